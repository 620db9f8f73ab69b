"""Test the Triton GEMM kernels, on a GPU or in Triton's interpreter: see the parent package's `common.py`."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error, same_bits

from ..common import GPU, TOLERANCE, TRITON_TEST_DTYPES, empty, random

pytest.importorskip("triton")
from jitnorm.batch_invariant.matmul import triton_kernels
from jitnorm.batch_invariant.matmul.problem import BATCH_SIZES


@pytest.mark.parametrize("dtype", TRITON_TEST_DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 130, 70), (70, 67, 129)])
def test_batched_gemm(m, n, k, dtype):
    a, out = random(2, m, k, dtype=dtype), empty(2, m, n, dtype=dtype)
    for b in (random(2, k, n, dtype=dtype), random(2, n, k, dtype=dtype).transpose(1, 2)):
        triton_kernels.batched_gemm(a, b, out, False)
        assert relative_error(out, a.double() @ b.double()) <= TOLERANCE[dtype]
        alone = empty(1, 1, n, dtype=dtype)
        triton_kernels.batched_gemm(a[1:, m // 2 : m // 2 + 1], b[1:], alone, False)
        if GPU:
            assert same_bits(alone[0], out[1, m // 2 : m // 2 + 1])
        out.fill_(float("nan"))


@pytest.mark.skipif(GPU and torch.cuda.get_device_capability() < (9, 0), reason="no TMA")
# Loads of b differ by its layout, and the end by the bias: neither depends on the other.
@pytest.mark.parametrize(("transposed", "has_bias"), [(True, False), (False, True)])
@pytest.mark.parametrize("tile", triton_kernels.TILES)
def test_persistent_gemm(tile, transposed, has_bias):
    """There are fewer programs than tiles, so that each computes several; every dimension has a ragged end."""
    # More rows of the smallest tiles than are computed together, and a second column of tiles.
    dtype, (m, n, k) = torch.float16, (150, tile.block_n + 48, tile.block_k + 8)
    a, stored = random(m, k, dtype=dtype), random(*((n, k) if transposed else (k, n)), dtype=dtype)
    b = stored.t() if transposed else stored
    bias, out = random(n, dtype=dtype) if has_bias else None, empty(m, n, dtype=dtype)
    triton_kernels.persistent_gemm(a, b, bias, out, transposed, stored.stride(0), tile, 3)
    exact = a.double() @ b.double() + (bias.double() if has_bias else 0)
    assert relative_error(out, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("columns", [64, 4096, 6144, 28672])
def test_batch_sizes_contain_every_tile(columns):
    checked = {triton_kernels.choose_tile(m, columns, 132) for m in BATCH_SIZES}
    assert {triton_kernels.choose_tile(m, columns, 132) for m in (*range(1, 600), *range(600, 20000, 37))} <= checked
    assert triton_kernels.choose_tile(1, columns, 132).block_m == 16
    if columns >= 4096:  # enough work to give all SMs the largest tile
        largest = max(triton_kernels.TILES, key=lambda tile: tile.block_m * tile.block_n)
        assert triton_kernels.choose_tile(8192, columns, 132) == largest


def test_shared_memory_has_room():
    for tile in {*triton_kernels.TILES, triton_kernels.FIXED_TILE}:
        assert triton_kernels.stages_of(tile, 2, tile.block_m * min(tile.block_n, 128) * 2) == tile.max_stages
        assert triton_kernels.stages_of(tile, 2, tile.block_m * min(tile.block_n, 128) * 4) >= 2
