"""Products of a few rows and a weight against float64, and what engine_gemms relies on."""

from __future__ import annotations

import pytest
import torch
from helpers import TOLERANCE, relative_error, same_bits

import jitnorm
from jitnorm.batch_invariant.matmul.problem import UnsupportedProblem
from jitnorm.integrations.few_rows import KERNELS, REGISTERS, WGMMA
from jitnorm.jit.build import build
from jitnorm.jit.spec import Target

BF16, F16 = torch.bfloat16, torch.float16
# Of both: the smallest; a number of columns that no block has; few columns and much k.
SHAPES = [(8, 64), (24, 320), (512, 16384)]
# Steps that few warps share; one tile in a block, and two; more steps than are in flight, and a number of steps that is
# no multiple of it.
REGISTERS_SHAPES = [(1024, 3072), (4096, 4096), (4608, 2560), (9728, 896)]
# One box in a step, and two; blocks that share columns, with one box and with two; all instructions' parts, and columns
# after the last; one step for two warpgroups; more blocks than SMs; fewer stages than steps; blocks that share 128
# columns, and columns after the last.
WGMMA_SHAPES = [
    (4096, 1024),
    (2048, 2048),
    (4096, 5120),
    (1024, 3072),
    (15352, 192),
    (4096, 64),
    (32768, 320),
    (24576, 1088),
    (8184, 4224),
]
CASES = [
    pytest.param(kernel, n, k, id=f"{kernel.name}-{n}-{k}")
    for kernel, shapes in ((REGISTERS, REGISTERS_SHAPES), (WGMMA, WGMMA_SHAPES))
    for n, k in SHAPES + shapes
]


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.name)
def kernel(request):
    return request.param


@pytest.fixture(autouse=True)
def skips_other_gpus(request):
    """wgmma is Hopper's."""
    used = getattr(request.node, "callspec", None)
    uses_wgmma = used and request.node.get_closest_marker("gpu") and used.params.get("kernel") is WGMMA
    if uses_wgmma and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("wgmma needs sm_90a")


def operands(rows, n, k, dtype):
    x = torch.randn(rows, k, device="cuda").to(dtype)
    weight = torch.randn(n, k, device="cuda").mul(k**-0.5).to(dtype)
    return x, weight


def multiply(kernel, x, weight):
    out = torch.full((len(x), len(weight)), float("nan"), dtype=x.dtype, device="cuda")
    kernel.gemm(weight)(x, weight.t(), None, out)
    return out


@pytest.mark.slow
@pytest.mark.nvcc
@pytest.mark.parametrize(  # the first architecture that has the instruction, the first with PDL, and the newest
    ("kernel", "arch", "shape", "dtype"),
    [
        (REGISTERS, "8.0", (24, 320), F16),
        (REGISTERS, "9.0a", (4096, 4096), BF16),
        (REGISTERS, "12.0a", (1024, 3072), BF16),
        (WGMMA, "9.0a", (15352, 192), F16),
        (WGMMA, "9.0a", (4096, 5120), BF16),
    ],
)
def test_compiles(kernel, arch, shape, dtype):
    entry = build(kernel.spec(*shape, dtype, Target.cuda(arch)))
    assert f"{kernel.name}_{shape[0]}x{shape[1]}".encode() in entry.verify()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("kernel", "n", "k"), CASES)
def test_matches_the_definition(kernel, n, k, dtype):
    x, weight = operands(kernel.max_rows, n, k, dtype)
    expected = x.double() @ weight.double().t()
    together = multiply(kernel, x, weight)
    assert relative_error(together, expected) <= TOLERANCE[dtype]
    for rows in (1, 2, 7, 8, 9, 15, 17, 63):
        if rows > kernel.max_rows:
            break
        # In a smaller batch, at another place, and between gaps, a row has the same bits.
        some = torch.full((rows, k + 8), float("nan"), dtype=dtype, device="cuda")[:, :k].copy_(x[-rows:])
        assert same_bits(multiply(kernel, some, weight), together[-rows:])
    assert not multiply(kernel, x[:0], weight).numel()


@pytest.mark.gpu
def test_writes_its_rows_and_nothing_else(kernel):
    x, weight = operands(kernel.max_rows, 1024, 2048, BF16)
    expected = multiply(kernel, x, weight)
    for rows in (1, 3, kernel.max_rows - 1):
        out = torch.full((rows + 2, 1024 + 16), -7.0, dtype=BF16, device="cuda")
        kernel.gemm(weight)(x[:rows], weight.t(), None, out[1:-1, 8:-8])
        assert same_bits(out[1:-1, 8:-8], expected[:rows])
        out[1:-1, 8:-8] = -7.0
        assert (out == -7.0).all()


@pytest.mark.gpu
def test_rows_that_are_not_finite_stay_alone(kernel):
    rows = kernel.max_rows - 7
    x, weight = operands(rows, 1024, 2048, BF16)
    expected = multiply(kernel, x, weight)
    for value in (float("nan"), float("inf")):
        y = x.clone()
        y[4, 77] = value
        got = multiply(kernel, y, weight)
        assert not got[4].isfinite().any()
        others = [*range(4), *range(5, rows)]
        assert same_bits(got[others], expected[others])


@pytest.mark.gpu
def test_what_the_kernel_does_not_take(kernel):
    rows = kernel.max_rows + 1
    x, weight = operands(rows, 64, 128, BF16)
    gemm, out = kernel.gemm(weight), torch.zeros(rows, 64, dtype=BF16, device="cuda")
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
    has_wgmma = torch.cuda.get_device_capability() == (9, 0)
    for each, is_here in ((REGISTERS, True), (WGMMA, has_wgmma)):
        assert each.is_supported(weight) == each.is_supported(weight.half()) == is_here
        for other in (weight.float(), weight[:60], weight[:, :96], weight[:0], weight.cpu()):
            assert not each.is_supported(other)
    for n, k, is_supported in (
        *((4096, 4096, True), (4096 + 8, 4096, False)),  # the largest
        *((8, 64 * 192, True), (8, 64 * 251, False)),  # no number of warps divides 251 steps
    ):
        some = torch.empty(1, dtype=BF16, device="cuda").expand(n, k)
        assert REGISTERS.is_supported(some) == is_supported and WGMMA.is_supported(some) == has_wgmma


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1024, 2048])  # blocks of WGMMA that share columns, and others
def test_reads_nothing_before_the_kernel_before_it_has_written(kernel, size):
    """Norms and products in turns: with PDL each starts before the one before it has ended."""
    x, weight = operands(5, size, size, BF16)
    gemm, norm_weight = kernel.gemm(weight), torch.ones(size, dtype=BF16, device="cuda")
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
