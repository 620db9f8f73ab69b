"""The dispatcher: which backend serves which call, and that each of them gives the right result.

There is no FlashInfer and no GPU here: a module of that name records its calls, and tensors say that they are on CUDA.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
import threading
import types
import warnings

import pytest
import torch
from helpers import DTYPES, compiled, relative_error, rmsnorm_reference, same_bits

import jitnorm
from jitnorm import dispatch
from jitnorm.core import norms
from jitnorm.dispatch import choice, flashinfer_backend, wanted

OPS = ("rmsnorm", "gemma_rmsnorm", "fused_add_rmsnorm", "gemma_fused_add_rmsnorm")
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-6}
ROWS = 7


class OnCuda(torch.Tensor):
    """A tensor of the CPU that says it is on CUDA: what the choice sees of a GPU, and kernels can still serve it."""

    is_cuda = True


def on_cuda(tensor: torch.Tensor) -> torch.Tensor:
    """A copy, aligned as torch's allocator for CUDA aligns."""
    room = torch.empty(tensor.numel() + 256, dtype=tensor.dtype)
    start = -room.data_ptr() % 256 // room.element_size()
    return room[start : start + tensor.numel()].view(tensor.shape).copy_(tensor).as_subclass(OnCuda)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A process that has not yet read JITNORM_BACKEND, looked for FlashInfer, or found it."""
    monkeypatch.delenv("JITNORM_BACKEND", raising=False)
    monkeypatch.setattr(flashinfer_backend, "_absence", None)
    monkeypatch.setattr(flashinfer_backend, "_norm", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # what get_device() says on the CPU
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flashinfer"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flashinfer", None)  # not installed, whatever this machine has
    wanted._from_environment.cache_clear()
    yield
    wanted._from_environment.cache_clear()


def stand_in(monkeypatch, **functions) -> None:
    """`flashinfer`, with these functions in flashinfer.norm."""
    package, norm = types.ModuleType("flashinfer"), types.ModuleType("flashinfer.norm")
    package.norm = norm
    for name, function in functions.items():
        setattr(norm, name, function)
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.norm", norm)


@pytest.fixture
def flashinfer(monkeypatch) -> list:
    """A FlashInfer that works. Its calls: (name, the tensors' ids, eps, enable_pdl)."""
    calls = []

    def rmsnorm_of(name):
        def function(input, weight, eps=1e-6, out=None, enable_pdl=None):
            calls.append((name, (id(input), id(weight), id(out)), eps, enable_pdl))
            out = torch.empty_like(input) if out is None else out
            return out.copy_(reference(name, input, None, weight, eps)[0])

        return function

    def fused_of(name):
        def function(input, residual, weight, eps=1e-6, enable_pdl=None):
            calls.append((name, (id(input), id(residual), id(weight)), eps, enable_pdl))
            normalised, total = reference(name, input, residual, weight, eps)
            residual.copy_(total)
            input.copy_(normalised)

        return function

    stand_in(monkeypatch, **{name: (fused_of if "fused" in name else rmsnorm_of)(name) for name in OPS})
    return calls


def reference(op, x, residual, weight, eps=1e-6):
    """(normalised, sum or None) in float64."""
    total = x.double() + residual.double() if "fused" in op else None
    factor = weight.double() + (1 if "gemma" in op else 0)
    return rmsnorm_reference(x if total is None else total, factor, eps), total


def inputs(hidden_size=256, dtype=torch.bfloat16, shape=(ROWS,), weight_dtype=None):
    x, residual = (torch.randn(*shape, hidden_size).to(dtype) for _ in range(2))
    weight = torch.randn(hidden_size).to(weight_dtype or dtype)
    return x, residual, weight.masked_fill(weight == -1, 1)  # of which Gemma's form, at size 1, makes nothing but zeros


def cuda_inputs(*arguments, **keywords):
    return tuple(map(on_cuda, inputs(*arguments, **keywords)))


def run(op, x, residual, weight, eps=1e-6, enable_pdl=None, module=dispatch):
    """(normalised, sum or None); copies are what is written."""
    function = getattr(module, op)
    if "fused" not in op:
        return function(x, weight, eps, enable_pdl=enable_pdl), None
    x, residual = (on_cuda(t) if isinstance(t, OnCuda) else t.clone() for t in (x, residual))
    assert function(x, residual, weight, eps, enable_pdl) is None
    return x, residual


def check(op, x, residual, weight, eps=1e-6, tolerance=None):
    """A call is right, and leaves alone what it does not write."""
    before = x.clone(), weight.clone()
    normalised, total = run(op, x, residual, weight, eps)
    expected, expected_total = reference(op, *(t.as_subclass(torch.Tensor) for t in (x, residual, weight)), eps)
    tolerance = tolerance or TOLERANCE[x.dtype]
    assert normalised.dtype == x.dtype and normalised.shape == x.shape
    assert relative_error(normalised, expected) < tolerance
    if total is not None:
        assert torch.equal(total, expected_total.to(x.dtype))
    assert same_bits(x, before[0]) and same_bits(weight, before[1])


# The rule


def explained(op="rmsnorm", input=None, weight=None, other=None, **keywords):
    x, residual, w = cuda_inputs(**keywords)
    input, weight = x if input is None else input, w if weight is None else weight
    if "fused" in op and other is None:
        other = residual
    return dispatch.explain(op, input, weight, other)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_flashinfer_serves_halves_on_cuda(op, dtype, flashinfer):
    for hidden_size in (64, 111, 4096, 16384):
        backend, why = explained(op, hidden_size=hidden_size, dtype=dtype)
        assert backend == "flashinfer" and "CUDA" in why
    assert flashinfer == []  # only asked


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


@pytest.mark.parametrize("op", OPS)
def test_what_the_rule_sends_elsewhere(op, flashinfer, monkeypatch):
    for x, residual, w, backend, words in (
        (*inputs(), "jit", "not on CUDA"),
        (*inputs(300), "torch", "not on CUDA, and jitnorm has no kernel for hidden size 300"),
        (*cuda_inputs(dtype=torch.float32), "jit", "neither float16 nor bfloat16"),
        (*cuda_inputs(111, dtype=torch.float32), "torch", "neither float16 nor bfloat16, and jitnorm has no kernel"),
    ):
        chosen, why = dispatch.explain(op, x, w, residual if "fused" in op else None)
        assert chosen == backend and words in why
        check(op, x, residual, w)
    monkeypatch.setattr(choice, "_is_dynamo_compiling", lambda: True)
    assert explained(op) == ("jit", "torch.compile is tracing")
    assert flashinfer == []


def not_for_flashinfer():
    """(name, words, what differs from a call that FlashInfer serves)"""
    x, _, w = cuda_inputs()
    flat = on_cuda(torch.randn(2 * ROWS * 256 + 8).bfloat16())
    wide = on_cuda(torch.randn(ROWS, 520).bfloat16())
    like = "FlashInfer takes a residual or out of the input's dtype, device and shape"
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
        ("other of other rows", like, {"other": x[:3]}),
        ("other strided", "residual or out with rows", {"other": wide[:, : 2 * 256 : 2]}),
        ("other expanded", "residual or out with rows", {"other": x[:1].expand(ROWS, 256)}),
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
    for name, words, differs in not_for_flashinfer():
        backend, why = explained(op, **differs)
        assert backend == ("torch" if name == "too large" else "jit"), name
        assert words in why, (name, why)


@pytest.mark.parametrize("op", OPS)
def test_what_is_written_is_looked_at_too(op, flashinfer):
    x, residual, w = cuda_inputs()
    arguments = (x, residual.float(), w) if "fused" in op else (x, w, 1e-6, x.float())
    with pytest.raises(TypeError, match=r"(out|residual) must be bfloat16, got float32"):
        getattr(dispatch, op)(*arguments)
    assert flashinfer == []


@pytest.mark.parametrize("op", OPS)
def test_flashinfer_is_not_asked_for_what_nobody_could_take(op, flashinfer):
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


def test_in_place_is_for_flashinfer(flashinfer):
    x, _, w = cuda_inputs()
    dispatch.rmsnorm(x, w, out=x)
    assert len(flashinfer) == 1


def test_more_elements_than_32_bits_count(flashinfer):
    huge = on_cuda(torch.zeros(1, 1).bfloat16()).expand(2**24, 256)
    assert "fewer than 2^31" in explained(input=huge)[1]


def test_another_device(flashinfer, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert explained() == ("jit", "FlashInfer takes inputs on the current CUDA device")


def test_three_dimensions(flashinfer):
    qkv = on_cuda(torch.randn(ROWS, 6, 64).bfloat16())
    for op in OPS:
        backend = "flashinfer" if op == "rmsnorm" else "jit"  # FlashInfer's CUDA kernels take 3 in rmsnorm alone
        assert dispatch.explain(op, qkv, qkv[0, 0], on_cuda(qkv))[0] == backend
    assert dispatch.explain("rmsnorm", qkv[:, 2:4], qkv[0, 0])[0] == "flashinfer"
    assert dispatch.explain("rmsnorm", qkv[:, ::2], qkv[0, 0])[0] == "flashinfer"


def test_row_strides_that_flashinfer_takes(flashinfer):
    wide = on_cuda(torch.randn(ROWS, 512).bfloat16())
    assert dispatch.explain("rmsnorm", wide[:, :256], wide[0, :256])[0] == "flashinfer"
    assert dispatch.explain("rmsnorm", wide[:, 256:], wide[0, :256])[0] == "flashinfer"
    odd = on_cuda(torch.randn(ROWS, 333).bfloat16())
    assert dispatch.explain("rmsnorm", odd[:, :111], wide[0, :111])[0] == "flashinfer"  # it reads those one by one


@pytest.mark.parametrize("op", OPS)
def test_a_float32_weight_is_read_as_such(op, flashinfer):
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


def test_sizes_are_those_of_the_kernels():
    supported = set(filter(norms.is_supported_hidden_size, range(40000)))
    assert set(choice._KERNEL_SIZES) == supported and {64, 8192} <= supported and not {111, 16384} & supported


# FlashInfer, absent and broken


def test_importing_looks_for_nothing():
    script = """
        import sys, jitnorm, jitnorm.dispatch, torch
        jitnorm.dispatch.rmsnorm(torch.ones(1, 111), torch.ones(111))
        print([name for name in sys.modules if name.startswith(("flashinfer", "torch._dynamo."))])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_absent(recwarn):
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
def test_broken(files, words, tmp_path, monkeypatch):
    package = tmp_path / "flashinfer"
    package.mkdir()
    for name, text in files.items():
        (package / name).write_text(text)
    monkeypatch.delitem(sys.modules, "flashinfer")
    monkeypatch.syspath_prepend(str(tmp_path))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check("rmsnorm", *inputs())
        assert not said  # nobody needed it
        for _ in range(3):
            for op in OPS:
                check(op, *cuda_inputs())
    assert len(said) == 1 and said[0].category is RuntimeWarning
    text = str(said[0].message)
    assert text.startswith("FlashInfer is installed but does not work: ") and words in text and "\n" not in text
    assert words in explained()[1]
    with dispatch.backend("flashinfer"), pytest.raises(RuntimeError, match="flashinfer was asked for and cannot serve"):
        run("rmsnorm", *cuda_inputs())


def test_looked_for_once_by_many_threads(tmp_path, monkeypatch):
    package = tmp_path / "flashinfer"
    package.mkdir()
    (package / "__init__.py").write_text("import time; time.sleep(0.2); raise ImportError('slow')")
    monkeypatch.delitem(sys.modules, "flashinfer")
    monkeypatch.syspath_prepend(str(tmp_path))
    results = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=lambda: results.append(explained())) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(said) == 1 and len(results) == 4 and all("slow" in why for _, why in results)


@pytest.mark.parametrize("op", OPS)
def test_broken_when_it_is_called(op, flashinfer, monkeypatch):
    """It imports, and finds out at its first call that the driver is too old (sgl-project/sglang#30777)."""
    tried = []

    def fail(*arguments, **keywords):
        tried.append(arguments)
        raise RuntimeError("cudaErrorInsufficientDriver")

    monkeypatch.setattr(sys.modules["flashinfer.norm"], op, fail)
    with pytest.warns(RuntimeWarning, match="does not work: RuntimeError: cudaErrorInsufficientDriver") as said:
        check(op, *cuda_inputs())
        check(op, *cuda_inputs())
    assert len(said) == 1 and len(tried) == 1 and flashinfer == []
    with dispatch.backend("flashinfer"), pytest.raises(RuntimeError, match="cudaErrorInsufficientDriver"):
        run(op, *cuda_inputs())


def test_two_calls_that_fail_at_once(flashinfer, monkeypatch):
    both = threading.Barrier(2, timeout=30)

    def fail(*arguments, **keywords):
        both.wait()
        raise RuntimeError("too old")

    monkeypatch.setattr(sys.modules["flashinfer.norm"], "rmsnorm", fail)
    x, _, w = cuda_inputs()
    results = []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=lambda: results.append(dispatch.rmsnorm(x, w))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(said) == 1 and len(results) == 2 and same_bits(*results)


def test_asked_for_and_broken_when_it_is_called(flashinfer, monkeypatch):
    monkeypatch.setattr(sys.modules["flashinfer.norm"], "rmsnorm", lambda *a, **k: 1 / 0)
    x, _, w = cuda_inputs()
    with (
        dispatch.backend("flashinfer"),
        pytest.warns(RuntimeWarning),
        pytest.raises(RuntimeError, match=r"cannot serve this call of rmsnorm: FlashInfer is .*ZeroDivisionError"),
    ):
        dispatch.rmsnorm(x, w)


def test_what_is_no_fault_of_flashinfer(flashinfer, monkeypatch, recwarn):
    def fail(input, weight, eps=1e-6, out=None, enable_pdl=None):
        raise (torch.OutOfMemoryError("no room") if eps == 1 else RuntimeError("not that"))

    monkeypatch.setattr(sys.modules["flashinfer.norm"], "rmsnorm", fail)
    x, _, w = cuda_inputs()
    with pytest.raises(torch.OutOfMemoryError):
        dispatch.rmsnorm(x, w, 1)
    with pytest.raises(TypeError, match="eps must be a float, got str"):
        dispatch.rmsnorm(x, w, "1e-6")
    with monkeypatch.context() as capturing, pytest.raises(RuntimeError, match="not that"):
        capturing.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        dispatch.rmsnorm(x, w)
    assert explained()[0] == "flashinfer" and not [w for w in recwarn if "FlashInfer" in str(w.message)]


# A backend that was asked for


def asked(monkeypatch, how, name):
    if how == "context":
        return dispatch.backend(name)
    monkeypatch.setenv("JITNORM_BACKEND", name)
    wanted._from_environment.cache_clear()
    return contextlib.nullcontext()


@pytest.mark.parametrize("how", ["context", "environment"])
@pytest.mark.parametrize("op", OPS)
def test_asked_for(op, how, flashinfer, monkeypatch):
    ours = []
    for name in ("rmsnorm", "fused_add_rmsnorm"):
        real = getattr(dispatch.torch_backend, name)
        monkeypatch.setattr(dispatch.torch_backend, name, lambda *a, real=real: ours.append(a) or real(*a))
    with asked(monkeypatch, how, "jit"):
        check(op, *cuda_inputs())
        with pytest.raises(RuntimeError, match=f"jit was asked for .* {op}: jitnorm has no kernel for hidden size 300"):
            run(op, *inputs(300))
    assert flashinfer == ours == []
    with asked(monkeypatch, how, "torch"):
        for x, residual, w in (cuda_inputs(), inputs(), inputs(300)):
            check(op, x, residual, w)
    assert flashinfer == [] and len(ours) == 3
    with asked(monkeypatch, how, "flashinfer"):
        check(op, *cuda_inputs())
        with pytest.raises(RuntimeError, match=f"flashinfer was asked for .* {op}: the input is not on CUDA"):
            run(op, *inputs())
        with pytest.raises(RuntimeError, match=r"weights of the input's dtype"):
            run(op, *cuda_inputs(weight_dtype=torch.float32))
    assert len(flashinfer) == 1 and len(ours) == 3
    with asked(monkeypatch, how, "auto"):
        check(op, *cuda_inputs())
    assert len(flashinfer) == 2


def test_asked_for_and_absent():
    with dispatch.backend("flashinfer"), pytest.raises(RuntimeError, match="FlashInfer is not installed"):
        run("rmsnorm", *cuda_inputs())


def test_auto_fast(flashinfer):
    with dispatch.backend("auto-fast"):
        for op in OPS:
            check(op, *cuda_inputs())
        assert flashinfer == []
        assert explained(hidden_size=16384)[0] == explained(hidden_size=111)[0] == "flashinfer"
        assert dispatch.explain("rmsnorm", *inputs(111)[::2])[0] == "torch"
        rows = on_cuda(torch.randn(ROWS, 4, 192).bfloat16())[:, :3, :64]  # no one stride from row to row
        for other in (None, on_cuda(torch.randn(ROWS, 3, 64).bfloat16())):
            assert dispatch.explain("rmsnorm", rows, rows[0, 0], other)[0] == "flashinfer"
        packed = on_cuda(torch.randn(ROWS, 3, 64).bfloat16())
        assert dispatch.explain("rmsnorm", packed, packed[0, 0], rows)[0] == "flashinfer"
        assert dispatch.explain("rmsnorm", rows[:, 0], rows[0, 0])[0] == "jit"
        assert explained(weight=on_cuda(torch.randn(256).half()))[0] == "jit"  # which says what is wrong with it


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
    with pytest.raises(ValueError, match=r"op must be one of rmsnorm, .*, got 'layernorm'"):
        dispatch.explain("layernorm", *inputs()[::2])


# PyTorch, for the sizes that no kernel serves


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [1, 111, 300, 16384])
def test_other_sizes(op, dtype, hidden_size):
    for weight_dtype in DTYPES:
        for shape in ((ROWS,), (3, 5), ()):
            x, residual, w = inputs(hidden_size, dtype, shape, weight_dtype)
            check(op, x, residual, w)
    x, residual, w = inputs(hidden_size, dtype)
    check(op, x * 1e-2, residual * 1e-2, w, eps=0.1)


@pytest.mark.parametrize("hidden_size", [64, 256, 4096])
@pytest.mark.parametrize("op", OPS)
def test_pytorch_and_the_kernels_agree(op, hidden_size):
    x, residual, w = inputs(hidden_size)
    results = []
    for name in ("torch", "jit"):
        with dispatch.backend(name):
            results.append(run(op, x, residual, w))
    assert relative_error(results[0][0], results[1][0]) < 1e-3
    if "fused" in op:
        assert same_bits(results[0][1], results[1][1])


@pytest.mark.parametrize("op", ["rmsnorm", "gemma_rmsnorm"])
@pytest.mark.parametrize("hidden_size", [256, 300])
def test_out(op, hidden_size):
    x, _, w = inputs(hidden_size)
    function = getattr(dispatch, op)
    expected = function(x, w)
    out = torch.full_like(x, float("nan"))
    assert function(x, w, out=out) is out and same_bits(out, expected)
    wide = torch.full((ROWS, 2 * hidden_size), 7.0, dtype=x.dtype)
    function(x, w, out=wide[:, :hidden_size])
    assert same_bits(wide[:, :hidden_size], expected) and (wide[:, hidden_size:] == 7).all()
    assert function(x, w, out=x) is x and same_bits(x, expected)


@pytest.mark.parametrize("op", OPS)
def test_any_strides_and_no_rows(op):
    x, residual, w = inputs(300, shape=(3, ROWS))
    expected = run(op, x, residual, w)
    strided = torch.empty(3, ROWS, 600, dtype=x.dtype)[..., ::2].copy_(x), residual.transpose(0, 1).contiguous().mT
    got = run(op, strided[0], residual.transpose(0, 1).contiguous().transpose(0, 1), w)
    assert torch.equal(got[0], expected[0])
    empty, total = run(op, x[:0], residual[:0], w)
    assert empty.shape == (0, ROWS, 300) and (total is None or total.shape == empty.shape)


@pytest.mark.parametrize("op", ["fused_add_rmsnorm", "gemma_fused_add_rmsnorm"])
def test_the_sum_is_normalised_before_it_is_rounded(op):
    x, residual, w = inputs(300, weight_dtype=torch.float32)
    residual = residual.sign() * 256 + residual
    total = x.float() + residual.float()
    w[:] = 0.5
    got, _ = run(op, x, residual, w)
    factor = w + 1 if "gemma" in op else w
    exact, rounded = (
        torch.nn.functional.rms_norm(t.float(), (300,), factor, 1e-6).bfloat16() for t in (total, total.bfloat16())
    )
    assert same_bits(got, exact) and not same_bits(got, rounded)


def test_gemma_adds_its_one_in_float32():
    x, _, w = inputs(300)
    w[:] = 0.0035
    got = dispatch.gemma_rmsnorm(x, w)
    lossy = dispatch.rmsnorm(x, 1 + w)
    exact = reference("gemma_rmsnorm", x, None, w)[0]
    assert relative_error(got, exact) < 2e-3 < 3e-3 < relative_error(lossy, exact)


# What is wrong with an argument


@pytest.mark.parametrize("hidden_size", [256, 300])
def test_refused(hidden_size):
    x, residual, w = inputs(hidden_size)
    h = hidden_size
    flat = torch.randn(4 * h).bfloat16()
    calls = [
        (TypeError, "input must be a torch.Tensor, got list", lambda: dispatch.rmsnorm([1.0], w)),
        (TypeError, "weight must be a torch.Tensor, got NoneType", lambda: dispatch.rmsnorm(x, None)),
        (TypeError, "out must be a torch.Tensor, got int", lambda: dispatch.rmsnorm(x, w, 1e-6, 3)),
        (TypeError, "residual must be a torch.Tensor, got None", lambda: dispatch.fused_add_rmsnorm(x, None, w)),
        (ValueError, "input must have at least one dim", lambda: dispatch.rmsnorm(w.new_ones(()), w)),
        (TypeError, "input must be .* got float64", lambda: dispatch.rmsnorm(x.double(), w.double())),
        (TypeError, "weight must be .* got float64", lambda: dispatch.rmsnorm(x, w.double())),
        (ValueError, "weight must have shape", lambda: dispatch.gemma_rmsnorm(x, w[:1])),
        (ValueError, "weight must have shape", lambda: dispatch.rmsnorm(x, x)),
        (TypeError, "out must be bfloat16, got float32", lambda: dispatch.rmsnorm(x, w, 1e-6, x.float())),
        (ValueError, "out must have shape", lambda: dispatch.rmsnorm(x, w, 1e-6, x[:3])),
        (TypeError, "residual must be bfloat16", lambda: dispatch.gemma_fused_add_rmsnorm(x, residual.float(), w)),
        (ValueError, "residual must have shape", lambda: dispatch.fused_add_rmsnorm(x, residual[:1], w)),
        (ValueError, "residual must share no memory", lambda: dispatch.fused_add_rmsnorm(x, x, w)),
        (
            ValueError,
            "residual must share no memory",
            lambda: dispatch.fused_add_rmsnorm(flat[: 2 * h].view(2, h), flat[h : 3 * h].view(2, h), w),
        ),
        (ValueError, "eps must be zero or more", lambda: dispatch.rmsnorm(x, w, -1.0)),
        (TypeError, "eps must be a float, got str", lambda: dispatch.fused_add_rmsnorm(x, residual, w, "1")),
        (TypeError, "enable_pdl must be", lambda: dispatch.gemma_rmsnorm(x, w, 1e-6, None, 1)),
    ]
    before = x.clone(), residual.clone()
    for kind, words, call in calls:
        with pytest.raises(kind, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert same_bits(x, before[0]) and same_bits(residual, before[1])


def test_jitnorm_itself_still_refuses():
    with pytest.raises(RuntimeError, match="does not support hidden_size 300"):
        jitnorm.rmsnorm(*inputs(300)[::2])


# Gradients


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("hidden_size", [256, 300])
def test_gradients(op, hidden_size):
    leaves = [t.requires_grad_() for t in inputs(hidden_size, torch.float32)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    grad = torch.randn(2, ROWS, hidden_size)
    x, residual, w = leaves
    if "fused" in op:
        outputs = x * 1, residual * 1
        getattr(dispatch, op)(*outputs, w)
    else:
        outputs = (getattr(dispatch, op)(x, w),)
    expected = [t for t in reference(op, *exact) if t is not None]
    for function, results in ((torch.autograd.backward, outputs), (torch.autograd.backward, expected)):
        function(results, [g.to(r.dtype) for g, r in zip(grad, results, strict=False)])
    for got, want in zip(leaves, exact, strict=True):
        if want.grad is not None:
            assert relative_error(got.grad, want.grad) < 1e-5
    assert sum(t.grad is not None for t in leaves) == (3 if "fused" in op else 2)


@pytest.mark.parametrize("hidden_size", [256, 300])
def test_what_has_no_gradient_says_so(hidden_size):
    x, residual, w = inputs(hidden_size, torch.float32)
    w.requires_grad_()
    with pytest.raises(RuntimeError, match="rmsnorm with out= has no gradient"):
        dispatch.rmsnorm(x, w, out=torch.empty_like(x))
    with torch.no_grad():
        dispatch.rmsnorm(x, w, out=torch.empty_like(x))
    out = torch.full_like(x, torch.nan).requires_grad_()
    assert dispatch.rmsnorm(x, w.detach(), out=out) is out and out.is_leaf  # data
    assert relative_error(out.detach(), rmsnorm_reference(x, w.detach(), 1e-6)) < TOLERANCE[torch.float32]
    with pytest.raises(RuntimeError, match="leaf"):
        dispatch.fused_add_rmsnorm(x.requires_grad_(), residual, w)


@pytest.mark.parametrize("hidden_size", [256, 300])
def test_nothing_is_written_where_one_of_two_cannot_be(hidden_size):
    x, residual, w = inputs(hidden_size, torch.float32)
    before = residual.clone()
    overlapping = torch.randn(x.numel()).as_strided(x.shape, (hidden_size // 2, 1))
    for bad, error in (
        (torch.randn(1, hidden_size).expand_as(x), ValueError),
        (overlapping, ValueError),
        (x.clone().requires_grad_(), RuntimeError),
    ):
        with pytest.raises(error, match=r"input (must not overlap itself|is a leaf that requires grad)"):
            dispatch.fused_add_rmsnorm(bad, residual, w)
        assert same_bits(residual, before)
    for bad in (torch.empty(1, hidden_size).expand_as(x), w.expand(1, -1)):
        with pytest.raises(ValueError, match="out must"):
            dispatch.rmsnorm(x[: len(bad)], w, out=bad)


def test_rows_of_no_one_stride_that_lie_between_each_other_count_as_shared():
    both = torch.randn(3, 5, 2 * 300)
    before = both.clone()
    with pytest.raises(ValueError, match="residual must share no memory with input"):
        dispatch.fused_add_rmsnorm(both[:, :3, :300], both[:, :3, 300:], torch.ones(300))
    assert same_bits(both, before)


# torch.compile


@pytest.mark.parametrize("dynamic", [True, False, None])
@pytest.mark.parametrize("hidden_size", [256, 300, 16384])
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
        for rows in (3, 5, 64):
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


def test_a_backend_that_cannot_serve_fails_while_tracing():
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
