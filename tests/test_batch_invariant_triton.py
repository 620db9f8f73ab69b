"""The Triton kernels: on a GPU where there is one, else in Triton's interpreter, which tests/conftest.py asks for.

The interpreter has numpy multiply, and numpy's order of additions is its own: it shows that results are right, and that
places, tails and strides are; and, for rows, that the schedule does not depend on their number. It knows no bfloat16
in products.
"""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error, rmsnorm_reference, same_bits

pytest.importorskip("triton")
from jitnorm.batch_invariant import triton_matmul as matmul
from jitnorm.batch_invariant import triton_rows as rows
from jitnorm.batch_invariant.proof import BATCHES

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = (torch.float16, torch.float32, *((torch.bfloat16,) if GPU else ()))
# Half a unit in the last place: a result may be a single number. float32 has sums that nearly cancel.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-5}


def random(*shape, dtype):
    return torch.randn(shape, device=DEVICE).to(dtype)


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), device=DEVICE, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (5, 130, 70), (130, 67, 129)])
def test_batched_products(m, n, k, dtype):
    a, out = random(2, m, k, dtype=dtype), poisoned(2, m, n, dtype=dtype)
    for b in (random(2, k, n, dtype=dtype), random(2, n, k, dtype=dtype).transpose(1, 2)):
        matmul.batched(a, b, out, False)
        assert relative_error(out, a.double() @ b.double()) <= TOLERANCE[dtype]
        alone = poisoned(1, 1, n, dtype=dtype)
        matmul.batched(a[1:, m // 2 : m // 2 + 1], b[1:], alone, False)
        if GPU:
            assert same_bits(alone[0], out[1, m // 2 : m // 2 + 1])
        out.fill_(float("nan"))


@pytest.mark.skipif(GPU and torch.cuda.get_device_capability() < (9, 0), reason="no copy engine")
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("tile", matmul.TILES)
def test_persistent_products(tile, transposed):
    """Fewer programs than tiles, so that each has several; ragged ends of every dimension."""
    dtype, (m, n, k) = torch.float16, (150, 304, 136)
    a, stored = random(m, k, dtype=dtype), random(*((n, k) if transposed else (k, n)), dtype=dtype)
    b = stored.t() if transposed else stored
    for bias in (None, random(n, dtype=dtype)):
        out = poisoned(m, n, dtype=dtype)
        matmul.persistent(a, b, bias, out, transposed, stored.stride(0), tile, 3)
        exact = a.double() @ b.double() + (0 if bias is None else bias.double())
        assert relative_error(out, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("columns", [64, 4096, 6144, 28672])
def test_tiles_by_the_number_of_rows(columns):
    proven = {matmul.choose_tile(m, columns, 132) for m in BATCHES}
    assert {matmul.choose_tile(m, columns, 132) for m in (*range(1, 600), *range(600, 20000, 37))} <= proven
    assert matmul.choose_tile(1, columns, 132).rows == 16
    if columns >= 4096:  # as large as they get, where there is work for all multiprocessors
        assert matmul.choose_tile(8192, columns, 132) == max(matmul.TILES, key=lambda tile: tile.rows * tile.columns)


def test_shared_memory_has_room():
    for tile in {*matmul.TILES, matmul.FIXED}:
        assert matmul.stages_of(tile, 2, tile.rows * min(tile.columns, 128) * 2) == tile.stages
        assert matmul.stages_of(tile, 2, tile.rows * min(tile.columns, 128) * 4) >= 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 1024, 1500, 40000])
def test_rows(columns, dtype):
    """Against float64; and one row alone against the same row among nine, which may share a program."""
    x, weight = random(9, columns, dtype=dtype), random(columns, dtype=dtype)

    def softmax(x, log):
        out = poisoned(*x.shape, dtype=dtype)
        rows.softmax(x, out, log)
        return out

    def mean(x):
        out = poisoned(x.shape[0], dtype=dtype)
        rows.mean(x, out)
        return out

    def rms_norm(x):
        out = poisoned(*x.shape, dtype=dtype)
        rows.rms_norm(x, weight, 1e-6, out)
        return out

    exact = x.double()
    for call, reference in (
        (lambda x: softmax(x, False), torch.softmax(exact, -1)),
        (lambda x: softmax(x, True), torch.log_softmax(exact, -1)),
        (mean, exact.mean(-1)),
        (rms_norm, rmsnorm_reference(x, weight, 1e-6)),
    ):
        out = call(x)
        assert float((out - reference).abs().max()) <= 2 * TOLERANCE[dtype] * max(1, float(reference.abs().max()))
        assert same_bits(call(x[4:5].clone()), out[4:5])


def test_softmax_of_special_values():
    for columns in (100, 40000):
        x = random(4, columns, dtype=torch.float32)
        x[0, 5], x[1, 7], x[2] = float("nan"), float("inf"), float("-inf")
        x[3, 1:] = float("-inf")
        out = poisoned(4, columns, dtype=torch.float32)
        rows.softmax(x, out, False)
        assert out[:3].isnan().all()
        assert out[3, 0] == 1 and not out[3, 1:].any()
