"""Products in Triton: a persistent kernel over whole tiles, which never splits k.

An element of the result is the sum of the same terms in the same order whatever the tile's height and width: k goes
forward in steps of a tensor core's instruction, into one accumulator. So tiles may be chosen by the number of rows, but
only where jitnorm.batch_invariant.proof finds this true on the GPU itself; where not, all products have one tile.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from jitnorm.batch_invariant.cublaslt import Refused
from jitnorm.batch_invariant.proof import BATCHES

if TYPE_CHECKING:
    from jitnorm.batch_invariant.cuda_matmul import Problem, Road

VERSION = triton.__version__
CODE = (Path(__file__),)


class Tile(NamedTuple):
    rows: int
    columns: int
    depth: int
    warps: int
    stages: int  # at most: fewer where shared memory has no room for them
    swapped: bool = False  # the transpose is computed: columns are the 64 rows or more of a tensor core's instruction
    residents: int = 1  # programs on a multiprocessor at once


# Of up to 64 rows, the weight's way here is all that takes time: as few rows as there are, and most of shared memory in
# flight, by one program where all columns are one wave of them, else by two. Swapped, as Hopper's own instruction wants
# 64 rows or more, and rows that do not exist would take their part of shared memory's bandwidth.
_ONE_WAVE = (Tile(16, 64, 256, 4, 5, True), Tile(32, 64, 256, 4, 4, True), Tile(64, 64, 128, 4, 6))
_WAVES = (Tile(16, 64, 128, 4, 5, True, 2), Tile(32, 64, 128, 4, 4, True, 2), Tile(64, 64, 128, 4, 3, False, 2))
_MANY = (
    Tile(128, 256, 64, 8, 4),
    Tile(128, 128, 64, 4, 6),
    Tile(64, 128, 128, 4, 4),
    Tile(64, 64, 128, 4, 6),
)
TILES = _ONE_WAVE + _WAVES + _MANY
FIXED = Tile(128, 128, 64, 4, 6)
# Without the copy engine; small enough for the shared memory of any GPU since Turing.
_HALF = Tile(128, 128, 32, 8, 3)
_FLOAT32 = Tile(64, 64, 32, 4, 3)
_BATCHED = Tile(64, 64, 64, 4, 3)
_GROUP = 8  # rows of tiles that are worked on together, so that what they read of b is still in the L2 cache
_SHARED = 228 << 10  # bytes of a multiprocessor's shared memory
_BARRIERS = 3 << 10  # of them for what the system keeps of each program, for barriers and a bias
# A multiprocessor of Hopper multiplies and adds as many elements in a cycle, and gets as many from the L2 cache.
_MULTIPLIED, _LOADED = 2048, 31


def choose_tile(rows: int, columns: int, processors: int) -> Tile:
    """The one whose tiles take the least time, one wave of them after another. A proof meets all that this answers."""
    narrow = _ONE_WAVE if triton.cdiv(columns, 64) <= processors else _WAVES
    for tile in narrow:
        if rows <= tile.rows:
            return tile
    if rows > 256:
        rows = min(triton.next_power_of_2(rows), BATCHES[-1])

    def cycles(tile: Tile) -> float:
        tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
        loaded = tile.rows + tile.columns
        waves: int = triton.cdiv(tiles, processors)
        return waves * max(tile.rows * tile.columns / _MULTIPLIED, loaded / _LOADED)

    return min(_MANY, key=cycles)


def run(
    problem: Problem,
    fixed: bool,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """`out = a @ b + bias`, of tensors laid out as cuda_matmul.cuda_product does."""
    if problem.dtype == torch.float32 or not _copy_engine_serves(problem):
        tile = _FLOAT32 if problem.dtype == torch.float32 else _HALF
        _strided(a[None], b[None], bias, out[None], problem.tf32, tile)
        return
    processors = _processors(problem.device)
    tile = FIXED if fixed else choose_tile(a.shape[0], problem.n, processors)
    persistent(a, b, bias, out, problem.b_transposed, problem.b_stride, tile, processors)


def compile_tiles(problem: Problem, road: Road) -> None:
    """Runs every tile that `road` may choose once: what is not compiled yet may not be while a graph is captured."""
    processors = _processors(problem.device)
    for rows in {choose_tile(rows, problem.n, processors): rows for rows in reversed(BATCHES)}.values():
        a = torch.zeros(rows, problem.k, dtype=problem.dtype, device=problem.device)
        stored = a.new_zeros(problem.n if problem.b_transposed else problem.k, problem.b_stride)
        b = stored[:, : problem.k].t() if problem.b_transposed else stored[:, : problem.n]
        bias = a.new_zeros(problem.n) if problem.bias else None
        road(a, b, bias, a.new_empty(rows, problem.n, dtype=problem.out_dtype))


def batched(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, tf32: bool) -> None:
    """`out[i] = a[i] @ b[i]`, any strides."""
    _strided(a, b, None, out, tf32, _FLOAT32 if a.dtype == torch.float32 else _BATCHED)


def persistent(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    transposed: bool,
    b_stride: int,
    tile: Tile,
    processors: int,
) -> None:
    """By the copy engine of Hopper and later. `b_stride` is from row to row of b, or of its transpose."""
    (rows, depth), columns = a.shape, out.shape[1]
    # Strides as they are meant: those of a single row, or column, may be anything.
    shape_b, block_b = [depth, columns], [tile.depth, tile.columns]
    if transposed:
        shape_b, block_b = shape_b[::-1], block_b[::-1]
    halves = tile.columns > 128 and not tile.swapped
    block_out = [tile.rows, tile.columns // 2 if halves else tile.columns]
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    programs = min(tiles, processors * tile.residents)
    try:
        _persistent[(programs,)](
            TensorDescriptor(a, [rows, depth], [depth, 1], [tile.rows, tile.depth]),
            TensorDescriptor(b, shape_b, [b_stride, 1], block_b),
            bias,
            TensorDescriptor(out, [rows, columns], [columns, 1], block_out),
            rows,
            columns,
            depth,
            programs,
            B_TRANSPOSED=transposed,
            HAS_BIAS=bias is not None,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            GROUP=_GROUP,
            HALVES=halves,
            SWAPPED=tile.swapped,
            num_warps=tile.warps,
            num_stages=stages_of(tile, a.element_size(), out.element_size() * block_out[0] * block_out[1]),
        )
    except OutOfResources as error:
        raise Refused(f"{tile} does not fit this GPU: {error}") from None


def stages_of(tile: Tile, element_size: int, out_bytes: int) -> int:
    """As many as shared memory has room for beside the part of the result that is on its way."""
    each = (tile.rows + tile.columns) * tile.depth * element_size
    return min(tile.stages, ((_SHARED // tile.residents - _BARRIERS) - out_bytes) // each)


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _copy_engine_serves(problem: Problem) -> bool:
    """It wants rows at multiples of 16 bytes; and the tiles want the shared memory of data-centre GPUs."""
    size, out_size = problem.dtype.itemsize, problem.out_dtype.itemsize
    steps = (problem.k * size, problem.b_stride * size, problem.n * out_size)
    return torch.cuda.get_device_capability(problem.device)[0] in (9, 10) and not any(step % 16 for step in steps)


def _strided(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, tf32: bool, tile: Tile
) -> None:
    batch, rows, columns = out.shape
    tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    _tiles[(tiles * batch,)](
        a,
        b,
        bias,
        out,
        rows,
        columns,
        a.shape[2],
        *a.stride(),
        *b.stride(),
        *out.stride()[:2],
        HAS_BIAS=bias is not None,
        PRECISION="tf32" if tf32 else "ieee",
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        GROUP=_GROUP,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@triton.jit
def _place(tile, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles before the next columns."""
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    first = tile // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    return first + tile % (GROUP * across) % height, tile % (GROUP * across) // height


@triton.jit(do_not_specialize=["rows", "programs"])
def _persistent(
    a,
    b,
    bias,
    out,
    rows,
    columns,
    depth,
    programs,
    B_TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    HALVES: tl.constexpr,
    SWAPPED: tl.constexpr,
):
    tiles = tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        down, across = _place(tile, rows, columns, ROWS, COLUMNS, GROUP)
        row, column = down * ROWS, across * COLUMNS
        total = tl.zeros((COLUMNS, ROWS) if SWAPPED else (ROWS, COLUMNS), tl.float32)
        for step in range(tl.cdiv(depth, DEPTH)):
            x = a.load([row, step * DEPTH])
            if B_TRANSPOSED:  # noqa: SIM108 (Triton compiles one branch)
                y = b.load([column, step * DEPTH]).T
            else:
                y = b.load([step * DEPTH, column])
            if SWAPPED:  # noqa: SIM108
                total = tl.dot(y.T, x.T, total)
            else:
                total = tl.dot(x, y, total)
        if SWAPPED:
            total = total.T
        if HAS_BIAS:
            at = column + tl.arange(0, COLUMNS)
            total += tl.load(bias + at, mask=at < columns, other=0.0).to(tl.float32)[None, :]
        if HALVES:  # one after the other through half the shared memory, which leaves room for another stage
            left, right = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
            out.store([row, column], left.to(out.dtype))
            out.store([row, column + COLUMNS // 2], right.to(out.dtype))
        else:
            out.store([row, column], total.to(out.dtype))


@triton.jit(do_not_specialize=["rows", "a_batch", "b_batch", "out_batch"])
def _tiles(
    a,
    b,
    bias,
    out,
    rows,
    columns,
    depth,
    a_batch,
    a_row,
    a_column,
    b_batch,
    b_row,
    b_column,
    out_batch,
    out_row,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles = tl.cdiv(rows, ROWS) * tl.cdiv(columns, COLUMNS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    down, across = _place(tl.program_id(0) % tiles, rows, columns, ROWS, COLUMNS, GROUP)
    row = (down.to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (across.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    k = tl.arange(0, DEPTH).to(tl.int64)
    a += batch * a_batch + row * a_row
    b += batch * b_batch + column * b_column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        at = start + k
        x = tl.load(a + at[None, :] * a_column, mask=(row < rows) & (at[None, :] < depth), other=0.0)
        y = tl.load(b + at[:, None] * b_row, mask=(column < columns) & (at[:, None] < depth), other=0.0)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    at = out + batch * out_batch + row * out_row + column
    tl.store(at, total.to(out.dtype.element_ty), mask=(row < rows) & (column < columns))
