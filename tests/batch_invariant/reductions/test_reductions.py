"""Test softmax, means and RMSNorm in batch-invariant mode against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, relative_error, rmsnorm_reference, same_bits

from jitnorm.batch_invariant import log_softmax, mean_dim, rms_norm_batch_invariant, set_batch_invariant_mode, softmax

TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 4e-6}  # torch's softmax: 1e-6
SIZES = (1, 7, 1024, 1500, 40000)  # one element, less than a vector, whole, ragged, more than one block holds


def other_layouts(x):
    """Yield the same rows in other strides, and at another address."""
    yield torch.cat((x, x), -1)[..., : x.shape[-1]]
    yield x.transpose(0, 1).contiguous().transpose(0, 1)
    yield torch.cat((x[:1], x))[1:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("function", "exact"), [(softmax, torch.softmax), (log_softmax, torch.log_softmax)])
def test_softmax(device, function, exact, size, dtype):
    x = (4 * torch.randn(9, size, device=device)).to(dtype)
    out = function(x)
    expected = exact(x.double(), -1)
    # torch's kernel adds 40000 float32 numbers with an error of 8e-6
    factor = 5 if device == "cpu" and dtype == torch.float32 else 1
    assert float((out - expected).abs().max()) <= factor * TOLERANCE[dtype] * max(1.0, float(expected.abs().max()))
    for other in (*other_layouts(x), x.float().to(dtype)):
        assert same_bits(function(other), out)
    assert same_bits(function(x[4:5]), out[4:5])
    assert same_bits(function(x.t().contiguous(), 0), out.t())


def test_softmax_of_special_values(device):
    x = torch.randn(4, 40000, device=device)
    x[0, 5], x[1, 7], x[2] = float("nan"), float("inf"), float("-inf")
    x[3, 1:] = float("-inf")
    for size in (100, 40000):
        out = softmax(x[:, :size])
        assert out[:3].isnan().all()
        assert out[3, 0] == 1 and not out[3, 1:].any()
    assert softmax(torch.tensor(3.0, device=device)) == 1
    assert softmax(torch.empty(0, 5, device=device)).shape == (0, 5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_mean(device, size, dtype):
    x = (1 + torch.randn(9, size, device=device)).to(dtype)
    out = mean_dim(x, -1)
    assert relative_error(out, x.double().mean(-1)) <= TOLERANCE[dtype]
    for other in other_layouts(x):
        assert same_bits(mean_dim(other, -1), out)
    assert same_bits(mean_dim(x[4:5], 1), out[4:5])
    assert same_bits(mean_dim(x.t().contiguous(), 0, keepdim=True), out[None])


def test_mean_of_dimensions(device):
    x = 1 + torch.randn(3, 4, 5, device=device)  # no mean is a small difference of large numbers
    for dim in (0, -1, (0, 2), [-3, 1], None, (), (0, 1, 2)):
        expected = x.double().mean(dim)
        for keepdim in (False, True):
            out = mean_dim(x, dim, keepdim)
            assert out.shape == x.mean(dim, keepdim).shape
            assert relative_error(out.reshape(expected.shape), expected) < 1e-6
    assert mean_dim(x.bfloat16(), 0, dtype=torch.float32).dtype == torch.float32
    assert mean_dim(torch.arange(4, device=device), 0, dtype=torch.float32) == 1.5
    assert mean_dim(torch.empty(2, 0, device=device), 1).isnan().all()
    assert mean_dim(torch.empty(0, 2, device=device), 1).shape == (0,)
    scalar = torch.tensor(3.0, device=device)
    with set_batch_invariant_mode():
        assert [scalar.mean(), scalar.mean(0), scalar.mean(-1, keepdim=True)] == [scalar] * 3


@pytest.mark.slow
def test_compiled_with_other_strides(mode, device):
    """Compiled code relies on the strides of ATen's results. One graph calls all operators, to be compiled once."""

    def call(x):
        results = [
            x.mean(-1),
            x.mean((0, 2), keepdim=True),
            torch.softmax(x, 1),
            torch.bmm(x, x.transpose(1, 2)),
            torch.mm(x[0].t(), x[0]),
        ]
        return [result + 1 for result in results]

    x = torch.randn(3, 4, 5, device=device).permute(2, 0, 1)
    torch.compiler.reset()
    for result, expected in zip(torch.compile(call, fullgraph=True)(x), call(x), strict=True):
        assert same_bits(result, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [128, 1024, 1, 1000, 10000])  # with a kernel of the package, and without
def test_rms_norm(device, size, dtype):
    x, weight = torch.randn(9, size, device=device).to(dtype), torch.randn(size, device=device).to(dtype)
    out = rms_norm_batch_invariant(x, weight)
    assert relative_error(out, rmsnorm_reference(x, weight, 1e-6)) <= TOLERANCE[dtype]
    for other in other_layouts(x):
        assert same_bits(rms_norm_batch_invariant(other, weight), out)
    assert same_bits(rms_norm_batch_invariant(x[4:5], weight), out[4:5])


def test_aten_rms_norm(mode, device):
    x = torch.randn(3, 5, 100, device=device).bfloat16()
    ones = torch.ones(100, device=device)
    for size in (64, 100):
        out = F.rms_norm(x[..., :size], (size,))
        assert relative_error(out, rmsnorm_reference(x[..., :size], ones[:size], 2**-7)) <= TOLERANCE[torch.bfloat16]
    with pytest.raises(ValueError, match=r"normalized_shape is \[5, 100\] and the input's shape \[3, 5, 100\]"):
        F.rms_norm(x, (5, 100))
    with pytest.raises(ValueError, match="weight must have shape"):
        F.rms_norm(x, (100,), ones[:50])


@pytest.mark.parametrize("size", [128, 100])
def test_gradients(mode, device, size):
    def inputs():
        torch.manual_seed(0)
        return [t.requires_grad_() for t in (torch.randn(5, size, device=device), torch.randn(size, device=device))]

    calls = (
        lambda x, w: F.rms_norm(x, (size,), w, 1e-6),
        lambda x, w: torch.softmax(x, -1) * w,
        lambda x, w: torch.log_softmax(x, -1) * w,
        lambda x, w: (x * w).mean(-1),
    )
    for call in calls:
        x, w = inputs()
        call(x, w).square().sum().backward()
        with set_batch_invariant_mode(False):
            x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
            call(x64, w64).square().sum().backward()
        assert relative_error(x.grad, x64.grad) < 1e-5
        assert relative_error(w.grad, w64.grad) < 1e-5


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: softmax(torch.ones(3).long()), TypeError, "floating-point dtype, got torch.int64"),
        (lambda: log_softmax(torch.ones(3), 1), IndexError, "dim must be from -1 to 0, got 1"),
        (lambda: mean_dim(torch.ones(3).long(), 0), TypeError, "floating-point or complex"),
        (lambda: mean_dim(torch.ones(3, 2), (0, -2)), ValueError, "each dimension once"),
        (lambda: mean_dim(torch.ones(3, requires_grad=True), 0), RuntimeError, "call torch.mean in the mode"),
        (lambda: rms_norm_batch_invariant(torch.ones(()), torch.ones(1)), ValueError, "at least one dimension"),
        (lambda: rms_norm_batch_invariant(torch.ones(2, 3), torch.ones(4)), ValueError, "weight must have shape"),
        (
            lambda: rms_norm_batch_invariant(torch.ones(2, 3), torch.ones(3), -1.0),
            ValueError,
            "eps must be zero or more",
        ),
    ],
)
def test_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
