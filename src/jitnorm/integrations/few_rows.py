"""Products of up to 16 rows and a weight, `x @ weight.t()`, by a kernel of this package: for engines' linear layers.

Such a product takes as long as reading the weight, and for a small weight as long as the latencies of its steps. On an
H200, bf16, with a norm before it, one row and 16 rows took these times, in microseconds:

| n | k | torch | the kernel |
|---|---|---|---|
| 1024 | 2048 | 13.4, 7.7 | 3.4, 4.4 |
| 1024 | 3072 | 8.2, 8.4 | 4.2, 5.7 |
| 4096 | 1024 | 6.5, 7.3 | 4.6, 5.6 |
| 6144 | 1024 | 8.3, 8.7 | 5.9, 6.8 |
| 4096 | 4096 | 15.1, 15.7 | 12.9, 14.4 |

With programmatic dependent launch the kernel loads the weight before the kernels before it have ended. So it must not
be launched while a kernel that writes the weight may run.
"""

from __future__ import annotations

from typing import Any

import torch

from jitnorm.batch_invariant.matmul.problem import Gemm, UnsupportedProblem
from jitnorm.core.targets import cuda_target
from jitnorm.jit.load import load
from jitnorm.jit.spec import KernelSpec, Target

MAX_ROWS = 16
# The elements of a weight. Larger ones are read at the memory's bandwidth by torch's GEMMs too: an H200 took as long
# with either for n = 6144, k = 4096.
MAX_WEIGHT = 1 << 24
_COLUMNS_PER_TILE, _STEP = 8, 64  # as in csrc/gemm/few_rows.cuh
_MAX_WARPS = 8  # of any block, see warps_per_block there
_MAX_STEPS_PER_WARP = 32  # a loop over the steps is unrolled
_MIN_ARCH = 8.0  # of the tensor core instruction
_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


class _Spec(KernelSpec):
    @property
    def warmup_command(self) -> str:
        return "load the model once where there is a compiler"


def spec(n: int, k: int, dtype: torch.dtype, target: Target) -> KernelSpec:
    """Return the kernel for weights `[n, k]`."""
    name = f"few_rows_gemm_{n}x{k}_{_DTYPES[dtype]}"
    return _Spec(
        op="few_rows_gemm",
        family="few_rows",
        folder="gemm",
        binding="few_rows_gemm",
        name=name,
        kernel=f"FewRowsGemmKernel<{n}, {k}, {_DTYPES[dtype]}_t>",
        target=target,
        warmup="",
    )


def spec_of(weight: torch.Tensor) -> KernelSpec:
    """Return the kernel for a weight's shape, dtype and device."""
    n, k = weight.shape
    return spec(n, k, weight.dtype, cuda_target(weight.device.index))


def is_supported(weight: torch.Tensor) -> bool:
    """Return whether there is a kernel for a weight `[n, k]`, which must be contiguous."""
    n, k = weight.shape
    return (
        weight.is_cuda
        and weight.dtype in _DTYPES
        and 0 < n * k <= MAX_WEIGHT
        and not (n % _COLUMNS_PER_TILE or k % _STEP)
        and _steps_per_warp(k // _STEP) <= _MAX_STEPS_PER_WARP
        and torch.version.hip is None
        and float(cuda_target(weight.device.index).arch.rstrip("af")) >= _MIN_ARCH
    )


def _steps_per_warp(steps: int) -> int:
    """Return the steps of a warp in a block of as many warps as take equal numbers of them."""
    return min(steps // warps for warps in range(1, _MAX_WARPS + 1) if steps % warps == 0)


def gemm(weight: torch.Tensor) -> Gemm:
    """Return the product by weights of this shape, dtype and device. The kernel is built if it is not in the cache.

    A call raises UnsupportedProblem for more than MAX_ROWS rows and for operands that the kernel does not take.

    Raises:
        RuntimeError: there is no compiler, or the build failed.
    """
    module: Any = load(spec_of(weight))
    function = module.few_rows_gemm
    n, k = weight.shape

    def run(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        if bias is not None or function(a, b.t(), out, None):
            raise UnsupportedProblem(f"the kernel for n={n}, k={k} and up to {MAX_ROWS} rows does not take {a.shape}")

    return run
