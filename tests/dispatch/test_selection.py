"""Which backend is selected for which call, and the backend that the user requests."""

from __future__ import annotations

import contextlib
import sys
import threading

import pytest
import torch

from dispatch.calls import OPS, ROWS, check, cuda_inputs, explained, inputs, on_cuda, run
from jitnorm import dispatch
from jitnorm.dispatch import selection

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flashinfer_is_selected_for_half_precision_on_cuda(op, dtype, flashinfer):
    for hidden_size in (64, 111, 4096, 16384):
        backend, why = explained(op, hidden_size=hidden_size, dtype=dtype)
        assert backend == "flashinfer" and "CUDA" in why
    assert flashinfer == []  # explain calls nothing


@pytest.mark.parametrize("op", OPS)
def test_other_backends_are_selected(op, flashinfer, monkeypatch):
    for x, residual, w, backend, words in (
        (*inputs(), "jit", "not on CUDA"),
        (*inputs(300), "jit", "not on CUDA"),
        (*inputs(65537), "torch", "not on CUDA, and jitnorm has no kernel for hidden size 65537"),
        (*cuda_inputs(dtype=torch.float32), "jit", "neither float16 nor bfloat16"),
        (*cuda_inputs(111, dtype=torch.float32), "jit", "neither float16 nor bfloat16"),
    ):
        chosen, why = dispatch.explain(op, x, w, residual if "fused" in op else None)
        assert chosen == backend and words in why
        check(op, x, residual, w)
    monkeypatch.setattr(selection, "_is_dynamo_compiling", lambda: True)
    assert explained(op) == ("jit", "torch.compile is tracing")
    assert flashinfer == []


# A backend that the user requests


def requested(monkeypatch, how, name):
    if how == "context":
        return dispatch.backend(name)
    monkeypatch.setenv("JITNORM_BACKEND", name)
    selection._backend_from_environment.cache_clear()
    return contextlib.nullcontext()


@pytest.mark.parametrize("how", ["context", "environment"])
@pytest.mark.parametrize("op", OPS)
def test_a_requested_backend_is_called(op, how, flashinfer, monkeypatch):
    ours = []
    for name in ("rmsnorm", "fused_add_rmsnorm"):
        real = getattr(dispatch.torch_backend, name)
        monkeypatch.setattr(dispatch.torch_backend, name, lambda *a, real=real, **k: ours.append(a) or real(*a, **k))
    with requested(monkeypatch, how, "jit"):
        check(op, *cuda_inputs())
        with pytest.raises(
            RuntimeError, match=f"jit was requested .* {op}: jitnorm has no kernel for hidden size 65537"
        ):
            run(op, *inputs(65537))
    assert flashinfer == ours == []
    with requested(monkeypatch, how, "torch"):
        for x, residual, w in (cuda_inputs(), inputs(), inputs(65537)):
            check(op, x, residual, w)
    assert flashinfer == [] and len(ours) == 3
    with requested(monkeypatch, how, "flashinfer"):
        check(op, *cuda_inputs())
        with pytest.raises(RuntimeError, match=f"flashinfer was requested .* {op}: the input is not on CUDA"):
            run(op, *inputs())
        with pytest.raises(RuntimeError, match=r"weights of the input's dtype"):
            run(op, *cuda_inputs(weight_dtype=torch.float32))
    assert len(flashinfer) == 1 and len(ours) == 3
    with requested(monkeypatch, how, "auto"):
        check(op, *cuda_inputs())
    assert len(flashinfer) == 2


def test_flashinfer_is_requested_and_absent():
    with dispatch.backend("flashinfer"), pytest.raises(RuntimeError, match="FlashInfer is not installed"):
        run("rmsnorm", *cuda_inputs())


def test_auto_fast(flashinfer):
    with dispatch.backend("auto-fast"):
        for op in OPS:
            check(op, *cuda_inputs())
        assert flashinfer == []
        assert explained(hidden_size=16384)[0] == explained(hidden_size=111)[0] == "jit"
        assert explained(hidden_size=65537)[0] == "torch"
        assert dispatch.explain("rmsnorm", *inputs(65537)[::2])[0] == "torch"
        columns = on_cuda(torch.randn(64, ROWS).bfloat16()).t()
        assert dispatch.explain("rmsnorm", columns, columns[0].contiguous())[0] == "torch"
        rows = on_cuda(torch.randn(ROWS, 4, 192).bfloat16())[:, :3, :64]  # no one stride from row to row
        assert dispatch.explain("rmsnorm", rows, rows[0, 0])[0] == "jit"
        assert dispatch.explain("rmsnorm", rows[:, 0], rows[0, 0])[0] == "jit"
        assert explained(weight=on_cuda(torch.randn(256).half()))[0] == "jit"  # whose checks name the wrong dtype


def test_blocks_nest_and_end(monkeypatch):
    def chosen():
        return dispatch.explain("rmsnorm", *inputs()[::2])[0]

    monkeypatch.setenv("JITNORM_BACKEND", "torch")
    assert chosen() == "torch"
    with dispatch.backend("jit"):
        assert chosen() == "jit"
        with dispatch.backend("torch"):
            assert chosen() == "torch"
            with dispatch.backend("auto"):
                assert chosen() == "jit"
            with pytest.raises(KeyError), dispatch.backend("jit"):
                assert chosen() == "jit"
                raise KeyError
            assert chosen() == "torch"
        assert chosen() == "jit"
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(chosen()))
        thread.start()
        thread.join()
        assert elsewhere == ["torch"] or sys.flags.__dict__.get("thread_inherit_context")
    assert chosen() == "torch"


def test_unknown_names(monkeypatch):
    names = "auto, auto-fast, jit, flashinfer, torch"
    with pytest.raises(ValueError, match=f"backend must be one of {names}, got 'cuda'"):
        dispatch.backend("cuda")
    monkeypatch.setenv("JITNORM_BACKEND", "Jit")
    for op in OPS:
        with pytest.raises(ValueError, match=f"JITNORM_BACKEND must be one of {names}, got 'Jit'"):
            run(op, *inputs())
    with dispatch.backend("jit"):
        run("rmsnorm", *inputs())
    monkeypatch.setenv("JITNORM_BACKEND", "")
    run("rmsnorm", *inputs())
    with pytest.raises(ValueError, match=r"op must be one of rmsnorm, .*, got 'batchnorm'"):
        dispatch.explain("batchnorm", *inputs()[::2])
