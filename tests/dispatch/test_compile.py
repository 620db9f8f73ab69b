"""The operators of `jitnorm.dispatch` under torch.compile."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from helpers import compiled, relative_error, rmsnorm_reference

import jitnorm
from dispatch.calls import inputs
from jitnorm import dispatch

pytestmark = pytest.mark.usefixtures("fresh")


# Every size is symbolic; none is, so that another number of rows compiles again; those that changed are.
every_dynamic = pytest.mark.parametrize("dynamic", [True, False, None])


def block(ops, x, residual, w, out):
    """Call every operator of `ops`, which is `jitnorm` or `jitnorm.dispatch`."""
    y = ops.rmsnorm(x + 1, w)
    ops.rmsnorm(y, w, 1e-5, out=out)
    z = ops.gemma_rmsnorm(out, w) * 2
    ops.fused_add_rmsnorm(z, residual, w)
    ops.gemma_fused_add_rmsnorm(z, residual, w)
    return z, out + 1


@every_dynamic
def test_graphs_of_sizes_with_a_kernel_are_those_of_jitnorms_operators(dynamic):
    """Equal graphs compile and run equally, so that tests/test_compile_block.py tests these operators too."""
    graphs = {}
    for ops in (jitnorm, dispatch):
        recorded = graphs[ops] = []

        def record(graph, _, recorded=recorded):
            recorded.append(graph.code)
            return graph

        torch._dynamo.reset()
        run = torch.compile(partial(block, ops), fullgraph=True, backend=record, dynamic=dynamic)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for rows in (3, 5, 64):
                x, residual, w = inputs(256, torch.float32, (rows,))
                run(x, residual, w, torch.empty_like(x))
        assert len(recorded) == {True: 1, False: 3, None: 2}[dynamic]
    assert graphs[dispatch] == graphs[jitnorm] and "jitnorm.gemma_fused_add_rmsnorm" in graphs[jitnorm][0]


@pytest.mark.slow
@every_dynamic
def test_sizes_without_a_kernel_compile_without_a_graph_break(dynamic):
    run = compiled(partial(block, dispatch), dynamic)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rows in (3, 5) if dynamic is False else (3, 5, 64):
            x, residual, w = inputs(300, torch.float32, (rows,))
            mine, out, other = residual.clone(), torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
            got, expected = run(x, mine, w, out), block(dispatch, x, residual, w, other)
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
    x, _, w = inputs(65537, torch.float32)
    for name, words in (("jit", "jitnorm has no kernel for hidden size 65537"), ("flashinfer", "not on CUDA")):
        with dispatch.backend(name), pytest.raises(RuntimeError, match=words):
            compiled(dispatch.rmsnorm, dynamic=False)(x, w)


@pytest.mark.slow
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
