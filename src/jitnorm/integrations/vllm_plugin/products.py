"""This package's batch-invariant products, softmax, means and norms in vLLM's batch-invariant mode.

vLLM's mode, `VLLM_BATCH_INVARIANT=1`, computes every linear layer by a Triton kernel with fixed tiles. The products
here have the same guarantee. Attention, collectives and all other settings of the mode stay vLLM's.
"""

# No `from __future__ import annotations`: infer_schema reads the annotations of the operators.

import os
from collections.abc import Callable
from typing import Any

import torch

from jitnorm.batch_invariant.matmul.gemm import bmm, mm
from jitnorm.batch_invariant.reductions.rms_norm import rms_norm
from jitnorm.batch_invariant.reductions.softmax_mean import aten_mean, aten_softmax
from jitnorm.integrations.vllm_plugin import compatibility


def reason_to_leave() -> str | None:
    """Return why vLLM's own products stay, or None."""
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") in ("", "0"):
        return "VLLM_BATCH_INVARIANT is not 1"
    from vllm.model_executor.layers import batch_invariant

    if batch_invariant._batch_invariant_MODE:
        return "vLLM's batch-invariant mode was on before the plugin was loaded"
    return compatibility.changed("products")


def install(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Replace the functions that vLLM's mode calls, and those that it will register as ATen's operators.

    Args:
        set_attribute: Sets an attribute of a module.
    """
    from vllm.model_executor.layers import batch_invariant, layernorm, linear, vocab_parallel_embedding

    for module in (batch_invariant, linear, vocab_parallel_embedding):
        set_attribute(module, "linear_batch_invariant", linear_batch_invariant)
    original = batch_invariant.rms_norm_batch_invariant

    def rms_norm_batch_invariant(
        input: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6, residual: torch.Tensor | None = None
    ) -> Any:
        if residual is not None:  # for norms with a hidden size that no kernel supports
            return original(input, weight, eps, residual)
        return rms_norm(input, [input.shape[-1]], weight, eps)

    for module in (batch_invariant, layernorm):
        set_attribute(module, "rms_norm_batch_invariant", rms_norm_batch_invariant)
    # The rest are names that `enable_batch_invariant_mode` looks up when a worker starts.
    for name, function in {
        "matmul_persistent": matmul_persistent,
        "bmm_batch_invariant": bmm_batch_invariant,
        "_log_softmax_batch_invariant": _log_softmax,
        "softmax_batch_invariant": _softmax,
        "mean_batch_invariant": _mean,
    }.items():
        set_attribute(batch_invariant, name, function)


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


def _define() -> torch.library.Library:
    """Define the operators for compiled graphs: GEMMs choose their backends when they run."""
    library = torch.library.Library("jitnorm_vllm", "FRAGMENT")
    for name, function, fake in (("linear", _linear, _linear_fake), ("bmm", _bmm, _bmm_fake)):
        library.define(name + torch.library.infer_schema(function, mutates_args=[]))
        for key in ("CPU", "CUDA"):
            library.impl(name, function, key)
        library._register_fake(name, fake)
    return library


_library = _define()  # its operators exist as long as it does
