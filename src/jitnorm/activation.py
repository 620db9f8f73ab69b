"""Gated activations of feed-forward layers: `out = activation(gate) * up`, where input is gate and up side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from jitnorm.core import checks
from jitnorm.core.operators import CPP_TYPES, DTYPES, EXAMPLES, Example, Operator
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
from jitnorm.jit.spec import KernelSpec, Target

MAX_WIDTH = 1 << 30  # kMaxWidth in csrc/elementwise/activation.h


@dataclass(eq=False, repr=False)
class Activation(Operator):
    """One of the gated activations."""

    policy: str  # the policy class in csrc/elementwise/activation.h, which computes the activation

    size_name: ClassVar[str | None] = "d"
    needs_size: ClassVar[bool] = False

    def spec(self, dtype: torch.dtype, vector_bytes: int, target: Target) -> KernelSpec:
        """Return what to build for rows of whole accesses of `vector_bytes`. A kernel supports every such width."""
        if dtype not in CPP_TYPES:
            raise TypeError(f"{self.op} takes {checks.enumeration(DTYPES)}, got {dtype}")
        name = checks.DTYPE_NAMES[dtype]
        full = vector_bytes == checks.CUDA_ALIGNMENT
        return KernelSpec(
            op=self.op,
            family="activation",
            binding=self.binding,
            name=f"{self.op}_{name}" + ("" if full else f"_by_{vector_bytes}"),
            kernel=f"ActivationKernel<{CPP_TYPES[dtype]}, {self.policy}, {vector_bytes}>",
            target=target,
            warmup=f"--op {self.op} --dtype {name}"
            + ("" if full else f" --hidden-size {vector_bytes // dtype.itemsize}"),
        )

    def warmup_spec(
        self, size: int | None, dtype: torch.dtype, weight_dtype: torch.dtype, target: Target
    ) -> KernelSpec:
        """Return what to build for rows of `size` elements, or of whole 16 bytes if it is None."""
        if size is None:
            return self.spec(dtype, checks.CUDA_ALIGNMENT, target)
        _check_width(self.op, size, dtype)
        return self.spec(dtype, checks.vector_bytes(size * dtype.itemsize), target)

    def run(self, input: torch.Tensor, *arguments: Any) -> None:
        """Run the kernel that supports `input` on it and on `arguments`, which have been checked."""
        if input.shape[-1] == 0:
            return
        key = input.dtype, checks.vector_bytes(input.shape[-1] // 2 * input.itemsize), target_of(input)
        self.call((input.dtype,), key, input, *arguments)


SILU_AND_MUL = Activation("silu_and_mul", "activation", "SiLU")
GELU_AND_MUL = Activation("gelu_and_mul", "activation", "GELU")
GELU_TANH_AND_MUL = Activation("gelu_tanh_and_mul", "activation", "GELUTanh")

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_Tensor = torch.Tensor


def silu_and_mul(
    input: torch.Tensor,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,
) -> torch.Tensor:
    """Compute `out = silu(input[..., :d]) * input[..., d:]`, as in SwiGLU, in float32 and rounded once.

    `silu(x) = x / (1 + exp(-x))`, as `torch.nn.functional.silu` (Shazeer, 2020, https://arxiv.org/abs/2002.05202). A
    row's result has the same bits alone and in any batch. One kernel supports every d: the first call of a dtype
    compiles it.

    Args:
        input: `[..., 2 * d]`, float16, bfloat16 or float32, on the CPU or a CUDA device. The last stride is 1 and the
            leading dimensions collapse to one row stride. d is any number up to 2^30, zero included; in half precision
            it is even. On CUDA rows are aligned to 16 bytes if d is a multiple of 16 bytes, otherwise to 8 or 4, as d
            is.
        out: `[..., d]`, written; of the input's dtype and device, sharing no memory with it. Allocated if None. A call
            with `out` raises RuntimeError if the input needs a gradient; requires_grad of `out` itself is ignored.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it. The bits are the same.
        expert_ids: for mixture-of-experts, int32 or int64, `[n]`, contiguous, on the input's device: row i belongs to
            expert `expert_ids[i // expert_step]`, and rows of expert -1 are not computed. A given `out` keeps its
            values there; if `out` is None, these rows are zero. There may be more elements than rows need.
        expert_step: how many adjacent rows share an element of expert_ids; 1 or more.

    Returns:
        `out`.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype.
        ValueError: a shape, stride, device, alignment or overlap is not accepted, or expert_step is invalid.
        RuntimeError: d is not supported (nothing is built then), or the kernel cannot be built or launched.
    """
    return _gated_activation(SILU_AND_MUL, input, out, enable_pdl, expert_ids, expert_step)


def gelu_and_mul(
    input: torch.Tensor,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,
) -> torch.Tensor:
    """Compute `out = gelu(input[..., :d]) * input[..., d:]`, as in GEGLU, in float32 and rounded once.

    `gelu(x) = x * (1 + erf(x / sqrt(2))) / 2`, as `torch.nn.functional.gelu` (Hendrycks and Gimpel, 2016,
    https://arxiv.org/abs/1606.08415), computed without the cancellation in `1 + erf` for x far below zero.

    Args:
        input: `[..., 2 * d]`. It and the arguments below have dtypes, sizes and strides as for `jitnorm.silu_and_mul`.
        out: `[..., d]`, written. Allocated if None.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        expert_ids: one id for every `expert_step` rows. Rows of expert -1 are not computed.
        expert_step: how many adjacent rows share an element of expert_ids; 1 or more.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.silu_and_mul`.
    """
    return _gated_activation(GELU_AND_MUL, input, out, enable_pdl, expert_ids, expert_step)


def gelu_tanh_and_mul(
    input: torch.Tensor,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,
) -> torch.Tensor:
    """Compute `out = gelu(input[..., :d]) * input[..., d:]` with the tanh approximation of GELU, which Gemma uses.

    `gelu(x) = x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2`, as `torch.nn.functional.gelu` with
    `approximate="tanh"`, computed in float32 and rounded once.

    Args:
        input: `[..., 2 * d]`. It and the arguments below have dtypes, sizes and strides as for `jitnorm.silu_and_mul`.
        out: `[..., d]`, written. Allocated if None.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        expert_ids: one id for every `expert_step` rows. Rows of expert -1 are not computed.
        expert_step: how many adjacent rows share an element of expert_ids; 1 or more.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.silu_and_mul`.
    """
    return _gated_activation(GELU_TANH_AND_MUL, input, out, enable_pdl, expert_ids, expert_step)


def _gated_activation(
    activation: Activation,
    input: torch.Tensor,
    out: torch.Tensor | None,
    enable_pdl: bool | None,
    expert_ids: torch.Tensor | None,
    expert_step: int,
) -> torch.Tensor:
    if _is_dynamo_compiling():
        return _call_torch_op(activation, input, out, expert_ids, expert_step, enable_pdl)
    try:
        if (
            input.__class__ is _Tensor
            and (out is None or out.__class__ is _Tensor)
            and (expert_ids is None or expert_ids.__class__ is _Tensor)
            and (not input.requires_grad or not torch.is_grad_enabled())
        ):
            result = _new_out(input, expert_ids) if out is None else out
            if not activation.fast_cache[input.dtype](input, result, expert_ids, expert_step, enable_pdl):
                return result
    except Exception:  # no kernel yet, or arguments without such attributes: the slow path raises for these
        pass
    return _activation_slow_path(activation, input, out, expert_ids, expert_step, enable_pdl)


def _activation_slow_path(
    activation: Activation,
    input: torch.Tensor,
    out: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    expert_step: int,
    enable_pdl: bool | None,
) -> torch.Tensor:
    """Check the arguments, then run the right kernel, which is built and cached if need be."""
    traced = needs_dispatcher(input, out, expert_ids)
    if traced:
        _check_types(input, out, expert_ids, expert_step, enable_pdl)
        refuse_torch_func(activation.op, input)
    else:
        check(activation.op, input, out, expert_ids, expert_step, enable_pdl)
    if traced or needs_grad(input):
        return _call_torch_op(activation, input, out, expert_ids, int(expert_step), enable_pdl)
    result = _new_out(input, expert_ids) if out is None else out
    activation.run(input, result, expert_ids, expert_step, enable_pdl)
    return result


def _new_out(input: torch.Tensor, expert_ids: object) -> torch.Tensor:
    """Return a new `out`. Rows that the kernel skips are zero in it."""
    shape = (*input.shape[:-1], input.shape[-1] // 2)
    return input.new_empty(shape) if expert_ids is None else input.new_zeros(shape)


def check(op: str, input: Any, out: Any, expert_ids: Any, expert_step: Any, enable_pdl: Any) -> None:
    """Raise for arguments that the bindings function in csrc/elementwise/activation.h refuses."""
    _check_types(input, out, expert_ids, expert_step, enable_pdl)
    _check_metadata(op, input, out, expert_ids, expert_step)
    checks.supported_device("input", input)
    alignment = checks.vector_bytes(input.shape[-1] // 2 * input.itemsize)
    checks.rows("input", input, alignment)
    if out is not None:
        checks.rows("out", out, alignment)
        checks.no_row_overlap("out", out)
        checks.no_overlap("out", out, "input", input, reject_identical=True)
    if expert_ids is None:
        return
    checks.storage("expert_ids", expert_ids)
    checks.address("expert_ids", expert_ids, expert_ids.element_size())
    rows = math.prod(input.shape[:-1])
    needed = -(-rows // int(expert_step))
    if expert_ids.shape[0] < needed:
        raise ValueError(
            f"expert_ids must have {needed} element{'s' * (needed != 1)} or more, for {rows} rows "
            f"and an expert_step of {expert_step}, got {expert_ids.shape[0]}"
        )
    if out is not None:
        checks.no_shared_memory("out", out, "expert_ids", expert_ids)


def _check_types(input: Any, out: Any, expert_ids: Any, expert_step: Any, enable_pdl: Any) -> None:
    """Raise for bad types. torch's dispatcher would raise for them too, with messages that name no argument."""
    for name, value in (("input", input), ("out", out), ("expert_ids", expert_ids)):
        if value is not None or name == "input":
            checks.tensor(name, value)
    checks.integer("expert_step", expert_step)
    checks.enable_pdl(enable_pdl)


def _check_metadata(op: str, input: torch.Tensor, out: Any, expert_ids: Any, expert_step: Any) -> None:
    """Raise for what is wrong with dtypes, shapes and devices; works on fake and meta tensors too."""
    checks.dtype("input", input, DTYPES)
    width = _width(op, input)
    if out is not None:
        checks.dtype("out", out, (input.dtype,))
        checks.shape("out", out, [*input.shape[:-1], width], "input with half its last dimension")
        checks.device("out", out, "input", input)
    if expert_step < 1:
        raise ValueError(f"expert_step must be 1 or more, got {expert_step}")
    if expert_ids is not None:
        checks.indices("expert_ids", expert_ids, "input", input)


def _width(op: str, input: torch.Tensor) -> int:
    """Return d of an input [..., 2 * d]. ValueError for an odd dimension, RuntimeError if no kernel supports d."""
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a scalar")
    columns = int(input.shape[-1])
    if columns % 2:
        raise ValueError(f"input must have an even last dimension, gates and factors, got shape {list(input.shape)}")
    if columns:  # for zero columns, no kernel runs
        _check_width(op, columns // 2, input.dtype)
    return columns // 2


def _check_width(op: str, width: int, dtype: torch.dtype) -> None:
    if width * dtype.itemsize % checks.MIN_ACCESS_BYTES or not 1 <= width <= MAX_WIDTH:
        raise RuntimeError(
            f"{op} does not support d = {width} in {str(dtype).removeprefix('torch.')}: "
            f"supported are multiples of {checks.MIN_ACCESS_BYTES // dtype.itemsize} "
            f"up to {checks.power_of_two(MAX_WIDTH)}"
        )


def _call_torch_op(
    activation: Activation,
    input: torch.Tensor,
    out: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    expert_step: int,
    enable_pdl: bool | None,
) -> torch.Tensor:
    """Call the operator in torch.ops.jitnorm, for tracers and gradients."""
    if out is None:
        operator = getattr(torch.ops.jitnorm, activation.op)
        result: torch.Tensor = operator(input, expert_ids, expert_step, enable_pdl)
        return result
    if needs_grad(input):
        raise RuntimeError(f"{activation.op} with out= has no gradient: call it without, or under torch.no_grad()")
    getattr(torch.ops.jitnorm, f"{activation.op}_out")(input, out, expert_ids, expert_step, enable_pdl)
    return out


def _silu_backward(grad: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the gate. Written out, because torch.ops.aten.silu_backward has no derivative."""
    sigmoid = gate.sigmoid()
    return grad * sigmoid * (1 + gate * (1 - sigmoid))


def _gelu_backward(grad: torch.Tensor, gate: torch.Tensor, approximate: str) -> Any:
    return torch.ops.aten.gelu_backward(grad, gate, approximate=approximate)


# The activation of a gate in float32 and its backward, by policy. torch.ops.aten is looked up only at the call, because
# the look-up would slow down the import.
_FORMULAS: dict[str, tuple[Any, Any]] = {
    "SiLU": (F.silu, _silu_backward),
    "GELU": (F.gelu, partial(_gelu_backward, approximate="none")),
    "GELUTanh": (partial(F.gelu, approximate="tanh"), partial(_gelu_backward, approximate="tanh")),
}


def _register(activation: Activation) -> None:
    """Define two forms in torch.ops.jitnorm: a functional one, which has a gradient, and one that writes into `out`."""

    def run(input: Any, expert_ids: Any = None, expert_step: int = 1, enable_pdl: bool | None = None) -> torch.Tensor:
        arguments = expert_ids, expert_step, enable_pdl
        if input.dim() and activation.try_cached((input.dtype,), input, out := _new_out(input, expert_ids), *arguments):
            return out
        check(activation.op, input, None, *arguments)
        activation.run(input, out := _new_out(input, expert_ids), *arguments)
        return out

    def run_out(
        input: Any, out: Any, expert_ids: Any = None, expert_step: int = 1, enable_pdl: bool | None = None
    ) -> None:
        arguments = input, out, expert_ids, expert_step, enable_pdl
        if not activation.try_cached((input.dtype,), *arguments):
            check(activation.op, *arguments)
            activation.run(*arguments)
        increment_versions(out)

    def trace(input: Any, out: Any, expert_ids: Any, expert_step: int) -> None:
        _check_metadata(activation.op, input, out, expert_ids, expert_step)
        if width := int(input.shape[-1]) // 2:
            vector = checks.vector_bytes(width * input.itemsize)
            build_while_tracing(activation, input, input.dtype, vector)

    def fake(input: Any, expert_ids: Any = None, expert_step: int = 1, enable_pdl: bool | None = None) -> torch.Tensor:
        trace(input, None, expert_ids, expert_step)
        return _new_out(input, None)

    def fake_out(
        input: Any, out: Any, expert_ids: Any = None, expert_step: int = 1, enable_pdl: bool | None = None
    ) -> None:
        trace(input, out, expert_ids, expert_step)

    def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.expert_step = inputs[2]

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, expert_ids = ctx.saved_tensors
        grad_input = _gradient(activation, input, grad)
        if expert_ids is not None:
            grad_input = torch.where(_skipped(input, expert_ids, ctx.expert_step), 0.0, grad_input)
        return grad_input.to(input.dtype), None, None, None

    rest = "Tensor? expert_ids=None, int expert_step=1, bool? enable_pdl=None"
    name = register(f"{activation.op}(Tensor input, {rest}) -> Tensor", run, fake)
    register_autograd(name, backward, save)
    register(f"{activation.op}_out(Tensor input, Tensor(a!) out, {rest}) -> ()", run_out, fake_out)


def _gradient(activation: Activation, input: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the input, in float32."""
    gate, up = input.float().chunk(2, dim=-1)
    forward, backward = _FORMULAS[activation.policy]
    grad = grad.float()
    return torch.cat((backward(grad * up, gate), grad * forward(gate)), dim=-1)


def _skipped(input: torch.Tensor, expert_ids: torch.Tensor, expert_step: int) -> torch.Tensor:
    """Return a mask of the rows of expert -1, [..., 1]."""
    rows = math.prod(input.shape[:-1])
    expert_of_row = expert_ids[torch.arange(rows, device=input.device) // expert_step]
    return (expert_of_row == -1).reshape(*input.shape[:-1], 1)


for _activation, _function in (
    (SILU_AND_MUL, silu_and_mul),
    (GELU_AND_MUL, gelu_and_mul),
    (GELU_TANH_AND_MUL, gelu_tanh_and_mul),
):
    _register(_activation)
    EXAMPLES[_activation.op] = Example(
        _function,
        lambda shape: {"input": shape.randn(shape.rows, 2 * shape.size)},
        make_outputs=lambda shape: {"out": shape.zeros()},
    )
