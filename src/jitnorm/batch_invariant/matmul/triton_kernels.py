"""The Triton backend: persistent GEMM kernels over whole tiles, which never split k.

An element of the result is the sum of the same terms in the same order whatever the tile's height and width: one
accumulator goes through k in steps of a tensor core's instruction. So a tile may be chosen by the number of rows, but
only if the invariance check passes with such tiles on the GPU itself; otherwise all GEMMs have one tile.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from jitnorm.batch_invariant.matmul.problem import BATCH_SIZES, Gemm, Problem, UnsupportedProblem
from jitnorm.batch_invariant.triton_support import sm_count

VERSION = triton.__version__
SOURCES = (Path(__file__),)


class Tile(NamedTuple):
    """The block of the result that a program computes at a time, and how."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    max_stages: int  # fewer if shared memory has no room for them
    swap_operands: bool = False  # compute the transpose: columns are the 64 rows or more that wgmma needs
    programs_per_sm: int = 1


# Up to 64 rows, reading the weight takes all the time. So a tile has as few rows as there are, and most of shared
# memory holds loads in flight: of one program if all columns fit into one wave of programs, otherwise of two. Operands
# are swapped because wgmma needs 64 rows or more, and padding rows would use shared memory's bandwidth.
_SINGLE_WAVE_TILES = (Tile(16, 64, 256, 4, 5, True), Tile(32, 64, 256, 4, 4, True), Tile(64, 64, 128, 4, 6))
_MULTI_WAVE_TILES = (
    Tile(16, 64, 128, 4, 5, True, 2),
    Tile(32, 64, 128, 4, 4, True, 2),
    Tile(64, 64, 128, 4, 3, False, 2),
)
_MANY_ROWS_TILES = (
    Tile(128, 256, 64, 8, 4),
    Tile(128, 128, 64, 4, 6),
    Tile(64, 128, 128, 4, 4),
    Tile(64, 64, 128, 4, 6),
)
TILES = _SINGLE_WAVE_TILES + _MULTI_WAVE_TILES + _MANY_ROWS_TILES
FIXED_TILE = Tile(128, 128, 64, 4, 6)
# For kernels without TMA; small enough for the shared memory of every GPU since Turing.
_STRIDED_HALF_TILE = Tile(128, 128, 32, 8, 3)
_STRIDED_FLOAT32_TILE = Tile(64, 64, 32, 4, 3)
_BATCHED_TILE = Tile(64, 64, 64, 4, 3)
_GROUP_M = 8  # rows of tiles that are computed together, so that what they read of b is still in L2
_SHARED_BYTES = 228 << 10  # shared memory of an SM
_RESERVED_BYTES = 3 << 10  # of it, for each program: what the system keeps, barriers and a bias
# What an SM of Hopper does in a cycle: multiply-adds, and elements that it gets from L2.
_FMA_PER_CYCLE, _ELEMENTS_LOADED_PER_CYCLE = 2048, 31


def choose_tile(rows: int, columns: int, num_sms: int) -> Tile:
    """Return the tile with the shortest estimated time. BATCH_SIZES contain a number of rows for every tile chosen."""
    few_rows_tiles = _SINGLE_WAVE_TILES if triton.cdiv(columns, 64) <= num_sms else _MULTI_WAVE_TILES
    for tile in few_rows_tiles:
        if rows <= tile.block_m:
            return tile
    if rows > 256:
        rows = min(triton.next_power_of_2(rows), BATCH_SIZES[-1])

    def estimate_cycles(tile: Tile) -> float:
        tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n)
        waves: int = triton.cdiv(tiles, num_sms)
        fma, loaded = tile.block_m * tile.block_n, tile.block_m + tile.block_n
        return waves * max(fma / _FMA_PER_CYCLE, loaded / _ELEMENTS_LOADED_PER_CYCLE)

    return min(_MANY_ROWS_TILES, key=estimate_cycles)


def gemm(problem: Problem, fixed_tile: bool = False) -> Gemm:
    """Return the backend, bound to `problem`. A call raises UnsupportedProblem if a tile does not fit the GPU.

    Args:
        fixed_tile: use FIXED_TILE for every number of rows.
    """
    return functools.partial(_run, problem, fixed_tile)


def _run(
    problem: Problem,
    fixed_tile: bool,
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    if problem.dtype == torch.float32 or not _is_tma_supported(problem):
        tile = _STRIDED_FLOAT32_TILE if problem.dtype == torch.float32 else _STRIDED_HALF_TILE
        _strided_gemm(a[None], b[None], bias, out[None], problem.tf32, tile)
        return
    num_sms = sm_count(problem.device)
    tile = FIXED_TILE if fixed_tile else choose_tile(a.shape[0], problem.n, num_sms)
    persistent_gemm(a, b, bias, out, problem.b_transposed, problem.b_stride, tile, num_sms)


def compile_tiles(problem: Problem, gemm: Gemm) -> None:
    """Run every tile that `gemm` may choose once, because Triton cannot compile while a CUDA graph is captured."""
    num_sms = sm_count(problem.device)
    for rows in {choose_tile(rows, problem.n, num_sms): rows for rows in reversed(BATCH_SIZES)}.values():
        a = torch.zeros(rows, problem.k, dtype=problem.dtype, device=problem.device)
        stored = a.new_zeros(problem.n if problem.b_transposed else problem.k, problem.b_stride)
        b = stored[:, : problem.k].t() if problem.b_transposed else stored[:, : problem.n]
        bias = a.new_zeros(problem.n) if problem.bias else None
        gemm(a, b, bias, a.new_empty(rows, problem.n, dtype=problem.out_dtype))


def batched_gemm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, tf32: bool) -> None:
    """Write `a[i] @ b[i]` into `out[i]` for each i. Any strides, but columns of `out` are adjacent."""
    _strided_gemm(a, b, None, out, tf32, _STRIDED_FLOAT32_TILE if a.dtype == torch.float32 else _BATCHED_TILE)


def persistent_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    b_transposed: bool,
    b_stride: int,
    tile: Tile,
    num_sms: int,
) -> None:
    """Write `a @ b + bias` into `out`, with the TMA of Hopper and later.

    Args:
        a, out: contiguous.
        b_transposed: whether `b` is the transpose of a row-major matrix.
        b_stride: elements from row to row of that matrix, or of `b`.
        num_sms: how many SMs get programs.

    Raises:
        UnsupportedProblem: the tile does not fit the GPU.
    """
    (rows, depth), columns = a.shape, out.shape[1]
    # Strides are not read from the tensors: that of a lone row or column may be any number.
    b_shape, b_block = [depth, columns], [tile.block_k, tile.block_n]
    if b_transposed:
        b_shape, b_block = b_shape[::-1], b_block[::-1]
    store_halves = tile.block_n > 128 and not tile.swap_operands
    out_block = [tile.block_m, tile.block_n // 2 if store_halves else tile.block_n]
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n)
    programs = min(tiles, num_sms * tile.programs_per_sm)
    try:
        _persistent_gemm_kernel[(programs,)](
            TensorDescriptor(a, [rows, depth], [depth, 1], [tile.block_m, tile.block_k]),
            TensorDescriptor(b, b_shape, [b_stride, 1], b_block),
            bias,
            TensorDescriptor(out, [rows, columns], [columns, 1], out_block),
            rows,
            columns,
            depth,
            programs,
            B_TRANSPOSED=b_transposed,
            HAS_BIAS=bias is not None,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            GROUP_M=_GROUP_M,
            STORE_HALVES=store_halves,
            SWAP_OPERANDS=tile.swap_operands,
            num_warps=tile.num_warps,
            num_stages=stages_of(tile, a.element_size(), out.element_size() * out_block[0] * out_block[1]),
        )
    except OutOfResources as error:
        raise UnsupportedProblem(f"{tile} does not fit this GPU: {error}") from None


def stages_of(tile: Tile, element_size: int, out_bytes: int) -> int:
    """Return the number of pipeline stages for which shared memory has room beside `out_bytes` of the result."""
    stage_bytes = (tile.block_m + tile.block_n) * tile.block_k * element_size
    available = _SHARED_BYTES // tile.programs_per_sm - _RESERVED_BYTES - out_bytes
    return min(tile.max_stages, available // stage_bytes)


def _is_tma_supported(problem: Problem) -> bool:
    """Return whether rows begin at multiples of 16 bytes, and the GPU has TMA and shared memory for the tiles."""
    size, out_size = problem.dtype.itemsize, problem.out_dtype.itemsize
    row_strides = (problem.k * size, problem.b_stride * size, problem.n * out_size)
    is_data_center_gpu = torch.cuda.get_device_capability(problem.device)[0] in (9, 10)
    return is_data_center_gpu and not any(stride % 16 for stride in row_strides)


def _strided_gemm(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, tf32: bool, tile: Tile
) -> None:
    batch, rows, columns = out.shape
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(columns, tile.block_n)
    _strided_gemm_kernel[(tiles * batch,)](
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
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=_GROUP_M,
        num_warps=tile.num_warps,
        num_stages=tile.max_stages,
    )


@triton.jit
def _tile_position(tile, rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Return the row and column of a tile, counted in tiles. GROUP_M rows of tiles come before the next columns."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first_m = tile // (GROUP_M * tiles_n) * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    return first_m + tile % (GROUP_M * tiles_n) % group_m, tile % (GROUP_M * tiles_n) // group_m


@triton.jit(do_not_specialize=["rows", "programs"])
def _persistent_gemm_kernel(
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    STORE_HALVES: tl.constexpr,
    SWAP_OPERANDS: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        tile_m, tile_n = _tile_position(tile, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        accumulator = tl.zeros((BLOCK_N, BLOCK_M) if SWAP_OPERANDS else (BLOCK_M, BLOCK_N), tl.float32)
        for step in range(tl.cdiv(depth, BLOCK_K)):
            a_block = a.load([row, step * BLOCK_K])
            if B_TRANSPOSED:  # noqa: SIM108 (Triton compiles one branch)
                b_block = b.load([column, step * BLOCK_K]).T
            else:
                b_block = b.load([step * BLOCK_K, column])
            if SWAP_OPERANDS:
                accumulator = tl.dot(b_block.T, a_block.T, accumulator)
            else:
                accumulator = tl.dot(a_block, b_block, accumulator)
        if SWAP_OPERANDS:
            accumulator = accumulator.T
        if HAS_BIAS:
            columns_n = column + tl.arange(0, BLOCK_N)
            bias_n = tl.load(bias + columns_n, mask=columns_n < columns, other=0.0)
            accumulator += bias_n.to(tl.float32)[None, :]
        if STORE_HALVES:  # one after the other through half the shared memory, which leaves room for another stage
            left, right = tl.split(tl.permute(tl.reshape(accumulator, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            out.store([row, column], left.to(out.dtype))
            out.store([row, column + BLOCK_N // 2], right.to(out.dtype))
        else:
            out.store([row, column], accumulator.to(out.dtype))


@triton.jit(do_not_specialize=["rows", "a_batch_stride", "b_batch_stride", "out_batch_stride"])
def _strided_gemm_kernel(
    a,
    b,
    bias,
    out,
    rows,
    columns,
    depth,
    a_batch_stride,
    a_row_stride,
    a_column_stride,
    b_batch_stride,
    b_row_stride,
    b_column_stride,
    out_batch_stride,
    out_row_stride,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(columns, BLOCK_N)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile_m, tile_n = _tile_position(tl.program_id(0) % tiles, rows, columns, BLOCK_M, BLOCK_N, GROUP_M)
    row = (tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = (tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    block_k = tl.arange(0, BLOCK_K).to(tl.int64)
    a += batch * a_batch_stride + row * a_row_stride
    b += batch * b_batch_stride + column * b_column_stride
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + block_k
        a_mask = (row < rows) & (k[None, :] < depth)
        a_block = tl.load(a + k[None, :] * a_column_stride, mask=a_mask, other=0.0)
        b_mask = (column < columns) & (k[:, None] < depth)
        b_block = tl.load(b + k[:, None] * b_row_stride, mask=b_mask, other=0.0)
        accumulator = tl.dot(a_block, b_block, accumulator, input_precision=PRECISION)
    if HAS_BIAS:
        accumulator += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)
    out_pointers = out + batch * out_batch_stride + row * out_row_stride + column
    tl.store(out_pointers, accumulator.to(out.dtype.element_ty), mask=(row < rows) & (column < columns))
