"""Which road a product takes on CUDA, and how a road is proven; as far as no GPU is needed, without one."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import json
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tvm_ffi
from helpers import DTYPES, relative_error, same_bits

from jitnorm.batch_invariant import cublaslt, cuda_matmul, matmul_persistent, proof
from jitnorm.batch_invariant.cuda_matmul import Problem
from jitnorm.jit.load import load
from jitnorm.jit.spec import CSRC
from jitnorm.jit.toolchain import find_nvcc


def problem(n=48, k=77, dtype=torch.float32, **other):
    fields = {"out_dtype": dtype, "b_transposed": True, "b_stride": k, "bias": False, "tf32": False, **other}
    return Problem(device=torch.device("cpu"), n=n, k=k, dtype=dtype, **fields)


A_GPU = SimpleNamespace(name="a GPU", multi_processor_count=8)


def row_by_row(a, b, bias, out):
    for i in range(a.shape[0]):
        torch.mm(a[i : i + 1], b, out=out[i : i + 1])
    if bias is not None:
        out += bias


def splits_k_for_few_rows(a, b, bias, out):
    """As a library does that has more processors than tiles."""
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
    monkeypatch.setattr(proof, "BATCHES", (1, 2, 16, 17, 40))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k", [78, 77])
def test_a_road_that_keeps_the_promise(few_batches, dtype, bias, k):
    assert proof.first_difference(row_by_row, problem(k=k, dtype=dtype, bias=bias)) == ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("road", "where"),
    [
        (splits_k_for_few_rows, "in a batch of 17"),
        (adds_backwards_at_odd_places, "in a batch of 2"),
        (lambda a, b, bias, out: None, "not finite"),
    ],
)
def test_a_road_that_does_not(few_batches, road, where, dtype):
    assert proof.first_difference(road, problem(dtype=dtype)).endswith(where)


@pytest.mark.parametrize("k", [512, 513])
def test_operands_that_cancel_show_every_order(k):
    """Rounded to bfloat16, where the sums of random operands would hide most of the difference."""
    a, b = proof.cancelling_operands(7, 64, k, torch.bfloat16, torch.device("cpu"))
    assert (a.double() @ b.double() == (0 if k == 512 else 2**-22)).all()
    out, other = torch.empty(7, 64), torch.empty(7, 64)
    row_by_row(a.float(), b.float(), None, out)
    row_by_row(a.float().flip(1), b.float().flip(0), None, other)
    assert (out.bfloat16() != other.bfloat16()).float().mean() > 0.9


def test_proofs_are_kept(cache_dir, monkeypatch, few_batches):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: A_GPU)
    runs = []

    def road(a, b, bias, out):
        runs.append(a.shape[0])
        (row_by_row if good else splits_k_for_few_rows)(a, b, bias, out)

    def holds(name):
        runs.clear()
        return proof.holds(name, "a library", (), road, problem(n=8))

    for good in (True, False):
        assert holds(f"road {good}") is good
        assert runs
        assert holds(f"road {good}") is good  # from disk
        assert not runs
    kept = {p.road: p for p in proof.known_proofs()}
    assert kept["road True"].holds and not kept["road True"].first
    assert "in a batch of 17" in kept["road False"].first
    good = True
    for name in ("driver_version", "_hash_of"):  # another driver, or other code, is another question
        monkeypatch.setattr(proof, name, lambda *_: "another")
        assert holds("road True")
        assert runs
    monkeypatch.setattr(A_GPU, "multi_processor_count", 4)  # as is a part of this GPU
    assert holds("road True")
    assert runs
    runs.clear()
    assert proof.holds("road True", "another library", (), road, problem(n=8))
    assert runs
    for other in ({"b_stride": 128}, {"bias": True}, {"tf32": True}, {"b_transposed": False}, {"dtype": torch.float64}):
        assert str(problem(n=8, **other)) != str(problem(n=8))


def test_no_memory_is_no_proof(cache_dir, monkeypatch, few_batches, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: A_GPU)

    def road(a, b, bias, out):
        raise torch.cuda.OutOfMemoryError

    assert not proof.holds("road", "a library", (), road, problem(n=8))
    assert "no memory to find out whether road keeps the promise" in caplog.text
    assert proof.holds("road", "a library", (), row_by_row, problem(n=8))


def test_a_proof_that_was_changed_is_none(cache_dir, monkeypatch, few_batches):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: A_GPU)
    question = "road", "a library", (), splits_k_for_few_rows, problem(n=8)
    assert not proof.holds(*question)
    (file,) = (cache_dir / "proofs").glob("*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"problem": "another"}))
    assert not list(proof.known_proofs())
    assert not proof.holds(*question)


@pytest.mark.nvcc
def test_declarations_are_those_of_the_header(tmp_path):
    """As a compiler sees them; in torch's wheels for CUDA the header is there."""
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
    start = '#include <cstddef>\n#include <cublasLt.h>\n#include "gemm/cublaslt_cpu.h"\nusing namespace jitnorm::lt;\n'
    source.write_text(start + equal)
    include = [CSRC, CSRC / "include", tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()]
    words = [find_nvcc(), "-std=c++17", "-c", source, "-o", tmp_path / "out.o", *(f"-I{path}" for path in include)]
    done = subprocess.run([*words, f"-I{header.parent}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_operator_refuses_what_is_not_its_own():
    module = load(cublaslt.SPEC)
    a = torch.ones(2, 16)
    assert module.cublaslt_matmul(a, a.t(), None, torch.ones(2, 2), True, False, None) == 1  # not on CUDA
    assert module.cublaslt_matmul(1, 2) == 1
    assert module.cublaslt_open(ctypes.CDLL(None)._handle) == 0  # no such functions


def test_no_library_is_no_error(monkeypatch):
    monkeypatch.setattr(cublaslt, "library_path", lambda: None)
    cublaslt._opened.cache_clear()
    assert cublaslt.library_version() == 0
    cublaslt._opened.cache_clear()


gpu = pytest.mark.gpu
# Half a unit in the last place: a result may be a single number. float32 has sums that nearly cancel.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-5}


def triton_with(fixed, problem):
    return functools.partial(cuda_matmul.triton_module("triton_matmul").run, problem, fixed)


# Each road for itself, whatever the proof says.
ROADS = {
    "cublaslt": cublaslt.road,
    "cublaslt, 1 KiB": functools.partial(cublaslt.road, workspace=1024),
    "triton": functools.partial(triton_with, False),
    "triton, one tile": functools.partial(triton_with, True),
}


@gpu
@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("transposed", "bias"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (264, 136), (77, 33), (1, 64)])
def test_every_road_on_the_gpu(road, dtype, transposed, bias, n, k):
    """Right, that is: whether it keeps the promise is for the proof to say, but the last resort must."""
    device = torch.device("cuda", 0)
    subject = Problem(device, n, k, dtype, dtype, transposed, k if transposed else n, bias, False)
    if road.startswith("cublaslt") and not cublaslt.library_version():
        pytest.skip("no cuBLASLt")
    run = ROADS[road](subject)
    for m in (1, 17, 300):
        a = torch.randn(m, k, device=device).to(dtype)
        stored = torch.randn(*((n, k) if transposed else (k, n)), device=device).to(dtype)
        b, c = stored.t() if transposed else stored, torch.randn(n, device=device).to(dtype) if bias else None
        out = torch.full((m, n), float("nan"), device=device, dtype=dtype)
        try:
            run(a, b, c, out)
        except cublaslt.Refused:
            pytest.skip("cuBLASLt has no kernel for it")
        exact = a.double() @ b.double() + (c.double() if bias else 0)
        # The larger of the norm of this product and the norm that such products have on average: the terms of
        # a single number may nearly cancel, and a number that came out large is rounded to fewer places.
        norm = max(float(exact.norm()), math.sqrt(m * n * k))
        assert (out.double() - exact).norm() <= TOLERANCE[dtype] * norm
    if road == "triton, one tile" and transposed and not bias:
        assert proof.first_difference(run, subject) == ""


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("n", "k"), [(4096, 14336), (6144, 4096), (77, 33)])
def test_the_road_that_is_chosen_keeps_the_promise(dtype, bias, n, k):
    subject = Problem(torch.device("cuda", 0), n, k, dtype, dtype, True, k, bias, False)
    assert proof.first_difference(cuda_matmul.road_of(subject), subject) == ""


@gpu
def test_the_road_is_found_outside_of_a_graph(cache_dir, monkeypatch):
    monkeypatch.setattr(cuda_matmul, "_roads", {})
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
def test_tf32_only_where_the_user_allows_it():
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
