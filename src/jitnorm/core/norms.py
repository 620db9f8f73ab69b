"""The RMSNorm family: which sizes it serves, with which kernel, and what it refuses.

Each operator has a file of its own for its signature and the fast way of a call. What they share is here: the slow way,
which a call takes once for each size, or to be told what is wrong with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from jitnorm.core import checks
from jitnorm.core.operators import CPP_TYPES, DTYPES, Operator
from jitnorm.core.targets import target_of
from jitnorm.jit.spec import KernelSpec, Target

_WARP_SIZES = (64, 128, 256)
_BLOCK_SIZES = range(512, 8192 + 1, 256)


def is_supported_hidden_size(hidden_size: int) -> bool:
    """Whether a kernel of the family serves `hidden_size`."""
    return hidden_size in _WARP_SIZES or hidden_size in _BLOCK_SIZES


def kernel_class(hidden_size: int, op: str = "rmsnorm") -> str:
    """The class in csrc/elementwise that serves `hidden_size`; RuntimeError if none does."""
    if hidden_size in _WARP_SIZES:
        return "RMSNormWarpKernel"
    if hidden_size in _BLOCK_SIZES:
        return "RMSNormKernel"
    raise RuntimeError(
        f"{op} does not support hidden_size {hidden_size}: "
        "supported are 64, 128, 256 and the multiples of 256 from 512 to 8192"
    )


@dataclass(frozen=True)
class Norm(Operator):
    """One operator of the family, or one of its variants."""

    policy: str  # what sets its kernels apart, in csrc/include/jitnorm/rms_policy.h
    family: str = field(default="rmsnorm", kw_only=True)  # the files in csrc/elementwise that have its kernels
    weight_offset: float = field(default=0.0, kw_only=True)  # what the weight gets before it multiplies

    def kernel_class(self, hidden_size: int) -> str:
        """The class in csrc/elementwise that serves `hidden_size`; RuntimeError if none does."""
        return kernel_class(hidden_size, self.op)

    def spec(self, hidden_size: int, dtype: torch.dtype, weight_dtype: torch.dtype, target: Target) -> KernelSpec:
        """What to build for one size. RuntimeError for a size that is not supported, TypeError for such a dtype."""
        cls = self.kernel_class(hidden_size)
        if dtype not in DTYPES or weight_dtype not in (dtype, torch.float32):
            raise TypeError(
                f"{self.op} takes float16, bfloat16 and float32, with weights of the same dtype or float32, "
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
            entry=self.entry,
            name=f"{self.op}_{hidden_size}_{name}{suffix}",
            kernel=f"{cls}<{hidden_size}, {CPP_TYPES[dtype]}, {CPP_TYPES[weight_dtype]}{policy}>",
            target=target,
            warmup=warmup,
        )

    def run(self, input: torch.Tensor, weight: torch.Tensor, *arguments: Any) -> None:
        """Calls the kernel that serves `input` and `weight` on `arguments`, which have been checked."""
        key = input.shape[-1], input.dtype, weight.dtype, target_of(input)
        self.call((input.dtype, weight.nbytes), key, *arguments)


RMSNORM = Norm("rmsnorm", "rmsnorm", "Plain")
GEMMA_RMSNORM = Norm("gemma_rmsnorm", "rmsnorm", "Gemma", weight_offset=1.0)
FUSED_ADD_RMSNORM = Norm("fused_add_rmsnorm", "fused_add_rmsnorm", "FusedAdd")
FUSED_ADD_RMSNORM_ROUND_SUM = Norm("fused_add_rmsnorm_round_sum", "fused_add_rmsnorm", "FusedAddRounded")
GEMMA_FUSED_ADD_RMSNORM = Norm("gemma_fused_add_rmsnorm", "fused_add_rmsnorm", "GemmaFusedAdd", weight_offset=1.0)
GEMMA_FUSED_ADD_RMSNORM_ROUND_SUM = Norm(
    "gemma_fused_add_rmsnorm_round_sum", "fused_add_rmsnorm", "GemmaFusedAddRounded", weight_offset=1.0
)
NORMS = (
    RMSNORM,
    GEMMA_RMSNORM,
    FUSED_ADD_RMSNORM,
    FUSED_ADD_RMSNORM_ROUND_SUM,
    GEMMA_FUSED_ADD_RMSNORM,
    GEMMA_FUSED_ADD_RMSNORM_ROUND_SUM,
)


def new_like(input: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Rows in the order of the input's. torch takes windows that begin one element apart for columns."""
    out = torch.empty_like(input, dtype=dtype)
    return out if out.dim() == 0 or out.stride(-1) == 1 else input.new_empty(input.shape, dtype=dtype)


def check_rmsnorm(norm: Norm, input: Any, weight: Any, eps: Any, out: Any, enable_pdl: Any) -> None:
    """Raises for what the glue `rmsnorm` in csrc/elementwise/rmsnorm.h refuses."""
    check_input_and_weight(norm, input, weight, eps, enable_pdl)
    if out is None:
        return
    check_like_input("out", out, input)
    checks.written_rows("out", out)
    checks.no_overlap("out", out, "input", input)
    checks.no_shared_memory("out", out, "weight", weight)


def check_fused_add_rmsnorm(norm: Norm, input: Any, residual: Any, weight: Any, eps: Any, enable_pdl: Any) -> None:
    """Raises for what the glue `fused_add_rmsnorm` in csrc/elementwise/rmsnorm.h refuses."""
    check_input_and_weight(norm, input, weight, eps, enable_pdl)
    check_like_input("residual", residual, input)
    for name, written in (("input", input), ("residual", residual)):
        checks.written_rows(name, written)
        checks.no_shared_memory(name, written, "weight", weight)
    checks.no_overlap("residual", residual, "input", input, even_exactly=True)


def check_kinds(norm: Norm, input: torch.Tensor, weight: torch.Tensor, **like_input: torch.Tensor) -> None:
    """What can be said of tensors without storage: RuntimeError for a size, errors for dtypes, shapes and devices."""
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a scalar")
    checks.dtype("input", input, DTYPES)
    checks.dtype("weight", weight, (input.dtype, torch.float32))
    hidden_size = int(input.shape[-1])
    norm.kernel_class(hidden_size)
    checks.shape("weight", weight, [hidden_size], "one factor for each element of input's last dimension")
    checks.device("weight", weight, "input", input)
    for name, value in like_input.items():
        checks.dtype(name, value, (input.dtype,))
        checks.shape(name, value, input.shape, "like input")
        checks.device(name, value, "input", input)


def check_input_and_weight(norm: Norm, input: Any, weight: Any, eps: Any, enable_pdl: Any) -> None:
    """What every operator of the family refuses of what they all have."""
    checks.tensor("input", input)
    checks.tensor("weight", weight)
    check_kinds(norm, input, weight)
    checks.supported_device("input", input)
    checks.eps(eps)
    checks.enable_pdl(enable_pdl)
    checks.rows("input", input)
    checks.rows("weight", weight)


def check_like_input(name: str, value: Any, input: torch.Tensor) -> None:
    """`value` is rows of the input's shape, dtype and device."""
    checks.tensor(name, value)
    checks.dtype(name, value, (input.dtype,))
    checks.shape(name, value, input.shape, "like input")
    checks.device(name, value, "input", input)
    checks.rows(name, value)
