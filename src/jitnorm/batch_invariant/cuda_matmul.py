"""Products on CUDA: which road a product takes, by all that it is but the number of rows."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from jitnorm.batch_invariant import cublaslt
from jitnorm.batch_invariant.cpu_matmul import aligned
from jitnorm.batch_invariant.triton_needed import on_device_of, triton_module

_ALIGNMENT = 16  # bytes, of every operand: what tensor cores and the copy engine ask for


@dataclass(frozen=True)
class Problem:
    """A product of any number of rows."""

    device: torch.device
    n: int
    k: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    b_transposed: bool  # b is the transpose of a matrix with rows, as the weight of a linear layer is
    b_stride: int  # elements from one row of that, or of b, to the next
    bias: bool
    tf32: bool

    def __str__(self) -> str:
        names = [str(d).removeprefix("torch.") for d in dict.fromkeys((self.dtype, self.out_dtype))]
        words = f"{' to '.join(names)} n={self.n} k={self.k} {'nt' if self.b_transposed else 'nn'}"
        own = self.k if self.b_transposed else self.n
        return (
            words
            + ("" if self.b_stride == own else f" stride={self.b_stride}")
            + (" bias" if self.bias else "")
            + (" tf32" if self.tf32 else "")
        )


# (a, b, bias, out), all of them laid out as `cuda_product` does
Road: TypeAlias = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None", torch.Tensor], None]

# By what a call can tell of a problem in the least time; decode calls products of 10 us.
_roads: dict[tuple[Any, ...], Road] = {}
_lock = threading.Lock()


def cuda_product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """`a @ b + bias` of checked tensors."""
    (m, k), n = a.shape, b.shape[1]
    out = a.new_empty((m, n), dtype=out_dtype)
    if not (m and n and k):
        return out.zero_() if bias is None else out.copy_(bias)
    # Another row stride or address of a could mean another kernel, and these may depend on the batch.
    a = aligned(a, _ALIGNMENT)
    if bias is not None:
        bias = aligned(bias, _ALIGNMENT)
    down, across = b.stride()
    if not ((down == 1 and across >= k) or (across == 1 and down >= n)) or b.data_ptr() % _ALIGNMENT:
        b = b.clone(memory_format=torch.contiguous_format)
        down, across = n, 1
    dtype, device = a.dtype, a.device
    tf32 = dtype == torch.float32 and tf32_allowed()
    key = (n, k, down, across, dtype, out_dtype, bias is None, tf32, device)
    road = _roads.get(key)
    if device.index == torch.cuda.current_device():
        (road or _find_road(key))(a, b, bias, out)
    else:
        with torch.cuda.device(device):
            (road or _find_road(key))(a, b, bias, out)
    return out


def cuda_batched_product(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """`a[i] @ b[i]` of checked tensors. Attention makes these, whose sizes grow with every token: too many to prove."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2], dtype=out_dtype)
    if out.numel() == 0 or a.shape[2] == 0:
        return out.zero_()
    with on_device_of(a):
        triton_module("triton_matmul").batched(a, b, out, tf32_allowed())
    return out


def tf32_allowed() -> bool:
    """Whether the user lets torch round float32 operands to TF32."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # torch 2.9 and later
    if precision is not None:
        return bool(precision == "tf32")
    return bool(torch.backends.cuda.matmul.allow_tf32)


def road_of(problem: Problem) -> Road:
    """cuBLASLt where it is proven to keep the promise for this product, else the Triton kernel."""
    from jitnorm.batch_invariant.proof import holds

    if cublaslt.library_version():
        road = cublaslt.road(problem)
        if holds("cublaslt", cublaslt.identity(), Path(cublaslt.__file__), road, problem):
            return road
    return triton_road(problem)


def triton_road(problem: Problem) -> Road:
    """With tiles by the number of rows, where that is proven to leave the bits alone; else with one size of tile."""
    from jitnorm.batch_invariant.proof import holds

    kernel = triton_module("triton_matmul")
    free = functools.partial(kernel.run, problem, False)
    road = functools.partial(kernel.run, problem, True)
    if holds("triton", kernel.VERSION, Path(kernel.__file__), free, problem):
        road = free
    kernel.compile_tiles(problem, road)
    return road


def _find_road(key: tuple[Any, ...]) -> Road:
    problem = _problem(*key)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"batch-invariant mode meets a product for the first time ({problem}) while a CUDA graph is captured, and "
            "must find out first which kernel keeps its promise: run the model once in the mode before capturing"
        )
    with _lock:
        if key not in _roads:
            with torch.no_grad():
                _roads[key] = road_of(problem)
        return _roads[key]


def _problem(
    n: int,
    k: int,
    down: int,
    across: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    no_bias: bool,
    tf32: bool,
    device: torch.device,
) -> Problem:
    transposed = down == 1 and across >= k
    return Problem(device, n, k, dtype, out_dtype, transposed, across if transposed else down, not no_bias, tf32)
