"""LayerNorm against its definition in float64: every kind of size, layout and form, and the float8 output."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from fp8_reference import check_operator, codes, decode, encode, quotient
from helpers import DTYPES, TOLERANCE, compiled, relative_error, same_bits
from operator_calls import forget_kernels

import jitnorm
from jitnorm import dispatch, layernorm, layernorm_quant_fp8, nn
from jitnorm.core.norms import MAX_HIDDEN_SIZE
from jitnorm.core.operators import OPERATORS
from jitnorm.jit.load import load
from jitnorm.jit.spec import Target
from jitnorm.layernorm import LAYERNORM_QUANT_FP8

E4M3 = torch.float8_e4m3fn
EPS = 1e-6
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# By vector width in 16 bits: 1 (one element, odd sizes), 2, 4 and 8 elements; sizes of both kernel classes; and, on
# CUDA, rows in shared memory, and of clusters of 2, 4 and 8 blocks, of sizes that divide among the threads and that do
# not. In a cluster each of the two sums goes through the memory of all blocks.
SIZES = [1, 2, 3, 100, 250, 257, 300, 768, 1001, 2880, 5000, 12288]
LONG_SIZES = [3001, 16384, 20481, 32768, 40004, 40008, 53248, 65535, 65536]
PAIRS = [(BF16, BF16), (FP16, FP32), (FP32, BF16)]
QUANT_ERROR = 2e-6  # of the normalised float32 number, relative to its terms: two sums, the root, and two products


def sizes_and_dtypes(cpu_sizes):
    """Parametrise by device, size and dtypes. A CPU kernel is one loop for all sizes: the first two are not slow."""
    cpu = [
        pytest.param("cpu", size, PAIRS[i % len(PAIRS)], marks=pytest.mark.slow if i > 1 else ())
        for i, size in enumerate(cpu_sizes)
    ]
    cuda = [pytest.param("cuda", size, pair, marks=pytest.mark.gpu) for size in SIZES + LONG_SIZES for pair in PAIRS]
    return pytest.mark.parametrize(("device", "hidden_size", "dtypes"), [*cpu, *cuda])


def tolerance(dtype, hidden_size):
    """Return that of TOLERANCE, or the bound of one rounding for rows of so few numbers that errors do not average."""
    return TOLERANCE[dtype] * (1.4 if hidden_size < 8 else 1)


def reference(x, weight=None, bias=None, eps=EPS):
    """Return the result, mean and rstd in float64."""
    x = x.double()
    mean = x.mean(-1)
    y = x - mean.unsqueeze(-1)
    rstd = 1 / torch.sqrt(y.square().mean(-1) + eps)
    y = y * rstd.unsqueeze(-1)
    y = y if weight is None else y * weight.double()
    return (y if bias is None else y + bias.double()), mean, rstd


def inputs(*shape, dtype, device, weight_dtype=None):
    """Return rows of all magnitudes, whose means are about as large as their deviations, a weight and a bias."""
    scale = torch.rand(*shape[:-1], 1, device=device).mul(4).exp()
    x = torch.randn(shape, device=device) + torch.randn_like(scale)
    if shape[-1] < 8:  # numbers that are nearly equal by chance would have no deviation but that of rounding
        x = x + torch.arange(shape[-1], device=device) % 2 * 8
    x = (x * scale).to(dtype)
    weight, bias = (torch.randn(shape[-1], device=device).to(weight_dtype or dtype) for _ in range(2))
    return x, weight, bias


def poisoned(x, dtype=None):
    out = torch.full(x.shape, float("nan"), device=x.device)
    return out.to(dtype or x.dtype)


@sizes_and_dtypes([1, 7, 300, 1001, 65536])
def test_matches_the_definition(device, hidden_size, dtypes):
    dtype, weight_dtype = dtypes
    for num_rows in (1, 3, 67):
        x, w, b = inputs(num_rows, hidden_size, dtype=dtype, device=device, weight_dtype=weight_dtype)
        before, out = x.clone(), poisoned(x)
        assert layernorm(x, w, b, out=out) is out
        assert relative_error(out, reference(x, w, b)[0]) <= tolerance(dtype, hidden_size)
        assert same_bits(x, before)


# By where a row waits: in registers (of one of many rows of a warp, of a warp, of a block, by narrow accesses), in
# shared memory, in a cluster.
@pytest.mark.gpu
@pytest.mark.parametrize("hidden_size", [100, 768, 1001, 4096, 12288, 20481, 65536])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_large_grid_has_the_same_bits(dtype, hidden_size):
    """There weight and bias are read only when a row is written."""
    num_rows = max(600, (1 << 23) // hidden_size)
    x, w, b = inputs(num_rows, hidden_size, dtype=dtype, device="cuda", weight_dtype=FP32)
    out = layernorm(x, w, b, out=poisoned(x))
    assert relative_error(out, reference(x, w, b)[0]) <= tolerance(dtype, hidden_size)
    for first in (0, num_rows // 2, num_rows - 7):
        assert same_bits(layernorm(x[first : first + 7], w, b), out[first : first + 7])


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden_size", "dtype"), [(4096, BF16), (18432, BF16), (65536, BF16), (65536, FP32)])
def test_unaligned_rows_have_the_same_bits(hidden_size, dtype):
    for num_rows in (3, 1100):  # in a small grid, and in a large one
        x, w, b = inputs(num_rows, hidden_size, dtype=dtype, device="cuda")
        wide = torch.zeros(num_rows, hidden_size + 1, device="cuda", dtype=dtype)
        view = wide[:, 1:]
        view.copy_(x)
        assert same_bits(layernorm(view, w, b), layernorm(x, w, b))


@pytest.mark.gpu
def test_reads_no_weight_before_the_kernel_before_it_has_written():
    """In a large grid, whose kernel reads it when it writes the row."""
    x, first_weight, b = inputs(1100, 4096, dtype=BF16, device="cuda")
    for _ in range(10):
        results = []
        for pdl in (True, False):
            w, out = first_weight.clone(), poisoned(x)
            for i in range(20):
                layernorm(x, w, b, out=out, enable_pdl=pdl)
                layernorm(out[i : i + 1], first_weight, b, out=w.unsqueeze(0), enable_pdl=pdl)
            results.append(out)
        assert same_bits(*results)


# On the GPU each class of kernels, and clusters.
@pytest.mark.parametrize(
    ("device", "hidden_size"),
    [("cpu", 300), *(pytest.param("cuda", n, marks=pytest.mark.gpu) for n in (64, 300, 4096, 12288, 20481, 65536))],
)
def test_forms_and_stats(device, hidden_size):
    for dtype in (BF16, FP32)[: 1 + (device == "cuda")]:
        x, w, b = inputs(7, hidden_size, dtype=dtype, device=device)
        for weight, bias in ((w, b), (w, None), (None, b), (None, None)):
            expected, mean, rstd = reference(x, weight, bias)
            out = layernorm(x, weight, bias)
            assert relative_error(out, expected) <= TOLERANCE[dtype]
            for _ in range(2):  # by the slow path, then by the fast path
                again, *found = layernorm(x, weight, bias, return_stats=True)
                assert same_bits(again, out)
                for stat, exact in zip(found, (mean, rstd), strict=True):
                    assert stat.dtype == torch.float32 and stat.shape == x.shape[:-1]
                    assert relative_error(stat, exact) <= 2e-6


# A sum over warps, and many more numbers.
@pytest.mark.parametrize("hidden_size", [300, pytest.param(4096, marks=pytest.mark.slow)])
def test_a_large_mean_costs_no_variance(device, hidden_size):
    """The mean of the squares minus the square of the mean would be wrong in the first digit."""
    x = torch.randn(5, hidden_size, device=device) + 1000
    out, mean, rstd = layernorm(x, return_stats=True)
    expected, exact_mean, exact_rstd = reference(x)
    assert relative_error(mean, exact_mean) <= 5e-7 and relative_error(rstd, exact_rstd) <= 1e-6
    assert relative_error(out, expected) <= 6e-4  # of the mean, whose ulp is 6e-5


def test_rows_of_one_number_become_the_bias(device):
    _, w, b = inputs(1, 300, dtype=FP32, device=device)
    x = torch.tensor([0.0, -3.0, 2.0**100], device=device).unsqueeze(-1).repeat(1, 300)
    out, mean, rstd = layernorm(x, w, b, return_stats=True)
    assert same_bits(out, b.expand(3, 300)) and same_bits(mean, x[:, 0])
    assert relative_error(rstd, torch.full((3,), 1e3, device=device, dtype=torch.float64)) <= 1e-6


def test_is_layer_norm_of_torch(device):
    x, w, b = inputs(67, 300, dtype=FP32, device=device)
    for eps in (0.0, 1e-5, 100.0):
        expected = F.layer_norm(x.double(), (300,), w.double(), b.double(), eps)
        assert relative_error(layernorm(x, w, b, eps), expected) <= 1e-6


def test_a_weight_for_each_head(device):
    x = torch.randn(5, 3, 6, 300, device=device).bfloat16()
    w, b = (torch.randn(n, 300, device=device).bfloat16() for n in (6, 1))
    assert relative_error(layernorm(x, w, b[0]), reference(x, w, b)[0]) <= TOLERANCE[BF16]


# Whole vectors of 16 bytes, and one element in each.
@pytest.mark.parametrize("hidden_size", [pytest.param(128, marks=pytest.mark.slow), 1001])
def test_the_same_bits_in_every_layout(device, hidden_size):
    x, w, b = inputs(4, 6, 5, hidden_size, dtype=BF16, device=device)
    expected, scale = layernorm(x, w, b), torch.full((1,), 0.1, device=device)
    quantised = layernorm_quant_fp8(x, w, b, scale)[0]
    wide = torch.randn(4, 6, 5, 2 * hidden_size + 24, device=device).bfloat16()
    for first in (0, 8, 1):  # aligned as far as the size is, and not at all
        view = wide[..., first : first + hidden_size]
        view.copy_(x)
        before = wide.clone()
        assert same_bits(layernorm(view, w, b), expected)
        moved = view.permute(2, 0, 1, 3)  # three leading dimensions that do not merge
        assert same_bits(layernorm(moved, w, b), expected.permute(2, 0, 1, 3))
        bytes_around = torch.full((4, 6, 5, hidden_size + 24), 0x55, dtype=torch.uint8, device=device)
        into = bytes_around.view(E4M3)[..., first : first + hidden_size]
        assert layernorm_quant_fp8(view, w, b, scale, out=into)[0] is into
        assert same_bits(into, quantised)
        bytes_around[..., first : first + hidden_size] = 0x55
        assert (bytes_around == 0x55).all()  # nothing beside the rows was written
        assert same_bits(layernorm_quant_fp8(moved, w, b, scale)[0], quantised.permute(2, 0, 1, 3))
        assert same_bits(wide, before)
        assert layernorm(view, w, b, out=view) is view
        before[..., first : first + hidden_size] = expected
        assert same_bits(wide, before)
    shifted_w, shifted_b = torch.empty(2, hidden_size + 1, device=device).bfloat16()[:, 1:]
    assert same_bits(layernorm(x, shifted_w.copy_(w), shifted_b.copy_(b)), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden_size", [2, 6, 12, 64])  # rows of 1, 2, 4 and more float8 numbers in an access
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(FP32, BF16), (BF16, FP32)])
def test_unaligned_rows_beside_factors_of_another_dtype(hidden_size, dtype, weight_dtype):
    x, w, b = inputs(5, hidden_size, dtype=dtype, device="cuda", weight_dtype=weight_dtype)
    scale = torch.ones(1, device="cuda")
    expected, quantised = layernorm(x, w, b), layernorm_quant_fp8(x, w, b, scale)[0]
    assert relative_error(expected, reference(x, w, b)[0]) <= tolerance(dtype, hidden_size)
    shifted = torch.empty(5, hidden_size + 1, device="cuda", dtype=dtype)[:, 1:].copy_(x)
    w, b = torch.stack((w, b)).new_empty(2, hidden_size + 1)[:, 1:].copy_(torch.stack((w, b)))
    out = torch.zeros(5, hidden_size + 1, device="cuda").to(E4M3)[:, 1:]
    assert same_bits(layernorm(shifted, w, b), expected)
    assert same_bits(layernorm_quant_fp8(shifted, w, b, scale, out=out)[0], quantised)


@pytest.mark.parametrize(("hidden_size", "dtype"), [(300, BF16), pytest.param(20481, FP32, marks=pytest.mark.slow)])
def test_the_same_bits_in_any_batch(device, hidden_size, dtype):
    x, w, b = inputs(515, hidden_size, dtype=dtype, device=device)
    scale = torch.full((1,), 0.1, device=device)
    for call in (lambda x, **o: layernorm(x, w, b, **o), lambda x, **o: layernorm_quant_fp8(x, w, b, scale, **o)[0]):
        everything = call(x)
        for rows in (slice(0, 1), slice(514, 515), slice(7, 40), slice(1, 515)):
            assert same_bits(call(x[rows]), everything[rows])
            assert same_bits(call(x[rows].clone(), enable_pdl=False), everything[rows])


def test_no_rows(device):
    scale = torch.ones(1, device=device)
    for shape in ((0, 300), (0, 3, 300), (3, 0, 300)):
        x = torch.empty(shape, device=device)
        out, mean, rstd = layernorm(x, return_stats=True)
        assert out.shape == shape and mean.shape == rstd.shape == shape[:-1]
        assert layernorm_quant_fp8(x, None, None, scale)[0].shape == shape


def test_special_values_stay_in_their_row(device):
    x, w, b = inputs(5, 300, dtype=FP32, device=device)
    expected = layernorm(x, w, b)
    x[1, 7], x[2, 8], x[3, 9] = float("inf"), float("-inf"), float("nan")
    out = layernorm(x, w, b)
    assert same_bits(out[[0, 4]], expected[[0, 4]])
    assert out[1:4].isnan().all()  # as F.layer_norm: the mean is infinite


# The float8 output


@sizes_and_dtypes([1, 7, 300, 4096])
def test_float8_matches_the_definition(device, hidden_size, dtypes):
    dtype, weight_dtype = dtypes
    x, w, b = inputs(33, hidden_size, dtype=dtype, device=device, weight_dtype=weight_dtype)
    scale, before = torch.full((1,), 0.013, device=device), x.clone()
    out = torch.full((33, hidden_size + 32), 0x7F, dtype=torch.uint8, device=device).view(E4M3)[:, :hidden_size]
    for weight, bias in ((w, b), (None, None)):
        q, s = layernorm_quant_fp8(x, weight, bias, scale, EPS, out)
        assert q is out and s is scale and same_bits(x, before)
        y, mean, rstd = reference(x, weight, bias)
        terms = (x.double().abs() + mean.abs().unsqueeze(-1)) * rstd.unsqueeze(-1)  # of which one may cancel the other
        terms = terms if weight is None else terms * weight.double().abs() + bias.double().abs()
        low, high = (decode(encode(quotient(y + sign * QUANT_ERROR * terms, scale)).long()) for sign in (-1, 1))
        found = decode(codes(q).long()).view(33, hidden_size)
        assert ((low <= found) & (found <= high)).all()
        # Otherwise the comparison would be empty. Equal numbers, as those of a row of one, have a large rstd.
        assert hidden_size < 3 or (low == high).double().mean() > 0.98


def test_float8_saturates(device):
    x, w, b = inputs(3, 300, dtype=BF16, device=device)
    x[1, 5] = float("nan")
    q, _ = layernorm_quant_fp8(x, w, b, torch.full((1,), 1e-6, device=device))
    found = codes(q).view(3, 300)
    assert (found[1] & 127).eq(0x7F).all()
    assert (found[[0, 2]] & 127).eq(0x7E).double().mean() > 0.99  # 448, but where the result is nearly zero


# Gradients and tracers


@pytest.mark.parametrize("has_weight", [True, False])
def test_gradients(device, has_weight):
    x, _, bias = inputs(4, 3, 60, dtype=FP32, device=device)
    weight = torch.randn(3, 60, device=device) if has_weight else None
    leaves = [None if t is None else t.requires_grad_() for t in (x, weight, bias)]
    grad = torch.randn_like(x)
    out, mean, rstd = layernorm(*leaves, return_stats=True)
    assert not mean.requires_grad and not rstd.requires_grad
    (out * grad).sum().backward()
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    (reference(*doubles)[0] * grad).sum().backward()
    for found, expected in zip(leaves, doubles, strict=True):
        assert found is None or relative_error(found.grad, expected.grad) <= 1e-5


@pytest.mark.slow
def test_gradients_in_half_precision(device):
    leaves = [t.requires_grad_() for t in inputs(33, 768, dtype=BF16, device=device)]
    layernorm(*leaves).float().square().sum().backward()
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    reference(*doubles)[0].square().sum().backward()
    for found, expected in zip(leaves, doubles, strict=True):
        assert found.grad.dtype == BF16 and relative_error(found.grad, expected.grad) <= 1e-2


@pytest.mark.slow
def test_second_derivatives(device):
    x, w = (torch.randn(shape, device=device).requires_grad_() for shape in ((3, 20), (20,)))
    found = []
    for function in (layernorm, lambda x, w: reference(x, w)[0].float()):
        (grad,) = torch.autograd.grad(function(x, w).pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), (x, w)))
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b.double()) <= 1e-4


def test_gradients_that_there_are_not(device):
    x, w, b = inputs(3, 300, dtype=FP32, device=device)
    w.requires_grad_()
    with pytest.raises(RuntimeError, match="layernorm with out= has no gradient"):
        layernorm(x, w, b, out=torch.empty_like(x))
    with pytest.raises(RuntimeError, match="layernorm_quant_fp8 has no gradient"):
        layernorm_quant_fp8(x, w, b, torch.ones(1, device=device))
    with torch.no_grad():
        assert not layernorm(x, w, b).requires_grad


@pytest.mark.slow
def test_compiles_into_one_graph(device):
    x, w, b = inputs(6, 300, dtype=BF16, device=device)
    scale = torch.full((1,), 0.1, device=device)

    def function(x, w, b, scale):
        out = torch.empty_like(x)
        layernorm(x + x, w, out=out)
        return out, *layernorm(x + x, w, b, return_stats=True), *layernorm_quant_fp8(x + x, w, b, scale)

    for found, expected in zip(compiled(function)(x, w, b, scale), function(x, w, b, scale), strict=True):
        assert same_bits(found, expected)


@pytest.mark.slow
def test_opcheck(device):
    """Schema, fake implementation, autograd and dynamic shapes agree with what the operators do."""

    def rows(*shape):
        return torch.randn(*shape, device=device).bfloat16()

    def check(name, *arguments):
        torch.library.opcheck(getattr(torch.ops.jitnorm, name).default, arguments)

    stats = [torch.empty(3, 5, device=device) for _ in range(2)]
    check("layernorm", rows(3, 5, 60), None, None, EPS, True)
    check("layernorm", *(rows(*shape).requires_grad_() for shape in ((3, 5, 60), (5, 60), (60,))), EPS, False)
    check("layernorm_out", rows(3, 5, 60), rows(60), None, rows(3, 5, 60), *stats, EPS)
    check("layernorm_out", rows(3, 5, 60), None, rows(60), rows(3, 5, 60), None, None, EPS, True)
    scale, out = torch.ones(1, device=device), torch.zeros(3, 5, 60, device=device).to(E4M3)
    check_operator(
        torch.ops.jitnorm.layernorm_quant_fp8.default, (rows(3, 5, 60), rows(60), rows(60), out, scale, EPS, None)
    )


# Refused calls


def overlapping(x):
    """Return a view of the rows of `x` that begin one row later, as float8 numbers."""
    return x.view(E4M3).view(4, -1)[:, :300]


REFUSED = {
    "too long": (RuntimeError, "hidden_size 65537: supported are 1 to 65536", lambda x, w: (x.new_empty(2, 65537),)),
    "no elements": (RuntimeError, "does not support hidden_size 0", lambda x, w: (x[:, :0],)),
    "no tensor": (TypeError, "input must be a torch.Tensor, got NoneType", lambda x, w: (None, w)),
    "dtype": (TypeError, "input must be float16 or bfloat16 or float32, got float64", lambda x, w: (x.double(),)),
    "weight": (ValueError, r"weight must have shape \[300\]", lambda x, w: (x, w[:7])),
    "bias": (ValueError, r"bias must have shape \[300\]", lambda x, w: (x, w, w[:7])),
    "bias of another dtype": (TypeError, "bias must be float32, got bfloat16", lambda x, w: (x, w, w.bfloat16())),
    "columns apart": (ValueError, "input must have a last stride of 1", lambda x, w: (x.t().contiguous().t(), w)),
    "out": (ValueError, "out must be input itself or share no memory", lambda x, w: (x[1:], w, w, EPS, x[:-1])),
    "out repeats": (ValueError, "out must not overlap itself", lambda x, w: (x, w, w, EPS, w.clone().expand(4, 300))),
    "out's shape": (ValueError, r"out must have shape \[4, 300\]", lambda x, w: (x, w, w, EPS, x[1:].clone())),
    "out's dtype": (TypeError, "out must be float32, got bfloat16", lambda x, w: (x, w, w, EPS, x.bfloat16())),
    "out is the bias": (ValueError, "out must share no memory with bias", lambda x, w: (x[:1], w, x[0], EPS, x[:1])),
    "eps": (ValueError, "eps must be zero or more, got -1", lambda x, w: (x, w, w, -1)),
    "enable_pdl": (TypeError, "enable_pdl must be True, False or None", lambda x, w: (x, w, w, EPS, None, 1)),
}  # fmt: skip
QUANT_REFUSED = {
    "no scale": (TypeError, "scale must be a float32 tensor of one element, got float", lambda x, w, s: (x, w, w, 0.5)),
    "scales": (ValueError, r"scale must have 1 element \(one scale for all\)", lambda x, w, s: (x, w, w, w)),
    "scale's dtype": (TypeError, "scale must be float32, got float64", lambda x, w, s: (x, w, w, s.double())),
    "out's dtype": (TypeError, "out must be float8_e4m3fn, got float32", lambda x, w, s: (x, w, w, s, EPS, x.clone())),
    "out's shape": (ValueError, r"out must have shape \[4, 300\]", lambda x, w, s: (x, w, w, s, EPS, x[1:].to(E4M3))),
    "in place": (ValueError, "out must share no memory with input", lambda x, w, s: (x, w, w, s, EPS, overlapping(x))),
    "dtype": (TypeError, "input must be float16 or bfloat16 or float32", lambda x, w, s: (x.to(E4M3), w, w, s)),
    "bias": (ValueError, r"bias must have shape \[300\]", lambda x, w, s: (x, w, w[:7], s)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_before_anything_is_built(name, cache_dir):
    kind, pattern, make = REFUSED[name]
    with pytest.raises(kind, match=pattern) as caught:
        layernorm(*make(torch.randn(4, 300), torch.randn(300)))
    assert "\n" not in str(caught.value) and not list(cache_dir.glob("kernels/*"))


@pytest.mark.parametrize("name", QUANT_REFUSED)
def test_float8_refused_in_one_line_before_anything_is_built(name, cache_dir):
    kind, pattern, make = QUANT_REFUSED[name]
    with pytest.raises(kind, match=pattern) as caught:
        layernorm_quant_fp8(*make(torch.randn(4, 300), torch.randn(300), torch.ones(1)))
    assert "\n" not in str(caught.value) and not list(cache_dir.glob("kernels/*"))


def test_a_later_call_refuses_what_a_first_call_refuses():
    x, w, scale = torch.randn(4, 300), torch.randn(300), torch.ones(1)
    layernorm(x, w, w)
    layernorm(x)
    layernorm_quant_fp8(x, w, w, scale)
    before = x.clone()
    for function, cases, extra in ((layernorm, REFUSED, ()), (layernorm_quant_fp8, QUANT_REFUSED, (scale,))):
        for kind, pattern, make in cases.values():
            with pytest.raises(kind, match=pattern):
                function(*make(x, w, *extra))
    wide = torch.randn(4, 600)
    with pytest.raises(ValueError, match="out must share no memory with bias"):
        layernorm(x, w, wide[1, 300:], out=wide[:, :300])
    assert same_bits(x, before)


def test_stats_that_are_refused():
    x, stats = torch.randn(4, 300), torch.zeros(2, 4)
    mean, rstd = stats
    run = torch.ops.jitnorm.layernorm_out
    for kind, pattern, tensors in (
        (TypeError, "mean must be float32, got float64", (mean.double(), rstd)),
        (ValueError, "mean must have 4 elements", (mean[:3], rstd)),
        (ValueError, "rstd must have 4 elements", (mean, rstd[:3])),
        (ValueError, "mean must share no memory with rstd", (mean, mean)),
        (ValueError, "input must share no memory with mean", (x[0, :4], rstd)),
        (ValueError, "mean must be contiguous", (stats.t().contiguous()[:, 0], rstd)),
    ):
        with pytest.raises(kind, match=pattern):
            run(x, None, None, x.clone(), *tensors, EPS)
    assert not stats.any()
    run(x, None, None, x.clone(), mean, rstd, EPS)
    assert relative_error(mean, x.double().mean(-1)) <= 1e-6


# Dispatch, modules, warm-up


@pytest.fixture
def no_backend(monkeypatch):
    monkeypatch.delenv("JITNORM_BACKEND", raising=False)
    dispatch.selection._backend_from_environment.cache_clear()


def test_dispatch_selects_a_kernel_or_pytorch(device, no_backend):
    x, w, b = inputs(3, 5, 300, dtype=BF16, device=device)
    assert dispatch.explain("layernorm", x, w, bias=b)[0] == "jit"
    assert same_bits(dispatch.layernorm(x, w, b), layernorm(x, w, b))
    columns = x.transpose(1, 2).contiguous().transpose(1, 2)
    doubles = [t.double() for t in (x, w, b)]
    heads = torch.randn(5, 300, device=device, dtype=torch.float64)
    for arguments in (
        (columns, w, b),
        doubles,
        (doubles[0], heads, doubles[2]),
        (doubles[0], None, doubles[2]),
        (torch.randn(2, 65537, device=device), None, None),
    ):
        assert dispatch.explain("layernorm", *arguments[:2])[0] == "torch"
        out, *stats = dispatch.layernorm(*arguments, return_stats=True)
        error = 1e-12 if out.dtype == torch.float64 else tolerance(out.dtype, 300)
        for found, expected in zip((out, *stats), reference(*arguments), strict=True):
            assert relative_error(found, expected) <= (error if found is out else max(error, 0) + 1e-6)
        into = torch.full_like(arguments[0], float("nan"))
        assert dispatch.layernorm(*arguments, out=into) is into and torch.equal(into, out)
    with dispatch.backend("torch"):
        assert relative_error(dispatch.layernorm(x, w, b), reference(x, w, b)[0]) <= TOLERANCE[BF16]
    with dispatch.backend("jit"), pytest.raises(RuntimeError, match="does not support this call of layernorm"):
        dispatch.layernorm(*doubles)
    with dispatch.backend("flashinfer"), pytest.raises(RuntimeError, match="does not support this call of layernorm"):
        dispatch.layernorm(x, w, b)


def test_dispatch_computes_other_biases_in_pytorch(no_backend):
    x, bias = torch.randn(3, 100), torch.randn(200)[::2]
    for given in (bias, bias.double()):
        expected = F.layer_norm(x.double(), (100,), None, given.double(), 1e-6)
        assert relative_error(dispatch.layernorm(x, None, given), expected) <= 1e-6


def test_dispatch_on_a_device_without_kernels(no_backend, monkeypatch):
    monkeypatch.setattr(dispatch.selection, "_missing_kernel", lambda *_: "jitnorm has no kernel for npu")
    x, w, b = inputs(3, 300, dtype=FP32, device="cpu")
    assert dispatch.explain("layernorm", x, w)[0] == "torch"
    assert relative_error(dispatch.layernorm(x, w, b), reference(x, w, b)[0]) <= 1e-6
    x.requires_grad_()
    dispatch.layernorm(x, w, b).sum().backward()
    assert x.grad is not None
    with pytest.raises(RuntimeError, match="layernorm with out= has no gradient"):
        dispatch.layernorm(x, w, b, out=torch.empty_like(x))


@pytest.mark.slow
def test_dispatch_compiles_into_one_graph(device, no_backend):
    x, w, b = inputs(5, 300, dtype=FP32, device=device)
    for tensors in ((x, w, b), (x.double(), w.double(), b.double())):
        found = compiled(lambda *t: dispatch.layernorm(*t, return_stats=True))(*tensors)
        for one, other in zip(found, dispatch.layernorm(*tensors, return_stats=True), strict=True):
            assert same_bits(one, other)


def test_dispatch_is_recorded_by_fx(no_backend):
    w = torch.randn(300)
    graph = torch.fx.symbolic_trace(lambda x: dispatch.layernorm(x, w))
    x = torch.randn(3, 300)
    assert same_bits(graph(x), layernorm(x, w))


def twins(*args, **kwargs):
    """Return this package's module and torch's, with the same random weight and bias."""
    ours, theirs = nn.LayerNorm(*args, **kwargs), torch.nn.LayerNorm(*args, **kwargs)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("shape", [300, pytest.param([1], marks=pytest.mark.slow), [3, 100]], ids=str)
def test_module_is_that_of_torch(device, options, shape):
    ours, theirs = twins(shape, eps=1e-3, device=device, **options)
    assert isinstance(ours, torch.nn.LayerNorm) and repr(ours) == repr(theirs)
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    for dtype in (FP32, BF16, torch.float64):
        mine, other = ours.to(dtype), theirs.to(dtype)
        x = torch.randn(2, 5, *ours.normalized_shape, device=device).to(dtype)
        out, expected = mine(x).detach(), other(x).detach()
        assert out.dtype == expected.dtype and out.shape == expected.shape
        bound = {FP32: 1e-6, BF16: 4e-3, torch.float64: 1e-12}[dtype]
        assert (out.double() - expected.double()).norm() <= bound * max(1.0, float(expected.double().norm()))
    for module in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert same_bits(module(x).detach(), out)


def test_module_calls_the_kernel_where_it_serves(device, monkeypatch):
    called, call = [], nn.layernorm
    monkeypatch.setattr(nn, "layernorm", lambda *a: called.append(a[0].shape) or call(*a))
    ours, theirs = twins(300, device=device)
    x = torch.randn(4, 7, 300, device=device)
    for input in (x, x.transpose(0, 1), x[:, 0], x.bfloat16(), x.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        expected = reference(input, theirs.weight.detach(), theirs.bias.detach(), theirs.eps)[0]
        assert relative_error(ours(input).detach(), expected) <= TOLERANCE[input.dtype]
    assert len(called) == 5
    nn.LayerNorm(300, elementwise_affine=False, device=device)(x)
    nn.LayerNorm(300, bias=False, device=device)(x)
    assert len(called) == 7
    nn.LayerNorm(65537, device=device)(torch.randn(2, 65537, device=device))
    nn.LayerNorm([7, 300], device=device)(x)
    torch.func.grad(lambda x: ours(x).square().sum())(x)
    with torch.autocast(device, torch.bfloat16):
        assert ours(x.bfloat16()).dtype == theirs(x.bfloat16()).dtype  # float32 on CUDA
    assert len(called) == 7


def test_module_refuses_what_torch_refuses():
    for module in (nn.LayerNorm(300), torch.nn.LayerNorm(300)):
        with pytest.raises(RuntimeError, match=r"normalized_shape|normalized shape"):
            module(torch.randn(3, 299))
    with pytest.raises(ValueError, match="eps must be zero or more, got -1"):
        nn.LayerNorm(300, eps=-1)
    with pytest.raises(RuntimeError, match=r"torch.jit.script cannot compile jitnorm's LayerNorm"):
        torch.jit.script(nn.LayerNorm(300))


@pytest.mark.slow
def test_module_trains_and_compiles(device):
    ours, theirs = twins(300, device=device)
    x = torch.randn(5, 300, device=device)
    for module in (ours, theirs):
        compiled(module)(x).pow(3).sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert relative_error(a.grad, b.grad.double()) <= 1e-5
    graph = torch.fx.symbolic_trace(ours)
    assert same_bits(graph(x), ours(x))


@pytest.mark.slow
def test_warm_up_builds_what_calls_load(cache_dir, monkeypatch):
    forget_kernels()
    forms = ["strided", "strided+bias", "strided+no_weight"]
    result = jitnorm.warmup("layernorm", 300, "fp32", device="cpu", form=forms)
    result_of_quant = jitnorm.warmup("layernorm_quant_fp8", 300, "fp32", device="cpu")
    assert len(result.built) == 3 and len(result_of_quant.built) == 1
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    x, w, b = inputs(4, 2, 300, dtype=FP32, device="cpu")
    for input in (x, x.transpose(0, 1)[:, :3]):
        layernorm(input, w, return_stats=True)
        layernorm(input, w, b)
        layernorm(input)
        layernorm_quant_fp8(input, w, b, torch.ones(1))
    for options, words in (({"bias": b[:200]}, "--form strided.no_weight.bias"), ({}, "--form strided.no_weight")):
        with pytest.raises(RuntimeError, match=f"jitnorm warmup --op layernorm --hidden-size 200 --dtype fp32 {words}"):
            layernorm(x[..., :200], **options)


# On CUDA


@pytest.mark.nvcc
@pytest.mark.parametrize(  # the oldest architecture, the first with e4m3 conversions, clusters, and the newest
    ("arch", "dtype", "hidden_size"),
    [
        pytest.param("7.5", FP16, 6, marks=pytest.mark.slow),
        pytest.param("8.9", BF16, 1001, marks=pytest.mark.slow),
        ("9.0a", FP32, 65536),
        pytest.param("12.0a", BF16, 2, marks=pytest.mark.slow),
        pytest.param("12.0a", BF16, 65536, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("form", ["strided+bias", "unaligned+no_weight"])
def test_compiles_for(arch, dtype, hidden_size, form):
    target = Target.cuda(arch)
    for operator in (OPERATORS["layernorm"], LAYERNORM_QUANT_FP8):
        kernel = load(operator.warmup_spec(hidden_size, dtype, dtype, target, form))
        x = torch.randn(2, hidden_size).to(dtype)
        out = x.to(E4M3) if operator is LAYERNORM_QUANT_FP8 else x
        assert kernel.layernorm(x, None, x[0], x[0], out, None, EPS, None, None, None) == 1  # refused: on the CPU


@pytest.mark.gpu
@pytest.mark.parametrize("hidden_size", [300, 1001, 65536])  # the last is that of a cluster
def test_reads_nothing_before_the_kernel_before_it_has_written(hidden_size):
    x, w, b = inputs(3, hidden_size, dtype=BF16, device="cuda")
    for _ in range(10):
        results = []
        for pdl in (True, False):
            one, other = x.clone(), poisoned(x)

            def chain(one=one, other=other, pdl=pdl):
                for _ in range(20):
                    for source, to in ((one, other), (other, one)):
                        layernorm(source, w, b, out=to, enable_pdl=pdl)

            chain()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                chain()
            graph.replay()
            results.append(one)
        assert same_bits(*results)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    x = torch.empty(2**31 // 12288 + 5, 12288, device="cuda", dtype=BF16)
    first, w, b = inputs(5, 12288, dtype=BF16, device="cuda")
    expected = layernorm(first, w, b)
    for rows in (x[:5], x[-5:]):
        rows.copy_(first)
    _, mean, _ = layernorm(x, w, b, out=x, return_stats=True)
    assert same_bits(x[:5], expected) and same_bits(x[-5:], expected) and same_bits(mean[:5], mean[-5:])


@pytest.mark.gpu
@pytest.mark.slow
def test_every_size():
    """The error is that of rounding for every size to 1100, for random longer ones, and in each dtype."""
    generator = torch.Generator().manual_seed(0)
    sizes = [*range(1, 1101), *torch.randint(1101, MAX_HIDDEN_SIZE + 1, (40,), generator=generator).tolist()]
    jitnorm.warmup("layernorm", sizes, DTYPES, device="cuda")
    for size in sizes:
        for dtype in DTYPES:
            x, w, b = inputs(3, size, dtype=dtype, device="cuda")
            out = layernorm(x, w, b, out=poisoned(x))
            assert relative_error(out, reference(x, w, b)[0]) <= tolerance(dtype, size), (size, dtype)
