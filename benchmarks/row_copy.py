"""Copy rows as an operator has to read them: with accesses no wider than the rows are aligned.

`out.copy_(x)` of contiguous tensors ignores rows, and has accesses of 16 bytes for any row size.
`find_row_copy` returns a call of a Triton kernel, each program of which copies one row, or a few short ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from jitnorm.benchmark import marker

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
    def _copy_rows_kernel(x, out, num_rows, width, SWAP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            at, mask = row * width + column, (row < num_rows) & (column < width)
            values = tl.load(x + at, mask)
            if SWAP:
                tl.store(x + at, tl.load(out + at, mask), mask)
            tl.store(out + at, values, mask)


def find_row_copy(has_residual: bool) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """Return a function of a norm's tensors that moves as many bytes as the norm. They have a shape [num_rows, size].

    Args:
        has_residual: False for (input, weight, out): copies input to out. True for (input, residual, weight), both of
            which a norm writes: exchanges input and residual.
    """
    if triton is None:
        marker.skip("triton is not installed")

    def copy_rows(x: torch.Tensor, second: torch.Tensor, third: torch.Tensor) -> None:
        out = second if has_residual else third
        if x.dtype != out.dtype:
            marker.skip(f"copies of {x.dtype} and {out.dtype} differ")
        num_rows, row_bytes = x.shape[0], x.shape[1] * x.itemsize
        integer = _INTEGERS[next(width for width in _INTEGERS if row_bytes % width == 0)]
        x, out = x.view(integer), out.view(integer)
        grid = lambda config: (triton.cdiv(num_rows, config["ROWS"]),)  # noqa: E731
        _copy_rows_kernel[grid](x, out, num_rows, x.shape[1], SWAP=has_residual)

    return copy_rows
