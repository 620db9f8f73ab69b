"""The operators of `jitnorm.dispatch` under torch.compile."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import compiled, relative_error, rmsnorm_reference

from dispatch.calls import inputs
from jitnorm import dispatch

pytestmark = pytest.mark.usefixtures("fresh")


# Every size is symbolic; none is, so that another number of rows compiles again; those that changed are.
@pytest.mark.parametrize("dynamic", [True, False, None])
# A kernel's size, and PyTorch's.
@pytest.mark.parametrize("hidden_size", [256, 300])
def test_compiles_without_a_graph_break(hidden_size, dynamic):
    gemma = torch.randn(hidden_size)

    def block(x, residual, w, out):
        y = dispatch.rmsnorm(x + 1, w)
        dispatch.rmsnorm(y, w, 1e-5, out=out)
        z = dispatch.gemma_rmsnorm(out, gemma) * 2
        dispatch.fused_add_rmsnorm(z, residual, w)
        dispatch.gemma_fused_add_rmsnorm(z, residual, gemma)
        return z, out + 1

    run = compiled(block, dynamic)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (3, 5) if dynamic is False else (3, 5, 64):
            x, residual, w = inputs(hidden_size, torch.float32, (rows,))
            mine, out, other = residual.clone(), torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
            got, expected = run(x, mine, w, out), block(x, residual, w, other)
            for a, b in zip((*got, mine, out), (*expected, residual, other), strict=True):
                assert relative_error(a, b.double()) < 1e-6


def test_a_compiled_graph_keeps_its_backend():
    x, _, w = inputs(256, torch.float32)
    targets = []

    def look(graph, _):
        targets.append({str(node.target) for node in graph.graph.nodes})
        return graph

    for name in ("auto", "auto-fast", "jit", "torch"):
        torch._dynamo.reset()
        function = torch.compile(lambda x: dispatch.rmsnorm(x, w), fullgraph=True, backend=look)
        with dispatch.backend(name):
            function(x)
        assert relative_error(function(x), rmsnorm_reference(x, w, 1e-6)) < 1e-6
        assert ("jitnorm.rmsnorm" in targets[-1]) == (name != "torch"), targets
    assert len(targets) == 4


def test_an_unsupported_backend_fails_while_tracing():
    x, _, w = inputs(300, torch.float32)
    for name, words in (("jit", "jitnorm has no kernel for hidden size 300"), ("flashinfer", "not on CUDA")):
        with dispatch.backend(name), pytest.raises(RuntimeError, match=words):
            compiled(dispatch.rmsnorm, dynamic=False)(x, w)


def test_gradients_in_a_compiled_graph():
    for hidden_size in (256, 300):
        x, _, w = inputs(hidden_size, torch.float32)
        grads = []
        for function in (compiled(dispatch.rmsnorm), dispatch.rmsnorm):
            leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
            function(*leaves).square().sum().backward()
            grads.append([t.grad for t in leaves])
        for got, expected in zip(*grads, strict=True):
            assert relative_error(got, expected.double()) < 1e-6
