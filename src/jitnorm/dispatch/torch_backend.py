"""PyTorch as a backend: the operators for every hidden size, computed in float32, rounded once, differentiable.

float64 is computed in float64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from jitnorm.core import checks
from jitnorm.core.operators import DTYPES
from jitnorm.core.torch_library import needs_dispatcher, needs_grad, refuse_unwritable
from jitnorm.gated_rmsnorm import check_metadata as check_gated_metadata
from jitnorm.gated_rmsnorm import check_options, gated_rmsnorm_in_torch
from jitnorm.general_rmsnorm import check_metadata

FLOATS = (*DTYPES, torch.float64)  # of inputs and weights


def rmsnorm(
    op: str,
    weight_offset: float,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None,
    enable_pdl: bool | None,
    *,
    bias: torch.Tensor | None = None,
    rounding: str = "once",
    return_rstd: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return `out = input / sqrt(mean(input^2) + eps) * (weight_offset + weight) + bias`, and perhaps rstd."""
    _check_rmsnorm(input, weight, eps, out, enable_pdl, bias, rounding)
    rstd = _rstd(input, eps) if return_rstd else None
    result = _normalise(input, input.dtype, weight, bias, eps, weight_offset, rounding).to(input.dtype)
    if out is not None:
        if needs_grad(input, weight, bias):
            raise RuntimeError(f"{op} with out= has no gradient: call it without, or under torch.no_grad()")
        out.detach().copy_(result)  # data, as for the kernels
        result = out
    return result if rstd is None else (result, rstd)


def fused_add_rmsnorm(
    op: str,
    weight_offset: float,
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    enable_pdl: bool | None,
    *,
    bias: torch.Tensor | None = None,
    rounding: str = "once",
    return_rstd: bool = False,
) -> torch.Tensor | None:
    """Compute `residual += input; input = rmsnorm(residual) * (weight_offset + weight) + bias`, both in place."""
    _check_fused_add_rmsnorm(input, residual, weight, eps, enable_pdl, bias, rounding)
    refuse_unwritable(op, residual, weight, bias, input=input)
    refuse_unwritable(op, input, residual=residual)
    dtype = _dtype_for(input)
    total = input.to(dtype) + residual.to(dtype)
    rstd = _rstd(total, eps) if return_rstd else None
    normalised = _normalise(total, input.dtype, weight, bias, eps, weight_offset, rounding)
    residual.copy_(total)
    input.copy_(normalised)
    return rstd


def gated_rmsnorm(
    input: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None,
    enable_pdl: bool | None,
    **options: Any,
) -> torch.Tensor:
    """Return what `jitnorm.gated_rmsnorm` does. Any size and any strides are accepted."""
    check_gated_arguments(input, gate, weight, eps, out, enable_pdl, **options)
    if out is not None:
        if needs_grad(input, gate, weight):
            raise RuntimeError("gated_rmsnorm with out= has no gradient: call it without, or under torch.no_grad()")
        if not needs_dispatcher(out, gate, weight):
            checks.no_internal_overlap("out", out)
            checks.no_overlap("out", out, "input", input)
            checks.no_overlap("out", out, "gate", gate, reject_identical=True)
            if weight is not None:
                checks.no_shared_memory("out", out, "weight", weight)
    result = gated_rmsnorm_in_torch(input, gate, weight, eps, **options)
    if out is None:
        return result
    out.detach().copy_(result)  # data, as for the kernels
    return out


def check_gated_arguments(
    input: Any, gate: Any, weight: Any, eps: Any, out: Any, enable_pdl: Any, **options: Any
) -> None:
    """Raise for arguments that no backend accepts; whether `out` overlaps others depends on the backend."""
    for name, value in (("input", input), ("gate", gate), ("weight", weight)):
        if value is not None or name != "weight":
            checks.tensor(name, value)
    check_options(**options)
    check_gated_metadata(input, gate, weight, options["group_size"], FLOATS)
    checks.eps(eps)
    checks.enable_pdl(enable_pdl)
    if out is not None:
        _check_like_input("out", out, input, input.dtype)


def layernorm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None,
    enable_pdl: bool | None,
    return_stats: bool,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `out = (input - mean) / sqrt(variance + eps) * weight + bias`, and perhaps mean and rstd."""
    _check_rmsnorm(input, weight, eps, out, enable_pdl, bias, "once")
    dtype = _dtype_for(input)
    x, w, b = (None if t is None else t.to(dtype) for t in (input, weight, bias))
    variance, mean = torch.var_mean(x.detach(), dim=-1, correction=0) if return_stats else (None, None)  # type: ignore[union-attr]
    if w is None or w.dim() == 1:
        result = F.layer_norm(x, input.shape[-1:], w, b, eps)  # type: ignore[arg-type]
    else:
        result = F.layer_norm(x, input.shape[-1:], None, None, eps) * w  # type: ignore[arg-type]
        result = result if b is None else result + b
    result = result.to(input.dtype)
    if out is not None:
        if needs_grad(input, weight, bias):
            raise RuntimeError("layernorm with out= has no gradient: call it without, or under torch.no_grad()")
        out.detach().copy_(result)  # data, as for the kernels
        result = out
    return result if variance is None else (result, mean, torch.rsqrt(variance + eps))  # type: ignore[return-value]


def _normalise(
    x: torch.Tensor,
    dtype: torch.dtype,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    rounding: str,
) -> torch.Tensor:
    """Return the result in the dtype that it is computed in, for inputs of `dtype`."""
    x = x.to(_dtype_for(x))
    factor = None if weight is None else weight.to(x.dtype)
    factor = factor + weight_offset if factor is not None and weight_offset else factor
    if rounding == "once" and (factor is None or factor.dim() == 1):
        result = F.rms_norm(x, (x.shape[-1],), factor, eps)
    else:
        result = F.rms_norm(x, (x.shape[-1],), None, eps)
        result = result.to(dtype).to(x.dtype) if rounding == "hf" else result
        result = result if factor is None else result * factor
    return result if bias is None else result + bias.to(x.dtype)


def _rstd(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(x.detach().to(_dtype_for(x)).square().mean(dim=-1) + eps)


def _dtype_for(x: torch.Tensor) -> torch.dtype:
    """Return the dtype to compute in."""
    return torch.promote_types(x.dtype, torch.float32)


def _check_rmsnorm(
    input: Any,
    weight: Any,
    eps: Any,
    out: Any,
    enable_pdl: Any,
    bias: Any,
    rounding: Any,
) -> None:
    """Raise for arguments that no backend accepts; any size and any strides are accepted."""
    _check_input_and_weight(input, weight, eps, enable_pdl, bias, rounding)
    if out is not None:
        _check_like_input("out", out, input, input.dtype)
        if not needs_dispatcher(out, weight):
            checks.no_internal_overlap("out", out)
            checks.no_overlap("out", out, "input", input)
            if weight is not None:
                checks.no_shared_memory("out", out, "weight", weight)


def _check_fused_add_rmsnorm(
    input: Any, residual: Any, weight: Any, eps: Any, enable_pdl: Any, bias: Any, rounding: Any
) -> None:
    """Raise for arguments that no backend accepts; any size and any strides are accepted."""
    _check_input_and_weight(input, weight, eps, enable_pdl, bias, rounding)
    _check_like_input("residual", residual, input, input.dtype, torch.float32)
    if not needs_dispatcher(input, residual):
        checks.no_internal_overlap("input", input)
        checks.no_internal_overlap("residual", residual)
        checks.no_overlap("residual", residual, "input", input, reject_identical=True)


def _check_input_and_weight(input: Any, weight: Any, eps: Any, enable_pdl: Any, bias: Any, rounding: Any) -> None:
    checks.tensor("input", input)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            checks.tensor(name, value)
    check_metadata(input, None, weight, bias, 0.0, rounding, FLOATS)
    checks.eps(eps)
    checks.enable_pdl(enable_pdl)


def _check_like_input(name: str, value: Any, input: torch.Tensor, *dtypes: torch.dtype) -> None:
    checks.tensor(name, value)
    checks.dtype(name, value, dtypes)
    checks.shape(name, value, input.shape, "like input")
    checks.device(name, value, "input", input)
