"""Residual addition and Gemma's RMSNorm in one pass."""

from __future__ import annotations

import torch

from jitnorm.core import norms
from jitnorm.fused_add_rmsnorm import first_fused_add_rmsnorm
from jitnorm.norm_ops import dispatch_fused_add_rmsnorm

_NORM, _ROUNDED = norms.GEMMA_FUSED_ADD_RMSNORM, norms.GEMMA_FUSED_ADD_RMSNORM_ROUND_SUM
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


def gemma_fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    round_sum: bool = False,
) -> None:
    """`residual += input; input = rmsnorm(residual) * (1 + weight)`, both written in place.

    As `jitnorm.fused_add_rmsnorm`, with Gemma's factor of `1 + weight`, the addition in float32 inside the kernel.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, on the CPU or a CUDA device; written.
        residual: of the input's shape, dtype and device, sharing no memory with it; written.
        weight: `[hidden_size]`, of the input's dtype or float32, on the same device.
        eps: added to the mean of the squares; zero or more.
        enable_pdl: programmatic dependent launch; None means on where the GPU has it.
        round_sum: normalise the sum as the residual holds it, rounded.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.fused_add_rmsnorm`.
    """
    norm = _ROUNDED if round_sum else _NORM
    if _is_dynamo_compiling():
        return dispatch_fused_add_rmsnorm(norm, input, residual, weight, eps, enable_pdl)
    try:
        if (
            input.__class__ is residual.__class__ is _Tensor
            and (weight.__class__ is _Parameter or weight.__class__ is _Tensor)
            and (
                not (weight.requires_grad or input.requires_grad or residual.requires_grad)
                or not torch.is_grad_enabled()
            )
            and not norm.kernels[input.dtype][weight.nbytes](input, residual, weight, eps, enable_pdl)
        ):
            return None
    except Exception:  # the way below says what it was
        pass
    return first_fused_add_rmsnorm(norm, input, residual, weight, eps, enable_pdl)
