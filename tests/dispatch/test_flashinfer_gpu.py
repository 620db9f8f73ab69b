"""`jitnorm.dispatch` with the real FlashInfer, on both of its implementations."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error, rmsnorm_reference, same_bits

import jitnorm
from jitnorm import dispatch
from jitnorm.dispatch import flashinfer_backend, selection

# Without a GPU nothing is imported: importing FlashInfer takes seconds, and may fail without one.
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
norm = pytest.importorskip("flashinfer.norm")

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("error:FlashInfer is installed")]
OPS = ("rmsnorm", "gemma_rmsnorm", "fused_add_rmsnorm", "gemma_fused_add_rmsnorm")
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-6}
ROWS = 67


@pytest.fixture(params=[True, False], ids=["cuda", "cute"], autouse=True)
def path(request, monkeypatch):
    """FlashInfer's CUDA kernels, then its CuTe ones."""
    if not request.param and not hasattr(norm, "rmsnorm_cute"):
        pytest.skip("FlashInfer has no CuTe kernels here")
    monkeypatch.setattr(norm, "_USE_CUDA_NORM", request.param)
    monkeypatch.setattr(flashinfer_backend, "_unavailable_reason", None)  # whatever happened in the test before
    monkeypatch.delenv("JITNORM_BACKEND", raising=False)
    selection._backend_from_environment.cache_clear()


@pytest.fixture
def called(monkeypatch) -> list[str]:
    """The names of FlashInfer's functions that were called, in order."""
    names = []
    for op in OPS:
        real = getattr(norm, op)

        def spy(*arguments, op=op, real=real, **keywords):
            names.append(op)
            return real(*arguments, **keywords)

        monkeypatch.setattr(norm, op, spy)
    return names


def inputs(hidden_size, dtype, weight_dtype=None, shape=(ROWS,)):
    x, residual = (torch.randn(*shape, hidden_size, device="cuda").to(dtype) for _ in range(2))
    return x, residual, torch.randn(hidden_size, device="cuda").to(weight_dtype or dtype)


def check(op, x, residual, w, eps=1e-5, enable_pdl=None):
    function = getattr(dispatch, op)
    factor = w.double() + (1 if "gemma" in op else 0)
    if "fused" in op:
        total = x.double() + residual.double()
        expected = rmsnorm_reference(total, factor, eps)
        got, residual = x.clone(), residual.clone()
        function(got, residual, w, eps, enable_pdl)
        assert relative_error(residual, total) < TOLERANCE[x.dtype]
    else:
        expected = rmsnorm_reference(x, factor, eps)
        got = torch.full_like(x, float("nan"))
        assert function(x, w, eps, got, enable_pdl) is got
        assert relative_error(function(x, w, eps), expected) < TOLERANCE[x.dtype]
    assert relative_error(got, expected) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hidden_size", [111, 128, 4096, 16384])
def test_flashinfer_is_called(op, dtype, hidden_size, called):
    for enable_pdl in (None, True, False):
        check(op, *inputs(hidden_size, dtype), enable_pdl=enable_pdl)
    assert set(called) == {op}


@pytest.mark.parametrize("op", OPS)
def test_what_flashinfer_would_misread_goes_to_jitnorm(op, called):
    check(op, *inputs(4096, torch.float32))
    check(op, *inputs(4096, torch.bfloat16, torch.float32))
    check(op, *inputs(4096, torch.bfloat16, shape=(3, 5, 7)))
    check(op, *inputs(111, torch.float32))  # to PyTorch
    x, _, w = (t.requires_grad_() for t in inputs(4096, torch.bfloat16))
    if "fused" not in op:
        getattr(dispatch, op)(x, w).float().square().sum().backward()
        assert x.grad.norm() > 0 and w.grad.norm() > 0
    assert called == []


def test_heads_of_a_packed_tensor(called):
    """They have 3 dimensions, and no single stride from row to row."""
    heads, _, w = inputs(128, torch.bfloat16, shape=(ROWS, 12))
    for q in (heads[:, :4], heads[:, 4:8]):
        out = dispatch.rmsnorm(q, w)
        assert relative_error(out, rmsnorm_reference(q, w, 1e-6)) < TOLERANCE[torch.bfloat16]
    assert called == ["rmsnorm"] * 2


@pytest.mark.parametrize("op", OPS)
def test_a_requested_backend_is_called(op, called):
    for name in ("jit", "auto-fast", "torch"):
        with dispatch.backend(name):
            check(op, *inputs(4096, torch.bfloat16))
    assert called == []
    with dispatch.backend("flashinfer"):
        check(op, *inputs(4096, torch.bfloat16))
        with pytest.raises(RuntimeError, match="weights of the input's dtype"):
            check(op, *inputs(4096, torch.bfloat16, torch.float32))
    assert set(called) == {op}


def test_a_compiled_graph_has_no_flashinfer(called):
    x, _, w = inputs(4096, torch.bfloat16)
    torch._dynamo.reset()
    out = torch.compile(dispatch.rmsnorm, fullgraph=True, backend="aot_eager")(x, w)
    assert same_bits(out, jitnorm.rmsnorm(x, w)) and called == []
