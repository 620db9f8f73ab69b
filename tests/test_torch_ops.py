"""The operators as torch.compile sees them."""

from __future__ import annotations

import pytest
import torch
from conftest import compiled, same_bits

from jitnorm import fused_add_rmsnorm, rmsnorm


def test_compiles_without_a_graph_break(device):
    w = torch.randn(256, device=device)

    def block(x):
        y = rmsnorm(x + 1, w)
        return rmsnorm(y, w, eps=1e-5) * 2

    run = compiled(block)
    for rows in (3, 5, 64):
        x = torch.randn(rows, 256, device=device)
        assert same_bits(run(x), block(x))


def test_written_outputs_are_seen_by_the_compiler(device):
    w = torch.randn(256, device=device)

    def block(x, out):
        rmsnorm(x, w, out=out)
        x = x + out
        rmsnorm(x, w, out=x)
        return x, out + 1

    x, out, expected_out = (torch.randn(7, 256, device=device) for _ in range(3))
    expected = block(x, expected_out)
    result = compiled(block)(x, out)
    for got, want in zip((*result, out), (*expected, expected_out), strict=True):
        assert same_bits(got, want)


def test_a_size_that_is_not_supported_fails_while_tracing(cache_dir):
    with pytest.raises(RuntimeError, match="hidden_size 300: supported are 64, 128, 256 and the multiples"):
        compiled(rmsnorm)(torch.randn(2, 300), torch.ones(300))
    assert not cache_dir.exists()


def test_kernels_are_built_while_tracing(cache_dir):
    with torch._subclasses.FakeTensorMode() as mode:
        torch.ops.jitnorm.rmsnorm(mode.from_tensor(torch.randn(2, 512)), mode.from_tensor(torch.ones(512)))
    assert len(list(cache_dir.glob("kernels/*/*/*.so"))) == 1


def test_opcheck(device):
    x, w = torch.randn(3, 256, device=device), torch.randn(256, device=device)
    torch.library.opcheck(torch.ops.jitnorm.rmsnorm.default, (x, w))
    torch.library.opcheck(torch.ops.jitnorm.rmsnorm_out.default, (x, w, torch.empty_like(x), 1e-5, False))


def test_a_stand_in_is_no_way_around_the_checks():
    """What torch's dispatcher would answer from a fake implementation is refused like any other call."""
    x, w = torch.randn(4, 64), torch.randn(64)
    for arguments in ((x, w.to("meta")), (x.to("meta"), w), (x.to("meta"), w[:7].to("meta"))):
        with pytest.raises((ValueError, RuntimeError), match="weight must"):
            rmsnorm(*arguments)
    with pytest.raises((ValueError, RuntimeError), match="weight must"):
        fused_add_rmsnorm(x, x.clone(), w.to("meta"))


def test_forward_mode_is_refused_not_lost():
    x, w = torch.randn(4, 64), torch.randn(64)
    with pytest.raises(RuntimeError, match="rmsnorm has no forward-mode derivative"):
        torch.func.jvp(lambda a: rmsnorm(a, w), (x,), (torch.ones_like(x),))


def test_the_operators_count_versions():
    x, w, out = torch.randn(4, 64), torch.randn(64), torch.randn(4, 64)
    leaf = torch.randn(4, 64, requires_grad=True)
    product = (leaf * out).sum()
    torch.ops.jitnorm.rmsnorm_out(x, w, out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_first_call_is_seen_by_tracers(cache_dir):
    x, w = torch.randn(4, 64), torch.randn(64)
    graph = torch.jit.trace(lambda a: rmsnorm(a, w), (x,), check_trace=False).graph
    assert "jitnorm::rmsnorm" in str(graph)
