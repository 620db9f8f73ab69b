"""Products of a few rows and a weight against float64, and what engine_gemms relies on."""

from __future__ import annotations

import pytest
import torch
from helpers import TOLERANCE, relative_error, same_bits

import jitnorm
from jitnorm.batch_invariant.matmul.problem import UnsupportedProblem
from jitnorm.integrations import few_rows
from jitnorm.jit.build import build
from jitnorm.jit.spec import Target

BF16, F16 = torch.bfloat16, torch.float16
# The smallest; steps that few warps share; one tile in a block, and two; more steps than are in flight, and a number of
# steps that is no multiple of it.
SHAPES = [(8, 64), (24, 320), (1024, 3072), (4096, 4096), (512, 16384), (4608, 2560), (9728, 896)]


def operands(rows, n, k, dtype):
    x = torch.randn(rows, k, device="cuda").to(dtype)
    weight = torch.randn(n, k, device="cuda").mul(k**-0.5).to(dtype)
    return x, weight


def multiply(x, weight):
    out = torch.full((len(x), len(weight)), float("nan"), dtype=x.dtype, device="cuda")
    few_rows.gemm(weight)(x, weight.t(), None, out)
    return out


@pytest.mark.slow
@pytest.mark.nvcc
@pytest.mark.parametrize(  # the first architecture that has the instruction, the first with PDL, and the newest
    ("arch", "shape", "dtype"), [("8.0", (24, 320), F16), ("9.0a", (4096, 4096), BF16), ("12.0a", (1024, 3072), BF16)]
)
def test_compiles(arch, shape, dtype):
    entry = build(few_rows.spec(*shape, dtype, Target.cuda(arch)))
    assert b"few_rows_gemm_%dx%d" % shape in entry.verify()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_matches_the_definition(n, k, dtype):
    x, weight = operands(few_rows.MAX_ROWS, n, k, dtype)
    expected = x.double() @ weight.double().t()
    together = multiply(x, weight)
    assert relative_error(together, expected) <= TOLERANCE[dtype]
    for rows in (1, 2, 7, 8, 9, 15):
        # In a smaller batch, at another place, and between gaps, a row has the same bits.
        some = torch.full((rows, k + 8), float("nan"), dtype=dtype, device="cuda")[:, :k].copy_(x[-rows:])
        assert same_bits(multiply(some, weight), together[-rows:])
    assert not multiply(x[:0], weight).numel()


@pytest.mark.gpu
def test_rows_that_are_not_finite_stay_alone():
    x, weight = operands(9, 1024, 2048, BF16)
    expected = multiply(x, weight)
    for value in (float("nan"), float("inf")):
        y = x.clone()
        y[4, 77] = value
        got = multiply(y, weight)
        assert not got[4].isfinite().any()
        assert same_bits(got[[*range(4), *range(5, 9)]], expected[[*range(4), *range(5, 9)]])


@pytest.mark.gpu
def test_what_the_kernel_does_not_take():
    x, weight = operands(17, 64, 128, BF16)
    gemm, out = few_rows.gemm(weight), torch.zeros(17, 64, dtype=BF16, device="cuda")
    shifted = torch.zeros(16 * 128 + 1, dtype=BF16, device="cuda")[1:].view(16, 128)
    for a, b, bias, to in (
        (x, weight.t(), None, out),  # too many rows
        (x[:3], weight.t(), out[0], out[:3]),  # a bias
        (x[:3].half(), weight.t(), None, out[:3]),
        (shifted, weight.t(), None, out[:16]),  # not aligned
        (x[:3], weight[:32].t(), None, out[:3, :32]),
        (x[:3], weight.t().contiguous(), None, out[:3]),
        (x[:3], weight.t(), None, out[:2]),
        (x[:3, :64], weight.t(), None, out[:3]),
        (x[:3].cpu(), weight.t(), None, out[:3]),
        (x[:3], weight.t(), None, x[:3, :64]),  # the result would overwrite what is read
    ):
        with pytest.raises(UnsupportedProblem):
            gemm(a, b, bias, to)
    assert not out.any()


@pytest.mark.gpu
def test_what_is_supported():
    weight = torch.zeros(64, 128, dtype=BF16, device="cuda")
    assert few_rows.is_supported(weight) and few_rows.is_supported(weight.half())
    for other in (weight.float(), weight[:60], weight[:, :96], weight[:0], weight.cpu()):
        assert not few_rows.is_supported(other)
    for n, k, is_supported in (
        *((4096, 4096, True), (4096 + 8, 4096, False)),  # the largest
        *((8, 64 * 192, True), (8, 64 * 251, False)),  # no number of warps divides 251 steps
    ):
        assert few_rows.is_supported(torch.empty(1, dtype=BF16, device="cuda").expand(n, k)) == is_supported


@pytest.mark.gpu
def test_reads_nothing_before_the_kernel_before_it_has_written():
    """Norms and products in turns: with PDL each starts before the one before it has ended."""
    size = 2048
    x, weight = operands(5, size, size, BF16)
    gemm, norm_weight = few_rows.gemm(weight), torch.ones(size, dtype=BF16, device="cuda")
    results = []
    for waits in (True, False):
        y, z = x.clone(), torch.full_like(x, float("nan"))
        for _ in range(100):
            gemm(y, weight.t(), None, z)
            if waits:
                torch.cuda.synchronize()
            jitnorm.rmsnorm(z, norm_weight, out=y)
            if waits:
                torch.cuda.synchronize()
        results.append(y)
    assert same_bits(*results)
