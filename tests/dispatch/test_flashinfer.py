"""FlashInfer as a backend, with a fake one: the calls that it gets, absent, broken, and failing later."""

from __future__ import annotations

import sys
import threading
import warnings

import pytest
import torch
from helpers import same_bits

from dispatch.calls import OPS, ROWS, OnCuda, check, cuda_inputs, explained, inputs, on_cuda, run
from jitnorm import dispatch

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize("op", OPS)
def test_flashinfer_is_called(op, flashinfer):
    x, residual, w = cuda_inputs(dtype=torch.float16)
    check(op, x, residual, w, 1e-3)
    out = on_cuda(torch.full_like(x, float("nan")))
    if "fused" in op:
        getattr(dispatch, op)(x, residual, w, 1e-5, False)
        assert flashinfer[1] == (op, (id(x), id(residual), id(w)), 1e-5, False)
    else:
        assert getattr(dispatch, op)(x, w, 1e-5, out, True) is out
        assert flashinfer[1] == (op, (id(x), id(w), id(out)), 1e-5, True)
    assert flashinfer[0][0] == op and flashinfer[0][2:] == (1e-3, None) and len(flashinfer) == 2


# Calls that FlashInfer does not support


def unsupported_calls():
    """Return (name, part of the reason, what differs from a call that FlashInfer supports)."""
    x, _, w = cuda_inputs()
    flat = on_cuda(torch.randn(2 * ROWS * 256 + 8).bfloat16())
    wide = on_cuda(torch.randn(ROWS, 520).bfloat16())
    like = "FlashInfer requires {other} to have the input's dtype, device and shape"
    return [
        ("weight fp32", "weights of the input's dtype", {"weight": w.float()}),
        ("weight fp16", "weights of the input's dtype", {"weight": w.half()}),
        ("weight of rows", "weights of one dimension", {"weight": w[None]}),
        ("weight of a column", "weights of one dimension", {"weight": w[:, None]}),
        ("weight too short", "of the hidden size", {"weight": w[:128]}),
        ("weight strided", "contiguous", {"weight": on_cuda(torch.randn(512).bfloat16())[::2]}),
        ("weight misaligned", "weights that are aligned", {"weight": flat[1:257]}),
        ("one dimension", "inputs of 2", {"input": x[0]}),
        ("four dimensions", "inputs of 2", {"input": x[None, None]}),
        ("no rows", "at least one row", {"input": x[:0]}),
        ("last stride", "adjacent, aligned", {"input": wide[:, : 2 * 256 : 2]}),
        ("misaligned", "adjacent, aligned", {"input": flat[1 : 1 + ROWS * 256].view(ROWS, 256)}),
        ("aligned to 16 only", "adjacent, aligned", {"input": flat[8 : 8 + ROWS * 256].view(ROWS, 256)}),
        ("rows misaligned", "adjacent, aligned", {"input": flat.as_strided((ROWS, 256), (257, 1))}),
        ("rows that overlap", "do not overlap", {"input": flat.as_strided((ROWS, 256), (128, 1))}),
        ("expanded", "do not overlap", {"input": x[:1].expand(ROWS, 256)}),
        ("far apart", "adjacent, aligned", {"input": FarApart.make()}),
        ("other fp16", like, {"other": x.half()}),
        ("other fp32", like, {"other": x.float()}),
        ("other of other rows", like, {"other": x[:3]}),
        ("other strided", "{other} to have rows", {"other": wide[:, : 2 * 256 : 2]}),
        ("other expanded", "{other} to have rows", {"other": x[:1].expand(ROWS, 256)}),
        ("too large", "hidden sizes up to 16384", {"input": on_cuda(torch.empty(2, 16392).bfloat16())}),
    ]


class FarApart(OnCuda):
    """Rows so far apart that 32 bits do not reach the last one."""

    @classmethod
    def make(cls):
        return torch.empty(ROWS, 256).bfloat16().as_subclass(cls)

    def is_contiguous(self):
        return False

    def stride(self, dim=None):
        return 1 if dim == -1 else (2**29, 1)


@pytest.mark.parametrize("op", OPS)
def test_what_flashinfer_would_misread_goes_to_jitnorm(op, flashinfer):
    other = "residual" if "fused" in op else "out"
    for name, words, differs in unsupported_calls():
        backend, why = explained(op, **differs)
        assert backend == ("torch" if name in ("last stride", "other strided", "weight strided") else "jit"), name
        assert words.format(other=other) in why, (name, why)


@pytest.mark.parametrize("op", OPS)
def test_the_written_tensor_is_checked_too(op, flashinfer):
    x, residual, w = cuda_inputs()
    arguments = (x, residual.half(), w) if "fused" in op else (x, w, 1e-6, x.half())
    with pytest.raises(TypeError, match=r"(out must be bfloat16|residual must be bfloat16 or float32), got float16"):
        getattr(dispatch, op)(*arguments)
    assert flashinfer == []


@pytest.mark.parametrize("op", OPS)
def test_flashinfer_is_not_called_with_arguments_that_no_backend_accepts(op, flashinfer):
    x, residual, w = cuda_inputs()
    arguments = (x, residual, w) if "fused" in op else (x, w)
    for more, error, words in (
        ({"eps": -1.0}, ValueError, "eps must be zero or more"),
        ({"eps": float("nan")}, ValueError, "eps must be zero or more"),
        ({"eps": True}, TypeError, "eps must be a float"),
        ({"enable_pdl": "yes"}, TypeError, "enable_pdl must be"),
    ):
        with pytest.raises(error, match=words):
            getattr(dispatch, op)(*arguments, **more)
    assert flashinfer == []
    rows = on_cuda(torch.randn(len(x) + 1, w.shape[0]).to(x.dtype))  # an out or a residual that the others lie in
    assert explained(op, input=x, weight=rows[0], other=rows[:-1])[0] == "jit"
    assert explained(op, input=rows[1:], weight=w, other=rows[:-1])[0] == "jit"
    assert explained(op, input=x, weight=w, other=x)[0] == ("jit" if "fused" in op else "flashinfer")


def test_flashinfer_supports_calls_in_place(flashinfer):
    x, _, w = cuda_inputs()
    dispatch.rmsnorm(x, w, out=x)
    assert len(flashinfer) == 1


def test_more_elements_than_32_bits_can_index(flashinfer):
    huge = on_cuda(torch.zeros(1, 1).bfloat16()).expand(2**24, 256)
    assert "fewer than 2^31" in explained(input=huge)[1]


def test_another_device(flashinfer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert explained() == ("jit", "FlashInfer requires inputs on the current CUDA device")


def test_ranks_that_flashinfer_supports(flashinfer):
    qkv = on_cuda(torch.randn(ROWS, 6, 64).bfloat16())
    for op in OPS:
        backend = "flashinfer" if op == "rmsnorm" else "jit"  # FlashInfer's CUDA kernels take 3 in rmsnorm alone
        assert dispatch.explain(op, qkv, qkv[0, 0], on_cuda(qkv))[0] == backend
    assert dispatch.explain("rmsnorm", qkv[:, 2:4], qkv[0, 0])[0] == "flashinfer"
    assert dispatch.explain("rmsnorm", qkv[:, ::2], qkv[0, 0])[0] == "flashinfer"


def test_row_strides_that_flashinfer_supports(flashinfer):
    wide = on_cuda(torch.randn(ROWS, 512).bfloat16())
    assert dispatch.explain("rmsnorm", wide[:, :256], wide[0, :256])[0] == "flashinfer"
    assert dispatch.explain("rmsnorm", wide[:, 256:], wide[0, :256])[0] == "flashinfer"
    odd = on_cuda(torch.randn(ROWS, 333).bfloat16())
    assert dispatch.explain("rmsnorm", odd[:, :111], wide[0, :111])[0] == "flashinfer"  # it reads those one by one


@pytest.mark.parametrize("op", OPS)
def test_float32_weights_beside_half_inputs_go_to_jitnorm(op, flashinfer):
    check(op, *cuda_inputs(dtype=torch.float16, weight_dtype=torch.float32))
    assert flashinfer == []


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("which", ["input", "weight", "residual"])
def test_no_gradient_is_lost(op, which, flashinfer):
    if which == "residual" and "fused" not in op:
        return
    x, residual, w = cuda_inputs(dtype=torch.float16)
    leaf = {"input": x, "weight": w, "residual": residual}[which].requires_grad_()
    other = residual if "fused" in op else None
    assert dispatch.explain(op, x, w, other) == ("jit", "the call needs a gradient, and FlashInfer has none")
    with torch.no_grad():
        assert dispatch.explain(op, x, w, other)[0] == "flashinfer"
    if other is None:
        x = getattr(dispatch, op)(x, w)
    else:
        x, residual = x * 1, residual * 1  # a leaf cannot be written in place
        getattr(dispatch, op)(x, residual, w)
    x.float().square().sum().backward()
    assert leaf.grad is not None and leaf.grad.norm() > 0 and flashinfer == []


def test_traced_tensors_never_reach_flashinfer(flashinfer):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x, w = torch.empty(ROWS, 256, dtype=torch.float16, device="cuda"), torch.empty(256, dtype=torch.float16)
        assert x.is_cuda
        assert dispatch.explain("rmsnorm", x, w)[1].startswith("the tensors are traced")


# Absent and broken


def test_flashinfer_is_absent(recwarn):
    assert explained() == ("jit", "FlashInfer is not installed")
    check("rmsnorm", *cuda_inputs())
    assert not [w for w in recwarn if "FlashInfer" in str(w.message)]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"__init__.py": "raise ImportError('libcudart.so.13: cannot open')"},
            "ImportError: libcudart.so.13: cannot open",
        ),
        ({"__init__.py": "raise OSError('undefined\\n symbol')"}, "OSError: undefined symbol"),
        ({"__init__.py": "import sys; sys.exit('no GPU')"}, "SystemExit: no GPU"),
        ({"__init__.py": "import not_there"}, "ModuleNotFoundError: No module named 'not_there'"),
        ({"__init__.py": ""}, "No module named 'flashinfer.norm'"),
        ({"README": "a folder that pip left behind"}, "No module named 'flashinfer.norm'"),
        ({"__init__.py": "", "norm.py": "def rmsnorm(input, weight): pass"}, "enable_pdl"),
        (
            {"__init__.py": "", "norm.py": "def rmsnorm(input, weight, enable_pdl): pass\ngemma_rmsnorm = rmsnorm"},
            "has no attribute 'fused_add_rmsnorm'",
        ),
    ],
)
def test_flashinfer_cannot_be_imported(files, words, tmp_path, monkeypatch):
    package = tmp_path / "flashinfer"
    package.mkdir()
    for name, text in files.items():
        (package / name).write_text(text)
    monkeypatch.delitem(sys.modules, "flashinfer")
    monkeypatch.syspath_prepend(str(tmp_path))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        check("rmsnorm", *inputs())
        assert not warned  # no call needed it
        for _ in range(3):
            for op in OPS:
                check(op, *cuda_inputs())
    assert len(warned) == 1 and warned[0].category is RuntimeWarning
    text = str(warned[0].message)
    assert text.startswith("FlashInfer is installed but does not work: ") and words in text and "\n" not in text
    assert words in explained()[1]
    with (
        dispatch.backend("flashinfer"),
        pytest.raises(RuntimeError, match="flashinfer was requested and does not"),
    ):
        run("rmsnorm", *cuda_inputs())


def test_many_threads_import_it_once(tmp_path, monkeypatch):
    package = tmp_path / "flashinfer"
    package.mkdir()
    (package / "__init__.py").write_text("import time; time.sleep(0.2); raise ImportError('slow')")
    monkeypatch.delitem(sys.modules, "flashinfer")
    monkeypatch.syspath_prepend(str(tmp_path))
    results = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=lambda: results.append(explained())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(warned) == 1 and len(results) == 4 and all("slow" in why for _, why in results)


@pytest.mark.parametrize("op", OPS)
def test_flashinfer_fails_when_it_is_called(op, flashinfer, monkeypatch):
    """As when it can be imported, but finds at its first call that the driver is too old (sgl-project/sglang#30777)."""
    tried = []

    def fail(*arguments, **keywords):
        tried.append(arguments)
        raise RuntimeError("cudaErrorInsufficientDriver")

    monkeypatch.setattr(sys.modules["flashinfer.norm"], op, fail)
    with pytest.warns(RuntimeWarning, match="does not work: RuntimeError: cudaErrorInsufficientDriver") as warned:
        check(op, *cuda_inputs())
        check(op, *cuda_inputs())
    assert len(warned) == 1 and len(tried) == 1 and flashinfer == []
    with dispatch.backend("flashinfer"), pytest.raises(RuntimeError, match="cudaErrorInsufficientDriver"):
        run(op, *cuda_inputs())


def test_two_calls_fail_at_once(flashinfer, monkeypatch):
    both = threading.Barrier(2, timeout=30)

    def fail(*arguments, **keywords):
        both.wait()
        raise RuntimeError("too old")

    monkeypatch.setattr(sys.modules["flashinfer.norm"], "rmsnorm", fail)
    x, _, w = cuda_inputs()
    results = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=lambda: results.append(dispatch.rmsnorm(x, w))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(warned) == 1 and len(results) == 2 and same_bits(*results)


def test_requested_and_fails_when_it_is_called(flashinfer, monkeypatch):
    monkeypatch.setattr(sys.modules["flashinfer.norm"], "rmsnorm", lambda *a, **k: 1 / 0)
    x, _, w = cuda_inputs()
    with (
        dispatch.backend("flashinfer"),
        pytest.warns(RuntimeWarning),
        pytest.raises(RuntimeError, match=r"does not support this call of rmsnorm: FlashInfer is .*ZeroDivisionError"),
    ):
        dispatch.rmsnorm(x, w)


def test_errors_that_do_not_disable_flashinfer(flashinfer, monkeypatch, recwarn):
    def fail(input, weight, eps=1e-6, out=None, enable_pdl=None):
        raise (torch.OutOfMemoryError("no room") if eps == 1 else RuntimeError("another error"))

    monkeypatch.setattr(sys.modules["flashinfer.norm"], "rmsnorm", fail)
    x, _, w = cuda_inputs()
    with pytest.raises(torch.OutOfMemoryError):
        dispatch.rmsnorm(x, w, 1)
    with pytest.raises(TypeError, match="eps must be a float, got str"):
        dispatch.rmsnorm(x, w, "1e-6")
    with monkeypatch.context() as capturing, pytest.raises(RuntimeError, match="another error"):
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        dispatch.rmsnorm(x, w)
    assert explained()[0] == "flashinfer" and not [w for w in recwarn if "FlashInfer" in str(w.message)]
