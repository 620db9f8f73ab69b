"""Products of a few rows and a weight, `x @ weight.t()`, by kernels of this package: for decode steps.

Such a product takes as long as reading the weight, and for a small weight as long as the latencies of its steps. There
are two kernels: REGISTERS loads the weight into registers, and is for up to 16 rows and small weights on any GPU since
sm_80; WGMMA is for up to 64 rows and Hopper. docs/performance.md has their times.

Each has variants with a gated activation, for a weight of gates and their factors, which save a kernel and what it
would read: the products are rounded to the dtype, as a GEMM's result is, and then activated.

With programmatic dependent launch both load a part of the weight before the kernels before them have ended. So they
must not be launched while a kernel that writes the weight may run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from jitnorm.activation import Activation
from jitnorm.batch_invariant.matmul.problem import Gemm, UnsupportedProblem
from jitnorm.core.targets import cuda_target
from jitnorm.integrations.engine_plugins import EngineKernelSpec
from jitnorm.jit.load import load
from jitnorm.jit.spec import KernelSpec, Target

_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class FewRowsKernel:
    """A kernel class for products of a few rows.

    Attributes:
        name: of its family and its bindings function, and the first part of its kernels' names.
        family: the file csrc/gemm/<family>.cuh.
        kernel_class: the C++ class template, of n, k, the element type and an activation's formula.
        max_rows: of x.
        supports: whether there is a kernel for n, k and an architecture such as "9.0a".

    The methods take an activation of two halves, gate and factor, for kernels whose result is the activation's. It has
    n / 2 columns.
    """

    name: str
    family: str
    kernel_class: str
    max_rows: int
    supports: Callable[[int, int, str], bool]

    def spec(
        self, n: int, k: int, dtype: torch.dtype, target: Target, activation: Activation | None = None
    ) -> KernelSpec:
        """Return the kernel for weights `[n, k]`."""
        arguments = f"{n}, {k}, {_DTYPES[dtype]}_t" + (f", {activation.formula}" if activation else "")
        return EngineKernelSpec(
            op=self.name,
            family=self.family,
            folder="gemm",
            binding=self.name,
            name=f"{self.name}{f'_{activation.op}' if activation else ''}_{n}x{k}_{_DTYPES[dtype]}",
            kernel=f"{self.kernel_class}<{arguments}>",
            target=target,
            warmup="",
        )

    def spec_of(self, weight: torch.Tensor, activation: Activation | None = None) -> KernelSpec:
        """Return the kernel for a weight's shape, dtype and device."""
        n, k = weight.shape
        return self.spec(n, k, weight.dtype, cuda_target(weight.device.index), activation)

    def is_supported(self, weight: torch.Tensor, activation: Activation | None = None) -> bool:
        """Return whether there is a kernel for a weight `[n, k]`, which must be contiguous."""
        n, k = weight.shape
        return (
            weight.is_cuda
            and weight.dtype in _DTYPES
            and weight.numel() > 0
            and torch.version.hip is None
            and not (activation and n % (2 * _COLUMNS_PER_TILE))
            and self.supports(n, k, cuda_target(weight.device.index).arch)
        )

    def gemm(self, weight: torch.Tensor, activation: Activation | None = None) -> Gemm:
        """Return the product by weights of this shape, dtype and device. The kernel is built if it is not in the cache.

        A call raises UnsupportedProblem for more than max_rows rows and for operands that the kernel does not take.

        Raises:
            RuntimeError: there is no compiler, or the build failed.
        """
        module: Any = load(self.spec_of(weight, activation))
        function = getattr(module, self.name)
        n, k = weight.shape

        def run(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
            if bias is not None or function(a, b.t(), out, None):
                raise UnsupportedProblem(
                    f"{self.name} for n={n}, k={k} and up to {self.max_rows} rows does not take {a.shape}"
                )

        return run


# Of csrc/gemm/few_rows.cuh:
_COLUMNS_PER_TILE, _STEP = 8, 64
_MAX_WARPS = 8  # of any block, see warps_per_block there
_MAX_STEPS_PER_WARP = 32  # a loop over the steps is unrolled
_MAX_WEIGHT = 1 << 24  # elements; torch's GEMMs take as long for larger ones


def _fits_registers(n: int, k: int, arch: str) -> bool:
    return (
        n * k <= _MAX_WEIGHT
        and not (n % _COLUMNS_PER_TILE or k % _STEP)
        and _steps_per_warp(k // _STEP) <= _MAX_STEPS_PER_WARP
        and float(arch.rstrip("af")) >= 8.0  # of the tensor core instruction
    )


def _steps_per_warp(steps: int) -> int:
    """Return the steps of a warp in a block of as many warps as take equal numbers of them."""
    return min(steps // warps for warps in range(1, _MAX_WARPS + 1) if steps % warps == 0)


def _fits_wgmma(n: int, k: int, arch: str) -> bool:
    return arch == "9.0a" and not (n % _COLUMNS_PER_TILE or k % _STEP)


REGISTERS = FewRowsKernel("few_rows_gemm", "few_rows", "FewRowsGemmKernel", 16, _fits_registers)
WGMMA = FewRowsKernel("few_rows_wgmma", "few_rows_wgmma", "FewRowsWgmmaKernel", 64, _fits_wgmma)
KERNELS = (REGISTERS, WGMMA)
