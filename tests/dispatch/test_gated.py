"""The gated norm of jitnorm.dispatch: which backend computes it, and that both agree."""

from __future__ import annotations

import pytest
import torch
from helpers import compiled, relative_error, same_bits
from references import gated_norm

import jitnorm
from jitnorm import dispatch

OPTIONS = [{}, {"group_size": 100, "norm_before_gate": False, "rounding": "hf"}, {"activation": "sigmoid"}]


def tensors(*leading, dtype=torch.float32, device="cpu"):
    x, gate = (torch.randn(*leading, 300, device=device).to(dtype) for _ in range(2))
    return x, gate, torch.randn(300, device=device).to(dtype)


@pytest.mark.parametrize("options", [*OPTIONS[:2], pytest.param(OPTIONS[2], marks=pytest.mark.slow)], ids=str)
def test_both_backends_agree_with_the_definition(options, device):
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 6e-3)):
        x, gate, weight = tensors(4, 3, dtype=dtype, device=device)
        expected = gated_norm({"input": x, "gate": gate, "weight": weight, **options})[0]
        assert same_bits(
            dispatch.gated_rmsnorm(x, gate, weight, **options), jitnorm.gated_rmsnorm(x, gate, weight, **options)
        )
        for name in ("jit", "torch"):
            with dispatch.backend(name):
                assert relative_error(dispatch.gated_rmsnorm(x, gate, weight, **options), expected) <= tolerance
                out = torch.empty_like(x)
                assert dispatch.gated_rmsnorm(x, gate, weight, out=out, **options) is out
                assert relative_error(out, expected) <= tolerance
                assert dispatch.explain("gated_rmsnorm", x, weight, gate) == (name, "it was requested")


def test_long_rows_of_short_groups_have_a_kernel():
    x, gate, weight = torch.randn(3, 1 << 17).unbind()
    assert dispatch.explain("gated_rmsnorm", x, weight, gate, group_size=1 << 10)[0] == "jit"
    assert dispatch.explain("gated_rmsnorm", x, weight, gate)[0] == "torch"
    assert "group size 131072" in dispatch.explain("gated_rmsnorm", x, weight, gate, group_size=1 << 17)[1]
    with pytest.raises(ValueError, match="group_size must be None for rmsnorm, got 4"):
        dispatch.explain("rmsnorm", x, weight, group_size=4)
    with dispatch.backend("jit"):
        out = dispatch.gated_rmsnorm(x, gate, weight, group_size=1 << 10)
    expected = gated_norm({"input": x, "gate": gate, "weight": weight, "group_size": 1 << 10})[0]
    assert relative_error(out, expected) <= 1e-6
    with pytest.raises(ValueError, match="group_size"):
        dispatch.gated_rmsnorm(x, gate, weight, group_size=3000)


def test_flashinfer_has_none(flashinfer):
    x, gate, weight = tensors(4)
    assert dispatch.explain("gated_rmsnorm", x, weight, gate)[0] == "jit"
    with (
        dispatch.backend("flashinfer"),
        pytest.raises(RuntimeError, match="does not support this call of gated_rmsnorm"),
    ):
        dispatch.gated_rmsnorm(x, gate, weight)


@pytest.mark.slow
def test_strides_without_a_kernel_go_to_pytorch(device):
    x, gate, weight = tensors(4, 2, 3, device=device)
    options = {"group_size": 100}
    expected = dispatch.gated_rmsnorm(x, gate, weight, **options)
    for move in (lambda t: t.permute(2, 1, 0, 3), lambda t: t.transpose(0, 1), lambda t: t.mT.contiguous().mT):
        out = dispatch.gated_rmsnorm(move(x), move(gate), weight, **options)
        assert relative_error(out, move(expected).double()) <= 1e-6
    moved = x.permute(2, 1, 0, 3)
    with dispatch.backend("jit"), pytest.raises(ValueError, match="merge to at most 3 strides"):
        dispatch.gated_rmsnorm(moved, moved, weight, **options)
    function = compiled(lambda x, gate: dispatch.gated_rmsnorm(x, gate, weight, **options))
    for a, b in ((x, gate), (moved, moved), (x.transpose(0, 1), gate.transpose(0, 1))):
        assert relative_error(function(a, b), dispatch.gated_rmsnorm(a, b, weight, **options).double()) <= 1e-6


def test_rows_longer_than_those_of_kernels():
    x, weight = torch.randn(2, 65537), torch.randn(65537)
    expected = gated_norm({"input": x, "gate": x, "weight": weight})[0]
    assert relative_error(dispatch.gated_rmsnorm(x, x, weight), expected) <= 1e-6


def test_gradients():
    x, gate, weight = tensors(4)
    found = []
    for name in ("jit", "torch"):
        leaves = [t.clone().requires_grad_() for t in (x, gate, weight)]
        with dispatch.backend(name):
            dispatch.gated_rmsnorm(*leaves, group_size=100).square().sum().backward()
            with pytest.raises(RuntimeError, match="gated_rmsnorm with out= has no gradient"):
                dispatch.gated_rmsnorm(*leaves, out=torch.empty_like(x))
        found.append([leaf.grad for leaf in leaves])
    for a, b in zip(*found, strict=True):
        assert relative_error(a, b.double()) <= 1e-5


def test_torch_fx_records_the_call():
    graph = torch.fx.symbolic_trace(lambda x, gate: dispatch.gated_rmsnorm(x, gate, group_size=100))
    x, gate, _ = tensors(4)
    assert same_bits(graph(x, gate), dispatch.gated_rmsnorm(x, gate, group_size=100))


@pytest.mark.parametrize("name", ["auto", "jit", "torch"])
def test_bad_arguments_are_refused(name):
    x, gate, weight = tensors(2, 3)
    moved = x.transpose(0, 1)
    for error, pattern, call in (
        (TypeError, "gate must be a torch.Tensor, got NoneType", lambda: dispatch.gated_rmsnorm(x, None)),
        (TypeError, "gate must be a torch.Tensor, got str", lambda: dispatch.gated_rmsnorm(moved, "gate")),
        (TypeError, "out must be a torch.Tensor, got str", lambda: dispatch.gated_rmsnorm(moved, moved, out="out")),
        (ValueError, "gate must have shape", lambda: dispatch.gated_rmsnorm(moved, moved[0])),
        (ValueError, "group_size must divide", lambda: dispatch.gated_rmsnorm(moved, moved, group_size=7)),
        (ValueError, "group_size must divide", lambda: dispatch.gated_rmsnorm(x, gate, group_size=0)),
        (TypeError, "group_size must be an int", lambda: dispatch.gated_rmsnorm(moved, moved, group_size="1")),
        (ValueError, "activation must be", lambda: dispatch.gated_rmsnorm(x, gate, activation="relu")),
        (ValueError, "out must", lambda: dispatch.gated_rmsnorm(x, gate, out=gate)),
        (ValueError, "weight must have shape", lambda: dispatch.gated_rmsnorm(x, gate, weight[:7])),
    ):
        with dispatch.backend(name), pytest.raises(error, match=pattern):
            call()


def test_rows_of_no_elements():
    empty = torch.empty(4, 0)
    assert dispatch.gated_rmsnorm(empty, empty).shape == empty.shape
