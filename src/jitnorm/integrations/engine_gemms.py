"""A few rows of an engine's linear layers by cuBLASLt without split k, where that is faster than what torch calls.

torch takes the first kernel that cuBLASLt proposes, which for few rows and columns is often not the fastest. On an H200
one row with n = 1024, k = 2048 took 12.9 us, where 16 rows took 6.1 by another kernel; 64 rows with n = 4096, k = 12288
took 32.7 us, and 28.3 without split k. So both are timed when a model is loaded.

Two processes may choose differently, where the times are close. So a layer whose result must be the same on all ranks
of tensor parallelism, such as the router of experts, must not be among the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from jitnorm.batch_invariant.matmul import cublaslt
from jitnorm.batch_invariant.matmul.problem import Gemm, Problem, UnsupportedProblem
from jitnorm.jit.log import logger

ROWS = (1, 2, 4, 8, 16, 32, 64)  # at which both are timed; other numbers of rows count as the next of these
MAX_COLUMNS = 4096  # with more, or with more than k, both took about the same time
_MAX_RATIO = 0.95  # of the times: a smaller gain may be noise
_SAMPLES = 5
_SLEEP_CYCLES = 2_000_000  # about a millisecond, in which the host launches all GEMMs of a sample

Shape = tuple[int, int, torch.dtype, int | None]  # n, k, and the device's index
# For each shape that has been timed: the GEMM, and the numbers of rows for which it is faster.
_chosen: dict[Shape, tuple[Gemm, frozenset[int]]] = {}


def is_candidate(weight: object) -> bool:
    """Return whether a weight `[n, k]` is one that `linear` may multiply by itself."""
    return (
        isinstance(weight, torch.Tensor)
        and weight.is_cuda
        and weight.dtype in (torch.bfloat16, torch.float16)
        and weight.dim() == 2
        and weight.is_contiguous()
        and 0 < weight.shape[0] <= min(weight.shape[1], MAX_COLUMNS)
        and not (weight.shape[0] % 8 or weight.shape[1] % 8 or weight.data_ptr() % 16)
    )


def is_available() -> bool:
    """Return whether cuBLASLt can be called."""
    return cublaslt.library_version() > 0


def select(weights: Iterable[torch.Tensor]) -> list[str]:
    """Time both on the weights of a model, and let `linear` use the faster. Return what was chosen, in words.

    Args:
        weights: candidates. Those of one shape are read in turns, as a model does, so that they are not in the L2.
    """
    by_shape: dict[Shape, list[torch.Tensor]] = {}
    for weight in weights:
        by_shape.setdefault(_shape_of(weight), []).append(weight.detach())
    found = []
    for shape, same in by_shape.items():
        try:
            _chosen[shape] = choice = _choose(same)
        except RuntimeError as error:  # out of memory, for instance: torch's GEMM stays
            logger.debug("no GEMM was timed for %s: %s", shape, error)
            continue
        rows = ", ".join(map(str, sorted(choice[1]))) or "none"
        found.append(f"cuBLASLt without split k for n={shape[0]} k={shape[1]}, numbers of rows: {rows}")
    return found


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return `x @ weight.t()`, as torch.nn.functional.linear does."""
    n, k = weight.shape
    choice = _chosen.get((n, k, weight.dtype, weight.device.index))
    rows = x.numel() // k
    if (
        choice is None
        or not 0 < rows <= ROWS[-1]
        or 1 << (rows - 1).bit_length() not in choice[1]
        or x.dtype != weight.dtype
        or not x.is_contiguous()
        or x.data_ptr() % 16
    ):
        return F.linear(x, weight)
    out = x.new_empty(*x.shape[:-1], n)
    try:
        choice[0](x.view(rows, k), weight.t(), None, out.view(rows, n))
    except UnsupportedProblem:  # a number of rows that was not timed, or new memory of the weight
        return F.linear(x, weight)
    return out


def _shape_of(weight: torch.Tensor) -> Shape:
    return weight.shape[0], weight.shape[1], weight.dtype, weight.device.index


def _choose(weights: Sequence[torch.Tensor]) -> tuple[Gemm, frozenset[int]]:
    n, k, dtype, _ = _shape_of(weights[0])
    device = weights[0].device
    gemm = cublaslt.gemm(Problem(device, n, k, dtype, dtype, True, k, False, False))
    rows = set()
    with torch.no_grad(), torch.cuda.device(device):
        for count in ROWS:
            x, out = (torch.zeros(count, size, dtype=dtype, device=device) for size in (k, n))
            seconds: dict[Gemm, list[float]] = {gemm: [], _mm: []}
            try:
                for each in (gemm, _mm) * (1 + _SAMPLES):  # in turns, as clocks and temperature change
                    seconds[each].append(_seconds(each, x, weights, out))
            except UnsupportedProblem:
                continue
            if min(seconds[gemm][1:]) < _MAX_RATIO * min(seconds[_mm][1:]):
                rows.add(count)
    return gemm, frozenset(rows)


def _mm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    torch.mm(a, b, out=out)


def _seconds(gemm: Gemm, x: torch.Tensor, weights: Sequence[torch.Tensor], out: torch.Tensor) -> float:
    """Return the GPU's time for a GEMM with each weight.

    The GPU waits until the host has launched them, as a launch may take the host longer than the GEMM. A CUDA graph
    would do the same, but its workspaces of cuBLAS might be those of the engine's graphs.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_SLEEP_CYCLES)
    start.record()
    for weight in weights:
        gemm(x, weight.t(), None, out)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
