"""LayerNorm in every form, and with a float8 output: any size and strides, weight and bias optional.

Its kernels are those of `jitnorm.general_rmsnorm` with a policy that subtracts the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from jitnorm.core import checks, norms
from jitnorm.core.operators import EXAMPLES, Example, Shape
from jitnorm.core.torch_library import (
    build_while_tracing,
    increment_versions,
    needs_dispatcher,
    needs_grad,
    refuse_gradient,
    refuse_torch_func,
    register,
    register_autograd,
)
from jitnorm.general_rmsnorm import (
    Form,
    FormOperator,
    check_arguments,
    check_dtypes,
    check_hidden_size,
    check_in_place,
    check_layouts,
    check_metadata,
    gradients,
    key_of,
    layout_of,
    spec_of_policy,
)
from jitnorm.jit.spec import KernelSpec, Target

_E4M3 = torch.float8_e4m3fn
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_Tensor = torch.Tensor


@dataclass(eq=False, repr=False)
class LayerNorm(FormOperator):
    """LayerNorm, or the variant of it with a float8 output."""

    policy: str  # the policy class in csrc/include/jitnorm/rms_policy.h

    options: ClassVar[tuple[str, ...]] = ("form",)

    def spec(
        self, hidden_size: int, dtype: torch.dtype, weight_dtype: torch.dtype, form: Form, target: Target
    ) -> KernelSpec:
        """Return what to build. RuntimeError for an unsupported size, TypeError for an unsupported dtype."""
        check_hidden_size(self.op, hidden_size)
        check_dtypes(self, dtype, weight_dtype)
        form = form._replace(needs_general=True)  # there is no faster kernel for aligned rows
        access = 0 if form.layout == "unaligned" else checks.CUDA_ALIGNMENT  # 0: that of an element
        policy = f"General<{self.policy}, {access}, {str(form.has_weight).lower()}, {str(form.has_bias).lower()}>"
        return spec_of_policy(
            self, self.binding, policy, hidden_size, dtype, weight_dtype, form.rounding, str(form), target
        )

    def warmup_spec(
        self,
        size: int | None,
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        target: Target,
        form: str = "strided+bias",
    ) -> KernelSpec:
        """Return what to build for a size, in one form; that of `torch.nn.LayerNorm` by default. Raises as `spec`."""
        return self.spec(int(size or 0), dtype, weight_dtype, Form.parse(form), target)


LAYERNORM = LayerNorm("layernorm", "layernorm", "LayerNorm")
LAYERNORM_QUANT_FP8 = LayerNorm("layernorm_quant_fp8", "layernorm", "StaticFp8<LayerNorm>")


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
    """Normalise the last dimension to mean 0 and variance 1: `(input - mean) * rstd * weight + bias`.

    `rstd[i] = 1 / sqrt(mean((input[i] - mean[i])^2) + eps)` (Ba, Kiros and Hinton, 2016,
    https://arxiv.org/abs/1607.06450), as `torch.nn.functional.layer_norm` and FlashInfer's `layernorm` compute it. A
    row is read once. Its mean is computed before the squares of the differences are added up, both in float32, and the
    result is rounded once. It has the same bits alone, in any batch and with any strides. The first call of a size and
    form compiles its kernel.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, on the CPU or a CUDA device; hidden_size from 1 to
            65536. The elements of a row are adjacent. The leading dimensions have any strides, but no more than three
            are left after neighbours are merged. Rows need no alignment; those aligned to 16 bytes are faster.
        weight: `[hidden_size]`, or `[heads, hidden_size]` for an input `[..., heads, hidden_size]`; float16, bfloat16
            or float32, on the same device. None multiplies by nothing.
        bias: `[hidden_size]`, of the weight's dtype; without a weight, of any of the three. None adds nothing.
        eps: added to the variance; zero or more. The default is FlashInfer's; PyTorch's is 1e-5.
        out: written; of the input's shape, dtype and device, with strides as the input may have them. The input itself
            for a call in place, otherwise sharing no memory with it. Allocated if None. A call with `out` has no
            gradient.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        return_stats: return `mean` and `rstd` too.

    Returns:
        `out`; with `return_stats` also mean and rstd, float32 of the input's leading dimensions, which have no
        gradient.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype.
        ValueError: a shape, stride, device or overlap is not accepted; or eps.
        RuntimeError: hidden_size is not supported (nothing is built then), the kernel cannot be built or launched, or
            `out` is given and a gradient is needed.
    """
    traced = _is_dynamo_compiling() or needs_dispatcher(input, weight, bias, out)
    if not traced:
        try:
            key = key_of(input, weight, bias, True, "once")
            # A kernel would accept tensors of other packages. `key` has their dtype only for input and weight.
            are_tensors = (bias is None or isinstance(bias, _Tensor)) and (out is None or isinstance(out, _Tensor))
            if key in LAYERNORM.functions and are_tensors and not needs_grad(input, weight, bias):
                result = norms.new_like(input) if out is None else out
                mean, rstd = _new_stats(input) if return_stats else (None, None)
                arguments = input, None, weight, bias, result, rstd, eps, enable_pdl, mean, None
                if LAYERNORM.try_fast_path(key, arguments, ()):
                    return (result, mean, rstd) if return_stats else result  # type: ignore[return-value]
        except Exception:  # arguments without such attributes: the slow path raises for these
            pass
        if out is None and isinstance(input, torch.Tensor) and input.layout == torch.strided:
            result = norms.new_like(input)
        else:
            result = out  # type: ignore[assignment]
        check(input, weight, bias, result, None, None, eps, enable_pdl)
    elif not _is_dynamo_compiling():
        _check_types(eps, enable_pdl, input=input, weight=weight, bias=bias, out=out)
        eps = float(eps)
        refuse_torch_func("layernorm", input, weight, bias)
    grad = needs_grad(input, weight, bias)
    if out is not None and grad:
        raise RuntimeError("layernorm with out= has no gradient: call it without, or under torch.no_grad()")
    if out is None and (traced or grad):
        result, mean, rstd = torch.ops.jitnorm.layernorm(
            input, weight, bias, eps, bool(return_stats or grad), enable_pdl
        )
    else:
        mean, rstd = _new_stats(input) if return_stats else (None, None)
        if traced:
            result = out  # type: ignore[assignment]
            torch.ops.jitnorm.layernorm_out(input, weight, bias, result, mean, rstd, eps, enable_pdl)
        else:
            _run(LAYERNORM, input, weight, bias, result, mean, rstd, None, eps, enable_pdl)
    return (result, mean, rstd) if return_stats else result  # type: ignore[return-value]


def layernorm_quant_fp8(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise the last dimension to mean 0 and variance 1, and quantise the result to float8_e4m3fn, in one pass.

    `out = e4m3(clip(y / scale, +-448))` with `y = (input - mean) * rstd * weight + bias` as `jitnorm.layernorm`
    computes it, in float32, not rounded to the input's dtype in between. The quotient is rounded to float32, and then
    to the nearest e4m3 number, ties to even. Infinities saturate, a NaN becomes a NaN. `out * scale` approximates `y`.

    This is the definition of FlashInfer's layernorm_quant, which takes bfloat16 inputs with float32 weights, rounds `y`
    to bfloat16 and multiplies by the reciprocal of the scale. The scale is that of `jitnorm.rmsnorm_quant_fp8`.

    Args:
        input: `[..., hidden_size]`, of the sizes, dtypes and strides of `jitnorm.layernorm`.
        weight: as for `jitnorm.layernorm`. None multiplies by nothing.
        bias: as for `jitnorm.layernorm`. None adds nothing.
        scale: one float32 on the same device, finite and above zero. The division is exact from 2^-90 to 2^125. Zero
            saturates.
        eps: added to the variance; zero or more.
        out: written; of the input's shape and device, float8_e4m3fn, with strides as the input may have them, sharing
            no memory with the other arguments. Allocated if None.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.

    Returns:
        `out`, and the given `scale`.

    Raises:
        TypeError, ValueError: as `jitnorm.layernorm`.
        RuntimeError: as `jitnorm.layernorm`. Also if a gradient is needed: there is none.
    """
    traced = _is_dynamo_compiling() or needs_dispatcher(input, weight, bias, scale, out)
    if not traced:
        try:
            key = key_of(input, weight, bias, True, "once")
            are_tensors = (bias is None or isinstance(bias, _Tensor)) and (out is None or isinstance(out, _Tensor))
            are_tensors = are_tensors and isinstance(scale, _Tensor)
            if key in LAYERNORM_QUANT_FP8.functions and are_tensors and not needs_grad(input, weight, bias, scale):
                result = norms.new_like(input, _E4M3) if out is None else out
                arguments = input, None, weight, bias, result, None, eps, enable_pdl, None, scale
                if LAYERNORM_QUANT_FP8.try_fast_path(key, arguments, ()):
                    return result, scale
        except Exception:  # as in layernorm
            pass
    if not isinstance(scale, torch.Tensor):
        raise TypeError(f"scale must be a float32 tensor of one element, got {type(scale).__name__}")
    if traced:
        _check_types(eps, enable_pdl, input=input, weight=weight, bias=bias, scale=scale, out=out)
    else:
        check_quant(input, weight, bias, out, scale, eps, enable_pdl)
    refuse_gradient("layernorm_quant_fp8", input, weight, bias, scale)
    result = norms.new_like(input, _E4M3) if out is None else out
    if traced:
        torch.ops.jitnorm.layernorm_quant_fp8(input, weight, bias, result, scale, float(eps), enable_pdl)
    else:
        _run(LAYERNORM_QUANT_FP8, input, weight, bias, result, None, None, scale, eps, enable_pdl)
    return result, scale


def _run(
    operator: LayerNorm,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    mean: torch.Tensor | None,
    rstd: torch.Tensor | None,
    scale: torch.Tensor | None,
    eps: float,
    enable_pdl: bool | None,
) -> None:
    """Run the right kernel on arguments that have been checked."""
    arguments = input, None, weight, bias, out, rstd, eps, enable_pdl, mean, scale
    operator.run(key_of(input, weight, bias, True, "once"), layout_of(input, weight, bias, out), arguments, ())


def _new_stats(input: torch.Tensor, is_returned: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Return empty tensors for mean and rstd, without elements unless they are returned."""
    shape = input.shape[:-1] if is_returned else (0,)
    return input.new_empty(shape, dtype=torch.float32), input.new_empty(shape, dtype=torch.float32)


# The rest is called only by the slow path.


def _check_types(eps: object, enable_pdl: object, **tensors: object) -> None:
    """Raise for bad types of traced arguments; tensors other than the input that are None were not given."""
    checks.types(eps, enable_pdl, **{name: t for name, t in tensors.items() if t is not None or name == "input"})


def check(input: Any, weight: Any, bias: Any, out: Any, mean: Any, rstd: Any, eps: Any, enable_pdl: Any) -> None:
    """Raise for arguments that the bindings function `layernorm` in csrc/elementwise/rmsnorm.h refuses."""
    optional = {"out": out, "weight": weight, "bias": bias, "rstd": rstd, "mean": mean}
    tensors = {"input": input} | {name: value for name, value in optional.items() if value is not None}
    check_arguments("layernorm", tensors, eps, 0.0, "once", enable_pdl)
    if mean is not None:
        checks.dtype("mean", mean, (torch.float32,))
        checks.device("mean", mean, "input", input)
        checks.elements("mean", mean, input.numel() // input.shape[-1], "one for each row", mean.element_size())
    if out is not None:
        checks.dtype("out", out, (input.dtype,))
        checks.shape("out", out, input.shape, "like input")
        checks.device("out", out, "input", input)
    if input.numel() == 0:
        return
    merged = check_layouts({name: value for name, value in tensors.items() if name != "mean"}, ("out",))
    if mean is not None:
        for name in ("weight", "bias", "rstd"):
            if name in tensors:
                checks.no_shared_memory("mean", mean, name, tensors[name])
        for name in ("input", "out"):
            if name in merged:
                checks.no_shared_heads(name, merged[name], "mean", mean, has_heads=False)
    if out is not None:
        check_in_place(merged)


def check_quant(input: Any, weight: Any, bias: Any, out: Any, scale: Any, eps: Any, enable_pdl: Any) -> None:
    """Raise for arguments that the bindings function `layernorm` refuses for a kernel with e4m3 outputs."""
    optional = {"out": out, "weight": weight, "bias": bias}
    tensors = {"input": input} | {name: value for name, value in optional.items() if value is not None}
    checks.tensor("scale", scale)
    check_arguments("layernorm_quant_fp8", tensors, eps, 0.0, "once", enable_pdl)
    _check_quant_metadata(input, out, scale)
    checks.elements("scale", scale, 1, "one scale for all", scale.element_size())
    if input.numel() == 0:
        return
    merged = check_layouts(tensors, ("out",))
    if out is not None:
        checks.no_shared_heads("out", merged["out"], "input", merged["input"])
        checks.no_shared_memory("out", out, "scale", scale)


def _check_quant_metadata(input: torch.Tensor, out: torch.Tensor | None, scale: torch.Tensor) -> None:
    if out is not None:
        checks.dtype("out", out, (_E4M3,))
        checks.shape("out", out, input.shape, "like input")
        checks.device("out", out, "input", input)
    checks.dtype("scale", scale, (torch.float32,))
    checks.device("scale", scale, "input", input)


def _build(operator: LayerNorm, input: Any, weight: Any, bias: Any) -> None:
    """Check what can be checked while tracing, and build the kernel."""
    check_metadata(input, None, weight, bias, 0.0, "once")
    size, dtype, weight_dtype, *form = key_of(input, weight, bias, True, "once")
    build_while_tracing(operator, input, int(size), dtype, weight_dtype, Form(layout_of(input, weight, bias), *form))


def _torch_layernorm(
    input: Any, weight: Any, bias: Any, eps: float, return_stats: bool, enable_pdl: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out, (mean, rstd) = norms.new_like(input), _new_stats(input, return_stats)
    _torch_layernorm_out(
        *(input, weight, bias, out, mean if return_stats else None, rstd if return_stats else None), eps, enable_pdl
    )
    return out, mean, rstd


def _torch_layernorm_out(
    input: Any,
    weight: Any,
    bias: Any,
    out: Any,
    mean: Any,
    rstd: Any,
    eps: float,
    enable_pdl: bool | None = None,
) -> None:
    check(input, weight, bias, out, mean, rstd, eps, enable_pdl)
    _run(LAYERNORM, input, weight, bias, out, mean, rstd, None, eps, enable_pdl)
    increment_versions(out, *(t for t in (mean, rstd) if t is not None))


def _torch_layernorm_quant_fp8(
    input: Any, weight: Any, bias: Any, out: Any, scale: Any, eps: float, enable_pdl: bool | None = None
) -> None:
    check_quant(input, weight, bias, out, scale, eps, enable_pdl)
    _run(LAYERNORM_QUANT_FP8, input, weight, bias, out, None, None, scale, eps, enable_pdl)
    increment_versions(out)


def _fake_layernorm(
    input: Any, weight: Any, bias: Any, eps: Any, return_stats: Any, pdl: Any = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _build(LAYERNORM, input, weight, bias)
    return norms.new_like(input), *_new_stats(input, return_stats)


def _fake_layernorm_out(
    input: Any, weight: Any, bias: Any, out: Any, mean: Any, rstd: Any, eps: Any, pdl: Any = None
) -> None:
    _build(LAYERNORM, input, weight, bias)


def _fake_layernorm_quant_fp8(
    input: Any, weight: Any, bias: Any, out: Any, scale: Any, eps: Any, pdl: Any = None
) -> None:
    _check_quant_metadata(input, out, scale)
    _build(LAYERNORM_QUANT_FP8, input, weight, bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    input, weight, bias, ctx.eps = inputs[:4]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(input, weight, bias, *output[1:])


def _backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    x, weight, bias, mean, rstd = ctx.saved_tensors
    if torch.is_grad_enabled() or (x.numel() and not rstd.numel()):  # they need a gradient too, or were not saved
        variance, mean = torch.var_mean(x.float(), dim=-1, correction=0)
        rstd = torch.rsqrt(variance + ctx.eps)
    # The gradient of RMSNorm is that of the differences from the mean, from which the mean's own gradient is left out.
    differences = x.float() - mean.unsqueeze(-1)
    grad_differences, grad_weight, grad_bias = gradients(differences, weight, bias, rstd, 0.0, grad)
    grad_x = grad_differences - grad_differences.mean(dim=-1, keepdim=True)
    return grad_x.to(x.dtype), grad_weight, grad_bias, None, None, None


_name = register(
    "layernorm(Tensor input, Tensor? weight, Tensor? bias, float eps, bool return_stats, bool? enable_pdl=None) "
    "-> (Tensor, Tensor, Tensor)",
    _torch_layernorm,
    _fake_layernorm,
)
register_autograd(_name, _backward, _save)
register(
    "layernorm_out(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!) out, Tensor(b!)? mean, Tensor(c!)? rstd, "
    "float eps, bool? enable_pdl=None) -> ()",
    _torch_layernorm_out,
    _fake_layernorm_out,
)
register(
    "layernorm_quant_fp8(Tensor input, Tensor? weight, Tensor? bias, Tensor(a!) out, Tensor scale, float eps, "
    "bool? enable_pdl=None) -> ()",
    _torch_layernorm_quant_fp8,
    _fake_layernorm_quant_fp8,
)


def _arguments(shape: Shape) -> dict[str, Any]:
    return {"input": shape.randn(), "weight": shape.randn(shape.size), "bias": shape.randn(shape.size)}


EXAMPLES["layernorm"] = Example(
    layernorm,
    _arguments,
    sizes=(100, 2880, 12288),
    make_outputs=lambda shape: {"out": shape.zeros()},
)
EXAMPLES["layernorm_quant_fp8"] = Example(
    layernorm_quant_fp8,
    lambda shape: {**_arguments(shape), "scale": torch.full((1,), 0.25, device=shape.device)},
    sizes=(100, 2880, 12288),
    make_outputs=lambda shape: {"out": shape.zeros(dtype=_E4M3)},
)
