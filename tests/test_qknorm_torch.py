"""fused_inplace_qknorm as torch sees it: compilers, fake tensors, autograd."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error, rmsnorm_reference, same_bits
from torch._dynamo.testing import CompileCounterWithBackend

from jitnorm import can_use_fused_inplace_qknorm, fused_inplace_qknorm


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()


def attention_input(qkv, q_weight, k_weight, num_q_heads=4, num_k_heads=2):
    """Normalise q and k as slices of a projection, in place. v is not written."""
    heads = qkv.unflatten(-1, (-1, q_weight.shape[0]))
    q, k, v = heads[:, :num_q_heads], heads[:, num_q_heads:-num_k_heads], heads[:, -num_k_heads:]
    fused_inplace_qknorm(q, k, q_weight, k_weight, 1e-5)
    return q, k, v


def tensors(num_tokens, device, dtype=torch.float32):
    return [t.to(dtype) for t in (torch.randn(num_tokens, 8 * 64, device=device), *torch.randn(2, 64, device=device))]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_and_writes_are_seen(backend, device):
    """Functionalisation replaces writes by new tensors, which bases and views made before and after must all see."""

    def function(qkv, q_weight, k_weight):
        before = qkv[:, :64] + 0
        q, k, v = attention_input(qkv, q_weight, k_weight)
        return before, q * 2, k + 1, v * 3, qkv - 1, qkv[::2]

    compiles = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=compiles)
    for num_tokens in (3, 5, 64):  # the second makes torch compile with a dynamic dimension, which serves the third
        qkv, *w = tensors(num_tokens, device)
        expected_qkv = qkv.clone()
        expected = function(expected_qkv, *w)
        for got, want in zip((*compiled(qkv, *w), qkv), (*expected, expected_qkv), strict=True):
            assert same_bits(got, want)
    assert compiles.frame_count == 2


def test_can_use_is_a_constant_of_the_graph(cache_dir):
    def function(x):
        return x + 1 if can_use_fused_inplace_qknorm(x.shape[-1], x.dtype) else x - 1

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for head_dim, step in ((128, 1), (96, -1)):
        x = torch.randn(2, head_dim)
        assert torch.equal(compiled(x), x + step)
    assert not cache_dir.exists()


@pytest.mark.parametrize(
    ("head_dim", "dtype", "pattern"),
    [
        ("128", torch.bfloat16, "head_dim must be an int, got str"),
        (True, torch.bfloat16, "head_dim must be an int, got bool"),
        (64.0, torch.bfloat16, "head_dim must be an int, got float"),
        (128, "bf16", "dtype must be a torch.dtype, got str"),
    ],
)
def test_can_use_is_not_asked_for_other_types(head_dim, dtype, pattern):
    with pytest.raises(TypeError, match=pattern):
        can_use_fused_inplace_qknorm(head_dim, dtype)


def test_opcheck(device):
    op = torch.ops.jitnorm.fused_inplace_qknorm.default
    for dtype, weight_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        qkv, *w = tensors(3, device, dtype)
        q, k, _ = qkv.unflatten(-1, (8, 64)).split((4, 2, 2), dim=1)
        w = [t.to(weight_dtype) for t in w]
        torch.library.opcheck(op, (q.clone(), k.clone(), *w))
        torch.library.opcheck(op, (q.new_empty(0, 4, 64), k.new_empty(0, 2, 64), *w, 1e-5, 64, False))
        # Neither is contiguous, and they do not share a storage, which opcheck does not copy as one.
        torch.library.opcheck(op, (q, qkv.clone().unflatten(-1, (8, 64))[:, 4:6], *w))


def test_kernels_are_built_while_tracing(cache_dir):
    with torch._subclasses.FakeTensorMode() as mode:
        qkv, *w = (mode.from_tensor(t) for t in tensors(3, "cpu"))
        attention_input(qkv, *w)
    assert len(list(cache_dir.glob("kernels/fused_inplace_qknorm_64_fp32.*/*/*.so"))) == 1


def test_what_is_refused_fails_while_tracing(cache_dir):
    compiled = torch.compile(fused_inplace_qknorm, fullgraph=True, backend="aot_eager")
    q, k, w = torch.randn(2, 3, 96), torch.randn(2, 1, 96), torch.ones(96)
    with pytest.raises(RuntimeError, match="does not support head_dim 96"):
        compiled(q, k, w, w)
    with pytest.raises((RuntimeError, ValueError), match="head_dim must be q's last dimension, 96, or 0"):
        compiled(q, k, w, w, head_dim=64)
    assert not cache_dir.exists()


def test_meta_tensors_are_checked():
    q, k, w = torch.randn(2, 3, 64), torch.randn(2, 1, 64), torch.ones(64)
    for arguments in ((q, k.to("meta"), w, w), (q.to("meta"), k, w, w), (q, k, w, w.to("meta"))):
        with pytest.raises((ValueError, RuntimeError), match=r"must (be on|have)"):
            fused_inplace_qknorm(*arguments)


def test_forward_mode_is_refused_not_lost():
    q, k, w = torch.randn(2, 3, 64), torch.randn(2, 1, 64), torch.ones(64)
    with pytest.raises(RuntimeError, match="fused_inplace_qknorm has no forward-mode derivative"):
        torch.func.jvp(lambda w: fused_inplace_qknorm(q, k, w, w), (w,), (w,))


def test_the_operator_counts_versions():
    q, k, w = torch.randn(2, 3, 64), torch.randn(2, 1, 64), torch.ones(64)
    for written in (q, k):
        product = (torch.randn_like(written).requires_grad_() * written).sum()
        torch.ops.jitnorm.fused_inplace_qknorm(q, k, w, w)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_through_a_fused_projection(dtype, compiler, device):
    leaves = [t.requires_grad_() for t in tensors(5, device, dtype)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    grads = [torch.randn(5, heads, 64, device=device).to(dtype) for heads in (4, 2, 2)]
    function = torch.compile(attention_input, fullgraph=True, backend=compiler) if compiler else attention_input
    got = function(leaves[0] * 1, *leaves[1:])  # q and k must not be leaves
    torch.autograd.backward(got, grads)

    q, k, v = doubles[0].unflatten(-1, (8, 64)).split((4, 2, 2), dim=1)
    want = rmsnorm_reference(q, doubles[1], 1e-5), rmsnorm_reference(k, doubles[2], 1e-5), v
    torch.autograd.backward(want, [g.double() for g in grads])
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3
    for a, b in zip((*got, *(t.grad for t in leaves)), (*want, *(t.grad for t in doubles)), strict=True):
        assert relative_error(a.detach(), b.detach()) < tolerance


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_gradients_where_heads_are_contiguous(compiler, device):
    """q and k from projections of their own. Only k's weight has a gradient, not k."""
    q, k = torch.randn(5, 256, device=device, requires_grad=True), torch.randn(5, 2, 64, device=device)
    weights = [torch.randn(64, device=device, requires_grad=True) for _ in range(2)]

    def function(q, k, *weights):
        q, k = (q * 1).view(5, 4, 64), k * 1
        fused_inplace_qknorm(q, k, *weights, 1e-5)
        return q, k

    got = (torch.compile(function, fullgraph=True, backend=compiler) if compiler else function)(q, k, *weights)
    grads = [torch.randn_like(t) for t in got]
    torch.autograd.backward(got, grads)
    doubles = [t.detach().double().requires_grad_() for t in (q, *weights)]
    want = [rmsnorm_reference(x, w, 1e-5) for x, w in ((doubles[0].view(5, 4, 64), doubles[1]), (k, doubles[2]))]
    torch.autograd.backward(want, [g.double() for g in grads])
    for leaf, double in zip((q, *weights), doubles, strict=True):
        assert relative_error(leaf.grad, double.grad) < 2e-6


def test_a_leaf_is_not_overwritten(device):
    q, k, w = torch.randn(2, 3, 64, device=device), torch.randn(2, 1, 64, device=device), torch.ones(64, device=device)
    before = q.clone()
    with pytest.raises(RuntimeError, match="k is a leaf that requires grad"):
        fused_inplace_qknorm(q, k.requires_grad_(), w, w)
    assert same_bits(q, before)
    with torch.no_grad():
        fused_inplace_qknorm(q, k, w, w)
    assert relative_error(q, rmsnorm_reference(before, w, 1e-6)) < 1e-6
