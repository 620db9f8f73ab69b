"""Two RMSNorms of different widths in one launch, as multi-head latent attention has them.

DeepSeek V2 and V3 and Kimi K2 project a token's hidden state to `[q_lora_rank + kv_lora_rank + qk_rope_head_dim]`, and
normalise the first two parts, each with its own weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from jitnorm.core import checks, norms
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
from jitnorm.rmsnorm import RMSNORM

MAX_HIDDEN_SIZE = 8192


def is_supported_hidden_size(hidden_size: int, dtype: torch.dtype) -> bool:
    """Return whether `dual_rmsnorm` supports rows of this size and dtype: whole vectors of 16 bytes."""
    return 0 < hidden_size <= MAX_HIDDEN_SIZE and hidden_size * dtype.itemsize % checks.CUDA_ALIGNMENT == 0


@dataclass(eq=False, repr=False)
class DualRMSNorm(Operator):
    """The operator, whose kernels differ by both sizes."""

    has_weight: ClassVar[bool] = True
    options: ClassVar[tuple[str, ...]] = ("hidden_size2",)

    def spec(
        self, hidden_size: int, hidden_size2: int, dtype: torch.dtype, weight_dtype: torch.dtype, target: Target
    ) -> KernelSpec:
        """Return what to build for two sizes. RuntimeError for an unsupported size, TypeError for such a dtype."""
        if dtype not in self.dtypes or weight_dtype not in (dtype, torch.float32):
            raise TypeError(
                f"{self.op} takes {checks.enumeration(self.dtypes)}, with weights of the same dtype or float32, "
                f"got {dtype} with weights of {weight_dtype}"
            )
        for size in (hidden_size, hidden_size2):
            check_hidden_size(size, dtype)
        name, weight_name = checks.DTYPE_NAMES[dtype], checks.DTYPE_NAMES[weight_dtype]
        warmup, suffix = f"--op {self.op} --hidden-size {hidden_size} --hidden-size2 {hidden_size2} --dtype {name}", ""
        if weight_name != name:
            warmup, suffix = f"{warmup} --weight-dtype {weight_name}", f"_{weight_name}_weight"
        return KernelSpec(
            op=self.op,
            family="dual_rmsnorm",
            binding=self.binding,
            name=f"{self.op}_{hidden_size}_{hidden_size2}_{name}{suffix}",
            kernel=f"DualRMSNormKernel<{hidden_size}, {hidden_size2}, {CPP_TYPES[dtype]}, {CPP_TYPES[weight_dtype]}>",
            target=target,
            warmup=warmup,
        )

    def warmup_spec(
        self,
        size: int | None,
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        target: Target,
        hidden_size2: int | None = None,
    ) -> KernelSpec:
        """Return what to build for two sizes; without the second, for two norms of one size. Raises as `spec`."""
        first = int(size or 0)
        return self.spec(first, first if hidden_size2 is None else hidden_size2, dtype, weight_dtype, target)


DUAL_RMSNORM = DualRMSNorm("dual_rmsnorm", "dual_rmsnorm")

_kernels = DUAL_RMSNORM.fast_cache
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


def dual_rmsnorm(
    input1: torch.Tensor,
    input2: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    eps: float = 1e-6,
    out1: torch.Tensor | None = None,
    out2: torch.Tensor | None = None,
    eps2: float | None = None,
    enable_pdl: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise the last dimension of two tensors in one launch, each as `jitnorm.rmsnorm` does.

    These are `q_a_layernorm` and `kv_a_layernorm` of latent attention (DeepSeek-V2, 2024,
    https://arxiv.org/abs/2405.04434), on slices of one projection. A row has the same bits as by `jitnorm.rmsnorm` or
    `jitnorm.general_rmsnorm`, alone and in any batch. The first call of two sizes compiles their kernel.

    Args:
        input1: `[..., hidden_size1]`, float16, bfloat16 or float32, on the CPU or a CUDA device. The last stride is 1
            and the leading dimensions collapse to one row stride; on CUDA every row is aligned to 16 bytes.
            hidden_size1 is a multiple of 16 bytes (8 elements, or 4 in float32) up to 8192 elements.
        input2: `[..., hidden_size2]`, likewise, of the leading dimensions, dtype and device of input1. Its row stride
            may be another. The two may be slices of one tensor.
        weight1: `[hidden_size1]`, of the inputs' dtype or float32, on the same device.
        weight2: `[hidden_size2]`, of the dtype of weight1.
        eps: added to the mean of the squares; zero or more.
        out1: written; of the shape, dtype and device of input1, with strides as an input may have them. Pass input1
            itself for a call in place; any other `out1` shares no memory with the inputs. Rows of the two results may
            alternate in one tensor. Allocated if None. A call with `out1` or `out2` raises RuntimeError if an input or
            a weight needs a gradient.
        out2: written; the same for input2.
        eps2: the same as `eps`, for input2; None for `eps`.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it. The bits are the same.

    Returns:
        `out1` and `out2`.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype.
        ValueError: a shape, stride, device, alignment or overlap is not accepted, or eps or eps2 is invalid.
        RuntimeError: a hidden size is not supported (nothing is built then; `jitnorm.dispatch.dual_rmsnorm` serves it
            by two launches), the kernel cannot be built or launched, or `out1` or `out2` is given and a gradient is
            needed.
    """
    if _is_dynamo_compiling():
        return _call_torch_op(input1, input2, weight1, weight2, eps, out1, out2, eps2, enable_pdl)
    try:
        result1 = torch.empty_like(input1) if out1 is None else out1
        result2 = torch.empty_like(input2) if out2 is None else out2
        if (
            input1.__class__ is input2.__class__ is result1.__class__ is result2.__class__ is _Tensor
            and (
                weight1.__class__ is weight2.__class__ is _Parameter
                or weight1.__class__ is weight2.__class__ is _Tensor
            )
            and (
                not (input1.requires_grad or input2.requires_grad or weight1.requires_grad or weight2.requires_grad)
                or not torch.is_grad_enabled()
            )
            and not _kernels[input1.dtype][weight1.nbytes][weight2.nbytes](
                input1, input2, weight1, weight2, result1, result2, eps, eps if eps2 is None else eps2, enable_pdl
            )
        ):
            return result1, result2
    except Exception:  # no kernel yet, or arguments without such attributes: the slow path raises for these
        pass
    return _slow_path(input1, input2, weight1, weight2, eps, out1, out2, eps2, enable_pdl)


def _slow_path(
    input1: torch.Tensor,
    input2: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    eps: float,
    out1: torch.Tensor | None,
    out2: torch.Tensor | None,
    eps2: float | None,
    enable_pdl: bool | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the arguments, then run the right kernel, which is built and cached if need be."""
    tensors = input1, input2, weight1, weight2
    traced = needs_dispatcher(*tensors, out1, out2)
    if traced:
        outs = {name: out for name, out in (("out1", out1), ("out2", out2)) if out is not None}
        checks.types(eps, enable_pdl, input1=input1, input2=input2, weight1=weight1, weight2=weight2, **outs)
        check_eps2(eps2)
        refuse_torch_func(DUAL_RMSNORM.op, *tensors)
    else:
        check(*tensors, eps, out1, out2, eps2, enable_pdl)
    eps, eps2 = float(eps), None if eps2 is None else float(eps2)
    if traced or needs_grad(*tensors):
        return _call_torch_op(*tensors, eps, out1, out2, eps2, enable_pdl)
    result1 = norms.new_like(input1) if out1 is None else out1
    result2 = norms.new_like(input2) if out2 is None else out2
    _run(*tensors, result1, result2, eps, eps2, enable_pdl)
    return result1, result2


def _run(
    input1: Any, input2: Any, weight1: Any, weight2: Any, out1: Any, out2: Any, eps: Any, eps2: Any, enable_pdl: Any
) -> None:
    """Run the right kernel on arguments that have been checked."""
    key = input1.shape[-1], input2.shape[-1], input1.dtype, weight1.dtype, target_of(input1)
    arguments = input1, input2, weight1, weight2, out1, out2, eps, eps if eps2 is None else eps2, enable_pdl
    DUAL_RMSNORM.call((input1.dtype, weight1.nbytes, weight2.nbytes), key, *arguments)


def check_hidden_size(hidden_size: int, dtype: torch.dtype) -> None:
    """Raise RuntimeError for a size without a kernel."""
    if not is_supported_hidden_size(hidden_size, dtype):
        step, name = checks.CUDA_ALIGNMENT // dtype.itemsize, str(dtype).removeprefix("torch.")
        raise RuntimeError(
            f"{DUAL_RMSNORM.op} does not support hidden_size {hidden_size} in {name}: "
            f"supported are multiples of {step} up to {MAX_HIDDEN_SIZE}"
        )


def check(
    input1: Any,
    input2: Any,
    weight1: Any,
    weight2: Any,
    eps: Any,
    out1: Any,
    out2: Any,
    eps2: Any,
    enable_pdl: Any,
) -> None:
    """Raise for arguments that the bindings function in csrc/elementwise/dual_rmsnorm.h refuses."""
    inputs, weights = {"input1": input1, "input2": input2}, {"weight1": weight1, "weight2": weight2}
    outs = {name: out for name, out in (("out1", out1), ("out2", out2)) if out is not None}
    for name, value in (inputs | weights | outs).items():
        checks.tensor(name, value)
    _check_metadata(input1, input2, weight1, weight2, **outs)
    checks.supported_device("input1", input1)
    checks.eps(eps)
    check_eps2(eps2)
    checks.enable_pdl(enable_pdl)
    for name, value in (inputs | weights | outs).items():
        checks.rows(name, value)
    for name, out in outs.items():
        checks.no_row_overlap(name, out)
        for other_name, other in inputs.items():
            checks.no_overlap(name, out, other_name, other, reject_identical=name[-1] != other_name[-1])
        for other_name, other in weights.items():
            checks.no_shared_memory(name, out, other_name, other)
    if out1 is not None and out2 is not None:
        checks.no_overlap("out2", out2, "out1", out1, reject_identical=True)


def refuse_gradient(*tensors: torch.Tensor) -> None:
    """Raise for a call with results that are given, if it needs a gradient."""
    if needs_grad(*tensors):
        raise RuntimeError(
            f"{DUAL_RMSNORM.op} with out1= or out2= has no gradient: call it without, or under torch.no_grad()"
        )


def check_eps2(eps2: object) -> None:
    """Raise unless it is None or a number that is zero or more."""
    if eps2 is None:
        return
    checks.number("eps2", eps2)
    if not float(eps2) >= 0:  # type: ignore[arg-type]
        raise ValueError(f"eps2 must be zero or more, or None for eps, got {eps2}")


def _check_metadata(
    input1: torch.Tensor, input2: torch.Tensor, weight1: torch.Tensor, weight2: torch.Tensor, **outs: torch.Tensor
) -> None:
    """Raise for what is wrong with dtypes, shapes and devices; works on fake and meta tensors too."""
    inputs = {"1": input1, "2": input2}
    for number, input in inputs.items():
        if input.dim() == 0:
            raise ValueError(f"input{number} must have at least one dimension, got a scalar")
    checks.dtype("input1", input1, DTYPES)
    checks.dtype("input2", input2, (input1.dtype,))
    checks.dtype("weight1", weight1, (input1.dtype, torch.float32))
    checks.dtype("weight2", weight2, (weight1.dtype,))
    for input in inputs.values():
        check_hidden_size(int(input.shape[-1]), input.dtype)
    rows = "the leading dimensions of input1, and a last one of its own"
    checks.shape("input2", input2, [*input1.shape[:-1], input2.shape[-1]], rows)
    checks.device("input2", input2, "input1", input1)
    for number, weight in {"1": weight1, "2": weight2}.items():
        why = f"one factor for each element of the last dimension of input{number}"
        checks.shape(f"weight{number}", weight, [int(inputs[number].shape[-1])], why)
        checks.device(f"weight{number}", weight, "input1", input1)
    for name, out in outs.items():
        like = f"input{name[-1]}"
        checks.dtype(name, out, (input1.dtype,))
        checks.shape(name, out, inputs[name[-1]].shape, f"like {like}")
        checks.device(name, out, "input1", input1)


def _call_torch_op(
    input1: torch.Tensor,
    input2: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    eps: float,
    out1: torch.Tensor | None,
    out2: torch.Tensor | None,
    eps2: float | None,
    enable_pdl: bool | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the operator in torch.ops.jitnorm, for tracers and gradients."""
    tensors = input1, input2, weight1, weight2
    if out1 is None and out2 is None:
        result: tuple[torch.Tensor, torch.Tensor] = torch.ops.jitnorm.dual_rmsnorm(*tensors, eps, eps2, enable_pdl)
        return result
    refuse_gradient(*tensors)
    out1 = norms.new_like(input1) if out1 is None else out1
    out2 = norms.new_like(input2) if out2 is None else out2
    torch.ops.jitnorm.dual_rmsnorm_out(*tensors, out1, out2, eps, eps2, enable_pdl)
    return out1, out2


def _torch_op(
    input1: Any,
    input2: Any,
    weight1: Any,
    weight2: Any,
    eps: float = 1e-6,
    eps2: float | None = None,
    enable_pdl: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out1, out2 = norms.new_like(input1), norms.new_like(input2)
    _run_unchecked(input1, input2, weight1, weight2, out1, out2, eps, eps2, enable_pdl)
    return out1, out2


def _torch_op_out(
    input1: Any,
    input2: Any,
    weight1: Any,
    weight2: Any,
    out1: Any,
    out2: Any,
    eps: float = 1e-6,
    eps2: float | None = None,
    enable_pdl: bool | None = None,
) -> None:
    _run_unchecked(input1, input2, weight1, weight2, out1, out2, eps, eps2, enable_pdl)
    increment_versions(out1, out2)


def _run_unchecked(
    input1: Any, input2: Any, weight1: Any, weight2: Any, out1: Any, out2: Any, eps: Any, eps2: Any, enable_pdl: Any
) -> None:
    """Run the cached kernel, or check the arguments and run the right one."""
    tensors = input1, input2, weight1, weight2
    fast_key = input1.dtype, weight1.nbytes, weight2.nbytes
    arguments = *tensors, out1, out2, eps, eps if eps2 is None else eps2, enable_pdl
    if not DUAL_RMSNORM.try_cached(fast_key, *arguments):
        check(*tensors, eps, out1, out2, eps2, enable_pdl)
        _run(*tensors, out1, out2, eps, eps2, enable_pdl)


def _build(input1: Any, input2: Any, weight1: Any, weight2: Any, **outs: Any) -> None:
    """Check what can be checked while tracing, and build the kernel."""
    _check_metadata(input1, input2, weight1, weight2, **outs)
    sizes = int(input1.shape[-1]), int(input2.shape[-1])
    build_while_tracing(DUAL_RMSNORM, input1, *sizes, input1.dtype, weight1.dtype)


def _fake(
    input1: Any, input2: Any, weight1: Any, weight2: Any, eps: Any = 1e-6, eps2: Any = None, enable_pdl: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    _build(input1, input2, weight1, weight2)
    return norms.new_like(input1), norms.new_like(input2)


def _fake_out(
    input1: Any,
    input2: Any,
    weight1: Any,
    weight2: Any,
    out1: Any,
    out2: Any,
    eps: Any = 1e-6,
    eps2: Any = None,
    enable_pdl: Any = None,
) -> None:
    _build(input1, input2, weight1, weight2, out1=out1, out2=out2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.eps = inputs[4], inputs[4] if inputs[5] is None else inputs[5]


def _backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors
    of_inputs, of_weights = [], []
    for x, weight, eps, grad in zip(saved[:2], saved[2:], ctx.eps, grads, strict=True):
        grad_x, grad_weight = norms.gradients(RMSNORM, x, weight, eps, grad)
        of_inputs.append(grad_x.to(x.dtype))
        of_weights.append(grad_weight.to(weight.dtype))
    return *of_inputs, *of_weights, None, None, None


_tensors = "Tensor input1, Tensor input2, Tensor weight1, Tensor weight2"
_options = "float eps=1e-6, float? eps2=None, bool? enable_pdl=None"
_name = register(f"dual_rmsnorm({_tensors}, {_options}) -> (Tensor, Tensor)", _torch_op, _fake)
register_autograd(_name, _backward, _save)
register(f"dual_rmsnorm_out({_tensors}, Tensor(a!) out1, Tensor(b!) out2, {_options}) -> ()", _torch_op_out, _fake_out)

EXAMPLES[DUAL_RMSNORM.op] = Example(
    dual_rmsnorm,
    lambda shape: {
        **{"input1": shape.randn(), "input2": shape.randn()},
        **{"weight1": shape.randn(shape.size), "weight2": shape.randn(shape.size)},
    },
    per_row=("input1", "input2"),
    sizes=(64, 512, 1536),
    make_outputs=lambda shape: {"out1": shape.zeros(), "out2": shape.zeros()},
)
