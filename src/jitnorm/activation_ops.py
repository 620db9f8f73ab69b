"""The gated activations: their kernels, what they refuse, and their place in torch.ops.jitnorm.

What the operators in activation.py need where a call finds no kernel, is traced, or needs a gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from jitnorm.core import checks
from jitnorm.core.operators import CPP_TYPES, DTYPES, Operator
from jitnorm.core.targets import target_of
from jitnorm.core.torch_library import (
    build_while_tracing,
    count_version,
    is_traced,
    needs_grad,
    refuse_torch_func,
    register,
    register_autograd,
)
from jitnorm.jit.spec import KernelSpec, Target

_MOST_WIDTH = 1 << 30


@dataclass(frozen=True)
class Activation(Operator):
    """One of the gated activations."""

    policy: str  # what is done to a gate, in csrc/elementwise/activation.h

    def spec(self, dtype: torch.dtype, vector_bytes: int, target: Target) -> KernelSpec:
        """What to build for rows that accesses of `vector_bytes` fit; the width itself is known to the call alone."""
        if dtype not in CPP_TYPES:
            raise TypeError(f"{self.op} takes float16, bfloat16 and float32, got {dtype}")
        name = checks.DTYPE_NAMES[dtype]
        full = vector_bytes == checks.CUDA_ALIGNMENT
        return KernelSpec(
            op=self.op,
            family="activation",
            entry=self.entry,
            name=f"{self.op}_{name}" + ("" if full else f"_by_{vector_bytes}"),
            kernel=f"ActivationKernel<{CPP_TYPES[dtype]}, {self.policy}, {vector_bytes}>",
            target=target,
            warmup=f"--op {self.op} --dtype {name}"
            + ("" if full else f" --hidden-size {vector_bytes // dtype.itemsize}"),
        )

    def warmup_spec(self, width: int | None, dtype: torch.dtype, _: torch.dtype, target: Target) -> KernelSpec:
        """What to build for rows of `width`, or of whole 16 bytes where it is None."""
        if width is None:
            return self.spec(dtype, checks.CUDA_ALIGNMENT, target)
        _check_width(self.op, width, dtype)
        return self.spec(dtype, checks.vector_bytes(width * dtype.itemsize), target)

    def run(self, input: torch.Tensor, *arguments: Any) -> None:
        """Calls the kernel that serves `input` on it and on `arguments`, which have been checked."""
        if input.shape[-1] == 0:
            return
        key = input.dtype, checks.vector_bytes(input.shape[-1] // 2 * input.itemsize), target_of(input)
        self.call((input.dtype,), key, input, *arguments)


SILU_AND_MUL = Activation("silu_and_mul", "activation", "SiLU")
GELU_AND_MUL = Activation("gelu_and_mul", "activation", "GELU")
GELU_TANH_AND_MUL = Activation("gelu_tanh_and_mul", "activation", "GELUTanh")
ACTIVATIONS = (SILU_AND_MUL, GELU_AND_MUL, GELU_TANH_AND_MUL)


def _width(op: str, input: torch.Tensor) -> int:
    """d of an input [..., 2 * d]. ValueError for an odd number, RuntimeError where no kernel serves d."""
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a scalar")
    columns = int(input.shape[-1])
    if columns % 2:
        raise ValueError(f"input must have an even last dimension, gates and factors, got shape {list(input.shape)}")
    if columns:  # of none there is nothing to compute
        _check_width(op, columns // 2, input.dtype)
    return columns // 2


def _check_width(op: str, width: int, dtype: torch.dtype) -> None:
    if width * dtype.itemsize % 4 or not 1 <= width <= _MOST_WIDTH:
        raise RuntimeError(
            f"{op} does not support d = {width} in {str(dtype).removeprefix('torch.')}: "
            f"supported are multiples of {4 // dtype.itemsize} up to 2^30"
        )


def new_out(input: torch.Tensor, expert_ids: object) -> torch.Tensor:
    """Where a call without `out` writes: rows that are skipped are zero."""
    shape = (*input.shape[:-1], input.shape[-1] // 2)
    return input.new_empty(shape) if expert_ids is None else input.new_zeros(shape)


def check(op: str, input: Any, out: Any, expert_ids: Any, expert_step: Any, enable_pdl: Any) -> None:
    """Raises for what the glue in csrc/elementwise/activation.h refuses."""
    _check_types(input, out, expert_ids, expert_step, enable_pdl)
    _check_kinds(op, input, out, expert_ids, expert_step)
    checks.supported_device("input", input)
    alignment = checks.vector_bytes(input.shape[-1] // 2 * input.itemsize)
    checks.rows("input", input, alignment)
    if out is not None:
        checks.rows("out", out, alignment)
        checks.written_rows("out", out)
        checks.no_overlap("out", out, "input", input, even_exactly=True)
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
    """What torch's dispatcher would refuse in words of its own."""
    for name, value in (("input", input), ("out", out), ("expert_ids", expert_ids)):
        if value is not None or name == "input":
            checks.tensor(name, value)
    checks.integer("expert_step", expert_step)
    checks.enable_pdl(enable_pdl)


def _check_kinds(op: str, input: torch.Tensor, out: Any, expert_ids: Any, expert_step: Any) -> None:
    """What can be said of tensors without storage."""
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


def first_activation(
    activation: Activation,
    input: torch.Tensor,
    out: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    expert_step: int,
    enable_pdl: bool | None,
) -> torch.Tensor:
    """The way of a call that finds no kernel or is refused by it: says what is wrong, or gets the right kernel."""
    traced = is_traced(input, out, expert_ids)
    if traced:
        _check_types(input, out, expert_ids, expert_step, enable_pdl)
        refuse_torch_func(activation.op, input)
    else:
        check(activation.op, input, out, expert_ids, expert_step, enable_pdl)
    if traced or needs_grad(input):
        return dispatch_activation(activation, input, out, expert_ids, int(expert_step), enable_pdl)
    to = new_out(input, expert_ids) if out is None else out
    activation.run(input, to, expert_ids, expert_step, enable_pdl)
    return to


def dispatch_activation(
    activation: Activation,
    input: torch.Tensor,
    out: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    expert_step: int,
    enable_pdl: bool | None,
) -> torch.Tensor:
    """A call by way of torch's dispatcher."""
    if out is None:
        operator = getattr(torch.ops.jitnorm, activation.op)
        result: torch.Tensor = operator(input, expert_ids, expert_step, enable_pdl)
        return result
    if needs_grad(input):
        raise RuntimeError(f"{activation.op} with out= has no gradient: call it without, or under torch.no_grad()")
    getattr(torch.ops.jitnorm, f"{activation.op}_out")(input, out, expert_ids, expert_step, enable_pdl)
    return out


def _silu_backward(grad: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Written out, as aten's has no derivative."""
    sigmoid = gate.sigmoid()
    return grad * sigmoid * (1 + gate * (1 - sigmoid))


def _gelu_backward(grad: torch.Tensor, gate: torch.Tensor, approximate: str) -> Any:
    return torch.ops.aten.gelu_backward(grad, gate, approximate=approximate)


# By policy, of a gate in float32: the activation, and what it makes of a gradient. Looked up in aten when called, as
# that takes time.
_FORMULAS: dict[str, tuple[Any, Any]] = {
    "SiLU": (F.silu, _silu_backward),
    "GELU": (F.gelu, partial(_gelu_backward, approximate="none")),
    "GELUTanh": (partial(F.gelu, approximate="tanh"), partial(_gelu_backward, approximate="tanh")),
}


def _register(activation: Activation) -> None:
    def run(input: Any, expert_ids: Any = None, expert_step: int = 1, enable_pdl: bool | None = None) -> torch.Tensor:
        arguments = expert_ids, expert_step, enable_pdl
        if input.dim() and activation.call_last((input.dtype,), input, out := new_out(input, expert_ids), *arguments):
            return out
        check(activation.op, input, None, *arguments)
        activation.run(input, out := new_out(input, expert_ids), *arguments)
        return out

    def run_out(
        input: Any, out: Any, expert_ids: Any = None, expert_step: int = 1, enable_pdl: bool | None = None
    ) -> None:
        arguments = input, out, expert_ids, expert_step, enable_pdl
        if not activation.call_last((input.dtype,), *arguments):
            check(activation.op, *arguments)
            activation.run(*arguments)
        count_version(out)

    def trace(input: Any, out: Any, expert_ids: Any, expert_step: int) -> None:
        _check_kinds(activation.op, input, out, expert_ids, expert_step)
        if width := int(input.shape[-1]) // 2:
            vector = checks.vector_bytes(width * input.itemsize)
            build_while_tracing(activation, input, input.dtype, vector)

    def fake(input: Any, expert_ids: Any = None, expert_step: int = 1, enable_pdl: bool | None = None) -> torch.Tensor:
        trace(input, None, expert_ids, expert_step)
        return new_out(input, None)

    def fake_out(
        input: Any, out: Any, expert_ids: Any = None, expert_step: int = 1, enable_pdl: bool | None = None
    ) -> None:
        trace(input, out, expert_ids, expert_step)

    def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])
        ctx.expert_step = inputs[2]

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, expert_ids = ctx.saved_tensors
        gradient = _gradient(activation, input, grad)
        if expert_ids is not None:
            gradient = torch.where(_skipped(input, expert_ids, ctx.expert_step), 0.0, gradient)
        return gradient.to(input.dtype), None, None, None

    rest = "Tensor? expert_ids=None, int expert_step=1, bool? enable_pdl=None"
    name = register(f"{activation.op}(Tensor input, {rest}) -> Tensor", run, fake)
    register_autograd(name, backward, save)
    register(f"{activation.op}_out(Tensor input, Tensor(a!) out, {rest}) -> ()", run_out, fake_out)


def _gradient(activation: Activation, input: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Of the input, in float32."""
    gate, factor = input.float().chunk(2, dim=-1)
    forward, backward = _FORMULAS[activation.policy]
    grad = grad.float()
    return torch.cat((backward(grad * factor, gate), grad * forward(gate)), dim=-1)


def _skipped(input: torch.Tensor, expert_ids: torch.Tensor, expert_step: int) -> torch.Tensor:
    """Which rows are, [..., 1]."""
    rows = math.prod(input.shape[:-1])
    each = expert_ids[torch.arange(rows, device=input.device) // expert_step]
    return (each == -1).reshape(*input.shape[:-1], 1)


for _activation in ACTIVATIONS:
    _register(_activation)
