"""Products on the CPU: torch's own, of blocks of rows that are always the same height.

A library chooses its way by the shapes that it sees, so it is shown one shape. The last block is filled up with zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

_COLUMNS = 16  # at least: with fewer, a row's way through the library depends on its place, and on b's strides
_ROWS = 32  # a block begins at a multiple of 64 bytes then, as an allocation does, whatever the row's length


def add_product(
    addend: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """`beta * addend + alpha * a @ b` of `[m, k]` and `[k, n]`; `addend` expands to `[m, n]`, and None is zero."""
    rows, columns = a.shape[0], b.shape[1]
    if 0 < columns < _COLUMNS:
        more = _COLUMNS - columns
        wide = None if addend is None else F.pad(addend.expand(rows, columns), (0, more))
        return add_product(wide, a, F.pad(b, (0, more)), beta, alpha)[:, :columns].contiguous()
    out = a.new_empty(rows, columns)
    a = aligned(a)
    if addend is not None:
        addend = addend.expand(rows, columns)
    for first in range(0, rows, _ROWS):
        part, source, count = out[first : first + _ROWS], a[first : first + _ROWS], min(_ROWS, rows - first)
        block = part
        if count < _ROWS:
            block = out.new_empty(_ROWS, columns)
            source = torch.cat((source, source.new_zeros(_ROWS - count, a.shape[1])))
        if addend is not None:
            block[:count].copy_(addend[first : first + count])
        # In place, as that is an operator of its own, which the mode leaves to torch.
        block.addmm_(source, b, beta=0 if addend is None else beta, alpha=alpha)
        if block is not part:
            part.copy_(block[:count])
    return out


def aligned(value: torch.Tensor, to: int = 64) -> torch.Tensor:
    """The same elements, adjacent and at an address that is a multiple of `to`, which fresh memory is."""
    if not value.is_contiguous():
        return value.contiguous()
    return value if value.data_ptr() % to == 0 else value.clone()
