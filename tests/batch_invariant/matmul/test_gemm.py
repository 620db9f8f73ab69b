"""Test that GEMMs in batch-invariant mode are right, and have the same bits for a row in any batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, relative_error, same_bits

from jitnorm.batch_invariant import bmm_batch_invariant, matmul_persistent

from ..common import TOLERANCE

# (m, n, k): one row; less, as many and more rows than a block; k of no tile; one column
SHAPES = [(1, 64, 128), (31, 48, 77), (32, 128, 64), (100, 300, 257), (5, 1, 33), (3, 7, 1)]


def operands(m, n, k, dtype, device):
    return torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.t().contiguous().t(),
    "a slice": lambda x: torch.cat((x, x[:, :1].repeat(1, 16)), 1)[:, : x.shape[1]],
    "every second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "from an odd address": lambda x: torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_definition(device, shape, dtype):
    a, b = operands(*shape, dtype, device)
    bias = torch.randn(shape[1], device=device).to(dtype)
    exact = a.double() @ b.double()
    assert relative_error(matmul_persistent(a, b), exact) <= TOLERANCE[dtype]
    assert relative_error(matmul_persistent(a, b, bias), exact + bias.double()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("b_layout", LAYOUTS)
@pytest.mark.parametrize("a_layout", LAYOUTS)
def test_strides(device, a_layout, b_layout):
    """Strides of a do not affect the bits. Other strides of b may select another GEMM."""
    a, b = operands(37, 72, 129, torch.bfloat16, device)
    other_b = LAYOUTS[b_layout](b)
    out = matmul_persistent(LAYOUTS[a_layout](a), other_b)
    assert relative_error(out, a.double() @ b.double()) <= TOLERANCE[torch.bfloat16]
    assert same_bits(out, matmul_persistent(a, other_b))
    assert same_bits(out[5:6], matmul_persistent(LAYOUTS[a_layout](a)[5:6], other_b))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 4, 3), (4, 0, 3), (4, 3, 0), (0, 0, 0)])
def test_empty(device, m, n, k):
    a, b = operands(m, n, k, torch.float32, device)
    assert torch.equal(matmul_persistent(a, b), torch.zeros(m, n, device=device))
    bias = torch.randn(n, device=device)
    assert torch.equal(matmul_persistent(a, b, bias), bias.expand(m, n))
    batched = bmm_batch_invariant(a[None].repeat(2, 1, 1), b[None].repeat(2, 1, 1))
    assert torch.equal(batched, torch.zeros(2, m, n, device=device))
    assert bmm_batch_invariant(a[None][:0], b[None][:0]).shape == (0, m, n)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches(device, dtype):
    a, b = (
        torch.randn(5, 9, 65, device=device).to(dtype),
        torch.randn(5, 12, 65, device=device).to(dtype).transpose(1, 2),
    )
    exact = a.double() @ b.double()
    out = torch.full((5, 9, 12), float("nan"), device=device, dtype=dtype)
    assert bmm_batch_invariant(a, b, out) is out
    assert relative_error(out, exact) <= TOLERANCE[dtype]
    strided = torch.full((5, 12, 9), float("nan"), device=device, dtype=dtype).transpose(1, 2)
    assert same_bits(bmm_batch_invariant(a, b, strided), out)
    for i in range(5):
        assert same_bits(bmm_batch_invariant(a[i : i + 1], b[i : i + 1])[0], out[i])


@pytest.mark.parametrize("dtype", DTYPES)
def test_aten_operators(mode, device, dtype):
    a, b = operands(33, 24, 50, dtype, device)
    exact, tolerance = a.double() @ b.double(), TOLERANCE[dtype]
    c, bias = torch.randn(33, 24, device=device).to(dtype), torch.randn(24, device=device).to(dtype)
    nan = torch.full_like(c, float("nan"))
    results = {
        "mm.out": (torch.mm(a, b, out=nan.clone()), exact),
        "addmm": (torch.addmm(c, a, b, beta=0.5, alpha=2), 0.5 * c.double() + 2 * exact),
        "addmm, a column": (torch.addmm(c[:, :1], a, b), c[:, :1].double() + exact),
        "addmm, a number": (torch.addmm(c[0, :1], a, b), c[0, :1].double() + exact),
        "addmm, beta 0": (torch.addmm(nan, a, b, beta=0), exact),
        "addmm.out": (torch.addmm(bias, a, b, out=nan.clone()), bias.double() + exact),
        "linear": (F.linear(a, b.t(), bias), bias.double() + exact),
        "matmul": (a.expand(2, 33, 50).contiguous() @ b, exact.expand(2, 33, 24)),
        "matmul, a vector": (a @ b[:, 0], exact[:, 0]),
        "bmm.out": (torch.bmm(a[None], b[None], out=nan.clone()[None])[0], exact),
        "baddbmm": (torch.baddbmm(c[None], a[None], b[None], beta=0.5)[0], 0.5 * c.double() + exact),
    }
    for name, (result, expected) in results.items():
        assert result.dtype == dtype
        assert relative_error(result, expected) <= tolerance, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mm_dtype_rounds_to_float32(mode, device, dtype):
    a, b = operands(33, 24, 50, dtype, device)
    out = torch.ops.aten.mm.dtype(a, b, torch.float32)
    assert out.dtype == torch.float32
    assert relative_error(out, a.double() @ b.double()) <= TOLERANCE[torch.float32]


def test_a_shared_weight_is_one_gemm(mode, device):
    """torch.matmul calls mm or bmm for it, depending on the strides and the size of the input."""
    weight = torch.randn(40, 64, device=device)
    x = torch.randn(3, 5, 64, device=device)
    rows = F.linear(x.reshape(15, 64), weight).view(3, 5, 40)
    assert same_bits(F.linear(x[:, -1:], weight), rows[:, -1:])
    assert same_bits(F.linear(x[:1, -1:], weight), rows[:1, -1:])
    assert same_bits(F.linear(x.transpose(0, 1), weight).transpose(0, 1), rows)


def test_integers_and_float64(mode):
    a, b = torch.randint(9, (33, 5)), torch.randint(9, (5, 6))
    assert torch.equal(a @ b, (a.double() @ b.double()).long())
    assert torch.equal(torch.addmm(torch.ones(33, 6).long(), a, b), a @ b + 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_is_one_gemm_whatever_the_strides(mode, device, dtype):
    """The strides of some tokens of each sequence fold into one row stride for one sequence, but not for five."""
    hidden, weight = torch.randn(5, 6, 256, device=device).to(dtype), torch.randn(300, 256, device=device).to(dtype)
    for bias in (None, torch.randn(300, device=device).to(dtype)):
        out = F.linear(hidden[:, -2:], weight, bias)
        exact = hidden[:, -2:].double() @ weight.double().t() + (0 if bias is None else bias.double())
        assert relative_error(out, exact) <= TOLERANCE[dtype]
        for i in range(5):
            assert same_bits(F.linear(hidden[i : i + 1, -2:], weight, bias), out[i : i + 1])
        assert same_bits(F.linear(hidden[0, -1], weight, bias), out[0, -1])
    assert F.linear(hidden, weight[0]).shape == (5, 6) and F.linear(hidden[:0], weight).shape == (0, 6, 300)


@pytest.mark.parametrize("n", [1, 2, 5, 9, 15])
def test_few_columns(mode, device, n):
    """The layouts are those that attention has for one sequence and for several."""
    b = torch.randn(65, n, device=device)
    a = torch.randn(1, 65, device=device).repeat(70, 1)
    for layout in ("contiguous", "transposed", "a slice"):
        out = a @ LAYOUTS[layout](b)
        assert relative_error(out, a.double() @ b.double()) < 1e-5
        assert all(same_bits(row, out[0]) for row in out)


def test_gradients(mode, device):
    x = torch.randn(9, 12, device=device, requires_grad=True)
    weight, bias = (
        torch.randn(7, 12, device=device, requires_grad=True),
        torch.randn(7, device=device, requires_grad=True),
    )
    grad = torch.randn(9, 7, device=device)
    F.linear(x, weight, bias).backward(grad)
    assert relative_error(x.grad, grad.double() @ weight.double()) < 1e-6
    assert relative_error(weight.grad, grad.double().T @ x.double()) < 1e-6
    assert relative_error(bias.grad, grad.double().sum(0)) < 1e-6
    x.grad = None
    torch.mm(x, weight.t()).backward(grad)
    assert relative_error(x.grad, grad.double() @ weight.double()) < 1e-6


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: matmul_persistent(1, torch.ones(2, 2)), TypeError, "a must be a torch.Tensor, got int"),
        (lambda: matmul_persistent(torch.ones(2, 3), torch.ones(2, 3)), ValueError, r"\[m, k\] and \[k, n\]"),
        (lambda: matmul_persistent(torch.ones(3), torch.ones(3, 2)), ValueError, r"got \[3\] and \[3, 2\]"),
        (lambda: matmul_persistent(torch.ones(2, 3), torch.ones(3, 2).half()), TypeError, "b must be float32"),
        (lambda: matmul_persistent(torch.ones(2, 3), torch.ones(3, 2), torch.ones(3)), ValueError, "bias must have"),
        (lambda: matmul_persistent(torch.ones(2, 3), torch.ones(3, 2, device="meta")), ValueError, "b must be on cpu"),
        (lambda: bmm_batch_invariant(torch.ones(2, 2, 3), torch.ones(1, 3, 2)), ValueError, "batch, m, k"),
        (
            lambda: bmm_batch_invariant(torch.ones(1, 2, 3), torch.ones(1, 3, 2), torch.ones(2, 2)),
            ValueError,
            "out must have shape",
        ),
        (
            lambda: matmul_persistent(torch.ones(2, 3, requires_grad=True), torch.ones(3, 2)),
            RuntimeError,
            "call torch.mm or torch.addmm in the mode",
        ),
    ],
)
def test_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
