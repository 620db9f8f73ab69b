"""Quantisation to float8_e4m3fn: the kernels of per_tensor_quant_fp8 and per_token_quant_fp8, and what both refuse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from jitnorm.core import checks
from jitnorm.core.operators import CPP_TYPES, DTYPES, Operator
from jitnorm.core.targets import target_of
from jitnorm.core.torch_library import needs_grad
from jitnorm.jit.spec import KernelSpec, Target


@dataclass(frozen=True)
class QuantFp8(Operator):
    """One kernel of the family, for tensors of any size."""

    kernel_class: str  # in csrc/elementwise/quant_fp8.cuh and _cpu.h, with {} for the input's type

    def spec(self, dtype: torch.dtype, target: Target) -> KernelSpec:
        """What to build. TypeError for a dtype that is not supported."""
        if dtype not in CPP_TYPES:
            raise TypeError(f"{self.op} takes float16, bfloat16 and float32, got {dtype}")
        name = checks.DTYPE_NAMES[dtype]
        return KernelSpec(
            op=self.op,
            family="quant_fp8",
            entry=self.entry,
            name=f"{self.op}_{name}",
            kernel=self.kernel_class.format(CPP_TYPES[dtype]),
            target=target,
            warmup=f"--op {self.op} --dtype {name}",
        )

    def warmup_spec(self, size: object, dtype: torch.dtype, weight_dtype: torch.dtype, target: Target) -> KernelSpec:
        """As `spec`, of a warm-up's words: one kernel serves every size, and there is no weight."""
        return self.spec(dtype, target)

    def run(self, input: torch.Tensor, *arguments: Any) -> None:
        """Calls the kernel for `input` on it and on `arguments`, which have been checked."""
        self.call((input.dtype,), (input.dtype, target_of(input)), input, *arguments)


def check_kinds(input: Any, output_q: Any, output_s: Any) -> None:
    """What can be said of tensors without storage."""
    for name, value in (("input", input), ("output_q", output_q), ("output_s", output_s)):
        checks.tensor(name, value)
    checks.dtype("input", input, DTYPES)
    checks.dtype("output_q", output_q, (torch.float8_e4m3fn,))
    checks.shape("output_q", output_q, input.shape, "like input")
    checks.dtype("output_s", output_s, (torch.float32,))
    for name, value in (("output_q", output_q), ("output_s", output_s)):
        checks.device(name, value, "input", input)


def check_memory(input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor, writes_s: bool) -> None:
    checks.no_shared_memory("output_q", output_q, "input", input)
    checks.no_shared_memory("output_q", output_q, "output_s", output_s)
    if writes_s:
        checks.no_shared_memory("output_s", output_s, "input", input)


def refuse_gradient(operator: Operator, input: object) -> None:
    if needs_grad(input):
        raise RuntimeError(f"{operator.op} has no gradient: call it under torch.no_grad()")
