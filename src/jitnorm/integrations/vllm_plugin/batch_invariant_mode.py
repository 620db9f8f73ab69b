"""This package's batch-invariant GEMMs, softmax, means and norms in vLLM's batch-invariant mode.

vLLM's mode, `VLLM_BATCH_INVARIANT=1`, computes every linear layer by a Triton kernel with fixed tiles. The GEMMs
here have the same guarantee. Attention, collectives and all other settings of the mode stay vLLM's.
"""

# No `from __future__ import annotations`: infer_schema reads the annotations of the operators.

from collections.abc import Callable
from typing import Any

import torch

from jitnorm.batch_invariant.matmul.gemm import bmm, mm
from jitnorm.batch_invariant.reductions.rms_norm import rms_norm
from jitnorm.batch_invariant.reductions.softmax_mean import aten_mean, aten_softmax
from jitnorm.integrations.vllm_plugin.operators import define


def is_mode_requested() -> bool:
    """Return whether vLLM's batch-invariant mode is asked for."""
    from vllm import envs

    return bool(envs.VLLM_BATCH_INVARIANT)


def install(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Replace the functions that vLLM's layers call in the mode, and the ATen operators that the mode overrides.

    Args:
        set_attribute: Sets an attribute of a module.
    """
    from vllm.model_executor.layers import batch_invariant, layernorm, linear, vocab_parallel_embedding

    original = batch_invariant.rms_norm_batch_invariant

    def rms_norm_batch_invariant(
        input: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6, residual: torch.Tensor | None = None
    ) -> Any:
        if residual is not None:  # only norms with a hidden size that no kernel supports come here
            return original(input, weight, eps, residual)
        return rms_norm(input, [input.shape[-1]], weight, eps)

    for module in (batch_invariant, linear, vocab_parallel_embedding):
        set_attribute(module, "linear_batch_invariant", linear_batch_invariant)
    for module in (batch_invariant, layernorm):
        set_attribute(module, "rms_norm_batch_invariant", rms_norm_batch_invariant)
    # `enable_batch_invariant_mode` registers these. A worker calls it before it loads a model.
    functions = {
        "matmul_persistent": matmul_persistent,
        "bmm_batch_invariant": bmm_batch_invariant,
        "_log_softmax_batch_invariant": _log_softmax,
        "softmax_batch_invariant": _softmax,
        "mean_batch_invariant": _mean,
    }
    for name, function in functions.items():
        set_attribute(batch_invariant, name, function)
    if batch_invariant._batch_invariant_MODE:
        _override(batch_invariant._batch_invariant_LIB, set_attribute)


def _override(library: torch.library.Library, set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Override the ATen operators that vLLM's mode has overridden, in its library."""
    from vllm.platforms import current_platform

    for name, function in {
        "_log_softmax": _log_softmax,
        "softmax": _softmax,
        "_softmax": _softmax,
        "mean.dim": _mean,
        "bmm": bmm_batch_invariant,
    }.items():
        library.impl(name, function, current_platform.dispatch_key, allow_override=True)
    set_attribute(torch, "bmm", bmm_batch_invariant)


def linear_batch_invariant(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `input @ weight.t() + bias`, rounded once. A row has the same bits in any batch.

    Takes the arguments of vLLM's function.
    """
    if torch.compiler.is_compiling():
        return torch.ops.jitnorm_vllm.linear(input, weight, bias)  # type: ignore[no-any-return]
    return _linear(input, weight, bias)


def matmul_persistent(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `a @ b + bias` for `[m, k]` and `[k, n]`. Takes the arguments of vLLM's function."""
    if torch.compiler.is_compiling():
        return torch.ops.jitnorm_vllm.linear(a, b.t(), bias)  # type: ignore[no-any-return]
    return mm(a, b, bias)


def bmm_batch_invariant(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return `a[i] @ b[i]` for each i. Takes the arguments of vLLM's function, which replaces torch.bmm."""
    result: torch.Tensor = torch.ops.jitnorm_vllm.bmm(a, b) if torch.compiler.is_compiling() else bmm(a, b)
    return result if out is None else out.copy_(result)


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows = input.reshape(-1, input.shape[-1])
    return mm(rows, weight.t(), bias).view(*input.shape[:-1], weight.shape[0])


def _linear_fake(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return bmm(a, b)


def _bmm_fake(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty((a.shape[0], a.shape[1], b.shape[2]))


def _log_softmax(input: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    return aten_softmax(input, dim, half_to_float, log=True)


def _softmax(input: torch.Tensor, dim: int, dtype: torch.dtype | bool | None = None) -> torch.Tensor:
    """Compute aten::softmax, whose third argument is a dtype, and aten::_softmax, where it is half_to_float."""
    if isinstance(dtype, torch.dtype):
        return aten_softmax(input.to(dtype), dim, False, log=False)
    return aten_softmax(input, dim, bool(dtype), log=False)


def _mean(
    input: torch.Tensor, dim: list[int] | None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> torch.Tensor:
    return aten_mean(input, dim, keepdim, dtype)


# GEMMs choose their backends when they run.
define("linear", _linear, _linear_fake)
define("bmm", _bmm, _bmm_fake)
