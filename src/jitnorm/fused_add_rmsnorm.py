"""Residual addition and RMSNorm, or Gemma's, in one pass: `residual += input`, then `input = rmsnorm(residual)`."""

from __future__ import annotations

import functools
from typing import Any

import torch

from jitnorm.core import checks, norms
from jitnorm.core.norms import Norm
from jitnorm.core.operators import EXAMPLES, Example, Shape
from jitnorm.core.torch_library import (
    increment_versions,
    needs_dispatcher,
    needs_grad,
    refuse_torch_func,
    refuse_unwritable,
    register,
    register_autograd,
)

FUSED_ADD_RMSNORM = Norm("fused_add_rmsnorm", "fused_add_rmsnorm", "FusedAdd")
FUSED_ADD_RMSNORM_ROUND_SUM = Norm("fused_add_rmsnorm_round_sum", "fused_add_rmsnorm", "FusedAddRounded")
GEMMA_FUSED_ADD_RMSNORM = Norm("gemma_fused_add_rmsnorm", "fused_add_rmsnorm", "GemmaFusedAdd", weight_offset=1.0)
GEMMA_FUSED_ADD_RMSNORM_ROUND_SUM = Norm(
    "gemma_fused_add_rmsnorm_round_sum", "fused_add_rmsnorm", "GemmaFusedAddRounded", weight_offset=1.0
)
# For a float32 residual beside an input in half precision. Its sum is not rounded, so these serve round_sum=True too.
FUSED_ADD_RMSNORM_FP32_RESIDUAL = Norm(
    "fused_add_rmsnorm_fp32_residual", "fused_add_rmsnorm", "FusedAddFp32Residual", residual_dtype=torch.float32
)
GEMMA_FUSED_ADD_RMSNORM_FP32_RESIDUAL = Norm(
    "gemma_fused_add_rmsnorm_fp32_residual",
    "fused_add_rmsnorm",
    "GemmaFusedAddFp32Residual",
    weight_offset=1.0,
    residual_dtype=torch.float32,
)

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
    """Add the input to the residual and normalise the sum: `residual += input; input = rmsnorm(residual) * weight`.

    Both are written in place. The sum is normalised from its float32 value, before it is rounded into the residual, as
    FlashInfer's fused_add_rmsnorm does. A row's result has the same bits alone and in any batch.

    Beside a float16 or bfloat16 input the residual may be float32, as with `residual_dtype` of quack's rmsnorm. The sum
    is then not rounded; a residual in half precision is rounded in every layer of a model.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, on the CPU or a CUDA device; written. Sizes and
            strides as for `jitnorm.rmsnorm`.
        residual: of the input's shape and device, and of its dtype or float32, sharing no memory with it; written.
        weight: `[hidden_size]`, of the input's dtype or float32, on the same device.
        eps: added to the mean of the squares; zero or more.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        round_sum: normalise the sum as rounded into the residual. `residual += input` followed by
            `rmsnorm(residual, weight)`, and SGLang's kernel, compute this. Use it for models whose reference or cached
            results were computed in this way. With a float32 residual it makes no difference.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.rmsnorm`. ValueError also if input and residual overlap.
    """
    norm = FUSED_ADD_RMSNORM_ROUND_SUM if round_sum else FUSED_ADD_RMSNORM
    if _is_dynamo_compiling():
        norm = FUSED_ADD_RMSNORM_FP32_RESIDUAL if _has_fp32_residual(input, residual) else norm
        return _call_torch_op(norm, input, residual, weight, eps, enable_pdl)
    try:
        if (
            input.__class__ is residual.__class__ is _Tensor
            and (weight.__class__ is _Parameter or weight.__class__ is _Tensor)
            and (
                not (weight.requires_grad or input.requires_grad or residual.requires_grad)
                or not torch.is_grad_enabled()
            )
            and not norm.fast_cache[input.dtype][weight.nbytes](input, residual, weight, eps, enable_pdl)
        ):
            return None
    except Exception:  # no kernel yet, or arguments without such attributes: the slow path raises for these
        pass
    if _has_fp32_residual(input, residual):
        norm = FUSED_ADD_RMSNORM_FP32_RESIDUAL
        if _try_fast_path(norm, input, residual, weight, eps, enable_pdl):
            return None
    return _fused_add_rmsnorm_slow_path(norm, input, residual, weight, eps, enable_pdl)


def gemma_fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    round_sum: bool = False,
) -> None:
    """Add and normalise with Gemma's factor: `residual += input; input = rmsnorm(residual) * (1 + weight)`.

    Both are written in place. The 1 is added in float32 inside the kernel. Otherwise as `jitnorm.fused_add_rmsnorm`.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, on the CPU or a CUDA device; written.
        residual: of the input's shape and device, and of its dtype or float32, sharing no memory with it; written.
        weight: `[hidden_size]`, of the input's dtype or float32, on the same device.
        eps: added to the mean of the squares; zero or more.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        round_sum: normalise the sum as rounded into the residual.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.fused_add_rmsnorm`.
    """
    norm = GEMMA_FUSED_ADD_RMSNORM_ROUND_SUM if round_sum else GEMMA_FUSED_ADD_RMSNORM
    if _is_dynamo_compiling():
        norm = GEMMA_FUSED_ADD_RMSNORM_FP32_RESIDUAL if _has_fp32_residual(input, residual) else norm
        return _call_torch_op(norm, input, residual, weight, eps, enable_pdl)
    try:
        if (
            input.__class__ is residual.__class__ is _Tensor
            and (weight.__class__ is _Parameter or weight.__class__ is _Tensor)
            and (
                not (weight.requires_grad or input.requires_grad or residual.requires_grad)
                or not torch.is_grad_enabled()
            )
            and not norm.fast_cache[input.dtype][weight.nbytes](input, residual, weight, eps, enable_pdl)
        ):
            return None
    except Exception:  # as in fused_add_rmsnorm
        pass
    if _has_fp32_residual(input, residual):
        norm = GEMMA_FUSED_ADD_RMSNORM_FP32_RESIDUAL
        if _try_fast_path(norm, input, residual, weight, eps, enable_pdl):
            return None
    return _fused_add_rmsnorm_slow_path(norm, input, residual, weight, eps, enable_pdl)


def _has_fp32_residual(input: Any, residual: Any) -> bool:
    """Return whether the residual is float32 beside an input in half precision. False for what is no tensor."""
    if getattr(residual, "dtype", None) is not torch.float32:
        return False
    return getattr(input, "dtype", None) in (torch.float16, torch.bfloat16)


def _try_fast_path(norm: Norm, input: Any, residual: Any, weight: Any, eps: Any, enable_pdl: Any) -> bool:
    """Run the kernel that the fast path caches for `norm`. False if there is none or it refuses the arguments."""
    try:
        return (
            input.__class__ is residual.__class__ is _Tensor
            and (weight.__class__ is _Parameter or weight.__class__ is _Tensor)
            and (
                not (weight.requires_grad or input.requires_grad or residual.requires_grad)
                or not torch.is_grad_enabled()
            )
            and not norm.fast_cache[input.dtype][weight.nbytes](input, residual, weight, eps, enable_pdl)
        )
    except Exception:  # as in fused_add_rmsnorm
        return False


def _fused_add_rmsnorm_slow_path(
    norm: Norm,
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    enable_pdl: bool | None,
) -> None:
    """Check the arguments, then run the right kernel, which is built and cached if need be."""
    traced = needs_dispatcher(input, residual, weight)
    if traced:
        checks.types(eps, enable_pdl, input=input, residual=residual, weight=weight)
        refuse_torch_func(norm.op, input, residual, weight)
    else:
        check(norm, input, residual, weight, eps, enable_pdl, accepts_fp32_residual=True)
    if traced or needs_grad(input, residual, weight):
        return _call_torch_op(norm, input, residual, weight, float(eps), enable_pdl)
    return norm.run(input, weight, input, residual, weight, eps, enable_pdl)


def check(
    norm: Norm,
    input: Any,
    residual: Any,
    weight: Any,
    eps: Any,
    enable_pdl: Any,
    *,
    accepts_fp32_residual: bool = False,
) -> None:
    """Raise for arguments that the bindings function `fused_add_rmsnorm` in csrc/elementwise/rmsnorm.h refuses.

    The public functions choose `norm` by the residual's dtype. With `accepts_fp32_residual`, the message about another
    dtype names both that they accept.
    """
    norms.check_input_and_weight(norm, input, weight, eps, enable_pdl)
    if accepts_fp32_residual:
        norms.check_like_input("residual", residual, input, input.dtype, torch.float32)
    else:
        norms.check_like_input("residual", residual, input, norm.residual_dtype or input.dtype)
    for name, written in (("input", input), ("residual", residual)):
        checks.no_row_overlap(name, written)
        checks.no_shared_memory(name, written, "weight", weight)
    checks.no_overlap("residual", residual, "input", input, reject_identical=True)


def _call_torch_op(
    norm: Norm,
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    enable_pdl: bool | None,
) -> None:
    """Call the operator in torch.ops.jitnorm, for tracers and gradients.

    With gradients, the functional form is called and its results are copied into `input` and `residual`.
    """
    if needs_grad(input, residual, weight):
        refuse_unwritable(norm.op, input, residual, weight, input=input, residual=residual)
        functional = getattr(torch.ops.jitnorm, f"{norm.op}_functional")
        normalised, total = functional(input, residual, weight, eps, enable_pdl)
        input.copy_(normalised)
        residual.copy_(total)
    else:
        getattr(torch.ops.jitnorm, norm.op)(input, residual, weight, eps, enable_pdl)


def _register(norm: Norm) -> None:
    """Define two forms in torch.ops.jitnorm: one that writes in place, and a functional one, which has a gradient."""

    def run(input: Any, residual: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None) -> None:
        arguments = input, residual, weight, eps, enable_pdl
        if not norm.try_cached((input.dtype, weight.nbytes), *arguments):
            check(norm, input, residual, weight, eps, enable_pdl)
            norm.run(input, weight, *arguments)
        increment_versions(input, residual)

    def run_functional(
        input: Any, residual: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check(norm, input, residual, weight, eps, enable_pdl)
        normalised, total = input.clone(), residual.clone()
        norm.run(normalised, weight, normalised, total, weight, eps, enable_pdl)
        return normalised, total

    def fake(input: Any, residual: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None) -> None:
        norms.check_and_build(norm, input, weight, residual=residual)

    def fake_functional(
        input: Any, residual: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        norms.check_and_build(norm, input, weight, residual=residual)
        return torch.empty_like(input), torch.empty_like(residual)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        # Save the rounded sum, not its terms: a later in-place call may overwrite those.
        ctx.save_for_backward(output[1], inputs[2])
        ctx.eps = inputs[3]

    def backward(ctx: Any, grad: torch.Tensor, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        grad_x, grad_weight = norms.gradients(norm, total, weight, ctx.eps, grad)
        grad_residual = (grad_x + grad_total.float()).to(total.dtype)
        return grad_residual.to(grad.dtype), grad_residual, grad_weight.to(weight.dtype), None, None

    tensors, rest = "Tensor{} input, Tensor{} residual, Tensor weight", "float eps=1e-6, bool? enable_pdl=None"
    register(f"{norm.op}({tensors.format('(a!)', '(b!)')}, {rest}) -> ()", run, fake)
    name = register(
        f"{norm.op}_functional({tensors.format('', '')}, {rest}) -> (Tensor, Tensor)", run_functional, fake_functional
    )
    register_autograd(name, backward, save)


def _arguments(shape: Shape, round_sum: bool, residual_dtype: torch.dtype | None) -> dict[str, Any]:
    residual = shape._replace(dtype=residual_dtype or shape.dtype).randn()
    arguments = {"input": shape.randn(), "residual": residual, "weight": shape.randn(shape.size)}
    return arguments | ({"round_sum": True} if round_sum else {})


for _norm, _function, _round_sum in (
    (FUSED_ADD_RMSNORM, fused_add_rmsnorm, False),
    (FUSED_ADD_RMSNORM_ROUND_SUM, fused_add_rmsnorm, True),
    (FUSED_ADD_RMSNORM_FP32_RESIDUAL, fused_add_rmsnorm, False),
    (GEMMA_FUSED_ADD_RMSNORM, gemma_fused_add_rmsnorm, False),
    (GEMMA_FUSED_ADD_RMSNORM_ROUND_SUM, gemma_fused_add_rmsnorm, True),
    (GEMMA_FUSED_ADD_RMSNORM_FP32_RESIDUAL, gemma_fused_add_rmsnorm, False),
):
    _register(_norm)
    EXAMPLES[_norm.op] = Example(
        _function,
        functools.partial(_arguments, round_sum=_round_sum, residual_dtype=_norm.residual_dtype),
        written=("input", "residual"),
        per_row=("input", "residual"),
    )
