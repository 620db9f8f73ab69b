"""Gemma's RMSNorm: `out[i] = input[i] / sqrt(mean(input[i]^2) + eps) * (1 + weight)`."""

from __future__ import annotations

import torch

from jitnorm.core import norms
from jitnorm.norm_ops import dispatch_rmsnorm
from jitnorm.rmsnorm import first_rmsnorm

_NORM = norms.GEMMA_RMSNORM
_kernels = _NORM.kernels
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


def gemma_rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """RMSNorm with a factor of `1 + weight`, as Gemma's models have it.

    The 1 is added in float32 inside the kernel: a `1 + weight` prepared in bfloat16 would lose up to eight of the
    weight's bits. Everything else, sizes, dtypes, strides and errors, is as for `jitnorm.rmsnorm`.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, on the CPU or a CUDA device.
        weight: `[hidden_size]`, of the input's dtype or float32, on the same device.
        eps: added to the mean of the squares; zero or more.
        out: written; like the input, and the input itself for a call in place. Allocated where None. Has no gradient.
        enable_pdl: programmatic dependent launch; None means on where the GPU has it.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.rmsnorm`.
    """
    if _is_dynamo_compiling():
        return dispatch_rmsnorm(_NORM, input, weight, eps, out, enable_pdl)
    try:
        to = torch.empty_like(input) if out is None else out
        if (
            input.__class__ is to.__class__ is _Tensor
            and (weight.__class__ is _Parameter or weight.__class__ is _Tensor)
            and (not (weight.requires_grad or input.requires_grad) or not torch.is_grad_enabled())
            and not _kernels[input.dtype][weight.nbytes](input, weight, to, eps, enable_pdl)
        ):
            return to
    except Exception:  # the way below says what it was
        pass
    return first_rmsnorm(_NORM, input, weight, eps, out, enable_pdl)
