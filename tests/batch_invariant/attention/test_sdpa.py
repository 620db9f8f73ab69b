"""Test that attention in batch-invariant mode is right, whichever kernel computes it; verify/ tests its bits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error, same_bits
from torch.nn.attention import SDPBackend, sdpa_kernel

from jitnorm.batch_invariant import set_batch_invariant_mode
from jitnorm.batch_invariant.attention import invariance_check, sdpa

TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 2e-5}  # scores are rounded where attention is composed


def operands(device, dtype, queries, keys, groups):
    shapes = (3, 2 * groups, queries, 64), (3, 2, keys, 64), (3, 2, keys, 64)
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def exact(q, k, v, is_causal):
    q, k, v = (t.double() for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT / 8
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], device=q.device).triu(1).bool(), float("-inf"))
    return torch.softmax(scores, -1) @ v


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("queries", "keys", "is_causal"), [(1, 70, False), (9, 9, True), (70, 70, True)])
def test_matches_the_definition(device, dtype, groups, queries, keys, is_causal):
    """The queries are one, few, and more than the Triton kernel computes."""
    q, k, v = operands(device, dtype, queries, keys, groups)
    expected = exact(q, k, v, is_causal)
    grad = torch.randn(expected.shape, device=device).to(dtype)

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=groups > 1)

    with set_batch_invariant_mode():
        with torch.no_grad():
            out = attend(q, k, v)
            assert relative_error(out, expected) <= TOLERANCE[dtype]
            assert same_bits(attend(q[1:2], k[1:2], v[1:2]), out[1:2])
        grads = torch.autograd.grad(attend(q, k, v), (q, k, v), grad)
    for own, other in zip(grads, torch.autograd.grad(expected, (q, k, v), grad.double()), strict=True):
        assert relative_error(own, other.double()) <= 3 * TOLERANCE[dtype]


@pytest.mark.slow
def test_compiled_gradients(device):
    """A compiled forward pass runs without gradients, and must return what its backward pass needs."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = operands(device, dtype, 9, 9, 1)
    expected = exact(q, k, v, True)
    grad = torch.randn(expected.shape, device=device).to(dtype)
    with set_batch_invariant_mode():
        out = torch.compile(lambda *t: F.scaled_dot_product_attention(*t, is_causal=True), fullgraph=True)(q, k, v)
        grads = torch.autograd.grad(out, (q, k, v), grad)
    assert relative_error(out, expected) <= TOLERANCE[dtype]
    for own, other in zip(grads, torch.autograd.grad(expected, (q, k, v), grad.double()), strict=True):
        assert relative_error(own, other.double()) <= 3 * TOLERANCE[dtype]


splits_cudnn = pytest.mark.skipif(
    not sdpa.has_cudnn_attention_forward(), reason="torch cannot call cuDNN's attention for one sequence"
)
CUDNN = pytest.param(SDPBackend.CUDNN_ATTENTION, marks=splits_cudnn)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, CUDNN])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("queries", "keys", "is_causal"), [(1, 700, False), (40, 40, True), (300, 300, True)])
def test_every_fused_kernel(backend, groups, queries, keys, is_causal):
    """Operands have the strides of projections. Each sequence is also computed alone, as a slice and as a copy."""
    memory = [(3, queries, 2 * groups, 64), (3, keys, 2, 64), (3, keys, 2, 64)]
    q, k, v = (torch.randn(m, device="cuda").bfloat16().transpose(1, 2).requires_grad_() for m in memory)
    expected = exact(q, k, v, is_causal)
    grad = torch.randn(expected.shape, device="cuda").bfloat16()

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=groups > 1)

    with set_batch_invariant_mode(), sdpa_kernel(backend):
        for grad_mode in (torch.no_grad, torch.enable_grad):
            with grad_mode():
                out = attend(q, k, v)
                assert relative_error(out, expected) <= TOLERANCE[q.dtype]
                assert out.stride() == torch.empty_like(q).stride()
                for i in range(3):
                    for one in ([t[i : i + 1] for t in (q, k, v)], [t[i : i + 1].clone() for t in (q, k, v)]):
                        assert same_bits(attend(*one), out[i : i + 1])
        grads = torch.autograd.grad(attend(q, k, v), (q, k, v), grad)
    for own, other in zip(grads, torch.autograd.grad(expected, (q, k, v), grad.double()), strict=True):
        assert relative_error(own, other.double()) <= 3 * TOLERANCE[q.dtype]


@pytest.mark.gpu
@splits_cudnn
@pytest.mark.parametrize("queries", [1, 300])
def test_masks_reach_cudnn(queries):
    q, k, v = (torch.randn(3, 2, n, 64, device="cuda").bfloat16() for n in (queries, 300, 300))
    mask = torch.zeros(3, 1, queries, 300, device="cuda", dtype=q.dtype)
    mask[1, ..., :100] = float("-inf")
    scores = q.double() @ k.double().mT / 8 + mask
    with torch.no_grad(), set_batch_invariant_mode(), sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, mask)
        assert relative_error(out, torch.softmax(scores, -1) @ v.double()) <= TOLERANCE[q.dtype]
        alone = F.scaled_dot_product_attention(*(t[1:2].clone() for t in (q, k, v, mask)))
        assert same_bits(alone, out[1:2])


@pytest.mark.parametrize("layout", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)])
# The head_dim of the values is that of the result, which does not depend on a bias.
@pytest.mark.parametrize(
    ("value_dim", "bias_shape"), [(64, None), (32, None), (64, (70, 90)), (64, (1, 1, 70, 90)), (32, (3, 2, 1, 90))]
)
@pytest.mark.parametrize("is_invariant", [False, True])
def test_cudnn_gets_one_sequence_at_a_time(monkeypatch, layout, value_dim, bias_shape, is_invariant):
    """Unless one call for all passes the check. The joined result has every sequence in its place, and a call for one
    sequence has the same strides in any batch."""
    seen = []
    monkeypatch.setattr(invariance_check, "_results", {})

    def forward(q, k, v, bias, _q, _k, queries, keys, wants_sum, dropout, is_causal, debug, *, scale):
        """Compute one sequence after the other. The result has the query's layout, as cuDNN's has."""
        seen.append([(t.shape, t.stride()) for t in (q, k, v, bias) if t is not None])
        out = torch.empty_permuted((*q.shape[:3], v.shape[3]), sorted(range(4), key=q.stride, reverse=True))
        total = out.new_empty(*q.shape[:3], 1)
        for i in range(q.shape[0]):
            scores = q[i].contiguous() @ k[i].contiguous().mT * scale
            scores += 0 if bias is None else bias[i].contiguous()
            out[i] = torch.softmax(scores, -1) @ v[i].contiguous()
            total[i] = scores.logsumexp(-1, keepdim=True)
        if not is_invariant:
            out *= 1 + 1e-3 * (q.shape[0] - 1)
        return out, total if wants_sum else None, None, None, queries, keys, "seed", "offset", None

    monkeypatch.setattr(sdpa, "_aten", SimpleNamespace(_cudnn_attention_forward=forward))
    inverse = [layout.index(d) for d in range(4)]
    shapes = (3, 2, 70, 64), (3, 2, 90, 64), (3, 2, 90, value_dim)
    q, k, v = (torch.randn([shape[d] for d in layout]).permute(inverse) for shape in shapes)
    bias = None if bias_shape is None else torch.randn(bias_shape)
    result = sdpa.cudnn_attention(q, k, v, bias, True, scale=0.2)
    calls, last = len(seen), seen[-1]
    scores = q @ k.mT * 0.2 + (0 if bias is None else bias)
    torch.testing.assert_close(result[0], torch.softmax(scores, -1) @ v)
    torch.testing.assert_close(result[1], scores.logsumexp(-1, keepdim=True))
    assert result[2:] == (None, None, 70, 90, "seed", "offset", None)
    assert sorted(range(4), key=result[0].stride) == sorted(range(4), key=q.stride)
    again = sdpa.cudnn_attention(q, k, v, bias, True, scale=0.2)
    assert same_bits(again[0], result[0])
    assert len(seen) - calls == (1 if is_invariant else 3)  # the check runs once
    assert last[0] == ((q.shape, q.stride()) if is_invariant else ((1, 2, 70, 64), (70 * 128, 64, 128, 1)))
    lone_bias = bias[:1] if bias_shape and len(bias_shape) == 4 else bias
    for alone in ([t[:1] for t in (q, k, v)], [t[:1].clone() for t in (q, k, v)]):
        assert same_bits(sdpa.cudnn_attention(*alone, lone_bias, True, scale=0.2)[0], result[0][:1])


def test_every_kind_of_call_is_checked_once(monkeypatch):
    checked = []
    monkeypatch.setattr(invariance_check, "_results", {})
    monkeypatch.setattr(invariance_check, "_compare", lambda batched, single, operands: checked.append(1) is None)
    q = torch.randn(2, 4, 70, 64)
    for name in ("causal", "not causal"):
        for tensor in (q, q.half(), q[:, :, :69], q.transpose(1, 2).contiguous().transpose(1, 2)):
            for bias in ([], [q[..., :1]]):
                for _ in range(2):
                    assert invariance_check.one_call_passes(name, None, None, [tensor], bias)
    assert len(checked) == 2 * 4 * 2


def test_out_of_memory_is_not_cached(monkeypatch, caplog):
    def fails(*_):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(invariance_check, "_results", {})
    assert not invariance_check.one_call_passes("name", fails, fails, [torch.randn(2, 1, 3, 4)], [])
    assert not invariance_check._results
    assert "not enough GPU memory to check whether attention of 2 sequences" in caplog.text


def test_random_operands_in_any_strides():
    for like in (
        torch.randn(3, 1, 70, 64).expand(3, 4, 70, 64),
        torch.randn(2, 70, 4, 64).transpose(1, 2),
        torch.randn(1, 1, 1, 1),
    ):
        random = invariance_check._random_like(like)
        assert (random.shape, random.stride()) == (like.shape, like.stride())
        assert not random.isnan().any() and not same_bits(random, like)


def test_nothing_is_checked_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(invariance_check, "_results", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    q = SimpleNamespace(is_cuda=True, device="cuda", dtype=torch.float16, shape=(2, 1, 70, 64), stride=lambda: (1,))
    assert not invariance_check.one_call_passes("name", None, None, [q], [])
    assert not invariance_check._results
