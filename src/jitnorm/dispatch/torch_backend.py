"""PyTorch as a backend: the operators for every hidden size, computed in float32, rounded once, differentiable."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from jitnorm.core import checks
from jitnorm.core.operators import DTYPES
from jitnorm.core.torch_library import needs_dispatcher, needs_grad, refuse_unwritable


def rmsnorm(
    op: str,
    weight_offset: float,
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
    enable_pdl: bool | None,
) -> torch.Tensor:
    """Return `out = input / sqrt(mean(input^2) + eps) * (weight_offset + weight)`."""
    _check_rmsnorm(input, weight, eps, out, enable_pdl)
    result = _normalise(input, weight, eps, weight_offset).to(input.dtype)
    if out is None:
        return result
    if needs_grad(input, weight):
        raise RuntimeError(f"{op} with out= has no gradient: call it without, or under torch.no_grad()")
    out.detach().copy_(result)  # data, as for the kernels
    return out


def fused_add_rmsnorm(
    op: str,
    weight_offset: float,
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    enable_pdl: bool | None,
) -> None:
    """Compute `residual += input; input = rmsnorm(residual) * (weight_offset + weight)`, both in place."""
    _check_fused_add_rmsnorm(input, residual, weight, eps, enable_pdl)
    refuse_unwritable(op, residual, weight, input=input)
    refuse_unwritable(op, input, residual=residual)
    total = input.float() + residual.float()
    normalised = _normalise(total, weight, eps, weight_offset)
    residual.copy_(total)
    input.copy_(normalised)


def _normalise(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float) -> torch.Tensor:
    factor = weight.float() + weight_offset if weight_offset else weight.float()
    return F.rms_norm(x.float(), (x.shape[-1],), factor, eps)


def _check_rmsnorm(input: Any, weight: Any, eps: Any, out: Any, enable_pdl: Any) -> None:
    """Raise for arguments that no backend accepts; any size and any strides are accepted."""
    _check_input_and_weight(input, weight, eps, enable_pdl)
    if out is not None:
        _check_like_input("out", out, input, input.dtype)
        if not needs_dispatcher(out, weight):
            checks.no_internal_overlap("out", out)
            checks.no_overlap("out", out, "input", input)
            checks.no_shared_memory("out", out, "weight", weight)


def _check_fused_add_rmsnorm(input: Any, residual: Any, weight: Any, eps: Any, enable_pdl: Any) -> None:
    """Raise for arguments that no backend accepts; any size and any strides are accepted."""
    _check_input_and_weight(input, weight, eps, enable_pdl)
    _check_like_input("residual", residual, input, input.dtype, torch.float32)
    if not needs_dispatcher(input, residual):
        checks.no_internal_overlap("input", input)
        checks.no_internal_overlap("residual", residual)
        checks.no_overlap("residual", residual, "input", input, reject_identical=True)


def _check_input_and_weight(input: Any, weight: Any, eps: Any, enable_pdl: Any) -> None:
    checks.tensor("input", input)
    checks.tensor("weight", weight)
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a scalar")
    checks.dtype("input", input, DTYPES)
    checks.dtype("weight", weight, DTYPES)
    checks.shape("weight", weight, [input.shape[-1]], "one factor for each element of input's last dimension")
    checks.device("weight", weight, "input", input)
    checks.eps(eps)
    checks.enable_pdl(enable_pdl)


def _check_like_input(name: str, value: Any, input: torch.Tensor, *dtypes: torch.dtype) -> None:
    checks.tensor(name, value)
    checks.dtype(name, value, dtypes)
    checks.shape(name, value, input.shape, "like input")
    checks.device(name, value, "input", input)
