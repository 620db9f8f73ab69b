"""Residual addition and RMSNorm in one pass: `residual += input`, then `input = rmsnorm(residual) * weight`."""

from __future__ import annotations

import torch

from jitnorm.core import checks, norms
from jitnorm.core.torch_library import is_traced, needs_grad, refuse_torch_func
from jitnorm.norm_ops import dispatch_fused_add_rmsnorm

_NORM, _ROUNDED = norms.FUSED_ADD_RMSNORM, norms.FUSED_ADD_RMSNORM_ROUND_SUM
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


def fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    round_sum: bool = False,
) -> None:
    """Adds the input to the residual and normalises the sum: `residual += input; input = rmsnorm(residual) * weight`.

    Both are written in place. The sum is normalised from its float32 value, before it is rounded into the residual, as
    FlashInfer's fused_add_rmsnorm does. A row's result has the same bits alone and in any batch.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, on the CPU or a CUDA device; written. Sizes and
            strides as for `jitnorm.rmsnorm`.
        residual: of the input's shape, dtype and device, sharing no memory with it; written.
        weight: `[hidden_size]`, of the input's dtype or float32, on the same device.
        eps: added to the mean of the squares; zero or more.
        enable_pdl: programmatic dependent launch; None means on where the GPU has it.
        round_sum: normalise the sum as the residual holds it, rounded, which is what `residual += input` followed by
            `rmsnorm(residual, weight)` and SGLang's kernel compute: for models whose reference, or whose cached
            results, were made so.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.rmsnorm`; ValueError too where input and residual overlap.
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
    except Exception:  # no kernel yet, or arguments that have no such attributes: the way below says what it was
        pass
    return first_fused_add_rmsnorm(norm, input, residual, weight, eps, enable_pdl)


def first_fused_add_rmsnorm(
    norm: norms.Norm,
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    enable_pdl: bool | None,
) -> None:
    """The way of a call that finds no kernel or is refused by it: says what is wrong, or gets the right kernel."""
    traced = is_traced(input, residual, weight)
    if traced:
        checks.types(eps, enable_pdl, input=input, residual=residual, weight=weight)
        refuse_torch_func(norm.op, input, residual, weight)
    else:
        norms.check_fused_add_rmsnorm(norm, input, residual, weight, eps, enable_pdl)
    if traced or needs_grad(input, residual, weight):
        return dispatch_fused_add_rmsnorm(norm, input, residual, weight, float(eps), enable_pdl)
    return norm.run(input, weight, input, residual, weight, eps, enable_pdl)
