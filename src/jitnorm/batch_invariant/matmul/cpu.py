"""GEMMs on the CPU, by torch's library, in blocks that always have the same number of rows.

The library chooses its kernel by the shapes of its operands, so every call gives it the same shape. The last block is
padded with zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from jitnorm.batch_invariant.operands import contiguous_aligned

# With fewer columns, what the library does with a row depends on the row's place and on the strides of b.
_MIN_COLUMNS = 16
# With so many rows, every block begins at a multiple of 64 bytes, as an allocation does, whatever the row's length.
_BLOCK_ROWS = 32


def addmm(
    addend: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """Return `beta * addend + alpha * a @ b` for `[m, k]` and `[k, n]`.

    Args:
        addend: broadcast to `[m, n]`; None for zero.
    """
    rows, columns = a.shape[0], b.shape[1]
    if 0 < columns < _MIN_COLUMNS:
        padding = _MIN_COLUMNS - columns
        padded = None if addend is None else F.pad(addend.expand(rows, columns), (0, padding))
        return addmm(padded, a, F.pad(b, (0, padding)), beta, alpha)[:, :columns].contiguous()
    out = a.new_empty(rows, columns)
    a = contiguous_aligned(a)
    if addend is not None:
        addend = addend.expand(rows, columns)
    for start in range(0, rows, _BLOCK_ROWS):
        result, block_a, count = out[start : start + _BLOCK_ROWS], a[start : start + _BLOCK_ROWS], rows - start
        block = result
        if count < _BLOCK_ROWS:
            block = out.new_empty(_BLOCK_ROWS, columns)
            block_a = torch.cat((block_a, block_a.new_zeros(_BLOCK_ROWS - count, a.shape[1])))
        if addend is not None:
            block[: len(result)].copy_(addend[start : start + _BLOCK_ROWS])
        # In place, because addmm_ is an operator of its own, which the mode does not override.
        block.addmm_(block_a, b, beta=0 if addend is None else beta, alpha=alpha)
        if block is not result:
            result.copy_(block[:count])
    return out
