"""RMSNorm in every form: any size and strides, no weight or one for each head, a bias, two roundings, rstd as a result.

`jitnorm.rmsnorm` and `jitnorm.fused_add_rmsnorm` serve fewer sizes and forms, with less host time for a call. For what
they serve, the functions here run the same kernels. `jitnorm.dispatch` and `jitnorm.nn` choose between them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

from jitnorm.core import checks, norms
from jitnorm.core.norms import MAX_HIDDEN_SIZE, MAX_LEADING_DIMS, Norm
from jitnorm.core.operators import CPP_TYPES, DTYPES, EXAMPLES, Example, LayoutOperator, Shape
from jitnorm.core.targets import target_of
from jitnorm.core.torch_library import (
    build_while_tracing,
    increment_versions,
    needs_dispatcher,
    needs_grad,
    refuse_torch_func,
    refuse_unwritable,
    register,
    register_autograd,
)
from jitnorm.fused_add_rmsnorm import (
    FUSED_ADD_RMSNORM,
    FUSED_ADD_RMSNORM_FP32_RESIDUAL,
    FUSED_ADD_RMSNORM_ROUND_SUM,
    GEMMA_FUSED_ADD_RMSNORM,
    GEMMA_FUSED_ADD_RMSNORM_FP32_RESIDUAL,
    GEMMA_FUSED_ADD_RMSNORM_ROUND_SUM,
)
from jitnorm.jit.spec import KernelSpec, Target
from jitnorm.rmsnorm import GEMMA_RMSNORM, RMSNORM

MAX_ROWS = 2**31 - 1
ROUNDINGS = ("once", "hf")
LAYOUTS = ("rows", "strided", "unaligned")
_MAX_WARP_HIDDEN_SIZE = 256  # of RMSNormWarpKernel

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class Form(NamedTuple):
    """What distinguishes the kernels of one size and dtype.

    Attributes:
        layout: "rows" that are one stride apart and aligned; "strided" under several leading dimensions; "unaligned",
            which is strided too.
        has_weight: whether a weight multiplies.
        has_bias: whether a bias is added.
        needs_general: whether rstd is returned, or there is one weight for each head.
        rounding: one of ROUNDINGS.
    """

    layout: str = "rows"
    has_weight: bool = True
    has_bias: bool = False
    needs_general: bool = False
    rounding: str = "once"

    @property
    def is_general(self) -> bool:
        """Return whether a kernel of the C++ policy General is needed."""
        return self.layout != "rows" or not self.has_weight or self.has_bias or self.needs_general

    def __str__(self) -> str:
        layout = "strided" if self.layout == "rows" and self.is_general else self.layout
        return layout + "+no_weight" * (not self.has_weight) + "+bias" * self.has_bias

    @classmethod
    def parse(cls, text: str, rounding: str = "once") -> Form:
        """Return the form whose `str` is `text`. Raises ValueError if there is none."""
        layout, *parts = text.split("+")
        if layout not in LAYOUTS or not {*parts} <= {"no_weight", "bias"}:
            raise ValueError(f"form must be {', '.join(LAYOUTS)}, and may end with +no_weight and +bias, got {text!r}")
        return cls(layout, "no_weight" not in parts, "bias" in parts, rounding=rounding)


@dataclass(eq=False, repr=False)
class FormOperator(LayoutOperator):
    """An operator whose kernels of one size and dtype differ by `Form`."""

    layouts = LAYOUTS

    def try_fast_path(self, key: tuple[Any, ...], general: tuple[Any, ...], plain: tuple[Any, ...]) -> bool:
        """Run the kernel that was last used for `key` and the layout of the arguments. False if it refuses them.

        Args:
            key: Of `functions`: what `spec` takes, without the layout.
            general: The arguments of the bindings function of kernels that are general.
            plain: The arguments of the norm's bindings function.
        """
        has_weight, has_bias, needs_general = key[3:6]
        first = _first_layout(has_weight, has_bias, needs_general)
        for layout, function in enumerate(self.functions[key]):
            if function is not None:
                if not function(*(plain if layout == 0 else general)):
                    return True
            elif layout >= first and LAYOUTS.index(layout_of(*general[:5])) <= layout:
                return False  # a faster kernel than the next could run
        return False

    def run(self, key: tuple[Any, ...], layout: str, general: tuple[Any, ...], plain: tuple[Any, ...]) -> None:
        """Run the kernel for `key` and a layout, built and loaded if need be, on arguments that have been checked."""
        hidden_size, dtype, weight_dtype, has_weight, has_bias, needs_general, rounding = key
        layout = LAYOUTS[max(LAYOUTS.index(layout), _first_layout(has_weight, has_bias, needs_general))]
        form = Form(layout, has_weight, has_bias, needs_general, rounding)
        spec_key = hidden_size, dtype, weight_dtype, form, target_of(general[0])
        if self.kernel_of_layout(key, layout, spec_key)(*(general if form.is_general else plain)):
            raise self.refused()


def spec_of_policy(
    operator: LayoutOperator,
    binding: str,
    policy: str,
    size: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    rounding: str,
    form: str,
    target: Target,
) -> KernelSpec:
    """Return what to build for a policy of the kernel classes in csrc/elementwise/rmsnorm.cuh.

    Args:
        operator: whose warm-up builds it.
        binding: the bindings function.
        policy: in C++.
        size: that of a row.
        dtype: of the input.
        weight_dtype: of the weight.
        rounding: one of ROUNDINGS.
        form: as in the option of warm-up; empty for the one that needs no option.
        target: what to build for.
    """
    name, weight_name = checks.DTYPE_NAMES[dtype], checks.DTYPE_NAMES[weight_dtype]
    warmup, suffix = f"--op {operator.op} --hidden-size {size} --dtype {name}", ""
    if rounding != "once":
        warmup, suffix = f"{warmup} --rounding {rounding}", f"_{rounding}"
    if form:
        warmup, suffix = f"{warmup} --form {form}", f"{suffix}_{form.replace('+', '_')}"
    if weight_name != name:
        warmup, suffix = f"{warmup} --weight-dtype {weight_name}", f"{suffix}_{weight_name}_weight"
    return KernelSpec(
        op=operator.op,
        family="rmsnorm",
        binding=binding,
        name=f"{operator.op}_{size}_{name}{suffix}",
        kernel=f"{kernel_class(size)}<{size}, {CPP_TYPES[dtype]}, {CPP_TYPES[weight_dtype]}, {policy}>",
        target=target,
        warmup=warmup,
    )


def check_dtypes(operator: LayoutOperator, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """Raise TypeError for dtypes without kernels."""
    if dtype not in operator.dtypes or weight_dtype not in DTYPES:
        raise TypeError(
            f"{operator.op} takes {checks.enumeration(operator.dtypes)}, with weights of {checks.enumeration(DTYPES)}, "
            f"got {dtype} with weights of {weight_dtype}"
        )


@dataclass(eq=False, repr=False)
class GeneralNorm(FormOperator):
    """A norm, or one of its variants, in every form."""

    norm: Norm = field(kw_only=True)

    options: ClassVar[tuple[str, ...]] = ("rounding", "form")

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Return the dtypes of the input."""
        return self.norm.dtypes

    def spec(
        self, hidden_size: int, dtype: torch.dtype, weight_dtype: torch.dtype, form: Form, target: Target
    ) -> KernelSpec:
        """Return what to build. RuntimeError for an unsupported size, TypeError for an unsupported dtype."""
        check_hidden_size(self.op, hidden_size)
        check_dtypes(self, dtype, weight_dtype)
        is_plain = not form.is_general and form.rounding == "once"
        if is_plain and norms.is_supported_hidden_size(hidden_size) and weight_dtype in (dtype, torch.float32):
            return self.norm.spec(hidden_size, dtype, weight_dtype, target)
        policy = f"RoundedNormalised<{self.norm.policy}>" if form.rounding == "hf" else self.norm.policy
        if form.is_general:
            narrowest = min(dtype.itemsize, weight_dtype.itemsize)
            access = narrowest if form.layout == "unaligned" else checks.CUDA_ALIGNMENT
            policy = f"General<{policy}, {access}, {str(form.has_weight).lower()}, {str(form.has_bias).lower()}>"
        binding = self.binding if form.is_general else self.norm.binding
        text = str(form) if form.is_general else ""
        return spec_of_policy(self, binding, policy, hidden_size, dtype, weight_dtype, form.rounding, text, target)

    def warmup_spec(
        self,
        size: int | None,
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        target: Target,
        rounding: str = "once",
        form: str = "rows",
    ) -> KernelSpec:
        """Return what to build for a size, in one form. Raises as `spec`, and ValueError for another rounding."""
        checks.choice("rounding", rounding, ROUNDINGS)
        return self.spec(int(size or 0), dtype, weight_dtype, Form.parse(form, rounding), target)


def _first_layout(has_weight: bool, has_bias: bool, needs_general: bool) -> int:
    """Return the index of the first of LAYOUTS that a form has kernels of its own for."""
    return 0 if has_weight and not has_bias and not needs_general else 1


_VARIANTS = {
    norm.op: GeneralNorm(f"general_{norm.op}", "general_rmsnorm", norm=norm)
    for norm in (
        *(RMSNORM, GEMMA_RMSNORM, FUSED_ADD_RMSNORM, FUSED_ADD_RMSNORM_ROUND_SUM, FUSED_ADD_RMSNORM_FP32_RESIDUAL),
        *(GEMMA_FUSED_ADD_RMSNORM, GEMMA_FUSED_ADD_RMSNORM_ROUND_SUM, GEMMA_FUSED_ADD_RMSNORM_FP32_RESIDUAL),
    )
}


def _variant(weight_offset: float, residual: Any, input: Any, round_sum: bool) -> GeneralNorm:
    """Return the operator for arguments of which the offset has been checked."""
    gemma = "gemma_" if weight_offset else ""
    if residual is None:
        return _VARIANTS[f"{gemma}rmsnorm"]
    if residual.dtype is torch.float32 is not input.dtype:
        return _VARIANTS[f"{gemma}fused_add_rmsnorm_fp32_residual"]
    return _VARIANTS[f"{gemma}fused_add_rmsnorm{'_round_sum' if round_sum else ''}"]


def general_rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    bias: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    rounding: str = "once",
    return_rstd: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalise the last dimension by its root mean square: `input * rstd * (weight_offset + weight) + bias`.

    `rstd[i] = 1 / sqrt(mean(input[i]^2) + eps)`, accumulated in float32 (Zhang and Sennrich, 2019,
    https://arxiv.org/abs/1910.07467). A row's result has the same bits alone, in any batch and with any strides. The
    first call of a size and form compiles its kernel.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, on the CPU or a CUDA device; hidden_size from 1 to
            65536. The elements of a row are adjacent. The leading dimensions have any strides, but no more than three
            are left after neighbours are merged. Rows need no alignment; those aligned to 16 bytes are faster.
        weight: `[hidden_size]`, or `[heads, hidden_size]` for an input `[..., heads, hidden_size]`; float16, bfloat16
            or float32, on the same device. None multiplies by nothing.
        eps: added to the mean of the squares; zero or more.
        out: written; of the input's shape, dtype and device, with strides as the input may have them. The input itself
            for a call in place, otherwise sharing no memory with it. Allocated if None. A call with `out` has no
            gradient.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        bias: `[hidden_size]`, of the weight's dtype; without a weight, of any of the three. Added last.
        weight_offset: 0.0, or 1.0 for Gemma's norms. Added to the weight in float32.
        rounding: "once", at the end; or "hf", which rounds `input * rstd` to the input's dtype before the weight
            multiplies it, as the Llama class of Hugging Face's transformers does.
        return_rstd: return `rstd` too.

    Returns:
        `out`; with `return_rstd` also rstd, float32 of the input's leading dimensions, which has no gradient.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype.
        ValueError: a shape, stride, device or overlap is not accepted; or eps, weight_offset or rounding.
        RuntimeError: hidden_size is not supported (nothing is built then), the kernel cannot be built or launched, or
            `out` is given and a gradient is needed.
    """
    traced = _is_dynamo_compiling() or needs_dispatcher(input, weight, bias, out)
    if not traced:
        try:
            needs_general = return_rstd or (weight is not None and weight.dim() != 1)
            key = key_of(input, weight, bias, needs_general, rounding)
            operator = _VARIANTS["gemma_rmsnorm" if weight_offset else "rmsnorm"]
            is_known = weight_offset.__class__ in (float, int) and weight_offset in (0.0, 1.0)
            # The bindings take tensors of other packages too, which the checks refuse.
            is_known = is_known and (out is None or isinstance(out, torch.Tensor))
            is_known = is_known and (bias is None or isinstance(bias, torch.Tensor))
            if key in operator.functions and is_known and not needs_grad(input, weight, bias):
                result = norms.new_like(input) if out is None else out
                rstd = input.new_empty(input.shape[:-1], dtype=torch.float32) if return_rstd else None
                general = input, None, weight, bias, result, rstd, eps, enable_pdl
                if operator.try_fast_path(key, general, (input, weight, result, eps, enable_pdl)):
                    return (result, rstd) if return_rstd else result  # type: ignore[return-value]
        except Exception:  # arguments without such attributes: the slow path raises for these
            pass
        if out is None and isinstance(input, torch.Tensor) and input.layout == torch.strided:
            result = norms.new_like(input)
        else:
            result = out  # type: ignore[assignment]
        check(input, weight, bias, result, None, eps, weight_offset, rounding, enable_pdl)
    elif not _is_dynamo_compiling():
        _check_types(eps, weight_offset, rounding, enable_pdl, input=input, weight=weight, bias=bias, out=out)
        eps, weight_offset = float(eps), float(weight_offset)
        refuse_torch_func("general_rmsnorm", input, weight, bias)
    grad = needs_grad(input, weight, bias)
    if out is not None and grad:
        raise RuntimeError("general_rmsnorm with out= has no gradient: call it without, or under torch.no_grad()")
    if not traced and not grad:
        rstd = input.new_empty(input.shape[:-1], dtype=torch.float32) if return_rstd else None
        _run(input, None, weight, bias, result, rstd, eps, weight_offset, rounding, False, enable_pdl)
    elif out is None:
        arguments = input, weight, bias, eps, weight_offset, rounding, bool(return_rstd or grad), enable_pdl
        result, rstd = torch.ops.jitnorm.general_rmsnorm(*arguments)
    else:
        result = out
        rstd = input.new_empty(input.shape[:-1], dtype=torch.float32) if return_rstd else None
        options = eps, weight_offset, rounding, enable_pdl
        torch.ops.jitnorm.general_rmsnorm_out(input, weight, bias, out, rstd, *options)
    return (result, rstd) if return_rstd else result  # type: ignore[return-value]


def general_fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
    *,
    bias: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    rounding: str = "once",
    round_sum: bool = False,
    return_rstd: bool = False,
) -> torch.Tensor | None:
    """Add the input to the residual and normalise the sum: `residual += input; input = general_rmsnorm(residual)`.

    Both are written in place. The float32 sum is normalised, before it is rounded into the residual.

    Args:
        input: as for `jitnorm.general_rmsnorm`; written.
        residual: of the input's shape and device, and of its dtype or float32, sharing no memory with it; written.
        weight: as for `jitnorm.general_rmsnorm`.
        eps: added to the mean of the squares; zero or more.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        bias: as for `jitnorm.general_rmsnorm`.
        weight_offset: 0.0, or 1.0 for Gemma's norms.
        rounding: "once" or "hf", as for `jitnorm.general_rmsnorm`.
        round_sum: normalise the sum as rounded into the residual. With a float32 residual it makes no difference.
        return_rstd: return the reciprocal root mean square of each sum.

    Returns:
        None; with `return_rstd` rstd, float32 of the input's leading dimensions.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.general_rmsnorm`. ValueError also if input and residual
            overlap. RuntimeError also if a leaf that requires a gradient would be overwritten.
    """
    traced = _is_dynamo_compiling() or needs_dispatcher(input, residual, weight, bias)
    if not traced:
        try:
            needs_general = return_rstd or (weight is not None and weight.dim() != 1)
            key = key_of(input, weight, bias, needs_general, rounding)
            is_known = weight_offset.__class__ in (float, int) and weight_offset in (0.0, 1.0)
            operator = _variant(weight_offset, residual, input, round_sum)
            is_known = (
                is_known and isinstance(residual, torch.Tensor) and (bias is None or isinstance(bias, torch.Tensor))
            )
            if is_known and key in operator.functions:
                rstd = input.new_empty(input.shape[:-1], dtype=torch.float32) if return_rstd else None
                general = input, residual, weight, bias, input, rstd, eps, enable_pdl
                plain = input, residual, weight, eps, enable_pdl
                if not needs_grad(input, residual, weight, bias) and operator.try_fast_path(key, general, plain):
                    return rstd
        except Exception:  # as in general_rmsnorm
            pass
        check_fused(input, residual, weight, bias, None, eps, weight_offset, rounding, enable_pdl)
    elif not _is_dynamo_compiling():
        tensors = {"input": input, "residual": residual, "weight": weight, "bias": bias}
        _check_types(eps, weight_offset, rounding, enable_pdl, **tensors)
        eps, weight_offset = float(eps), float(weight_offset)
        refuse_torch_func("general_fused_add_rmsnorm", input, residual, weight, bias)
    options = eps, weight_offset, rounding, bool(round_sum)
    if needs_grad(input, residual, weight, bias):
        written = {"input": input, "residual": residual}
        refuse_unwritable("general_fused_add_rmsnorm", input, residual, weight, bias, **written)
        functional = torch.ops.jitnorm.general_fused_add_rmsnorm_functional
        normalised, total, rstd = functional(input, residual, weight, bias, *options, enable_pdl)
        input.copy_(normalised)
        residual.copy_(total)
        return rstd if return_rstd else None
    rstd = input.new_empty(input.shape[:-1], dtype=torch.float32) if return_rstd else None
    if traced:
        torch.ops.jitnorm.general_fused_add_rmsnorm(input, residual, weight, bias, rstd, *options, enable_pdl)
    else:
        _run(input, residual, weight, bias, input, rstd, *options, enable_pdl)
    return rstd


def key_of(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    needs_general: bool,
    rounding: str,
) -> tuple[Any, ...]:
    """Return what kernels differ by, except the layout and the device."""
    factor = weight if weight is not None else bias if bias is not None else input
    return input.shape[-1], input.dtype, factor.dtype, weight is not None, bias is not None, needs_general, rounding


def _run(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    rstd: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    rounding: str,
    round_sum: bool,
    enable_pdl: bool | None,
) -> None:
    """Run the right kernel on arguments that have been checked."""
    operator = _variant(weight_offset, residual, input, round_sum)
    needs_general = rstd is not None or (weight is not None and weight.dim() != 1)
    key = key_of(input, weight, bias, needs_general, rounding)
    general = input, residual, weight, bias, out, rstd, eps, enable_pdl
    plain = (input, weight, out, eps, enable_pdl) if residual is None else (input, residual, weight, eps, enable_pdl)
    operator.run(key, layout_of(input, residual, weight, bias, out), general, plain)


def layout_of(*tensors: torch.Tensor | None) -> str:
    """Return the layout of tensors that have been checked. That of traced ones is as if they were aligned."""
    given = [tensor for tensor in tensors if tensor is not None]
    if given[0].is_cuda and not are_aligned(given):
        return "unaligned"
    if all(t.stride(-1) == 1 and (t.numel() == 0 or checks.row_stride(t) is not None) for t in given):
        return "rows"
    return "strided"


def are_aligned(tensors: list[torch.Tensor]) -> bool:
    """Return whether tensors are as aligned as kernels with the widest accesses need them. Traced ones count as so."""
    return all(map(_is_aligned(tensors), tensors))


def _is_aligned(tensors: list[torch.Tensor]) -> Callable[[torch.Tensor], bool]:
    """Return whether a tensor is as aligned as kernels with the widest accesses need it, beside these others."""
    hidden_size = tensors[0].shape[-1]
    widest = max(t.element_size() for t in tensors if t.shape == tensors[0].shape)  # of input and residual
    vector = checks.CUDA_ALIGNMENT // widest  # elements; as elements_per_vector in csrc/include/jitnorm/rms_row.h
    while hidden_size % vector:
        vector //= 2

    def is_aligned(tensor: torch.Tensor) -> bool:
        size = tensor.element_size()
        whole = hidden_size * size % checks.CUDA_ALIGNMENT == 0
        alignment = checks.CUDA_ALIGNMENT if whole else min(checks.CUDA_ALIGNMENT, vector * size)
        steps = [step for step, n in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if n > 1]
        address = 0 if needs_dispatcher(tensor) else tensor.data_ptr()
        return address % alignment == 0 and all(step * size % alignment == 0 for step in steps)

    return is_aligned


# The rest is called only by the slow path.


def kernel_class(hidden_size: int) -> str:
    """Return the class in csrc/elementwise for rows of any strides, and of a size that `check_hidden_size` accepts."""
    return "RMSNormWarpKernel" if hidden_size <= _MAX_WARP_HIDDEN_SIZE else "RMSNormKernel"


def check_hidden_size(op: str, hidden_size: int) -> None:
    """Raise RuntimeError for a size without a kernel."""
    if not 1 <= hidden_size <= MAX_HIDDEN_SIZE:
        raise RuntimeError(f"{op} does not support hidden_size {hidden_size}: supported are 1 to {MAX_HIDDEN_SIZE}")


def _check_types(eps: object, weight_offset: object, rounding: object, enable_pdl: object, **tensors: object) -> None:
    """Raise for bad types of traced arguments; tensors that are None were not given."""
    required = {"input", "residual"}
    given = {name: value for name, value in tensors.items() if value is not None or name in required}
    checks.types(eps, enable_pdl, **given)
    checks.number("weight_offset", weight_offset)
    checks.choice("rounding", rounding, ROUNDINGS)


def check_metadata(
    input: torch.Tensor,
    residual: Any,
    weight: Any,
    bias: Any,
    weight_offset: object,
    rounding: object,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    """Raise for what is wrong with dtypes, shapes, devices and options, except the size. Works on fake tensors too."""
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a scalar")
    checks.dtype("input", input, dtypes)
    if residual is not None:
        checks.dtype("residual", residual, (input.dtype, torch.float32))
        checks.shape("residual", residual, input.shape, "like input")
        checks.device("residual", residual, "input", input)
    if weight is not None:
        checks.dtype("weight", weight, dtypes)
        if weight.dim() == 2 and input.dim() >= 2:
            checks.shape("weight", weight, input.shape[-2:], "a row of factors for each of input's heads")
        else:
            why = "one factor for each element of input's last dimension"
            checks.shape("weight", weight, [input.shape[-1]], why)
        checks.device("weight", weight, "input", input)
    if bias is not None:
        checks.dtype("bias", bias, dtypes if weight is None else (weight.dtype,))
        checks.shape("bias", bias, [input.shape[-1]], "one term for each element of input's last dimension")
        checks.device("bias", bias, "input", input)
    checks.number("weight_offset", weight_offset)
    if weight_offset not in (0.0, 1.0):
        raise ValueError(f"weight_offset must be 0.0 or 1.0, got {weight_offset}")
    checks.choice("rounding", rounding, ROUNDINGS)


def check(
    input: Any,
    weight: Any,
    bias: Any,
    out: Any,
    rstd: Any,
    eps: Any,
    weight_offset: Any,
    rounding: Any,
    enable_pdl: Any,
) -> None:
    """Raise for arguments without a residual that the bindings function `general_rmsnorm` in rmsnorm.h refuses."""
    optional = {"out": out, "weight": weight, "bias": bias, "rstd": rstd}
    tensors = {"input": input} | {name: value for name, value in optional.items() if value is not None}
    check_arguments("general_rmsnorm", tensors, eps, weight_offset, rounding, enable_pdl)
    if out is not None:
        checks.dtype("out", out, (input.dtype,))
        checks.shape("out", out, input.shape, "like input")
        checks.device("out", out, "input", input)
    if input.numel() == 0:
        return
    merged = check_layouts(tensors, ("out",))
    if out is not None:
        check_in_place(merged)


def check_fused(
    input: Any,
    residual: Any,
    weight: Any,
    bias: Any,
    rstd: Any,
    eps: Any,
    weight_offset: Any,
    rounding: Any,
    enable_pdl: Any,
) -> None:
    """Raise for arguments with a residual that the bindings function `general_rmsnorm` in rmsnorm.h refuses."""
    optional = {"weight": weight, "bias": bias, "rstd": rstd}
    tensors = {"input": input, "residual": residual}
    tensors |= {name: value for name, value in optional.items() if value is not None}
    check_arguments("general_fused_add_rmsnorm", tensors, eps, weight_offset, rounding, enable_pdl)
    if input.numel() == 0:
        return
    merged = check_layouts(tensors, ("input", "residual"))
    checks.no_shared_heads("residual", merged["residual"], "input", merged["input"])


def check_arguments(
    op: str, tensors: dict[str, Any], eps: Any, weight_offset: Any, rounding: Any, enable_pdl: Any
) -> None:
    """Raise for types, dtypes, shapes, devices and options."""
    for name, value in tensors.items():
        checks.tensor(name, value)
    input, rstd = tensors["input"], tensors.get("rstd")
    residual, weight, bias = (tensors.get(name) for name in ("residual", "weight", "bias"))
    check_metadata(input, residual, weight, bias, weight_offset, rounding)
    check_hidden_size(op, input.shape[-1])
    checks.supported_device("input", input)
    checks.eps(eps)
    checks.enable_pdl(enable_pdl)
    if rstd is not None:
        checks.dtype("rstd", rstd, (torch.float32,))
        checks.device("rstd", rstd, "input", input)
        checks.elements("rstd", rstd, input.numel() // input.shape[-1], "one for each row", rstd.element_size())


def check_layouts(tensors: dict[str, torch.Tensor], written: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Raise for strides and overlaps, except of input with residual or out. Return what `merge` does."""
    rows = {name: value for name, value in tensors.items() if name != "rstd"}
    for name, value in rows.items():
        checks.storage(name, value)
        if value.is_cuda:
            checks.address(name, value, value.element_size())
        if value.shape[-1] > 1 and value.stride(-1) != 1:
            layout = f"shape {list(value.shape)} and strides {list(value.stride())}"
            raise ValueError(f"{name} must have a last stride of 1, got {layout}")
    input = tensors["input"]
    if (count := input.numel() // input.shape[-1]) > MAX_ROWS:
        raise ValueError(f"input must have at most 2^31 - 1 rows, got {count}")
    merged = merge(rows)
    for name in written:
        if name in rows:
            checks.no_internal_overlap(name, rows[name])
            for other in ("weight", "bias"):
                if other in rows:
                    checks.no_shared_memory(name, rows[name], other, rows[other])
    if "rstd" in tensors:
        for name, value in rows.items():
            checks.no_shared_memory("rstd", tensors["rstd"], name, value)
    return merged


def check_in_place(merged: dict[str, torch.Tensor]) -> None:
    """Raise if out shares memory with input and is not the input itself. Takes what `check_layouts` returns."""
    if not checks.are_same_rows(merged["out"], merged["input"]):
        try:
            checks.no_shared_heads("out", merged["out"], "input", merged["input"])
        except ValueError:
            raise ValueError(
                "out must be input itself or share no memory with input, got a view that overlaps it"
            ) from None


def merge(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors with three leading dimensions each, after merging neighbours where all strides allow it.

    As as_merged_rows in csrc/include/jitnorm/strided.h. The first has the shape; others may lack leading dimensions.

    Raises:
        ValueError: more dimensions are left.
    """
    dims = merged_dims(tensors)
    if len(dims) > MAX_LEADING_DIMS:
        layouts = "; ".join(f"{name} {list(t.shape)} with strides {list(t.stride())}" for name, t in tensors.items())
        raise ValueError(
            f"{next(iter(tensors))} must have leading dimensions that merge to at most {MAX_LEADING_DIMS} strides, "
            f"got {layouts}"
        )
    while len(dims) < MAX_LEADING_DIMS:
        dims.append((1, dict.fromkeys(tensors, 0)))
    dims.reverse()
    return {
        name: value.detach().as_strided(
            [size for size, _ in dims] + [value.shape[-1]], [steps[name] for _, steps in dims] + [1]
        )
        for name, value in tensors.items()
    }


def merged_dims(tensors: dict[str, torch.Tensor]) -> list[tuple[int, dict[str, int]]]:
    """Return size and strides of the leading dimensions, innermost first, after merging those that `merge` does."""
    first = next(iter(tensors.values()))
    strides = {name: [0] * (first.dim() - value.dim()) + list(value.stride()) for name, value in tensors.items()}
    dims: list[tuple[int, dict[str, int]]] = []
    for dim in reversed(range(first.dim() - 1)):
        size, steps = int(first.shape[dim]), {name: own[dim] for name, own in strides.items()}
        if size == 1:
            continue
        if dims and all(steps[name] == inner * dims[-1][0] for name, inner in dims[-1][1].items()):
            dims[-1] = dims[-1][0] * size, dims[-1][1]
        else:
            dims.append((size, steps))
    return dims


def gradients(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    rstd: torch.Tensor,
    weight_offset: float,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of `x`, which was normalised, in float32, and of weight and bias."""
    normalised, grad_normalised = x.float() * rstd.unsqueeze(-1), grad.float()
    grad_weight = None if weight is None else (grad_normalised * normalised).sum_to_size(weight.shape).to(weight.dtype)
    grad_bias = None if bias is None else grad_normalised.sum_to_size(bias.shape).to(bias.dtype)
    if weight is not None:
        grad_normalised = grad_normalised * (weight.float() + weight_offset)
    grad_x = grad_normalised - normalised * (grad_normalised * normalised).mean(dim=-1, keepdim=True)
    return grad_x * rstd.unsqueeze(-1), grad_weight, grad_bias


def _build(
    input: Any, residual: Any, weight: Any, bias: Any, weight_offset: Any, rounding: Any, round_sum: Any, has_rstd: Any
) -> None:
    """Check what can be checked while tracing, and build the kernel."""
    check_metadata(input, residual, weight, bias, weight_offset, rounding)
    operator = _variant(weight_offset, residual, input, round_sum)
    needs_general = has_rstd or (weight is not None and weight.dim() != 1)
    size, dtype, weight_dtype, *form = key_of(input, weight, bias, needs_general, rounding)
    build_while_tracing(
        operator, input, int(size), dtype, weight_dtype, Form(layout_of(input, residual, weight, bias), *form)
    )


def _rstd_like(input: torch.Tensor, is_returned: bool) -> torch.Tensor:
    """Return an empty tensor for rstd, without elements unless it `is_returned`."""
    return input.new_empty(input.shape[:-1] if is_returned else (0,), dtype=torch.float32)


def _torch_rmsnorm(
    input: Any,
    weight: Any,
    bias: Any,
    eps: float,
    weight_offset: float,
    rounding: str,
    return_rstd: bool,
    enable_pdl: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, rstd = norms.new_like(input), _rstd_like(input, return_rstd)
    _torch_rmsnorm_out(
        *(input, weight, bias, out, rstd if return_rstd else None), eps, weight_offset, rounding, enable_pdl
    )
    return out, rstd


def _torch_rmsnorm_out(
    input: Any,
    weight: Any,
    bias: Any,
    out: Any,
    rstd: Any,
    eps: float,
    weight_offset: float,
    rounding: str,
    enable_pdl: bool | None = None,
) -> None:
    check(input, weight, bias, out, rstd, eps, weight_offset, rounding, enable_pdl)
    _run(input, None, weight, bias, out, rstd, eps, weight_offset, rounding, False, enable_pdl)
    increment_versions(out, *([] if rstd is None else [rstd]))


def _torch_fused_add(
    input: Any,
    residual: Any,
    weight: Any,
    bias: Any,
    rstd: Any,
    eps: float,
    weight_offset: float,
    rounding: str,
    round_sum: bool,
    enable_pdl: bool | None = None,
) -> None:
    check_fused(input, residual, weight, bias, rstd, eps, weight_offset, rounding, enable_pdl)
    _run(input, residual, weight, bias, input, rstd, eps, weight_offset, rounding, round_sum, enable_pdl)
    increment_versions(input, residual, *([] if rstd is None else [rstd]))


def _torch_fused_add_functional(
    input: Any,
    residual: Any,
    weight: Any,
    bias: Any,
    eps: float,
    weight_offset: float,
    rounding: str,
    round_sum: bool,
    enable_pdl: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_fused(input, residual, weight, bias, None, eps, weight_offset, rounding, enable_pdl)
    normalised, total, rstd = input.clone(), residual.clone(), _rstd_like(input, True)
    _run(normalised, total, weight, bias, normalised, rstd, eps, weight_offset, rounding, round_sum, enable_pdl)
    return normalised, total, rstd


def _fake_rmsnorm(
    input: Any, weight: Any, bias: Any, eps: Any, offset: Any, rounding: Any, return_rstd: Any, pdl: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    _build(input, None, weight, bias, offset, rounding, False, return_rstd)
    return norms.new_like(input), _rstd_like(input, return_rstd)


def _fake_rmsnorm_out(
    input: Any, weight: Any, bias: Any, out: Any, rstd: Any, eps: Any, offset: Any, rounding: Any, pdl: Any = None
) -> None:
    _build(input, None, weight, bias, offset, rounding, False, rstd is not None)


def _fake_fused_add(
    input: Any,
    residual: Any,
    weight: Any,
    bias: Any,
    rstd: Any,
    eps: Any,
    offset: Any,
    rounding: Any,
    round_sum: Any,
    pdl: Any = None,
) -> None:
    _build(input, residual, weight, bias, offset, rounding, round_sum, rstd is not None)


def _fake_fused_add_functional(
    input: Any,
    residual: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    offset: Any,
    rounding: Any,
    round_sum: Any,
    pdl: Any = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _build(input, residual, weight, bias, offset, rounding, round_sum, True)
    return torch.empty_like(input), torch.empty_like(residual), _rstd_like(input, True)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    input, weight, bias, ctx.eps, ctx.weight_offset = inputs[:5]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(input, weight, bias, output[1])


def _rstd_for_gradient(x: torch.Tensor, rstd: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the saved rstd, or compute it again where it was not saved, or where it needs a gradient itself."""
    if torch.is_grad_enabled() or (x.numel() and not rstd.numel()):
        return torch.rsqrt(x.float().square().mean(dim=-1) + eps)
    return rstd


def _backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias, rstd = ctx.saved_tensors
    rstd = _rstd_for_gradient(x, rstd, ctx.eps)
    grad_x, grad_weight, grad_bias = gradients(x, weight, bias, rstd, ctx.weight_offset, grad)
    return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None, None, None


def _save_fused_add(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    # Save the rounded sum, not its terms: a later in-place call may overwrite those.
    ctx.eps, ctx.weight_offset = inputs[4:6]
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(output[1], inputs[2], inputs[3], output[2])


def _backward_fused_add(ctx: Any, grad: torch.Tensor, grad_total: torch.Tensor, _: Any) -> tuple[Any, ...]:
    total, weight, bias, rstd = ctx.saved_tensors
    rstd = _rstd_for_gradient(total, rstd, ctx.eps)
    grad_x, grad_weight, grad_bias = gradients(total, weight, bias, rstd, ctx.weight_offset, grad)
    grad_residual = (grad_x + grad_total.float()).to(total.dtype)
    return grad_residual.to(grad.dtype), grad_residual, grad_weight, grad_bias, None, None, None, None, None


_options = "float eps, float weight_offset, str rounding"
_name = register(
    f"general_rmsnorm(Tensor input, Tensor? weight, Tensor? bias, {_options}, bool return_rstd, "
    "bool? enable_pdl=None) -> (Tensor, Tensor)",
    _torch_rmsnorm,
    _fake_rmsnorm,
)
register_autograd(_name, _backward, _save)
register(
    f"general_rmsnorm_out(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!) out, Tensor(b!)? rstd, {_options}, "
    "bool? enable_pdl=None) -> ()",
    _torch_rmsnorm_out,
    _fake_rmsnorm_out,
)
register(
    "general_fused_add_rmsnorm(Tensor(a!) input, Tensor(b!) residual, Tensor? weight, Tensor? bias, "
    f"Tensor(c!)? rstd, {_options}, bool round_sum, bool? enable_pdl=None) -> ()",
    _torch_fused_add,
    _fake_fused_add,
)
_name = register(
    "general_fused_add_rmsnorm_functional(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, "
    f"{_options}, bool round_sum, bool? enable_pdl=None) -> (Tensor, Tensor, Tensor)",
    _torch_fused_add_functional,
    _fake_fused_add_functional,
)
register_autograd(_name, _backward_fused_add, _save_fused_add)


def _arguments(shape: Shape, norm: Norm) -> dict[str, Any]:
    arguments: dict[str, Any] = {"input": shape.randn(), "weight": shape.randn(shape.size)}
    if "fused_add" in norm.op:
        arguments["residual"] = shape._replace(dtype=norm.residual_dtype or shape.dtype).randn()
        arguments["round_sum"] = norm.op.endswith("_round_sum")
    return arguments | {"weight_offset": norm.weight_offset}


for _operator in _VARIANTS.values():
    _is_fused = "fused_add" in _operator.op
    EXAMPLES[_operator.op] = Example(
        general_fused_add_rmsnorm if _is_fused else general_rmsnorm,
        functools.partial(_arguments, norm=_operator.norm),
        written=("input", "residual") if _is_fused else (),
        per_row=("input", "residual") if _is_fused else ("input",),
        sizes=(100, 2880, 12288),
        make_outputs=None if _is_fused else (lambda shape: {"out": shape.zeros()}),
    )
