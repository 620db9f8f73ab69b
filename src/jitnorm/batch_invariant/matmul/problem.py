"""The types that the GEMM backends, the choice between them and their invariance check share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

# Numbers of rows at which the invariance check compares results. The tile of the Triton backend follows from these
# too, so that the check meets every tile that is ever chosen.
BATCH_SIZES = (*range(1, 257), 384, 511, 512, 777, 1024, 2047, 2048, 3333, 4096, 8191, 8192)


class UnsupportedProblem(RuntimeError):
    """A GEMM backend has no kernel for a problem, such as none without split k, or none that fits shared memory."""


@dataclass(frozen=True)
class Problem:
    """A GEMM `a @ b + bias` in all but the number of rows of `a`, by which no backend may be chosen."""

    device: torch.device
    n: int
    k: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    b_transposed: bool  # b is the transpose of a row-major matrix, as the weight of a linear layer is
    b_stride: int  # elements from one row of that matrix, or of b, to the next
    bias: bool
    tf32: bool

    def __str__(self) -> str:
        names = [str(d).removeprefix("torch.") for d in dict.fromkeys((self.dtype, self.out_dtype))]
        dense_stride = self.k if self.b_transposed else self.n
        return (
            f"{' to '.join(names)} n={self.n} k={self.k} {'nt' if self.b_transposed else 'nn'}"
            + ("" if self.b_stride == dense_stride else f" stride={self.b_stride}")
            + (" bias" if self.bias else "")
            + (" tf32" if self.tf32 else "")
        )


# A GEMM backend, bound to one problem: writes `a @ b + bias` into `out`, the last of (a, b, bias, out). `cuda_mm`
# in cuda.py says how these are laid out.
Gemm: TypeAlias = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None", torch.Tensor], None]
