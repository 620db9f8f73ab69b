"""Attention in batch-invariant mode: right, whichever kernel takes it. Its bits: test_verify_invariance.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error, same_bits

from jitnorm.batch_invariant import set_batch_invariant_mode

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
    """One query, few, and more than share a launch."""
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
