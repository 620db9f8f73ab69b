"""Softmax, means and RMSNorm over contiguous rows in Triton.

What a program does with a row depends on the row's length: how many rows share a program, how many threads read one, in
what blocks. Triton compiles another kernel where an argument is 1 or a multiple of 16, and the number of rows must not
choose one, so that argument is never specialised; addresses and strides are always multiples of 16 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from jitnorm.batch_invariant.triton_pdl import pdl

_WHOLE = 32768  # elements of a row that a program holds at once
_PIECE = 4096  # elements of a longer one: its pieces go to as many programs
_BLOCK = 8192  # elements at a time, where one program goes through a row


def softmax(x: torch.Tensor, out: torch.Tensor, log: bool) -> None:
    """Over the last dimension of contiguous tensors of one shape."""
    columns = x.shape[-1]
    if not x.numel():
        return
    count = x.numel() // columns
    if columns <= _WHOLE:
        rows, width, warps = _schedule(columns)
        _softmax_whole[(triton.cdiv(count, rows),)](
            x, out, count, columns, LOG=log, ROWS=rows, COLUMNS=width, num_warps=warps, **pdl(x.device)
        )
    else:
        pieces = triton.cdiv(columns, _PIECE)
        parts = [torch.empty(count, pieces, dtype=torch.float32, device=x.device) for _ in range(2)]
        _softmax_parts[(count * pieces,)](x, *parts, columns, PIECES=pieces, BLOCK=_PIECE, num_warps=4, **pdl(x.device))
        _softmax_by_parts[(count * pieces,)](
            x,
            out,
            *parts,
            columns,
            LOG=log,
            PIECES=pieces,
            WIDTH=triton.next_power_of_2(pieces),
            BLOCK=_PIECE,
            num_warps=4,
            **pdl(x.device),
        )


def mean(x: torch.Tensor, out: torch.Tensor) -> None:
    """`out` is contiguous, and has the shape of `x` without its last dimension."""
    columns = x.shape[-1]
    if not out.numel():
        return
    if not columns:
        out.fill_(float("nan"))
        return
    x, divisor, launch = x.view(-1, columns), float(columns), pdl(x.device)
    while x.shape[1] > _WHOLE:  # sums of pieces first, which are as many as the length says
        pieces = triton.cdiv(x.shape[1], _PIECE)
        parts = torch.empty(x.shape[0], pieces, dtype=torch.float32, device=x.device)
        grid = (x.shape[0] * pieces,)
        _mean_of_piece[grid](x, parts, x.shape[1], 1.0, PIECES=pieces, COLUMNS=_PIECE, num_warps=4, **launch)
        x = parts
    count, columns = x.shape
    rows, width, warps = _schedule(columns)
    if rows == 1:
        _mean_of_piece[(count,)](x, out, columns, divisor, PIECES=1, COLUMNS=width, num_warps=warps, **launch)
    else:
        grid = (triton.cdiv(count, rows),)
        _mean[grid](x, out, count, columns, divisor, ROWS=rows, COLUMNS=width, num_warps=warps, **launch)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Over the last dimension of contiguous tensors of one shape."""
    columns = x.shape[-1]
    if x.numel():
        block = min(_BLOCK, triton.next_power_of_2(columns))
        grid, warps = (x.numel() // columns,), max(1, block // 1024)
        _rms_norm[grid](x, weight, out, columns, eps, BLOCK=block, num_warps=warps, **pdl(x.device))


def _schedule(columns: int) -> tuple[int, int, int]:
    """Rows and columns of a program's block, and its warps."""
    width = triton.next_power_of_2(columns)
    return max(1, 2048 // width), width, min(32, max(4, width // 512))


@triton.jit(do_not_specialize=["rows"])
def _softmax_whole(
    x,
    out,
    rows,
    columns,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    if PDL:
        gdc_wait()
    f = tl.load(x + row * columns + column, mask=inside, other=float("-inf")).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
    f -= tl.max(f, axis=1)[:, None]
    e = tl.exp(f)
    total = tl.sum(e, axis=1)[:, None]
    y = f - tl.log(total) if LOG else e / total
    tl.store(out + row * columns + column, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_parts(x, largest, totals, columns, PIECES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """The largest element of each piece of a row, and the sum of the exponentials relative to it."""
    program = tl.program_id(0).to(tl.int64)
    at = program % PIECES * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
    f = tl.load(x + program // PIECES * columns + at, mask=at < columns, other=float("-inf")).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
    most = tl.max(f, axis=0)
    tl.store(largest + program, most)
    tl.store(totals + program, tl.sum(tl.exp(f - tl.where(most == float("-inf"), 0.0, most)), axis=0))


@triton.jit
def _softmax_by_parts(
    x,
    out,
    largest,
    totals,
    columns,
    LOG: tl.constexpr,
    PIECES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """A piece of a row, from what `_softmax_parts` says of all its pieces. A NaN in one makes their total NaN."""
    program = tl.program_id(0).to(tl.int64)
    row, piece = program // PIECES, tl.arange(0, WIDTH)
    if PDL:
        gdc_wait()
    part = tl.load(largest + row * PIECES + piece, mask=piece < PIECES, other=float("-inf"))
    total = tl.load(totals + row * PIECES + piece, mask=piece < PIECES, other=0.0)
    most = tl.max(part, axis=0)
    total = tl.sum(tl.where(part == float("-inf"), total, total * tl.exp(part - most)), axis=0)
    at = program % PIECES * BLOCK + tl.arange(0, BLOCK)
    f = tl.load(x + row * columns + at, mask=at < columns, other=0.0).to(tl.float32) - most
    if PDL:
        gdc_launch_dependents()
    y = f - tl.log(total) if LOG else tl.exp(f) / total
    tl.store(out + row * columns + at, y.to(out.dtype.element_ty), mask=at < columns)


@triton.jit(do_not_specialize=["rows"])
def _mean(x, out, rows, columns, divisor, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    if PDL:
        gdc_wait()
    f = tl.load(x + row[:, None] * columns + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
    y = tl.sum(f, axis=1) / divisor
    tl.store(out + row, y.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def _mean_of_piece(x, out, columns, divisor, PIECES: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    """A row, or one of its pieces, to a program: without what more rows would need, a single one takes less time."""
    program = tl.program_id(0).to(tl.int64)
    column = program % PIECES * COLUMNS + tl.arange(0, COLUMNS)
    if PDL:
        gdc_wait()
    f = tl.load(x + program // PIECES * columns + column, mask=column < columns, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
    tl.store(out + program, (tl.sum(f, axis=0) / divisor).to(out.dtype.element_ty))


@triton.jit
def _rms_norm(x, weight, out, columns, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    x += tl.program_id(0).to(tl.int64) * columns
    out += tl.program_id(0).to(tl.int64) * columns
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    if PDL:
        gdc_wait()
    for start in range(0, columns, BLOCK):
        at = start + lane
        f = tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32)
        squares += f * f
    scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / columns + eps)
    for start in range(0, columns, BLOCK):
        at = start + lane
        f = tl.load(x + at, mask=at < columns, other=0.0).to(tl.float32)
        w = tl.load(weight + at, mask=at < columns, other=0.0).to(tl.float32)
        tl.store(out + at, (f * scale * w).to(out.dtype.element_ty), mask=at < columns)
