"""RMSNorm and Gemma's RMSNorm: `out[i] = input[i] / sqrt(mean(input[i]^2) + eps) * weight`, or `* (1 + weight)`."""

from __future__ import annotations

import functools
from typing import Any

import torch

from jitnorm.core import checks, norms
from jitnorm.core.norms import Norm
from jitnorm.core.operators import EXAMPLES, Example
from jitnorm.core.targets import resolve_target
from jitnorm.core.torch_library import (
    increment_versions,
    needs_dispatcher,
    needs_grad,
    refuse_torch_func,
    register,
    register_autograd,
)
from jitnorm.jit.load import load

RMSNORM = Norm("rmsnorm", "rmsnorm", "Plain")
GEMMA_RMSNORM = Norm("gemma_rmsnorm", "rmsnorm", "Gemma", weight_offset=1.0)

_rmsnorm_kernels, _gemma_rmsnorm_kernels = RMSNORM.fast_cache, GEMMA_RMSNORM.fast_cache
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


def rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """Normalise the last dimension by its root mean square, accumulated in float32 and rounded once.

    `out[i] = input[i] / sqrt(mean(input[i]^2) + eps) * weight` (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467).
    A row's result has the same bits alone and in any batch. The first call of a size compiles its kernel.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, on the CPU or a CUDA device. The last stride is 1 and
            the leading dimensions collapse to one row stride; on CUDA every row is aligned to 16 bytes.
            hidden_size is 64, 128, 256 or a multiple of 256 from 512 to 8192.
        weight: `[hidden_size]`, of the input's dtype or float32, on the same device.
        eps: added to the mean of the squares; zero or more.
        out: written; of the input's shape, dtype and device. Pass the input itself for a call in place; any other `out`
            shares no memory with the input. Allocated if None. A call with `out` raises RuntimeError if input or
            weight needs a gradient; requires_grad of `out` itself is ignored.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it (sm_90 and later). On
            other GPUs and on the CPU it has no effect. The bits are the same.

    Returns:
        `out`.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype.
        ValueError: a shape, stride, device, alignment or overlap is not accepted, or eps is invalid.
        RuntimeError: hidden_size is not supported (nothing is built then), the kernel cannot be built or launched, or
            `out` is given and a gradient is needed.
    """
    if _is_dynamo_compiling():
        return call_rmsnorm_torch_op(RMSNORM, input, weight, eps, out, enable_pdl)
    try:
        result = torch.empty_like(input) if out is None else out
        if (
            input.__class__ is result.__class__ is _Tensor
            and (weight.__class__ is _Parameter or weight.__class__ is _Tensor)
            and (not (weight.requires_grad or input.requires_grad) or not torch.is_grad_enabled())
            and not _rmsnorm_kernels[input.dtype][weight.nbytes](input, weight, result, eps, enable_pdl)
        ):
            return result
    except Exception:  # no kernel yet, or arguments without such attributes: the slow path raises for these
        pass
    return _rmsnorm_slow_path(RMSNORM, input, weight, eps, out, enable_pdl)


def gemma_rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """Normalise as `jitnorm.rmsnorm` does, with the factor `1 + weight` of Gemma's models.

    The 1 is added in float32 inside the kernel: a `1 + weight` prepared in bfloat16 would lose up to eight of the
    weight's bits. Sizes, dtypes, strides and errors are those of `jitnorm.rmsnorm`.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, on the CPU or a CUDA device.
        weight: `[hidden_size]`, of the input's dtype or float32, on the same device.
        eps: added to the mean of the squares; zero or more.
        out: written; like the input, and the input itself for a call in place. Allocated if None. Has no gradient.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.rmsnorm`.
    """
    if _is_dynamo_compiling():
        return call_rmsnorm_torch_op(GEMMA_RMSNORM, input, weight, eps, out, enable_pdl)
    try:
        result = torch.empty_like(input) if out is None else out
        if (
            input.__class__ is result.__class__ is _Tensor
            and (weight.__class__ is _Parameter or weight.__class__ is _Tensor)
            and (not (weight.requires_grad or input.requires_grad) or not torch.is_grad_enabled())
            and not _gemma_rmsnorm_kernels[input.dtype][weight.nbytes](input, weight, result, eps, enable_pdl)
        ):
            return result
    except Exception:  # as in rmsnorm
        pass
    return _rmsnorm_slow_path(GEMMA_RMSNORM, input, weight, eps, out, enable_pdl)


def _rmsnorm_slow_path(
    norm: Norm,
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
    enable_pdl: bool | None,
) -> torch.Tensor:
    """Check the arguments, then run the right kernel, which is built and cached if need be."""
    traced = needs_dispatcher(input, weight, out)
    if traced:
        checks.types(eps, enable_pdl, input=input, weight=weight, **({} if out is None else {"out": out}))
        refuse_torch_func(norm.op, input, weight)
    else:
        check(norm, input, weight, eps, out, enable_pdl)
    if traced or needs_grad(input, weight):
        return call_rmsnorm_torch_op(norm, input, weight, float(eps), out, enable_pdl)
    result = norms.new_like(input) if out is None else out
    norm.run(input, weight, input, weight, result, eps, enable_pdl)
    return result


def check(norm: Norm, input: Any, weight: Any, eps: Any, out: Any, enable_pdl: Any) -> None:
    """Raise for arguments that the bindings function `rmsnorm` in csrc/elementwise/rmsnorm.h refuses."""
    norms.check_input_and_weight(norm, input, weight, eps, enable_pdl)
    if out is None:
        return
    norms.check_like_input("out", out, input)
    checks.no_row_overlap("out", out)
    checks.no_overlap("out", out, "input", input)
    checks.no_shared_memory("out", out, "weight", weight)


def call_rmsnorm_torch_op(
    norm: Norm,
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
    enable_pdl: bool | None,
) -> torch.Tensor:
    """Call the operator in torch.ops.jitnorm, for tracers and gradients."""
    if out is None:
        result: torch.Tensor = getattr(torch.ops.jitnorm, norm.op)(input, weight, eps, enable_pdl)
        return result
    if needs_grad(input, weight):
        raise RuntimeError(f"{norm.op} with out= has no gradient: call it without, or under torch.no_grad()")
    getattr(torch.ops.jitnorm, f"{norm.op}_out")(input, weight, out, eps, enable_pdl)
    return out


def _register(norm: Norm) -> None:
    """Define two forms in torch.ops.jitnorm: a functional one, which has a gradient, and one that writes into `out`."""

    def run(input: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None) -> torch.Tensor:
        out = norms.new_like(input)
        arguments = input, weight, out, eps, enable_pdl
        if not norm.try_cached((input.dtype, weight.nbytes), *arguments):
            check(norm, input, weight, eps, None, enable_pdl)
            norm.run(input, weight, *arguments)
        return out

    def run_out(input: Any, weight: Any, out: Any, eps: float = 1e-6, enable_pdl: bool | None = None) -> None:
        arguments = input, weight, out, eps, enable_pdl
        if not norm.try_cached((input.dtype, weight.nbytes), *arguments):
            check(norm, input, weight, eps, out, enable_pdl)
            norm.run(input, weight, *arguments)
        increment_versions(out)

    def fake(input: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None) -> torch.Tensor:
        norms.check_and_build(norm, input, weight)
        return norms.new_like(input)

    def fake_out(input: Any, weight: Any, out: Any, eps: float = 1e-6, enable_pdl: bool | None = None) -> None:
        norms.check_and_build(norm, input, weight, out=out)

    def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.eps = inputs[2]

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = norms.gradients(norm, x, weight, ctx.eps, grad)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None, None

    rest = "float eps=1e-6, bool? enable_pdl=None"
    name = register(f"{norm.op}(Tensor input, Tensor weight, {rest}) -> Tensor", run, fake)
    register_autograd(name, backward, save)
    register(f"{norm.op}_out(Tensor input, Tensor weight, Tensor(a!) out, {rest}) -> ()", run_out, fake_out)


for _norm, _function in ((RMSNORM, rmsnorm), (GEMMA_RMSNORM, gemma_rmsnorm)):
    _register(_norm)
    EXAMPLES[_norm.op] = Example(
        _function,
        lambda shape: {"input": shape.randn(), "weight": shape.randn(shape.size)},
        make_outputs=lambda shape: {"out": shape.zeros()},
    )

# The rest is called only by the package's own tools and tests.

rmsnorm_spec = RMSNORM.spec


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
    """Return the loaded module of one kernel, built if need be. `arch` as in "9.0a"; None for this machine's own."""
    return load(rmsnorm_spec(hidden_size, dtype, weight_dtype or dtype, resolve_target(device, arch)))
