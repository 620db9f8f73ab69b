"""Products of a few rows and a weight against float64, and what engine_gemms relies on."""

from __future__ import annotations

import pytest
import torch
from helpers import TOLERANCE, relative_error, same_bits

import jitnorm
from jitnorm.activation import GELU_TANH_AND_MUL_HF, SILU_AND_MUL
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
# With an activation, of both: the smallest; a number of columns that no block has; few columns and much k.
GATED_SHAPES = [(16, 64), (48, 320), (512, 8192)]
# Steps that few warps share, and more steps than are in flight.
GATED_REGISTERS_SHAPES = [(1024, 3072), (6144, 1024), (9728, 896)]
# Two boxes in a step; blocks that share columns, and columns after the last; more blocks than SMs, and columns after
# the last; fewer stages than steps.
GATED_WGMMA_SHAPES = [(2048, 1024), (1040, 2048), (28720, 192), (24576, 1088)]
# SILU_AND_MUL for all gated shapes; GELU_TANH_AND_MUL_HF, which rounds before the product, for one.
CASES = [
    pytest.param(kernel, n, k, activation, id=f"{kernel.name}-{n}-{k}{'-' + activation.op if activation else ''}")
    for kernel, shapes, gated_shapes in (
        (REGISTERS, REGISTERS_SHAPES, GATED_REGISTERS_SHAPES),
        (WGMMA, WGMMA_SHAPES, GATED_WGMMA_SHAPES),
    )
    for n, k, activation in (
        *((*shape, None) for shape in SHAPES + shapes),
        *((*shape, SILU_AND_MUL) for shape in GATED_SHAPES + gated_shapes),
        (*GATED_SHAPES[1], GELU_TANH_AND_MUL_HF),
    )
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


def multiply(kernel, x, weight, activation=None):
    columns = len(weight) // 2 if activation else len(weight)
    out = torch.full((len(x), columns), float("nan"), dtype=x.dtype, device="cuda")
    kernel.gemm(weight, activation)(x, weight.t(), None, out)
    return out


def definition(x, weight, activation):
    """The products are rounded before an activation."""
    products = x.double() @ weight.double().t()
    if activation is None:
        return products
    gate, up = products.to(x.dtype).double().chunk(2, dim=-1)
    if activation is SILU_AND_MUL:
        return torch.nn.functional.silu(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh").to(x.dtype).double() * up


@pytest.mark.slow
@pytest.mark.nvcc
@pytest.mark.parametrize(  # the first architecture that has the instruction, the first with PDL, and the newest
    ("kernel", "arch", "shape", "dtype", "activation"),
    [
        (REGISTERS, "8.0", (24, 320), F16, None),
        (REGISTERS, "8.0", (48, 320), F16, SILU_AND_MUL),
        (REGISTERS, "9.0a", (4096, 4096), BF16, None),
        (REGISTERS, "12.0a", (1024, 3072), BF16, None),
        (WGMMA, "9.0a", (15352, 192), F16, None),
        (WGMMA, "9.0a", (4096, 5120), BF16, None),
        (WGMMA, "9.0a", (16384, 2048), BF16, GELU_TANH_AND_MUL_HF),
    ],
)
def test_compiles(kernel, arch, shape, dtype, activation):
    entry = build(kernel.spec(*shape, dtype, Target.cuda(arch), activation))
    name = f"{kernel.name}_{activation.op}" if activation else kernel.name
    assert f"{name}_{shape[0]}x{shape[1]}".encode() in entry.verify()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("kernel", "n", "k", "activation"), CASES)
def test_matches_the_definition(kernel, n, k, activation, dtype):
    x, weight = operands(kernel.max_rows, n, k, dtype)
    together = multiply(kernel, x, weight, activation)
    assert relative_error(together, definition(x, weight, activation)) <= TOLERANCE[dtype]
    for rows in (1, 2, 7, 8, 9, 15, 17, 63):
        if rows > kernel.max_rows:
            break
        # In a smaller batch, at another place, and between gaps, a row has the same bits.
        some = torch.full((rows, k + 8), float("nan"), dtype=dtype, device="cuda")[:, :k].copy_(x[-rows:])
        assert same_bits(multiply(kernel, some, weight, activation), together[-rows:])
    assert not multiply(kernel, x[:0], weight, activation).numel()


@pytest.mark.gpu
def test_the_products_are_rounded_before_the_activation(kernel):
    """As by two operators, for a shape whose products both kernels of a class sum up in the same order."""
    x, weight = operands(kernel.max_rows, 4608, 2560, BF16)
    expected = jitnorm.silu_and_mul(multiply(kernel, x, weight))
    assert same_bits(multiply(kernel, x, weight, SILU_AND_MUL), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [None, SILU_AND_MUL], ids=["product", "silu_and_mul"])
def test_writes_its_rows_and_nothing_else(kernel, activation):
    x, weight = operands(kernel.max_rows, 2048 if activation else 1024, 2048, BF16)
    expected = multiply(kernel, x, weight, activation)
    for rows in (1, 3, kernel.max_rows - 1):
        out = torch.full((rows + 2, 1024 + 16), -7.0, dtype=BF16, device="cuda")
        kernel.gemm(weight, activation)(x[:rows], weight.t(), None, out[1:-1, 8:-8])
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
    with pytest.raises(UnsupportedProblem):  # gates and factors, where only their products have a place
        kernel.gemm(weight, SILU_AND_MUL)(x[:3], weight.t(), None, out[:3])
    assert not out.any()


@pytest.mark.gpu
def test_what_is_supported():
    weight = torch.zeros(64, 128, dtype=BF16, device="cuda")
    has_wgmma = torch.cuda.get_device_capability() == (9, 0)
    for each, is_here in ((REGISTERS, True), (WGMMA, has_wgmma)):
        assert each.is_supported(weight) == each.is_supported(weight.half()) == is_here
        assert each.is_supported(weight, SILU_AND_MUL) == is_here and not each.is_supported(weight[:56], SILU_AND_MUL)
        assert each.is_supported(weight[:56]) == is_here
        for other in (weight.float(), weight[:60], weight[:, :96], weight[:0], weight.cpu()):
            assert not each.is_supported(other)
    for n, k, is_supported in (
        *((4096, 4096, True), (4096 + 8, 4096, False)),  # the largest
        *((8, 64 * 192, True), (8, 64 * 251, False)),  # no number of warps divides 251 steps
    ):
        some = torch.empty(1, dtype=BF16, device="cuda").expand(n, k)
        assert REGISTERS.is_supported(some) == is_supported and WGMMA.is_supported(some) == has_wgmma


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [None, SILU_AND_MUL], ids=["product", "silu_and_mul"])
@pytest.mark.parametrize("size", [1024, 2048])  # blocks of WGMMA that share columns, and others
def test_reads_nothing_before_the_kernel_before_it_has_written(kernel, size, activation):
    """Norms and products in turns: with PDL each starts before the one before it has ended."""
    x, weight = operands(5, size * (2 if activation else 1), size, BF16)
    gemm, norm_weight = kernel.gemm(weight, activation), torch.ones(size, dtype=BF16, device="cuda")
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
