"""Measure copies of rows with accesses as wide as an operator's: no wider than the rows are aligned.

`out.copy_(x)` of contiguous tensors ignores rows, and has accesses of 16 bytes for any row size. Here a program of a
Triton kernel copies one row, or a few short ones.
"""

from __future__ import annotations

import torch

from jitnorm.benchmark import marker
from jitnorm.benchmark.settings import current_settings

_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # by the bytes of an access

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
else:
    _CONFIGS = [
        triton.Config({"ROWS": rows, "BLOCK": block}, num_warps=warps)
        for rows, block, warps in [(16, 128, 4), (8, 128, 4), (4, 128, 4), (2, 512, 4), (4, 1024, 8)]
        + [(1, block, max(2, min(8, block // 256))) for block in (512, 1024, 2048, 4096, 8192)]
    ]

    @triton.autotune(_CONFIGS, key=["num_rows", "width"])
    @triton.jit
    def _copy_rows_kernel(x, out, num_rows, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            at, mask = row * width + column, (row < num_rows) & (column < width)
            tl.store(out + at, tl.load(x + at, mask), mask)


def _copy_rows(x: torch.Tensor, out: torch.Tensor) -> None:
    """Copy contiguous `x` [num_rows, size] to `out`."""
    num_rows, row_bytes = x.shape[0], x.shape[1] * x.itemsize
    integer = _INTEGERS[next(width for width in _INTEGERS if row_bytes % width == 0)]
    x, out = x.view(integer), out.view(integer)
    _copy_rows_kernel[lambda config: (triton.cdiv(num_rows, config["ROWS"]),)](x, out, num_rows, x.shape[1])


def bench_row_copy(num_rows: int, size: int) -> marker.BenchResult:
    """Measure a copy of `num_rows` rows of `size` elements, or skip the cell where the rows have whole 16-byte vectors.

    A norm with a residual moves as many bytes as a copy of twice as many rows.
    """
    settings = current_settings()
    if triton is None or settings.device.type != "cuda":
        marker.skip("it is a Triton kernel, for CUDA")
    if size * settings.dtype.itemsize % 16 == 0:
        marker.skip("all accesses may have 16 bytes, as those of `copy`")
    x, out = marker.create_random(num_rows, size), marker.create_empty(num_rows, size)
    return marker.do_bench(
        _copy_rows,
        input_args=(x, out),
        memory_args=(x,),
        memory_output=(out,),
        metrics=(0.5,),
        check=lambda x, out: x,
    )
