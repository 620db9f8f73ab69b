"""PyTorch as a backend; its checks and gradients are those of the kernels."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, relative_error, rmsnorm_reference, same_bits

import jitnorm
from dispatch.calls import OPS, ROWS, TOLERANCE, check, inputs, reference, run
from jitnorm import dispatch

pytestmark = pytest.mark.usefixtures("fresh", "backend")
# Both have kernels, which serve 256, and PyTorch serves 300: see `backend`.
both_backends = pytest.mark.parametrize("hidden_size", [256, 300])


@pytest.fixture
def backend(request):
    """Request PyTorch, except for tests with a size of 256."""
    sizes = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    with dispatch.backend("auto" if sizes.get("hidden_size") == 256 else "torch"):
        yield


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
# The smallest, one that no vector divides, one that is beside the kernels' sizes, and one above them.
@pytest.mark.parametrize("hidden_size", [1, 111, 300, 16384])
def test_sizes(op, dtype, hidden_size):
    for weight_dtype in DTYPES:
        check(op, *inputs(hidden_size, dtype, weight_dtype=weight_dtype))
    for shape in ((3, 5), ()):
        check(op, *inputs(hidden_size, dtype, shape))
    x, residual, w = inputs(hidden_size, dtype)
    check(op, x * 1e-2, residual * 1e-2, w, eps=0.1)


@pytest.mark.parametrize("hidden_size", [64, 256, 4096])
@pytest.mark.parametrize("op", OPS)
def test_pytorch_and_the_kernels_agree(op, hidden_size):
    x, residual, w = inputs(hidden_size)
    results = []
    for name in ("torch", "jit"):
        with dispatch.backend(name):
            results.append(run(op, x, residual, w))
    assert relative_error(results[0][0], results[1][0]) < 1e-3
    if "fused" in op:
        assert same_bits(results[0][1], results[1][1])


@pytest.mark.parametrize("op", ["rmsnorm", "gemma_rmsnorm"])
@both_backends
def test_out(op, hidden_size):
    x, _, w = inputs(hidden_size)
    function = getattr(dispatch, op)
    expected = function(x, w)
    out = torch.full_like(x, float("nan"))
    assert function(x, w, out=out) is out and same_bits(out, expected)
    wide = torch.full((ROWS, 2 * hidden_size), 7.0, dtype=x.dtype)
    function(x, w, out=wide[:, :hidden_size])
    assert same_bits(wide[:, :hidden_size], expected) and (wide[:, hidden_size:] == 7).all()
    assert function(x, w, out=x) is x and same_bits(x, expected)


@pytest.mark.parametrize("op", OPS)
def test_any_strides_and_no_rows(op):
    x, residual, w = inputs(300, shape=(3, ROWS))
    expected = run(op, x, residual, w)
    strided = torch.empty(3, ROWS, 600, dtype=x.dtype)[..., ::2].copy_(x), residual.transpose(0, 1).contiguous().mT
    got = run(op, strided[0], residual.transpose(0, 1).contiguous().transpose(0, 1), w)
    assert torch.equal(got[0], expected[0])
    empty, total = run(op, x[:0], residual[:0], w)
    assert empty.shape == (0, ROWS, 300) and (total is None or total.shape == empty.shape)


@pytest.mark.parametrize("op", ["fused_add_rmsnorm", "gemma_fused_add_rmsnorm"])
def test_the_sum_is_normalised_before_it_is_rounded(op):
    x, residual, w = inputs(300, weight_dtype=torch.float32)
    residual = residual.sign() * 256 + residual
    total = x.float() + residual.float()
    w[:] = 0.5
    got, _ = run(op, x, residual, w)
    factor = w + 1 if "gemma" in op else w
    exact, rounded = (
        torch.nn.functional.rms_norm(t.float(), (300,), factor, 1e-6).bfloat16() for t in (total, total.bfloat16())
    )
    assert same_bits(got, exact) and not same_bits(got, rounded)


@both_backends
@pytest.mark.parametrize("op", ["fused_add_rmsnorm", "gemma_fused_add_rmsnorm"])
def test_a_float32_residual_is_not_rounded(op, hidden_size):
    x, residual, w = inputs(hidden_size)
    residual = residual.float() / 3
    total = x.float() + residual
    got, got_total = run(op, x, residual, w)
    assert got.dtype == torch.bfloat16 and same_bits(got_total, total)
    assert relative_error(got, rmsnorm_reference(total, w.double() + ("gemma" in op), 1e-6)) < 3e-3


def test_gemma_adds_its_one_in_float32():
    x, _, w = inputs(300)
    w[:] = 0.0035
    got = dispatch.gemma_rmsnorm(x, w)
    lossy = dispatch.rmsnorm(x, 1 + w)
    exact = reference("gemma_rmsnorm", x, None, w)[0]
    assert relative_error(got, exact) < 2e-3 < 3e-3 < relative_error(lossy, exact)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rounding", ["once", "hf"])
def test_float64_is_computed_in_float64(op, rounding):
    x, residual, w = inputs(300, torch.float64)
    expected, expected_total = reference(op, x, residual, w)
    others = [residual.clone()] if "fused" in op else []
    y = x.clone()
    assert dispatch.explain(op, y, w, *others)[0] == "torch"
    got = getattr(dispatch, op)(y, *others, w, bias=w, rounding=rounding, return_rstd=True)
    normalised, rstd = (y, got) if others else got
    assert normalised.dtype == rstd.dtype == torch.float64
    assert relative_error(normalised, expected + w) < 1e-14
    total = x if expected_total is None else expected_total
    assert relative_error(rstd, (total.square().mean(-1) + 1e-6).rsqrt()) < 1e-14
    if others:
        assert torch.equal(others[0], expected_total)


def test_float64_of_gated_and_dual_rmsnorm():
    x, gate, w = inputs(300, torch.float64)
    expected = rmsnorm_reference(x, w, 1e-6) * gate * gate.sigmoid()
    assert relative_error(dispatch.gated_rmsnorm(x, gate, w), expected) < 1e-14
    for got, input in zip(dispatch.dual_rmsnorm(x, gate, w, w), (x, gate), strict=True):
        assert relative_error(got, rmsnorm_reference(input, w, 1e-6)) < 1e-14


# What is wrong with an argument


@both_backends
def test_bad_arguments_are_refused(hidden_size):
    x, residual, w = inputs(hidden_size)
    h = hidden_size
    flat = torch.randn(4 * h).bfloat16()
    calls = [
        (TypeError, "input must be a torch.Tensor, got list", lambda: dispatch.rmsnorm([1.0], w)),
        (TypeError, "weight must be a torch.Tensor, got float", lambda: dispatch.rmsnorm(x, 1.0)),
        (TypeError, "out must be a torch.Tensor, got int", lambda: dispatch.rmsnorm(x, w, 1e-6, 3)),
        (TypeError, "residual must be a torch.Tensor, got None", lambda: dispatch.fused_add_rmsnorm(x, None, w)),
        (ValueError, "input must have at least one dim", lambda: dispatch.rmsnorm(w.new_ones(()), w)),
        (TypeError, "input must be .* got int32", lambda: dispatch.rmsnorm(x.int(), w)),
        (TypeError, "input must be .* got int32", lambda: dispatch.explain("rmsnorm", x.int(), w)),
        (TypeError, "weight must be .* got int64", lambda: dispatch.rmsnorm(x, w.long())),
        (TypeError, "weight must be .* got int64", lambda: dispatch.explain("rmsnorm", x, w.long())),
        (ValueError, "weight must have shape", lambda: dispatch.gemma_rmsnorm(x, w[:1])),
        (ValueError, "weight must have shape", lambda: dispatch.rmsnorm(x, x[:3])),
        (TypeError, "out must be bfloat16, got float32", lambda: dispatch.rmsnorm(x, w, 1e-6, x.float())),
        (ValueError, "out must have shape", lambda: dispatch.rmsnorm(x, w, 1e-6, x[:3])),
        (
            TypeError,
            "residual must be bfloat16 or float32, got float16",
            lambda: dispatch.gemma_fused_add_rmsnorm(x, residual.half(), w),
        ),
        (ValueError, "residual must have shape", lambda: dispatch.fused_add_rmsnorm(x, residual[:1], w)),
        (ValueError, "residual must share no memory", lambda: dispatch.fused_add_rmsnorm(x, x, w)),
        (
            ValueError,
            "residual must share no memory",
            lambda: dispatch.fused_add_rmsnorm(flat[: 2 * h].view(2, h), flat[h : 3 * h].view(2, h), w),
        ),
        (ValueError, "eps must be zero or more", lambda: dispatch.rmsnorm(x, w, -1.0)),
        (TypeError, "eps must be a float, got str", lambda: dispatch.fused_add_rmsnorm(x, residual, w, "1")),
        (TypeError, "enable_pdl must be", lambda: dispatch.gemma_rmsnorm(x, w, 1e-6, None, 1)),
    ]
    before = x.clone(), residual.clone()
    for kind, words, call in calls:
        with pytest.raises(kind, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert same_bits(x, before[0]) and same_bits(residual, before[1])


def test_jitnorm_itself_refuses_other_sizes():
    with pytest.raises(RuntimeError, match="does not support hidden_size 300"):
        jitnorm.rmsnorm(*inputs(300)[::2])


# Gradients


@pytest.mark.parametrize("op", OPS)
@both_backends
def test_gradients(op, hidden_size):
    leaves = [t.requires_grad_() for t in inputs(hidden_size, torch.float32)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    grad = torch.randn(2, ROWS, hidden_size)
    x, residual, w = leaves
    if "fused" in op:
        outputs = x * 1, residual * 1
        getattr(dispatch, op)(*outputs, w)
    else:
        outputs = (getattr(dispatch, op)(x, w),)
    expected = [t for t in reference(op, *exact) if t is not None]
    for function, results in ((torch.autograd.backward, outputs), (torch.autograd.backward, expected)):
        function(results, [g.to(r.dtype) for g, r in zip(grad, results, strict=False)])
    for got, want in zip(leaves, exact, strict=True):
        if want.grad is not None:
            assert relative_error(got.grad, want.grad) < 1e-5
    assert sum(t.grad is not None for t in leaves) == (3 if "fused" in op else 2)


@both_backends
def test_calls_without_a_gradient_are_refused(hidden_size):
    x, residual, w = inputs(hidden_size, torch.float32)
    w.requires_grad_()
    with pytest.raises(RuntimeError, match="rmsnorm with out= has no gradient"):
        dispatch.rmsnorm(x, w, out=torch.empty_like(x))
    with torch.no_grad():
        dispatch.rmsnorm(x, w, out=torch.empty_like(x))
    out = torch.full_like(x, torch.nan).requires_grad_()
    assert dispatch.rmsnorm(x, w.detach(), out=out) is out and out.is_leaf  # data
    assert relative_error(out.detach(), rmsnorm_reference(x, w.detach(), 1e-6)) < TOLERANCE[torch.float32]
    with pytest.raises(RuntimeError, match="leaf"):
        dispatch.fused_add_rmsnorm(x.requires_grad_(), residual, w)


@both_backends
def test_nothing_is_written_if_one_of_two_tensors_cannot_be(hidden_size):
    x, residual, w = inputs(hidden_size, torch.float32)
    before = residual.clone()
    overlapping = torch.randn(x.numel()).as_strided(x.shape, (hidden_size // 2, 1))
    for bad, error in (
        (torch.randn(1, hidden_size).expand_as(x), ValueError),
        (overlapping, ValueError),
        (x.clone().requires_grad_(), RuntimeError),
    ):
        with pytest.raises(error, match=r"input (must not overlap itself|is a leaf that requires grad)"):
            dispatch.fused_add_rmsnorm(bad, residual, w)
        assert same_bits(residual, before)
    for bad in (torch.empty(1, hidden_size).expand_as(x), w.expand(1, -1)):
        with pytest.raises(ValueError, match="out must"):
            dispatch.rmsnorm(x[: len(bad)], w, out=bad)


def test_interleaved_rows_without_a_single_stride():
    both = torch.randn(3, 5, 2 * 300)
    before = both.clone()
    with pytest.raises(ValueError, match="residual must share no memory with input"):
        dispatch.fused_add_rmsnorm(both[:, :3, :300], both[:, :3, 300:], torch.ones(300))
    assert same_bits(both, before)
    with dispatch.backend("jit"):  # which tells them apart
        dispatch.fused_add_rmsnorm(both[:, :3, :300], both[:, :3, 300:], torch.ones(300))
    total = before[..., :300].double() + before[..., 300:].double()
    before[:, :3, 300:] = total[:, :3].float()
    before[:, :3, :300] = both[:, :3, :300]
    assert same_bits(both, before)  # nothing beside the rows was written
    assert relative_error(both[:, :3, :300], rmsnorm_reference(total, torch.ones(300), 1e-6)[:, :3]) <= 1e-6
