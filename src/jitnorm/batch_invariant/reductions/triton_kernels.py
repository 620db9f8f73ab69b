"""Triton kernels for softmax, means and RMSNorm over contiguous rows.

How a row is computed follows from its length alone: how many rows share a program, how many threads read one, and in
which blocks. Triton compiles another kernel for an argument that is 1 or a multiple of 16. The number of rows must not
select a kernel, so that argument is never specialised; addresses and strides are always multiples of 16 bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from jitnorm.batch_invariant.triton_support import pdl_options

_MAX_WHOLE_ROW = 32768  # elements of a row that one program holds in registers
_CHUNK = 4096  # elements of a longer row that one of several programs holds
_RMS_NORM_BLOCK = 8192  # elements at a time, in a loop of one program over a row


def softmax(x: torch.Tensor, out: torch.Tensor, log: bool) -> None:
    """Write the softmax over the last dimension, or its logarithm, of contiguous `x` into contiguous `out`."""
    columns = x.shape[-1]
    if not x.numel():
        return
    rows, pdl = x.numel() // columns, pdl_options(x.device)
    if columns <= _MAX_WHOLE_ROW:
        block_m, block_n, num_warps = _schedule(columns)
        grid, options = (triton.cdiv(rows, block_m),), {"num_warps": num_warps, **pdl}
        _softmax_kernel[grid](x, out, rows, columns, LOG=log, BLOCK_M=block_m, BLOCK_N=block_n, **options)
        return
    chunks = triton.cdiv(columns, _CHUNK)
    partial_max, partial_sum = (torch.empty(rows, chunks, dtype=torch.float32, device=x.device) for _ in range(2))
    grid, options = (rows * chunks,), {"CHUNKS": chunks, "BLOCK": _CHUNK, "num_warps": 4, **pdl}
    _softmax_partial_kernel[grid](x, partial_max, partial_sum, columns, **options)
    block_chunks = triton.next_power_of_2(chunks)
    _softmax_chunk_kernel[grid](
        x, out, partial_max, partial_sum, columns, LOG=log, BLOCK_CHUNKS=block_chunks, **options
    )


def mean(x: torch.Tensor, out: torch.Tensor) -> None:
    """Write the mean over the last dimension of contiguous `x` into contiguous `out`."""
    columns = x.shape[-1]
    if not out.numel():
        return
    if not columns:
        out.fill_(float("nan"))
        return
    x, divisor, pdl = x.view(-1, columns), float(columns), pdl_options(x.device)
    while x.shape[1] > _MAX_WHOLE_ROW:  # sums of chunks first, whose number follows from the length
        chunks = triton.cdiv(x.shape[1], _CHUNK)
        sums = torch.empty(x.shape[0], chunks, dtype=torch.float32, device=x.device)
        grid = (x.shape[0] * chunks,)
        _mean_chunk_kernel[grid](x, sums, x.shape[1], 1.0, CHUNKS=chunks, BLOCK=_CHUNK, num_warps=4, **pdl)
        x = sums
    rows, columns = x.shape
    block_m, block_n, num_warps = _schedule(columns)
    options = {"num_warps": num_warps, **pdl}
    if block_m == 1:
        _mean_chunk_kernel[(rows,)](x, out, columns, divisor, CHUNKS=1, BLOCK=block_n, **options)
    else:
        grid = (triton.cdiv(rows, block_m),)
        _mean_kernel[grid](x, out, rows, columns, divisor, BLOCK_M=block_m, BLOCK_N=block_n, **options)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """Write the RMSNorm over the last dimension of contiguous `x` into contiguous `out`."""
    columns = x.shape[-1]
    if x.numel():
        block = min(_RMS_NORM_BLOCK, triton.next_power_of_2(columns))
        grid, num_warps = (x.numel() // columns,), max(1, block // 1024)
        _rms_norm_kernel[grid](x, weight, out, columns, eps, BLOCK=block, num_warps=num_warps, **pdl_options(x.device))


def _schedule(columns: int) -> tuple[int, int, int]:
    """Return the rows and columns of a program's block, and its warps."""
    block_n = triton.next_power_of_2(columns)
    return max(1, 2048 // block_n), block_n, min(32, max(4, block_n // 512))


@triton.jit(do_not_specialize=["rows"])
def _softmax_kernel(
    x,
    out,
    rows,
    columns,
    LOG: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute whole rows, BLOCK_M of them to a program."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = tl.arange(0, BLOCK_N)[None, :]
    mask = (row < rows) & (column < columns)
    if PDL:
        gdc_wait()
    values = tl.load(x + row * columns + column, mask=mask, other=float("-inf")).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
    values -= tl.max(values, axis=1)[:, None]
    exponentials = tl.exp(values)
    total = tl.sum(exponentials, axis=1)[:, None]
    result = values - tl.log(total) if LOG else exponentials / total
    tl.store(out + row * columns + column, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _softmax_partial_kernel(
    x, partial_max, partial_sum, columns, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Compute the maximum of each chunk of a row, and the sum of the exponentials relative to it."""
    program = tl.program_id(0).to(tl.int64)
    column = program % CHUNKS * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
    values = tl.load(x + program // CHUNKS * columns + column, mask=column < columns, other=float("-inf"))
    values = values.to(tl.float32)
    if PDL:
        gdc_launch_dependents()
    chunk_max = tl.max(values, axis=0)
    tl.store(partial_max + program, chunk_max)
    address = partial_sum + program
    base = tl.where(chunk_max == float("-inf"), 0.0, chunk_max)
    tl.store(address, tl.sum(tl.exp(values - base), axis=0))


@triton.jit
def _softmax_chunk_kernel(
    x,
    out,
    partial_max,
    partial_sum,
    columns,
    LOG: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute one chunk of a row, from the maxima and sums of all its chunks. A NaN in one makes the total NaN."""
    program = tl.program_id(0).to(tl.int64)
    row, chunk = program // CHUNKS, tl.arange(0, BLOCK_CHUNKS)
    if PDL:
        gdc_wait()
    chunk_max = tl.load(partial_max + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=float("-inf"))
    chunk_sum = tl.load(partial_sum + row * CHUNKS + chunk, mask=chunk < CHUNKS, other=0.0)
    row_max = tl.max(chunk_max, axis=0)
    total = tl.sum(tl.where(chunk_max == float("-inf"), chunk_sum, chunk_sum * tl.exp(chunk_max - row_max)), axis=0)
    column = program % CHUNKS * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + row * columns + column, mask=column < columns, other=0.0).to(tl.float32) - row_max
    if PDL:
        gdc_launch_dependents()
    result = values - tl.log(total) if LOG else tl.exp(values) / total
    tl.store(out + row * columns + column, result.to(out.dtype.element_ty), mask=column < columns)


@triton.jit(do_not_specialize=["rows"])
def _mean_kernel(x, out, rows, columns, divisor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr):
    """Compute whole rows, BLOCK_M of them to a program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)[None, :]
    mask = (row < rows)[:, None] & (column < columns)
    if PDL:
        gdc_wait()
    values = tl.load(x + row[:, None] * columns + column, mask=mask, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
    result = tl.sum(values, axis=1) / divisor
    tl.store(out + row, result.to(out.dtype.element_ty), mask=row < rows)


@triton.jit
def _mean_chunk_kernel(x, out, columns, divisor, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Compute one row, or one chunk of a row, to a program: a single row takes less time than by `_mean_kernel`."""
    program = tl.program_id(0).to(tl.int64)
    column = program % CHUNKS * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
    values = tl.load(x + program // CHUNKS * columns + column, mask=column < columns, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
    tl.store(out + program, (tl.sum(values, axis=0) / divisor).to(out.dtype.element_ty))


@triton.jit
def _rms_norm_kernel(x, weight, out, columns, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Compute one row to a program, in two loops over its blocks."""
    x += tl.program_id(0).to(tl.int64) * columns
    out += tl.program_id(0).to(tl.int64) * columns
    lane = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    if PDL:
        gdc_wait()
    for start in range(0, columns, BLOCK):
        column = start + lane
        values = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
        squares += values * values
    rstd = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / columns + eps)
    for start in range(0, columns, BLOCK):
        column = start + lane
        values = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
        factors = tl.load(weight + column, mask=column < columns, other=0.0).to(tl.float32)
        tl.store(out + column, (values * rstd * factors).to(out.dtype.element_ty), mask=column < columns)
