"""The choice between torch's GEMM and cuBLASLt without split k for a few rows."""

from __future__ import annotations

import pytest
import torch
from helpers import TOLERANCE, relative_error, same_bits

from jitnorm.integrations import engine_gemms

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch):
    monkeypatch.setattr(engine_gemms, "_chosen", {})


def choose(monkeypatch, weight, rows):
    """Choose a GEMM that writes twice the product for numbers of rows. Return the shapes that it was called with."""
    calls = []

    def gemm(a, b, bias, out):
        assert a.is_contiguous() and out.is_contiguous() and bias is None
        calls.append(tuple(a.shape))
        out.copy_(2 * (a @ b))

    monkeypatch.setitem(engine_gemms._chosen, engine_gemms._shape_of(weight), (gemm, frozenset(rows)))
    return calls


def test_rows_decide(monkeypatch):
    """Numbers of rows count as the next power of two; more than 64, and shapes without a choice, are torch's."""
    weight, other = torch.randn(24, 16), torch.randn(24, 8)
    calls = choose(monkeypatch, weight, (1, 16))
    for shape in ((1,), (2,), (9,), (2, 8), (17,), (65,), (0,)):
        x = torch.randn(*shape, 16)
        calls.clear()
        got, expected = engine_gemms.linear(x, weight), torch.nn.functional.linear(x, weight)
        is_chosen = shape in ((1,), (9,), (2, 8))
        assert got.shape == expected.shape and calls == ([(x.numel() // 16, 16)] if is_chosen else [])
        torch.testing.assert_close(got, 2 * expected if is_chosen else expected)
    x = torch.randn(3, 8)
    assert same_bits(engine_gemms.linear(x, other), torch.nn.functional.linear(x, other))


def test_what_the_gemm_does_not_take_is_left_to_torch(monkeypatch):
    weight = torch.randn(24, 16)
    calls = choose(monkeypatch, weight, engine_gemms.ROWS)
    aligned = torch.randn(80)
    for x in (torch.randn(16, 4).t(), aligned[1:17][None], aligned[:64].view(4, 16)[::2]):
        assert same_bits(engine_gemms.linear(x, weight), torch.nn.functional.linear(x, weight))
    with pytest.raises(RuntimeError, match="dtype"):
        engine_gemms.linear(torch.randn(2, 16).half(), weight)
    assert not calls


def test_candidates(device):
    weight = torch.zeros(64, 128, dtype=BF16, device=device)
    assert engine_gemms.is_candidate(weight) == (device == "cuda")
    not_supported = [weight.float(), weight[:, :64], weight[:, 0], weight[:60], weight[:, :68].contiguous(), None]
    not_supported += [torch.zeros(n, 8192, dtype=BF16, device=device) for n in (0, engine_gemms.MAX_COLUMNS + 8)]
    not_supported += [weight.view(128, 64), weight.view(-1)[1:]]
    assert not any(engine_gemms.is_candidate(w) for w in not_supported)


def test_what_cannot_be_timed_is_left_to_torch(monkeypatch):
    weight, x = torch.randn(64, 128), torch.randn(3, 128)

    def choose(weights):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(engine_gemms, "_choose", choose)
    assert engine_gemms.select([weight]) == [] and not engine_gemms._chosen
    assert same_bits(engine_gemms.linear(x, weight), torch.nn.functional.linear(x, weight))


def test_an_unsupported_number_of_rows_is_left_to_torch(monkeypatch):
    weight, x = torch.randn(24, 16), torch.randn(3, 16)

    def gemm(a, b, bias, out):
        raise engine_gemms.UnsupportedProblem("no kernel")

    monkeypatch.setitem(engine_gemms._chosen, engine_gemms._shape_of(weight), (gemm, frozenset(engine_gemms.ROWS)))
    assert same_bits(engine_gemms.linear(x, weight), torch.nn.functional.linear(x, weight))


@pytest.mark.gpu
def test_both_gemms_on_the_gpu(monkeypatch):
    """Whatever is faster, the product is the same but for rounding; in a CUDA graph too."""
    weights = [torch.randn(1024, 2048, device="cuda").mul(0.02).to(BF16) for _ in range(4)]
    (said,) = engine_gemms.select(weights)
    assert said.startswith("cuBLASLt without split k for n=1024 k=2048, numbers of rows: ")
    shape = engine_gemms._shape_of(weights[0])
    gemm, _ = engine_gemms._chosen[shape]
    monkeypatch.setitem(engine_gemms._chosen, shape, (gemm, frozenset(engine_gemms.ROWS)))
    for rows in (1, 3, 64, 65):
        x = torch.randn(rows, 2048, device="cuda", dtype=BF16)
        got = engine_gemms.linear(x, weights[0])
        assert relative_error(got, x.double() @ weights[0].double().t()) <= TOLERANCE[BF16]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = engine_gemms.linear(x, weights[0])
        captured.fill_(float("nan"))
        graph.replay()
        assert same_bits(captured, got)
