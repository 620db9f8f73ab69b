"""What the RMSNorm operators share: sizes, kernel specs, argument checks and the gradient."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from jitnorm.core import checks
from jitnorm.core.operators import CPP_TYPES, DTYPES, Operator
from jitnorm.core.targets import target_of
from jitnorm.core.torch_library import build_while_tracing
from jitnorm.jit.spec import KernelSpec, Target

_WARP_HIDDEN_SIZES = (64, 128, 256)
_BLOCK_HIDDEN_SIZES = range(512, 8192 + 1, 256)
_HIDDEN_SIZES = frozenset((*_WARP_HIDDEN_SIZES, *_BLOCK_HIDDEN_SIZES))  # dynamo can look up a symbolic size in a set
# Of jitnorm.general_rmsnorm, which supports all sizes from 1. The leading dimensions are counted after those are merged
# whose strides allow it.
MAX_HIDDEN_SIZE = 65536
MAX_LEADING_DIMS = 3


def is_supported_hidden_size(hidden_size: int) -> bool:
    """Return whether the norms have a kernel for `hidden_size`."""
    return hidden_size in _HIDDEN_SIZES


def kernel_class(hidden_size: int, op: str = "rmsnorm") -> str:
    """Return the class in csrc/elementwise that supports `hidden_size`. RuntimeError if there is none."""
    if hidden_size in _WARP_HIDDEN_SIZES:
        return "RMSNormWarpKernel"
    if hidden_size in _BLOCK_HIDDEN_SIZES:
        return "RMSNormKernel"
    block = _BLOCK_HIDDEN_SIZES
    multiples = f"the multiples of {block.step} from {block[0]} to {block[-1]}"
    supported = checks.enumeration((*_WARP_HIDDEN_SIZES, multiples))
    raise RuntimeError(f"{op} does not support hidden_size {hidden_size}: supported are {supported}")


@dataclass(eq=False, repr=False)
class Norm(Operator):
    """One norm, or one of its variants."""

    policy: str  # the policy class in csrc/include/jitnorm/rms_policy.h, which distinguishes its kernels
    family: str = field(default="rmsnorm", kw_only=True)  # the files in csrc/elementwise that define its kernels
    weight_offset: float = field(default=0.0, kw_only=True)  # what is added to the weight before it multiplies
    residual_dtype: torch.dtype | None = field(default=None, kw_only=True)  # None for that of the input

    has_weight: ClassVar[bool] = True

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Return the dtypes of the input; a residual of its dtype is that of another norm."""
        return tuple(dtype for dtype in DTYPES if dtype != self.residual_dtype)

    def kernel_class(self, hidden_size: int) -> str:
        """Return the class in csrc/elementwise that supports `hidden_size`. RuntimeError if there is none."""
        return kernel_class(hidden_size, self.op)

    def spec(self, hidden_size: int, dtype: torch.dtype, weight_dtype: torch.dtype, target: Target) -> KernelSpec:
        """Return what to build for one size. RuntimeError for an unsupported size, TypeError for such a dtype."""
        cls = self.kernel_class(hidden_size)
        if dtype not in self.dtypes or weight_dtype not in (dtype, torch.float32):
            raise TypeError(
                f"{self.op} takes {checks.enumeration(self.dtypes)}, with weights of the same dtype or float32, "
                f"got {dtype} with weights of {weight_dtype}"
            )
        name, weight_name = checks.DTYPE_NAMES[dtype], checks.DTYPE_NAMES[weight_dtype]
        warmup, suffix = f"--op {self.op} --hidden-size {hidden_size} --dtype {name}", ""
        if weight_name != name:
            warmup += f" --weight-dtype {weight_name}"
            suffix = f"_{weight_name}_weight"
        policy = "" if self.policy == "Plain" else f", {self.policy}"
        return KernelSpec(
            op=self.op,
            family=self.family,
            binding=self.binding,
            name=f"{self.op}_{hidden_size}_{name}{suffix}",
            kernel=f"{cls}<{hidden_size}, {CPP_TYPES[dtype]}, {CPP_TYPES[weight_dtype]}{policy}>",
            target=target,
            warmup=warmup,
        )

    def run(self, input: torch.Tensor, weight: torch.Tensor, *arguments: Any) -> None:
        """Run the kernel for `input` and `weight` on the arguments of its bindings function, already checked."""
        key = input.shape[-1], input.dtype, weight.dtype, target_of(input)
        self.call((input.dtype, weight.nbytes), key, *arguments)


def new_like(input: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return an empty tensor like `input` whose last stride is 1.

    For rows that start one element apart, as overlapping windows do, torch.empty_like returns a transposed layout.
    """
    out = torch.empty_like(input, dtype=dtype)
    return out if out.dim() == 0 or out.stride(-1) == 1 else input.new_empty(input.shape, dtype=dtype)


def check_metadata(norm: Norm, input: torch.Tensor, weight: torch.Tensor, **like_input: torch.Tensor) -> None:
    """Raise for what is wrong with dtypes, shapes and devices; works on fake and meta tensors too.

    `like_input` are the other arguments that must have the input's shape and device, by name. They must have its dtype
    too, except a residual for which the norm names one.
    """
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a scalar")
    checks.dtype("input", input, norm.dtypes)
    checks.dtype("weight", weight, (input.dtype, torch.float32))
    hidden_size = int(input.shape[-1])
    norm.kernel_class(hidden_size)
    checks.shape("weight", weight, [hidden_size], "one factor for each element of input's last dimension")
    checks.device("weight", weight, "input", input)
    for name, value in like_input.items():
        dtype = norm.residual_dtype if name == "residual" else None
        checks.dtype(name, value, (dtype or input.dtype,))
        checks.shape(name, value, input.shape, "like input")
        checks.device(name, value, "input", input)


def check_input_and_weight(norm: Norm, input: Any, weight: Any, eps: Any, enable_pdl: Any) -> None:
    """Raise for what is wrong with the arguments that all norms have."""
    checks.tensor("input", input)
    checks.tensor("weight", weight)
    check_metadata(norm, input, weight)
    checks.supported_device("input", input)
    checks.eps(eps)
    checks.enable_pdl(enable_pdl)
    checks.rows("input", input)
    checks.rows("weight", weight)


def check_like_input(name: str, value: Any, input: torch.Tensor, *dtypes: torch.dtype) -> None:
    """Raise unless `value` is rows of the input's shape and device, and of its dtype or, if given, one of `dtypes`."""
    checks.tensor(name, value)
    checks.dtype(name, value, dtypes or (input.dtype,))
    checks.shape(name, value, input.shape, "like input")
    checks.device(name, value, "input", input)
    checks.rows(name, value)


def check_and_build(norm: Norm, input: torch.Tensor, weight: torch.Tensor, **like_input: torch.Tensor) -> None:
    """Raise for bad metadata, then build the kernel, so that the compiled graph's first run does not have to."""
    check_metadata(norm, input, weight, **like_input)
    build_while_tracing(norm, input, int(input.shape[-1]), input.dtype, weight.dtype)


def gradients(
    norm: Norm, x: torch.Tensor, weight: torch.Tensor, eps: float, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of `x`, which was normalised, and of the weight, in float32."""
    x, grad_out, factor = x.float(), grad.float(), weight.float() + norm.weight_offset
    rstd = torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + eps)
    normalised, grad_normalised = x * rstd, grad_out * factor
    grad_x = rstd * (grad_normalised - normalised * (grad_normalised * normalised).mean(dim=-1, keepdim=True))
    grad_weight = (grad_out * normalised).reshape(-1, x.shape[-1]).sum(dim=0)
    return grad_x, grad_weight
