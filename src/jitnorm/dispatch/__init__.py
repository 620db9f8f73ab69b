"""Norms that select a backend at each call: FlashInfer, this package's kernels or PyTorch.

The four functions of RMSNorm have sgl_kernel's names and signatures, followed by keyword arguments for further forms,
which FlashInfer does not have. The rule of the default, "auto":

1. FlashInfer, if it is importable and supports the call: the input is float16 or bfloat16, on the current CUDA device;
   torch.compile is not tracing; no gradient is needed; the weights have the input's dtype (FlashInfer would misread
   others without an error); the input has 2 dimensions (for rmsnorm 2 or 3), rows that FlashInfer's vector accesses
   can read, and a hidden size up to 16384.
2. This package's kernels: `jitnorm.rmsnorm` and `jitnorm.fused_add_rmsnorm` for what those take, and otherwise
   `jitnorm.general_rmsnorm` and `jitnorm.general_fused_add_rmsnorm`, which take every hidden size from 1 to 65536.
3. PyTorch's rms_norm in float32, for devices without kernels, larger sizes, and elements that are not adjacent.

`layernorm` selects between `jitnorm.layernorm` and PyTorch, which also serves float64.

The first call whose backend depends on FlashInfer imports it. If its import or a call of it fails, it is treated as
unavailable from then on, and one warning gives the reason. (Running out of memory, or an error during the capture of a
CUDA graph, is raised instead.) `explain` and `jitnorm doctor` show which backend is selected and why.

`with backend(name):` overrides the rule. JITNORM_BACKEND does so too, and is read once, at the first call:

- "auto": the rule above.
- "auto-fast": this package's kernels if they support the call, else as "auto". On an H200 with bfloat16 they were
  faster than both of FlashInfer's implementations in all 25 rows of benchmarks/results/rmsnorm_h200.json, by 1% in the
  closest, and in 5 of 6 of fused_add_rmsnorm_h200.json, where one took 0.7% longer.
- "jit", "flashinfer", "torch": that backend, or RuntimeError if it does not support the call.

A compiled graph keeps the backend with which it was traced, which is never FlashInfer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx

from jitnorm.core.eligibility import has_kernel_layout, is_plain_weight
from jitnorm.dispatch import flashinfer_backend, torch_backend
from jitnorm.dispatch.selection import BACKENDS, backend, explain, is_plain
from jitnorm.dispatch.selection import select_backend as _select_backend
from jitnorm.fused_add_rmsnorm import fused_add_rmsnorm as _jitnorm_fused_add_rmsnorm
from jitnorm.fused_add_rmsnorm import gemma_fused_add_rmsnorm as _jitnorm_gemma_fused_add_rmsnorm
from jitnorm.general_rmsnorm import general_fused_add_rmsnorm, general_rmsnorm
from jitnorm.layernorm import layernorm as _jitnorm_layernorm
from jitnorm.rmsnorm import gemma_rmsnorm as _jitnorm_gemma_rmsnorm
from jitnorm.rmsnorm import rmsnorm as _jitnorm_rmsnorm

__all__ = [
    "BACKENDS",
    "backend",
    "explain",
    "fused_add_rmsnorm",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "layernorm",
    "rmsnorm",
]


def rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    bias: torch.Tensor | None = None,
    rounding: str = "once",
    return_rstd: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute `out = input / sqrt(mean(input^2) + eps) * weight` over the last dimension.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, of any hidden size and strides.
        weight: `[hidden_size]` or `[heads, hidden_size]`, float16, bfloat16 or float32, on the same device. None
            multiplies by nothing.
        eps: added to the mean of the squares; zero or more.
        out: written; of the input's shape, dtype and device; may be the input itself. None allocates it. A call with
            `out` has no gradient.
        enable_pdl: programmatic dependent launch; None leaves it to the backend. PyTorch ignores it.
        bias: `[hidden_size]`, of the weight's dtype; added last.
        rounding: "once" or "hf", as for `jitnorm.general_rmsnorm`.
        return_rstd: return the reciprocal root mean square of each row too.

    Returns:
        `out`; with `return_rstd` also rstd, float32 of the input's leading dimensions.

    Raises:
        TypeError: an argument is not a tensor, or its dtype is not accepted.
        ValueError: a shape, stride, device, alignment, overlap or eps is not accepted, or JITNORM_BACKEND names no
            backend.
        RuntimeError: the requested backend does not support this call; a kernel cannot be built or launched; or `out`
            was given and a gradient is needed.
    """
    forms = {"bias": bias, "rounding": rounding, "return_rstd": return_rstd}
    return _rmsnorm(rmsnorm, _jitnorm_rmsnorm, 0.0, input, weight, eps, out, enable_pdl, forms)  # type: ignore[no-any-return]


def gemma_rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    bias: torch.Tensor | None = None,
    rounding: str = "once",
    return_rstd: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute `out = input / sqrt(mean(input^2) + eps) * (1 + weight)`, adding the 1 in float32.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, of any hidden size.
        weight: as for `rmsnorm`.
        eps: added to the mean of the squares; zero or more.
        out: written; of the input's shape, dtype and device; may be the input itself. None allocates it. A call with
            `out` has no gradient.
        enable_pdl: programmatic dependent launch; None leaves it to the backend.
        bias: as for `rmsnorm`.
        rounding: as for `rmsnorm`.
        return_rstd: as for `rmsnorm`.

    Returns:
        As `rmsnorm`.

    Raises:
        TypeError: as `rmsnorm`.
        ValueError: as `rmsnorm`.
        RuntimeError: as `rmsnorm`.
    """
    forms = {"bias": bias, "rounding": rounding, "return_rstd": return_rstd}
    return _rmsnorm(gemma_rmsnorm, _jitnorm_gemma_rmsnorm, 1.0, input, weight, eps, out, enable_pdl, forms)  # type: ignore[no-any-return]


def fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    bias: torch.Tensor | None = None,
    rounding: str = "once",
    return_rstd: bool = False,
) -> torch.Tensor | None:
    """Compute `residual += input; input = rmsnorm(residual) * weight`, both in place; the float32 sum is normalised.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, of any hidden size; written.
        residual: of the input's shape and device, and of its dtype or float32, sharing no memory with it; written.
        weight: as for `rmsnorm`.
        eps: added to the mean of the squares; zero or more.
        enable_pdl: programmatic dependent launch; None leaves it to the backend.
        bias: as for `rmsnorm`.
        rounding: as for `rmsnorm`.
        return_rstd: return the reciprocal root mean square of each sum.

    Returns:
        None; with `return_rstd` rstd, float32 of the input's leading dimensions.

    Raises:
        TypeError: as `rmsnorm`.
        ValueError: as `rmsnorm`.
        RuntimeError: as `rmsnorm`, or a leaf that requires grad would be overwritten.
    """
    forms = {"bias": bias, "rounding": rounding, "return_rstd": return_rstd}
    return _fused_add_rmsnorm(  # type: ignore[no-any-return]
        fused_add_rmsnorm, _jitnorm_fused_add_rmsnorm, 0.0, input, residual, weight, eps, enable_pdl, forms
    )


def gemma_fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    bias: torch.Tensor | None = None,
    rounding: str = "once",
    return_rstd: bool = False,
) -> torch.Tensor | None:
    """Compute `residual += input; input = rmsnorm(residual) * (1 + weight)`, both in place; see `fused_add_rmsnorm`.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, of any hidden size; written.
        residual: of the input's shape and device, and of its dtype or float32, sharing no memory with it; written.
        weight: as for `rmsnorm`.
        eps: added to the mean of the squares; zero or more.
        enable_pdl: programmatic dependent launch; None leaves it to the backend.
        bias: as for `rmsnorm`.
        rounding: as for `rmsnorm`.
        return_rstd: return the reciprocal root mean square of each sum.

    Returns:
        None; with `return_rstd` rstd, float32 of the input's leading dimensions.

    Raises:
        TypeError: as `fused_add_rmsnorm`.
        ValueError: as `fused_add_rmsnorm`.
        RuntimeError: as `fused_add_rmsnorm`.
    """
    forms = {"bias": bias, "rounding": rounding, "return_rstd": return_rstd}
    return _fused_add_rmsnorm(  # type: ignore[no-any-return]
        gemma_fused_add_rmsnorm, _jitnorm_gemma_fused_add_rmsnorm, 1.0, input, residual, weight, eps, enable_pdl, forms
    )


def layernorm(
    input: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    return_stats: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute `out = (input - mean) / sqrt(variance + eps) * weight + bias` over the last dimension.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16, float32 or float64, of any hidden size and strides.
        weight: `[hidden_size]` or `[heads, hidden_size]`, of any of these dtypes, on the same device. None multiplies
            by nothing.
        bias: `[hidden_size]`, of the weight's dtype. None adds nothing.
        eps: added to the variance; zero or more.
        out: written; of the input's shape, dtype and device; may be the input itself. None allocates it. A call with
            `out` has no gradient.
        enable_pdl: programmatic dependent launch; None leaves it to the backend. PyTorch ignores it.
        return_stats: return the mean and the reciprocal standard deviation of each row too.

    Returns:
        `out`; with `return_stats` also mean and rstd of the input's leading dimensions, float32, or float64 for
        float64.

    Raises:
        TypeError: as `rmsnorm`.
        ValueError: as `rmsnorm`.
        RuntimeError: as `rmsnorm`.
    """
    name, _ = _select_backend("layernorm", input, weight, out, False)
    if name == "jit":
        return _jitnorm_layernorm(input, weight, bias, eps, out, enable_pdl, return_stats=return_stats)
    if name == "torch":
        return torch_backend.layernorm(input, weight, bias, eps, out, enable_pdl, return_stats)
    return _record(layernorm, input, weight, bias, eps, out, enable_pdl, return_stats=return_stats)  # type: ignore[no-any-return]


def _rmsnorm(
    operator: Callable[..., Any],
    jitnorm_operator: Callable[..., torch.Tensor],
    weight_offset: float,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None,
    enable_pdl: bool | None,
    forms: dict[str, Any],
) -> Any:
    """Call the backend of `operator`, which is `rmsnorm` or `gemma_rmsnorm`, for these arguments."""
    plain = is_plain(weight, **forms)
    name, _ = _select_backend(operator.__name__, input, weight, out, plain)
    if name == "jit":
        if plain and _is_served_by_rmsnorm(input, weight, out):
            return jitnorm_operator(input, weight, eps, out, enable_pdl)
        return general_rmsnorm(input, weight, eps, out, enable_pdl, weight_offset=weight_offset, **forms)
    if name == "torch":
        arguments = input, weight, eps, out, enable_pdl
        return torch_backend.rmsnorm(operator.__name__, weight_offset, *arguments, **forms)
    if name == "torch.fx":
        return _record(operator, input, weight, eps, out, enable_pdl, **({} if plain else forms))
    return flashinfer_backend.call(operator, *_tensors(input, weight), eps=eps, out=out, enable_pdl=enable_pdl)


def _fused_add_rmsnorm(
    operator: Callable[..., Any],
    jitnorm_operator: Callable[..., None],
    weight_offset: float,
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    enable_pdl: bool | None,
    forms: dict[str, Any],
) -> Any:
    """Call the backend of `operator`, one of those with a residual, for these arguments."""
    plain = is_plain(weight, **forms)
    name, _ = _select_backend(operator.__name__, input, weight, residual, plain)
    arguments = input, residual, weight, eps, enable_pdl
    if name == "jit":
        if plain and _is_served_by_rmsnorm(input, weight, residual):
            return jitnorm_operator(*arguments)
        return general_fused_add_rmsnorm(*arguments, weight_offset=weight_offset, **forms)
    if name == "torch":
        return torch_backend.fused_add_rmsnorm(operator.__name__, weight_offset, *arguments, **forms)
    if name == "torch.fx":
        return _record(operator, *arguments, **({} if plain else forms))
    flashinfer_backend.call(operator, *_tensors(input, residual, weight), eps=eps, enable_pdl=enable_pdl)
    return None


def _is_served_by_rmsnorm(input: torch.Tensor, weight: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Return whether `jitnorm.rmsnorm`, or the fused form of it, takes a call, whose shapes may be wrong."""
    return (
        weight is not None
        and weight.dim() == 1
        and is_plain_weight(input, weight)
        and has_kernel_layout(input)
        and (other is None or has_kernel_layout(other))
    )


def _tensors(*tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Return tensors none of which is None."""
    return tensors  # type: ignore[return-value]


def _record(operator: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Record the call in the graph that torch.fx.symbolic_trace is making."""
    return torch.overrides.handle_torch_function(operator, arguments[:1], *arguments, **keywords)


# torch.fx must not remove these calls as dead code: they return nothing and write their arguments.
torch.fx.node.has_side_effect(fused_add_rmsnorm)
torch.fx.node.has_side_effect(gemma_fused_add_rmsnorm)
