"""RMSNorm beside a gate: `norm(input) * weight * silu(gate)` or `norm(input * silu(gate)) * weight`.

The norm is over whole rows, as in Qwen3-Next, or over groups of adjacent elements with a mean of squares each, as in
Mamba 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

from jitnorm.core import checks, norms
from jitnorm.core.norms import MAX_HIDDEN_SIZE, MAX_LEADING_DIMS
from jitnorm.core.operators import CPP_TYPES, DTYPES, EXAMPLES, Example, LayoutOperator, Shape
from jitnorm.core.targets import target_of
from jitnorm.core.torch_library import (
    build_while_tracing,
    increment_versions,
    needs_dispatcher,
    needs_grad,
    refuse_torch_func,
    register,
    register_autograd,
)
from jitnorm.general_rmsnorm import (
    ROUNDINGS,
    are_aligned,
    check_dtypes,
    check_in_place,
    check_layouts,
    merged_dims,
    spec_of_policy,
)
from jitnorm.jit.spec import KernelSpec, Target

ACTIVATIONS = {"silu": "GateActivation::kSilu", "sigmoid": "GateActivation::kSigmoid"}
LAYOUTS = ("strided", "unaligned")

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


class GatedForm(NamedTuple):
    """What distinguishes the kernels of one size and dtype.

    Attributes:
        layout: "strided", or "unaligned" for rows that are aligned to their elements alone.
        has_weight: whether a weight multiplies.
        has_float_gate: whether the gate is float32; otherwise it has the input's dtype.
        activation: one of ACTIVATIONS.
        rounding: "once" or "hf".
    """

    layout: str = "strided"
    has_weight: bool = True
    has_float_gate: bool = False
    activation: str = "silu"
    rounding: str = "once"

    def __str__(self) -> str:
        parts = {"no_weight": not self.has_weight, "fp32_gate": self.has_float_gate}
        parts["sigmoid"] = self.activation == "sigmoid"
        return "+".join((self.layout, *(name for name, is_given in parts.items() if is_given)))

    @classmethod
    def parse(cls, text: str, rounding: str = "once") -> GatedForm:
        """Return the form whose `str` is `text`. Raises ValueError if there is none."""
        layout, *parts = text.split("+")
        if layout not in LAYOUTS or not {*parts} <= {"no_weight", "fp32_gate", "sigmoid"}:
            raise ValueError(
                f"form must be {' or '.join(LAYOUTS)}, and may end with +no_weight, +fp32_gate and +sigmoid, "
                f"got {text!r}"
            )
        activation = "sigmoid" if "sigmoid" in parts else "silu"
        return cls(layout, "no_weight" not in parts, "fp32_gate" in parts, activation, rounding)


@dataclass(eq=False, repr=False)
class GatedNorm(LayoutOperator):
    """The norm with the gate before it or after it. The size of its kernels is that of a group."""

    norm_before_gate: bool = field(kw_only=True)

    options: ClassVar[tuple[str, ...]] = ("rounding", "form")
    layouts = LAYOUTS

    def spec(
        self, size: int, dtype: torch.dtype, weight_dtype: torch.dtype, form: GatedForm, target: Target
    ) -> KernelSpec:
        """Return what to build. RuntimeError for an unsupported size, TypeError for an unsupported dtype."""
        check_size(size)
        check_dtypes(self, dtype, weight_dtype)
        form = form._replace(has_float_gate=form.has_float_gate or dtype == torch.float32)
        gate_dtype = torch.float32 if form.has_float_gate else dtype
        gating = "Gating::kAfterNorm" if self.norm_before_gate else "Gating::kBeforeNorm"
        policy = f"Gated<{CPP_TYPES[gate_dtype]}, {gating}, {ACTIVATIONS[form.activation]}>"
        if form.rounding == "hf":
            policy = f"RoundedNormalised<{policy}>"
        narrowest = min(dtype.itemsize, weight_dtype.itemsize)
        access = narrowest if form.layout == "unaligned" else checks.CUDA_ALIGNMENT
        policy = f"General<{policy}, {access}, {str(form.has_weight).lower()}>"
        text = str(form._replace(has_float_gate=gate_dtype != dtype))
        text = "" if text == LAYOUTS[0] else text
        return spec_of_policy(self, self.binding, policy, size, dtype, weight_dtype, form.rounding, text, target)

    def warmup_spec(
        self,
        size: int | None,
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        target: Target,
        rounding: str = "once",
        form: str = LAYOUTS[0],
    ) -> KernelSpec:
        """Return what to build for a size, in one form. Raises as `spec`, and ValueError for another rounding."""
        checks.choice("rounding", rounding, ROUNDINGS)
        return self.spec(int(size or 0), dtype, weight_dtype, GatedForm.parse(form, rounding), target)

    def try_fast_path(self, key: tuple[Any, ...], *arguments: Any) -> bool:
        """Run a kernel that has been used for `key`, the fastest first. False if none takes the arguments."""
        strided, unaligned = self.functions[key]
        if strided is not None and not strided(*arguments):
            return True
        if unaligned is None or (strided is None and _layout(key[0], *arguments[:4]) == "strided"):
            return False
        return not unaligned(*arguments)

    def run(self, key: tuple[Any, ...], *arguments: Any) -> None:
        """Run the kernel for `key`, built and loaded if need be, on arguments that have been checked."""
        size, dtype, _, weight_dtype, *_ = key
        layout = _layout(size, *arguments[:4])
        spec_key = size, dtype, weight_dtype or dtype, _form(key, layout), target_of(arguments[0])
        if self.kernel_of_layout(key, layout, spec_key)(*arguments):
            raise self.refused()


GATED_RMSNORM = GatedNorm("gated_rmsnorm", "gated_rmsnorm", norm_before_gate=True)
GATED_RMSNORM_GATE_FIRST = GatedNorm("gated_rmsnorm_gate_first", "gated_rmsnorm", norm_before_gate=False)
_VARIANTS = {True: GATED_RMSNORM, False: GATED_RMSNORM_GATE_FIRST}  # by norm_before_gate


def gated_rmsnorm(
    input: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    activation: str = "silu",
    rounding: str = "once",
) -> torch.Tensor:
    """Normalise the input and multiply by an activated gate: `out = norm(input) * weight * silu(gate)`.

    With `norm_before_gate=False`, `out = norm(input * silu(gate)) * weight`. The norm divides by the root mean square
    of a row, or of each group of `group_size` adjacent elements of it. This is `rms_norm_ref` of mamba_ssm's
    ops/triton/layernorm_gated.py, and `forward_static` of vLLM's RMSNormGated.

    Everything is computed in float32. rounding="once" rounds the result alone, as mamba_ssm, vLLM's RMSNormGated and
    transformers' FalconH1RMSNormGated do. rounding="hf" rounds in the places of other classes of transformers:

    - `norm_before_gate=True`, as Qwen3NextRMSNormGated: the normalised value to the input's dtype; its product with the
      weight, to the input's dtype if the weight has that dtype; and the product with the gate.
    - `norm_before_gate=False`, as MambaRMSNormGated of Mamba 2, and those of Bamba, Zamba 2, Granite and Nemotron-H,
      and as vLLM's Mixer2RMSNormGated: the normalised value, and its product with the weight.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, on the CPU or a CUDA device. Elements of a row are
            adjacent. The leading dimensions, and that of the groups, may have any strides that merge to at most three
            with those of `gate` and `out`.
        gate: of the input's shape and device, and of its dtype or float32, with strides of its own, as a slice of the
            projection of which `input` is another slice has them. Not written.
        weight: `[hidden_size]`, or `[group_size]` for all groups alike; float16, bfloat16 or float32. None multiplies
            by nothing.
        eps: added to the mean of the squares; zero or more.
        out: written; of the input's shape, dtype and device, with any strides as above. It may be the input itself, and
            otherwise shares no memory with input, gate or weight. Allocated if None. A call with `out` has no gradient.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        group_size: 1 to 65536 elements, of which hidden_size is a multiple. None for whole rows, of up to 65536.
        norm_before_gate: whether the gate multiplies the result, or the input before it is normalised.
        activation: of the gate: "silu", or "sigmoid" as for Kimi Linear.
        rounding: "once", at the end; or "hf", as described above.

    Returns:
        `out`.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype; norm_before_gate is no bool, or group_size no int.
        ValueError: a shape, stride, device or overlap is not accepted; or eps, group_size, activation or rounding.
        RuntimeError: hidden_size or group_size is not supported (nothing is built then), the kernel cannot be built or
            launched, or `out` is given and a gradient is needed.
    """
    traced = _is_dynamo_compiling() or needs_dispatcher(input, gate, weight, out)
    if not traced:
        try:
            key = _key(input, gate, weight, group_size, activation, rounding)
            operator = _VARIANTS[norm_before_gate]
            # A key would be the same for True and 1, and the bindings take tensors of other libraries.
            is_known = (
                norm_before_gate.__class__ is bool
                and (group_size is None or group_size.__class__ is int)
                and (out is None or isinstance(out, torch.Tensor))
            )
            if is_known and key in operator.functions and not needs_grad(input, gate, weight):
                result = norms.new_like(input) if out is None else out
                if operator.try_fast_path(key, input, gate, weight, result, eps, enable_pdl):
                    return result
        except Exception:  # arguments without such attributes: the slow path raises for these
            pass
        if out is None and isinstance(input, torch.Tensor) and input.layout == torch.strided:
            result = norms.new_like(input)
        else:
            result = out  # type: ignore[assignment]
        check(input, gate, weight, result, eps, group_size, norm_before_gate, activation, rounding, enable_pdl)
    elif not _is_dynamo_compiling():
        tensors = {"input": input, "gate": gate, "weight": weight, "out": out}
        given = {name: value for name, value in tensors.items() if value is not None or name in ("input", "gate")}
        checks.types(eps, enable_pdl, **given)
        check_options(group_size, norm_before_gate, activation, rounding)
        eps = float(eps)
        refuse_torch_func("gated_rmsnorm", input, gate, weight)
    grad = needs_grad(input, gate, weight)
    if out is not None and grad:
        raise RuntimeError("gated_rmsnorm with out= has no gradient: call it without, or under torch.no_grad()")
    if group_size is not None:
        group_size = int(group_size)
    options = eps, group_size, norm_before_gate, activation, rounding, enable_pdl
    if not traced and not grad:
        _run(input, gate, weight, result, *options)
        return result
    if out is None:
        return torch.ops.jitnorm.gated_rmsnorm(input, gate, weight, *options)  # type: ignore[no-any-return]
    torch.ops.jitnorm.gated_rmsnorm_out(input, gate, weight, out, *options)
    return out


def _key(
    input: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    group_size: int | None,
    activation: str,
    rounding: str,
) -> tuple[Any, ...]:
    """Return what kernels differ by, except the layout and the device."""
    size = input.shape[-1] if group_size is None else group_size
    return size, input.dtype, gate.dtype, None if weight is None else weight.dtype, activation, rounding


def _form(key: tuple[Any, ...], layout: str) -> GatedForm:
    _, _, gate_dtype, weight_dtype, activation, rounding = key
    return GatedForm(layout, weight_dtype is not None, gate_dtype == torch.float32, activation, rounding)


def _run(
    input: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    out: torch.Tensor,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
    activation: str,
    rounding: str,
    enable_pdl: bool | None,
) -> None:
    """Run the right kernel on arguments that have been checked."""
    key = _key(input, gate, weight, group_size, activation, rounding)
    _VARIANTS[norm_before_gate].run(key, input, gate, weight, out, eps, enable_pdl)


# The rest is called only by the slow path, by gradients, and by modules and backends that compute in PyTorch.


def grouped(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Return a view of `[..., groups * size]` as `[..., groups, size]`, or the tensor if it has one group."""
    return tensor if tensor.shape[-1] == size else tensor.unflatten(-1, (tensor.shape[-1] // size, size))


def _layout(size: int, *tensors: torch.Tensor | None) -> str:
    """Return the layout of tensors that have been checked. That of traced ones is as if they were aligned."""
    views = [grouped(tensor, size) for tensor in tensors if tensor is not None]
    return "unaligned" if views[0].is_cuda and not are_aligned(views) else "strided"


def has_kernel(input: torch.Tensor, group_size: int | None, *others: torch.Tensor | None) -> bool:
    """Return whether a kernel takes the size and the strides of `input`, and of those others that are not None."""
    size = input.shape[-1] if group_size is None else group_size
    tensors = [input, *(other for other in others if other is not None)]
    if not 1 <= size <= MAX_HIDDEN_SIZE or any(t.stride(-1) != 1 and t.shape[-1] > 1 for t in tensors):
        return False
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    views = {str(i): grouped(tensor, size) for i, tensor in enumerate(tensors)}
    return len(merged_dims(views)) <= MAX_LEADING_DIMS


def check_size(size: int, group_size: int | None = None) -> None:
    """Raise RuntimeError for rows, or groups, of a size without a kernel."""
    name, size = ("hidden_size", size) if group_size is None else ("group_size", group_size)
    if not 1 <= size <= MAX_HIDDEN_SIZE:
        raise RuntimeError(f"gated_rmsnorm does not support {name} {size}: supported are 1 to {MAX_HIDDEN_SIZE}")


def check_options(group_size: object, norm_before_gate: object, activation: object, rounding: object) -> None:
    """Raise for what is wrong with the options, except for a group size that does not divide the hidden size."""
    if group_size is not None:
        checks.integer("group_size", group_size)
    if not isinstance(norm_before_gate, bool):
        raise TypeError(f"norm_before_gate must be True or False, got {type(norm_before_gate).__name__}")
    checks.choice("activation", activation, tuple(ACTIVATIONS))
    checks.choice("rounding", rounding, ROUNDINGS)


def check_metadata(
    input: torch.Tensor,
    gate: torch.Tensor,
    weight: Any,
    group_size: Any,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> None:
    """Raise for what is wrong with dtypes, shapes, devices and the group's size. Works on fake tensors too."""
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a scalar")
    checks.dtype("input", input, dtypes)
    checks.dtype("gate", gate, (input.dtype, torch.float32))
    checks.shape("gate", gate, input.shape, "like input")
    checks.device("gate", gate, "input", input)
    hidden_size = input.shape[-1]
    if group_size is not None and (group_size < 1 or hidden_size == 0 or hidden_size % group_size):
        raise ValueError(f"group_size must divide input's last dimension of {hidden_size}, got {group_size}")
    if weight is not None:
        checks.dtype("weight", weight, dtypes)
        if group_size is None or weight.shape != (group_size,):
            why = "one factor for each element of input's last dimension, or of a group of it"
            checks.shape("weight", weight, [hidden_size], why)
        checks.device("weight", weight, "input", input)


def check(
    input: Any,
    gate: Any,
    weight: Any,
    out: Any,
    eps: Any,
    group_size: Any,
    norm_before_gate: Any,
    activation: Any,
    rounding: Any,
    enable_pdl: Any,
) -> None:
    """Raise for arguments that the bindings function `gated_rmsnorm` in rmsnorm.h refuses."""
    tensors = {"input": input, "gate": gate} | ({} if out is None else {"out": out})
    tensors |= {} if weight is None else {"weight": weight}
    for name, value in tensors.items():
        checks.tensor(name, value)
    check_options(group_size, norm_before_gate, activation, rounding)
    check_metadata(input, gate, weight, group_size)
    check_size(input.shape[-1], group_size)
    checks.supported_device("input", input)
    checks.eps(eps)
    checks.enable_pdl(enable_pdl)
    if out is not None:
        checks.dtype("out", out, (input.dtype,))
        checks.shape("out", out, input.shape, "like input")
        checks.device("out", out, "input", input)
    if input.numel() == 0:
        return
    for name, value in tensors.items():
        if value.shape[-1] > 1 and value.stride(-1) != 1:
            layout = f"shape {list(value.shape)} and strides {list(value.stride())}"
            raise ValueError(f"{name} must have a last stride of 1, got {layout}")
    size = int(input.shape[-1] if group_size is None else group_size)
    merged = check_layouts({name: grouped(value, size) for name, value in tensors.items()}, ("out",))
    if out is not None:
        check_in_place(merged)
        checks.no_shared_heads("out", merged["out"], "gate", merged["gate"])


def gated_rmsnorm_in_torch(
    input: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    activation: str = "silu",
    rounding: str = "once",
) -> torch.Tensor:
    """Return what `gated_rmsnorm` does, computed by PyTorch's operators, of any dtype, size and strides."""
    dtype = torch.promote_types(input.dtype, torch.float32)
    x, activated = input.to(dtype), getattr(torch.nn.functional, activation)(gate.to(dtype))
    if not norm_before_gate:
        x = x * activated
    rows = grouped(x, x.shape[-1] if group_size is None else group_size)
    normalised = (rows * torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + eps)).reshape(x.shape)
    if rounding == "hf":
        normalised = normalised.to(input.dtype)
        if weight is not None:
            normalised = normalised * _of_all_groups(weight, x)
    else:
        normalised = normalised if weight is None else normalised * _of_all_groups(weight, x).to(dtype)
    if norm_before_gate:
        normalised = normalised.to(dtype) * activated
    return normalised.to(input.dtype)


def _of_all_groups(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the weight of the last dimension of `x` for that of all groups, or of each."""
    return weight if weight.shape[-1] == x.shape[-1] else weight.repeat(x.shape[-1] // weight.shape[-1])


def _build(input: Any, gate: Any, weight: Any, *options: Any) -> None:
    """Check what can be checked while tracing, and build the kernel."""
    check_options(*options)
    group_size, norm_before_gate, activation, rounding = options
    check_metadata(input, gate, weight, group_size)
    check_size(input.shape[-1], group_size)
    key = _key(input, gate, weight, group_size, activation, rounding)
    size, dtype, _, weight_dtype, *_ = key
    layout = _layout(size, input, gate, weight)
    build_while_tracing(_VARIANTS[norm_before_gate], input, int(size), dtype, weight_dtype or dtype, _form(key, layout))


def _torch_gated_rmsnorm(
    input: Any,
    gate: Any,
    weight: Any,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
    activation: str,
    rounding: str,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    out = norms.new_like(input)
    _torch_gated_rmsnorm_out(
        input, gate, weight, out, eps, group_size, norm_before_gate, activation, rounding, enable_pdl
    )
    return out


def _torch_gated_rmsnorm_out(
    input: Any,
    gate: Any,
    weight: Any,
    out: Any,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
    activation: str,
    rounding: str,
    enable_pdl: bool | None = None,
) -> None:
    check(input, gate, weight, out, eps, group_size, norm_before_gate, activation, rounding, enable_pdl)
    _run(input, gate, weight, out, eps, group_size, norm_before_gate, activation, rounding, enable_pdl)
    increment_versions(out)


def _fake(
    input: Any,
    gate: Any,
    weight: Any,
    eps: Any,
    group_size: Any,
    before: Any,
    activation: Any,
    rounding: Any,
    pdl: Any = None,
) -> torch.Tensor:
    _build(input, gate, weight, group_size, before, activation, rounding)
    return norms.new_like(input)


def _fake_out(
    input: Any,
    gate: Any,
    weight: Any,
    out: Any,
    eps: Any,
    group_size: Any,
    before: Any,
    activation: Any,
    rounding: Any,
    pdl: Any = None,
) -> None:
    _build(input, gate, weight, group_size, before, activation, rounding)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.eps, ctx.group_size, ctx.norm_before_gate, ctx.activation = inputs[3:7]


def _backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    input, gate, weight = ctx.saved_tensors
    size = input.shape[-1] if ctx.group_size is None else ctx.group_size
    x, g, grad = (grouped(tensor.float(), size) for tensor in (input, gate, grad_out))
    sigmoid = torch.sigmoid(g)
    slope = sigmoid * (1 - sigmoid)
    activated, slope = (sigmoid, slope) if ctx.activation == "sigmoid" else (g * sigmoid, sigmoid + g * slope)
    normalises = x if ctx.norm_before_gate else x * activated
    rstd = torch.rsqrt(normalises.square().mean(dim=-1, keepdim=True) + ctx.eps)
    normalised = normalises * rstd
    weighted, grad_weighted, grad_weight = normalised, grad, None
    if ctx.norm_before_gate:
        grad_weighted = grad * activated
    grad_normalised = grad_weighted
    if weight is not None:
        factor = grouped(weight.float(), size)
        weighted, grad_normalised = normalised * factor, grad_weighted * factor
        grad_weight = (grad_weighted * normalised).sum_to_size(factor.shape).reshape(weight.shape).to(weight.dtype)
    grad_x = rstd * (grad_normalised - normalised * (grad_normalised * normalised).mean(dim=-1, keepdim=True))
    if ctx.norm_before_gate:
        grad_gate = grad * weighted * slope
    else:
        grad_gate, grad_x = grad_x * x * slope, grad_x * activated
    grads = grad_x.reshape(input.shape).to(input.dtype), grad_gate.reshape(gate.shape).to(gate.dtype), grad_weight
    return *grads, None, None, None, None, None, None


_options = "float eps, int? group_size, bool norm_before_gate, str activation, str rounding, bool? enable_pdl=None"
_name = register(
    f"gated_rmsnorm(Tensor input, Tensor gate, Tensor? weight, {_options}) -> Tensor", _torch_gated_rmsnorm, _fake
)
register_autograd(_name, _backward, _save)
register(
    f"gated_rmsnorm_out(Tensor input, Tensor gate, Tensor? weight, Tensor(a!) out, {_options}) -> ()",
    _torch_gated_rmsnorm_out,
    _fake_out,
)


def _arguments(shape: Shape) -> dict[str, Any]:
    return {"input": shape.randn(), "gate": shape.randn(), "weight": shape.randn(shape.size)}


for _operator in _VARIANTS.values():
    EXAMPLES[_operator.op] = Example(
        gated_rmsnorm,
        _arguments if _operator.norm_before_gate else (lambda shape: _arguments(shape) | {"norm_before_gate": False}),
        per_row=("input", "gate"),
        sizes=(100, 2880, 12288),
        make_outputs=lambda shape: {"out": shape.zeros()},
    )
