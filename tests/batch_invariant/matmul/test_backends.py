"""Test the GEMM backends, the choice between them and their invariance check, without a GPU as far as possible."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import math
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tvm_ffi
from helpers import DTYPES, relative_error, same_bits

from jitnorm.batch_invariant import matmul_persistent
from jitnorm.batch_invariant.matmul import cublaslt, cuda, invariance_check
from jitnorm.batch_invariant.matmul.problem import Problem, UnsupportedProblem
from jitnorm.batch_invariant.operands import cancelling_operands
from jitnorm.batch_invariant.triton_support import triton_module
from jitnorm.jit.load import load
from jitnorm.jit.spec import CSRC, LAUNCHER
from jitnorm.jit.toolchain import find_nvcc

from ..common import TOLERANCE


def make_problem(n=48, k=77, dtype=torch.float32, **other):
    fields = {"out_dtype": dtype, "b_transposed": True, "b_stride": k, "bias": False, "tf32": False, **other}
    return Problem(device=torch.device("cpu"), n=n, k=k, dtype=dtype, **fields)


A_GPU = SimpleNamespace(name="a GPU", multi_processor_count=8)


def row_by_row(a, b, bias, out):
    for i in range(a.shape[0]):
        torch.mm(a[i : i + 1], b, out=out[i : i + 1])
    if bias is not None:
        out += bias


def splits_k_for_few_rows(a, b, bias, out):
    """Split k as a library does if it has more SMs than tiles."""
    half = a.shape[1] // 2 if a.shape[0] < 17 else a.shape[1]
    row_by_row(a[:, :half], b[:half], bias, out)
    rest = torch.zeros_like(out)
    row_by_row(a[:, half:], b[half:], None, rest)
    out += rest


def adds_backwards_at_odd_places(a, b, bias, out):
    row_by_row(a, b, bias, out)
    row_by_row(a[1::2].flip(1), b.flip(0), bias, odd := torch.empty_like(out[1::2]))
    out[1::2] = odd


@pytest.fixture
def few_batches(monkeypatch):
    monkeypatch.setattr(invariance_check, "BATCH_SIZES", (1, 2, 16, 17, 40))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k", [78, 77])
def test_an_invariant_backend_passes(few_batches, dtype, bias, k):
    problem = make_problem(k=k, dtype=dtype, bias=bias)
    assert invariance_check.find_first_difference(row_by_row, problem) == ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("gemm", "difference"),
    [
        (splits_k_for_few_rows, "in a batch of 17"),
        (adds_backwards_at_odd_places, "in a batch of 2"),
        (lambda a, b, bias, out: None, "not finite"),
    ],
)
def test_other_backends_fail(few_batches, gemm, difference, dtype):
    assert invariance_check.find_first_difference(gemm, make_problem(dtype=dtype)).endswith(difference)


@pytest.mark.parametrize("k", [512, 513])
def test_operands_that_cancel_show_every_order(k):
    """The difference shows in results that are rounded to bfloat16, where that of random operands mostly would not."""
    a, b = cancelling_operands(7, 64, k, torch.bfloat16, torch.device("cpu"))
    assert (a.double() @ b.double() == (0 if k == 512 else 2**-22)).all()
    out, other = torch.empty(7, 64), torch.empty(7, 64)
    row_by_row(a.float(), b.float(), None, out)
    row_by_row(a.float().flip(1), b.float().flip(0), None, other)
    assert (out.bfloat16() != other.bfloat16()).float().mean() > 0.9


@pytest.fixture
def on_a_gpu(cache_dir, monkeypatch, few_batches):
    """Let results be stored in an empty cache, as if tensors on the CPU were on A_GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: A_GPU)


def test_results_are_cached(on_a_gpu, monkeypatch):
    runs = []

    def gemm(a, b, bias, out):
        runs.append(a.shape[0])
        (row_by_row if is_invariant else splits_k_for_few_rows)(a, b, bias, out)

    def passes(name, library="a library"):
        runs.clear()
        return invariance_check.passes(name, library, (), gemm, make_problem(n=8))

    for is_invariant in (True, False):
        assert passes(f"backend {is_invariant}") is is_invariant
        assert runs
        assert passes(f"backend {is_invariant}") is is_invariant  # from disk
        assert not runs
    cached = {result.backend: result for result in invariance_check.cached_results()}
    assert cached["backend True"].passed and not cached["backend True"].first_difference
    assert "in a batch of 17" in cached["backend False"].first_difference
    is_invariant = True
    for name in ("driver_version", "_hash_of_sources"):  # the check runs again for another driver and for other code
        monkeypatch.setattr(invariance_check, name, lambda *_: "another")
        assert passes("backend True")
        assert runs
    monkeypatch.setattr(A_GPU, "multi_processor_count", 4)  # as of a part of this GPU
    assert passes("backend True")
    assert runs
    assert passes("backend True", "another library")
    assert runs
    for other in ({"b_stride": 128}, {"bias": True}, {"tf32": True}, {"b_transposed": False}, {"dtype": torch.float64}):
        assert str(make_problem(n=8, **other)) != str(make_problem(n=8))


def test_out_of_memory_is_not_cached(on_a_gpu, caplog):
    def gemm(a, b, bias, out):
        raise torch.cuda.OutOfMemoryError

    assert not invariance_check.passes("backend", "a library", (), gemm, make_problem(n=8))
    assert "not enough GPU memory to check whether backend is batch-invariant" in caplog.text
    assert invariance_check.passes("backend", "a library", (), row_by_row, make_problem(n=8))


def test_a_slow_check_is_logged(on_a_gpu, monkeypatch, caplog):
    monkeypatch.setattr(invariance_check, "_SECONDS_UNTIL_LOGGED", 0)
    caplog.set_level("INFO", logger="jitnorm")
    logged = threading.Event()
    caplog.handler.addFilter(lambda record: logged.set() or True)

    def gemm(a, b, bias, out):
        assert logged.wait(60)
        row_by_row(a, b, bias, out)

    assert invariance_check.passes("backend", "a library", (), gemm, make_problem(n=8))
    assert "checking that rows of float32 n=8 k=77 nt" in caplog.text and "with backend" in caplog.text


def test_a_result_that_was_changed_on_disk_is_ignored(on_a_gpu, cache_dir):
    arguments = "backend", "a library", (), splits_k_for_few_rows, make_problem(n=8)
    assert not invariance_check.passes(*arguments)
    (file,) = cache_dir.glob("*/*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"problem": "another"}))
    assert not list(invariance_check.cached_results())
    assert not invariance_check.passes(*arguments)


@pytest.mark.nvcc
def test_declarations_are_those_of_the_header(tmp_path):
    """A compiler compares the declarations in csrc with the header, which torch's wheels for CUDA bring."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = nvidia.submodule_search_locations if nvidia else []
    header = next((file for folder in folders for file in Path(folder).glob("**/cublasLt.h")), None)
    if not header:
        pytest.skip("no cublasLt.h")
    names = {
        "kRealFloat": "CUDA_R_32F",
        "kRealHalf": "CUDA_R_16F",
        "kRealBfloat16": "CUDA_R_16BF",
        "kComputeFloat": "CUBLAS_COMPUTE_32F",
        "kComputeTf32": "CUBLAS_COMPUTE_32F_FAST_TF32",
        "kTransposeA": "CUBLASLT_MATMUL_DESC_TRANSA",
        "kEpilogue": "CUBLASLT_MATMUL_DESC_EPILOGUE",
        "kBiasPointer": "CUBLASLT_MATMUL_DESC_BIAS_POINTER",
        "kMaxWorkspace": "CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES",
        "kAlignmentA": "CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES",
        "kAlignmentD": "CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES",
        "kSplitK": "CUBLASLT_ALGO_CONFIG_SPLITK_NUM",
        "kReductionScheme": "CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME",
        "kOpTranspose": "CUBLAS_OP_T",
        "kEpilogueBias": "CUBLASLT_EPILOGUE_BIAS",
        "sizeof(Algorithm)": "sizeof(cublasLtMatmulAlgo_t)",
        "sizeof(Heuristic)": "sizeof(cublasLtMatmulHeuristicResult_t)",
        "offsetof(Heuristic, workspace)": "offsetof(cublasLtMatmulHeuristicResult_t, workspaceSize)",
        "offsetof(Heuristic, state)": "offsetof(cublasLtMatmulHeuristicResult_t, state)",
    }
    equal = "".join(f"static_assert(int({ours}) == int({theirs}));\n" for ours, theirs in names.items())
    source = tmp_path / "declarations.cu"
    start = '#include <cstddef>\n#include <cublasLt.h>\n#include "gemm/cublaslt.h"\nusing namespace jitnorm::lt;\n'
    source.write_text(start + equal)
    include = [CSRC, CSRC / "include", tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()]
    words = [find_nvcc(), "-std=c++17", "-c", source, "-o", tmp_path / "out.o", *(f"-I{path}" for path in include)]
    done = subprocess.run([*words, f"-I{header.parent}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_bindings_refuse_other_arguments():
    module = load(LAUNCHER)
    a = torch.ones(2, 16)
    assert module.cublaslt_matmul(a, a.t(), None, torch.ones(2, 2), True, False, None) == 1  # not on CUDA
    assert module.cublaslt_matmul(1, 2) == 1
    assert module.cublaslt_open(ctypes.CDLL(None)._handle) == 0  # no such functions


def test_no_library_is_no_error(monkeypatch):
    monkeypatch.setattr(cublaslt, "library_path", lambda: None)
    cublaslt._open.cache_clear()
    assert cublaslt.library_version() == 0
    cublaslt._open.cache_clear()


gpu = pytest.mark.gpu


def triton_gemm(problem, fixed_tile=False):
    return triton_module("matmul.triton_kernels").gemm(problem, fixed_tile)


# Each backend, whether or not the invariance check passes for it.
BACKENDS = {
    "cublaslt": cublaslt.gemm,
    "cublaslt, 1 KiB": functools.partial(cublaslt.gemm, workspace_bytes=1024),
    "triton": triton_gemm,
    "triton, fixed tile": functools.partial(triton_gemm, fixed_tile=True),
}


@gpu
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
# Every epilogue and layout of b
@pytest.mark.parametrize(("transposed", "bias"), [(True, False), (True, True), (False, False)])
# A layer; ragged tiles; rows that TMA does not support; one column
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (264, 136), (77, 33), (1, 64)])
def test_every_backend_on_the_gpu(backend, dtype, transposed, bias, n, k):
    """Every backend computes the GEMM, and the last resort, the fixed tile, passes the invariance check."""
    device = torch.device("cuda", 0)
    problem = Problem(device, n, k, dtype, dtype, transposed, k if transposed else n, bias, False)
    if backend.startswith("cublaslt") and not cublaslt.library_version():
        pytest.skip("no cuBLASLt")
    gemm = BACKENDS[backend](problem)
    for m in (1, 17, 300):
        a = torch.randn(m, k, device=device).to(dtype)
        stored = torch.randn(*((n, k) if transposed else (k, n)), device=device).to(dtype)
        b, c = stored.t() if transposed else stored, torch.randn(n, device=device).to(dtype) if bias else None
        out = torch.full((m, n), float("nan"), device=device, dtype=dtype)
        try:
            gemm(a, b, c, out)
        except UnsupportedProblem:
            pytest.skip("cuBLASLt has no kernel for it")
        exact = a.double() @ b.double() + (c.double() if bias else 0)
        # The larger of the norm of this result and the norm that such results have on average: the terms of
        # a single number may nearly cancel, and a number that came out large is rounded to fewer places.
        norm = max(float(exact.norm()), math.sqrt(m * n * k))
        assert (out.double() - exact).norm() <= TOLERANCE[dtype] * norm
    if backend == "triton, fixed tile" and transposed and not bias:
        assert invariance_check.find_first_difference(gemm, problem) == ""


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "k"), [(4096, 14336), (6144, 4096), (77, 33)])
def test_the_selected_backend_passes(dtype, bias, n, k):
    problem = Problem(torch.device("cuda", 0), n, k, dtype, dtype, True, k, bias, False)
    assert invariance_check.find_first_difference(cuda.select_gemm(problem), problem) == ""


@gpu
def test_backends_are_selected_outside_of_captures(cache_dir, monkeypatch):
    monkeypatch.setattr(cuda, "_gemms", {})
    a, b = torch.randn(8, 264, device="cuda").bfloat16(), torch.randn(264, 136, device="cuda").bfloat16()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="run the model once in the mode before capturing"), torch.cuda.graph(graph):
        matmul_persistent(a, b)
    torch.cuda.synchronize()
    expected = matmul_persistent(a, b)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = matmul_persistent(a, b)
    out.fill_(float("nan"))
    graph.replay()
    assert same_bits(out, expected)


@gpu
def test_tf32_only_if_the_user_allows_it():
    a, b = torch.randn(64, 512, device="cuda"), torch.randn(512, 128, device="cuda")
    exact = a.double() @ b.double()
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert relative_error(matmul_persistent(a, b), exact) < 2e-6
        torch.set_float32_matmul_precision("high")
        assert 1e-5 < relative_error(matmul_persistent(a, b), exact) < 2e-3
    finally:
        torch.set_float32_matmul_precision(before)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_a_device_that_is_not_current():
    torch.cuda.set_device(0)
    a, b = torch.randn(5, 64, device="cuda:1"), torch.randn(64, 32, device="cuda:1")
    assert relative_error(matmul_persistent(a, b), a.double() @ b.double()) < 2e-6
    assert torch.cuda.current_device() == 0
