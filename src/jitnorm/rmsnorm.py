"""RMSNorm: `out[i] = input[i] / sqrt(mean(input[i]^2) + eps) * weight`."""

from __future__ import annotations

import functools
from typing import Any

import torch

from jitnorm.core import checks, norms
from jitnorm.core.targets import resolve_target
from jitnorm.core.torch_library import is_traced, needs_grad, refuse_torch_func
from jitnorm.jit.load import load
from jitnorm.norm_ops import dispatch_rmsnorm

_NORM = norms.RMSNORM
_kernels = _NORM.kernels
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


def rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """Root mean square layer normalisation over the last dimension, accumulated in float32 and rounded once.

    `out[i] = input[i] / sqrt(mean(input[i]^2) + eps) * weight` (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467).
    A row's result has the same bits alone and in any batch. The first call of a size compiles its kernel.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, on the CPU or a CUDA device. The last stride is 1 and
            the leading dimensions collapse to one row stride; on CUDA every row is aligned to 16 bytes.
            hidden_size is 64, 128, 256 or a multiple of 256 from 512 to 8192.
        weight: `[hidden_size]`, of the input's dtype or float32, on the same device.
        eps: added to the mean of the squares; zero or more.
        out: written; of the input's shape, dtype and device. The input itself for a call in place; otherwise it shares
            no memory with the input. Allocated where None. A call with it has no gradient; whether it requires one
            itself is not asked: it is data, as under no_grad.
        enable_pdl: programmatic dependent launch. None means on where the GPU has it (sm_90 and later); on others, and
            on the CPU, it has no effect. The bits are the same.

    Returns:
        `out`.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: a shape, stride, device, alignment or overlap that is not accepted, or a bad eps.
        RuntimeError: hidden_size is not supported (nothing is built then), or the kernel cannot be built or launched.
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
    except Exception:  # no kernel yet, or arguments that have no such attributes: the way below says what it was
        pass
    return first_rmsnorm(_NORM, input, weight, eps, out, enable_pdl)


def first_rmsnorm(
    norm: norms.Norm,
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
    enable_pdl: bool | None,
) -> torch.Tensor:
    """The way of a call that finds no kernel or is refused by it: says what is wrong, or gets the right kernel."""
    traced = is_traced(input, weight, out)
    if traced:
        checks.types(eps, enable_pdl, input=input, weight=weight, **({} if out is None else {"out": out}))
        refuse_torch_func(norm.op, input, weight)
    else:
        norms.check_rmsnorm(norm, input, weight, eps, out, enable_pdl)
    if traced or needs_grad(input, weight):
        return dispatch_rmsnorm(norm, input, weight, float(eps), out, enable_pdl)
    to = norms.new_like(input) if out is None else out
    norm.run(input, weight, input, weight, to, eps, enable_pdl)
    return to


rmsnorm_spec = _NORM.spec


def _is_supported_rmsnorm_hidden_size(hidden_size: int) -> bool:
    return norms.is_supported_hidden_size(hidden_size)


def _rmsnorm_kernel_class(hidden_size: int) -> str:
    return norms.kernel_class(hidden_size)


@functools.cache
def _jit_rmsnorm_module(
    hidden_size: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None = None,
    device: str = "cuda",
    arch: str | None = None,
) -> Any:
    """The loaded module of one instance, built if need be. `arch` as in "9.0a"; None for this machine's own."""
    return load(rmsnorm_spec(hidden_size, dtype, weight_dtype or dtype, resolve_target(device, arch)))
