"""Norms that select a backend at each call: FlashInfer, this package's kernels or PyTorch.

The four functions of RMSNorm have sgl_kernel's names and signatures, followed by keyword arguments for further forms,
which FlashInfer does not have. `gated_rmsnorm`, which FlashInfer lacks too, has the signature of
`jitnorm.gated_rmsnorm`. The rule of the default, "auto":

1. FlashInfer, if it is importable and supports the call: the input is float16 or bfloat16, on the current CUDA device;
   torch.compile is not tracing; no gradient is needed; the weights have the input's dtype (FlashInfer would misread
   others without an error); the input has 2 dimensions (for rmsnorm 2 or 3), rows that FlashInfer's vector accesses
   can read, and a hidden size up to 16384.
2. This package's kernels: `jitnorm.rmsnorm` and `jitnorm.fused_add_rmsnorm` for what those take, and otherwise
   `jitnorm.general_rmsnorm` and `jitnorm.general_fused_add_rmsnorm`, which take every hidden size from 1 to 65536; and
   `jitnorm.gated_rmsnorm`.
3. PyTorch's rms_norm in float32, for devices without kernels, larger sizes, and elements that are not adjacent.

`layernorm` selects between `jitnorm.layernorm` and PyTorch. PyTorch serves float64.

The first call whose backend depends on FlashInfer imports it. If its import or a call of it fails, it is treated as
unavailable from then on, and one warning gives the reason. (Running out of memory, or an error during the capture of a
CUDA graph, is raised instead.) `explain` and `jitnorm doctor` show which backend is selected and why.

`with backend(name):` overrides the rule. JITNORM_BACKEND does so too, and is read once, at the first call:

- "auto": the rule above.
- "auto-fast": this package's kernels if they support the call, else as "auto". docs/performance.md compares them with
  both of FlashInfer's implementations.
- "jit", "flashinfer", "torch": that backend, or RuntimeError if it does not support the call.

A compiled graph keeps the backend with which it was traced, which is never FlashInfer.

`dual_rmsnorm`, two norms of different widths, is one launch of `jitnorm.dual_rmsnorm` where that takes the call and no
other backend is requested, and otherwise two calls of `rmsnorm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx

from jitnorm.core import checks
from jitnorm.core.eligibility import has_general_layout, has_kernel_layout, is_plain_weight
from jitnorm.core.operators import DTYPES
from jitnorm.core.torch_library import needs_dispatcher
from jitnorm.dispatch import flashinfer_backend, torch_backend
from jitnorm.dispatch.selection import BACKENDS, backend, explain, is_plain, requested_backend
from jitnorm.dispatch.selection import select_backend as _select_backend
from jitnorm.dispatch.torch_backend import FLOATS
from jitnorm.dual_rmsnorm import check_eps2, refuse_gradient
from jitnorm.dual_rmsnorm import dual_rmsnorm as _jitnorm_dual_rmsnorm
from jitnorm.dual_rmsnorm import is_supported_hidden_size as _has_dual_kernel
from jitnorm.fused_add_rmsnorm import fused_add_rmsnorm as _jitnorm_fused_add_rmsnorm
from jitnorm.fused_add_rmsnorm import gemma_fused_add_rmsnorm as _jitnorm_gemma_fused_add_rmsnorm
from jitnorm.gated_rmsnorm import gated_rmsnorm as _jitnorm_gated_rmsnorm
from jitnorm.gated_rmsnorm import has_kernel as _has_gated_kernel
from jitnorm.general_rmsnorm import general_fused_add_rmsnorm, general_rmsnorm
from jitnorm.layernorm import layernorm as _jitnorm_layernorm
from jitnorm.rmsnorm import gemma_rmsnorm as _jitnorm_gemma_rmsnorm
from jitnorm.rmsnorm import rmsnorm as _jitnorm_rmsnorm

__all__ = [
    "BACKENDS",
    "backend",
    "dual_rmsnorm",
    "explain",
    "fused_add_rmsnorm",
    "gated_rmsnorm",
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
        input: `[..., hidden_size]`, float16, bfloat16, float32 or float64, of any hidden size and strides.
        weight: `[hidden_size]` or `[heads, hidden_size]`, float16, bfloat16, float32 or float64, on the same device.
            None multiplies by nothing.
        eps: added to the mean of the squares; zero or more.
        out: written; of the input's shape, dtype and device; may be the input itself. None allocates it. A call with
            `out` has no gradient.
        enable_pdl: programmatic dependent launch; None leaves it to the backend. PyTorch ignores it.
        bias: `[hidden_size]`, of the weight's dtype; added last.
        rounding: "once" or "hf", as for `jitnorm.general_rmsnorm`.
        return_rstd: return the reciprocal root mean square of each row too.

    Returns:
        `out`; with `return_rstd` also rstd of the input's leading dimensions, float32, or float64 for float64.

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
        input: `[..., hidden_size]`, float16, bfloat16, float32 or float64, of any hidden size.
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
        input: `[..., hidden_size]`, float16, bfloat16, float32 or float64, of any hidden size; written.
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
        input: `[..., hidden_size]`, float16, bfloat16, float32 or float64, of any hidden size; written.
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
    if name == "jit" and requested_backend() != "jit" and not _is_served_bias(bias):
        name = "torch"
    if name == "jit":
        return _jitnorm_layernorm(input, weight, bias, eps, out, enable_pdl, return_stats=return_stats)
    if name == "torch":
        return torch_backend.layernorm(input, weight, bias, eps, out, enable_pdl, return_stats)
    return _record(layernorm, input, weight, bias, eps, out, enable_pdl, return_stats=return_stats)  # type: ignore[no-any-return]


def dual_rmsnorm(
    input1: torch.Tensor,
    input2: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    eps: float = 1e-6,
    out1: torch.Tensor | None = None,
    out2: torch.Tensor | None = None,
    eps2: float | None = None,
    enable_pdl: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `rmsnorm` of two tensors, in one launch where `jitnorm.dual_rmsnorm` takes the call.

    Otherwise, and where the backend "flashinfer" or "torch" is requested, as two calls of `rmsnorm`.

    Args:
        input1: `[..., hidden_size1]`, float16, bfloat16, float32 or float64, of any hidden size and strides.
        input2: `[..., hidden_size2]`, likewise.
        weight1: `[hidden_size1]`, float16, bfloat16, float32 or float64, on the same device.
        weight2: `[hidden_size2]`, likewise.
        eps: added to the mean of the squares; zero or more.
        out1: written; of the shape, dtype and device of input1; may be input1 itself. None allocates it. A call with
            `out1` or `out2` has no gradient.
        out2: written; the same for input2.
        eps2: the same as `eps`, for input2; None for `eps`.
        enable_pdl: programmatic dependent launch; None leaves it to the backend.

    Returns:
        `out1` and `out2`.

    Raises:
        TypeError: as `rmsnorm`.
        ValueError: as `rmsnorm`; or a result overlaps the other norm's input or result.
        RuntimeError: as `rmsnorm`.
    """
    tensors = {"input1": input1, "input2": input2, "weight1": weight1, "weight2": weight2}
    outs = {name: out for name, out in (("out1", out1), ("out2", out2)) if out is not None}
    if not any(isinstance(tensor, torch.fx.Proxy) for tensor in tensors.values()):
        _check_dual(tensors, outs, eps, eps2, enable_pdl)
        if _is_served_by_dual_rmsnorm(*tensors.values(), *outs.values()):
            return _jitnorm_dual_rmsnorm(input1, input2, weight1, weight2, eps, out1, out2, eps2, enable_pdl)
    result1 = rmsnorm(input1, weight1, eps, out1, enable_pdl)
    result2 = rmsnorm(input2, weight2, eps if eps2 is None else eps2, out2, enable_pdl)
    return result1, result2  # type: ignore[return-value]


def gated_rmsnorm(
    input: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    activation: str = "silu",
    rounding: str = "once",
) -> torch.Tensor:
    """Compute `out = norm(input) * weight * silu(gate)`, or `norm(input * silu(gate)) * weight`.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16, float32 or float64, of any hidden size and strides.
        gate: of the input's shape and device, and of its dtype or float32; any strides.
        weight: `[hidden_size]` or `[group_size]`, float16, bfloat16, float32 or float64. None multiplies by nothing.
        eps: added to the mean of the squares; zero or more.
        out: written; of the input's shape, dtype and device; may be the input itself. None allocates it. A call with
            `out` has no gradient.
        enable_pdl: programmatic dependent launch; None leaves it to the backend. PyTorch ignores it.
        group_size: how many adjacent elements are normalised together; it divides hidden_size. None for whole rows.
        norm_before_gate: as for `jitnorm.gated_rmsnorm`.
        activation: "silu" or "sigmoid".
        rounding: "once" or "hf", as for `jitnorm.gated_rmsnorm`.

    Returns:
        `out`.

    Raises:
        TypeError: as `rmsnorm`, and for a norm_before_gate or a group_size of another type.
        ValueError: as `rmsnorm`, and for a group_size, activation or rounding that is not accepted.
        RuntimeError: as `rmsnorm`.
    """
    options: dict[str, Any] = {"group_size": group_size, "norm_before_gate": norm_before_gate}
    options |= {"activation": activation, "rounding": rounding}
    arguments = input, gate, weight, eps, out, enable_pdl
    name, _ = _select_backend("gated_rmsnorm", input, weight, gate, False, group_size)
    if name == "torch.fx":
        return _record(gated_rmsnorm, *arguments, **options)  # type: ignore[no-any-return]
    if name == "torch":
        return torch_backend.gated_rmsnorm(*arguments, **options)
    if requested_backend() != "jit" and not _are_contiguous(input, gate, out):
        torch_backend.check_gated_arguments(*arguments, **options)
        if not _has_gated_kernel(input, group_size, gate, out, weight):
            return torch_backend.gated_rmsnorm(*arguments, **options)
    return _jitnorm_gated_rmsnorm(*arguments, **options)


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


def _are_contiguous(*tensors: object) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors if isinstance(tensor, torch.Tensor))


def _is_served_bias(bias: object) -> bool:
    """Return whether a kernel takes a bias, if it is one at all."""
    return not isinstance(bias, torch.Tensor) or (bias.dtype in DTYPES and has_general_layout(bias))


def _is_served_by_rmsnorm(input: torch.Tensor, weight: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Return whether `jitnorm.rmsnorm`, or the fused form of it, takes a call, whose shapes may be wrong."""
    return (
        weight is not None
        and weight.dim() == 1
        and is_plain_weight(input, weight)
        and has_kernel_layout(input)
        and (other is None or has_kernel_layout(other))
    )


def _is_served_by_dual_rmsnorm(
    input1: torch.Tensor, input2: torch.Tensor, weight1: torch.Tensor, weight2: torch.Tensor, *outs: torch.Tensor
) -> bool:
    """Return whether `jitnorm.dual_rmsnorm` takes a call, and may: no other backend is requested."""
    return (
        requested_backend() not in ("flashinfer", "torch")
        and input1.dtype == input2.dtype
        and weight1.dtype == weight2.dtype
        and weight1.dtype in (input1.dtype, torch.float32)
        and input1.shape[:-1] == input2.shape[:-1]
        and _has_dual_kernel(input1.shape[-1], input1.dtype)
        and _has_dual_kernel(input2.shape[-1], input2.dtype)
        and input1.device.type in ("cpu", "cuda", "meta")
        and all(map(has_kernel_layout, (input1, input2, weight1, weight2, *outs)))
    )


def _check_dual(tensors: dict[str, Any], outs: dict[str, Any], eps: Any, eps2: Any, enable_pdl: Any) -> None:
    """Raise for what the second of two calls would refuse after the first has run, and for results that overlap."""
    for name, value in (tensors | outs).items():
        checks.tensor(name, value)
    for number in "12":
        input, weight = tensors[f"input{number}"], tensors[f"weight{number}"]
        if input.dim() == 0:
            raise ValueError(f"input{number} must have at least one dimension, got a scalar")
        checks.dtype(f"input{number}", input, FLOATS)
        checks.dtype(f"weight{number}", weight, FLOATS)
        why = f"one factor for each element of the last dimension of input{number}"
        checks.shape(f"weight{number}", weight, [input.shape[-1]], why)
        if (out := outs.get(f"out{number}")) is not None:
            checks.dtype(f"out{number}", out, (input.dtype,))
            checks.shape(f"out{number}", out, input.shape, f"like input{number}")
    for name, value in (tensors | outs).items():
        checks.device(name, value, "input1", tensors["input1"])
    checks.eps(eps)
    if eps2 is not None:
        check_eps2(eps2)
    checks.enable_pdl(enable_pdl)
    if outs:
        refuse_gradient(*tensors.values())
    if needs_dispatcher(*tensors.values()):  # without addresses
        return
    for name, out in outs.items():
        checks.no_internal_overlap(name, out)
        checks.no_overlap(name, out, f"input{name[-1]}", tensors[f"input{name[-1]}"])
        for weight in ("weight1", "weight2"):
            checks.no_shared_memory(name, out, weight, tensors[weight])
    for name, other in (("out1", "input2"), ("out2", "input1"), ("out2", "out1")):
        if name in outs and other in tensors | outs:
            checks.no_overlap(name, outs[name], other, (tensors | outs)[other], reject_identical=True)


def _tensors(*tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """Return tensors none of which is None."""
    return tensors  # type: ignore[return-value]


def _record(operator: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """Record the call in the graph that torch.fx.symbolic_trace is making."""
    return torch.overrides.handle_torch_function(operator, arguments[:1], *arguments, **keywords)


# torch.fx must not remove these calls as dead code: they return nothing and write their arguments.
torch.fx.node.has_side_effect(fused_add_rmsnorm)
torch.fx.node.has_side_effect(gemma_fused_add_rmsnorm)
