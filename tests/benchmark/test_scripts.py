"""Test the files in benchmarks/: each has the command line, and runs on the CPU as far as it can."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from jitnorm.benchmark import marker

FOLDER = Path(__file__).parents[2] / "benchmarks"
FILES = sorted(file.stem for file in FOLDER.glob("bench_*.py"))
# What runs anywhere, and small. torch.compile takes too long for a test.
RUNS = {
    "bench_activation": ["jitnorm", "torch"],
    "bench_fused_add_rmsnorm": ["jitnorm", "torch", "liger"],
    "bench_host_overhead": ["jitnorm", "torch", "define+impl", "custom_op", "empty_like"],
    "bench_llama_layer": ["jitnorm", "torch"],
    "bench_matmul": ["jitnorm", "torch", "triton"],
    "bench_qknorm": ["jitnorm", "torch"],
    "bench_quant_fp8": ["jitnorm", "torch"],
    "bench_rmsnorm": ["jitnorm", "torch", "liger"],
    "bench_row_reductions": ["jitnorm", "torch"],
    "bench_rmsnorm_cpu": ["jitnorm", "allocated", "torch"],
    "bench_store_cache": ["jitnorm", "torch"],
}


@pytest.fixture
def bench(request, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(request.param).bench


def test_every_file_is_here():
    assert {*RUNS, "bench_build"} == {*FILES}


@pytest.mark.parametrize("bench", FILES, indirect=True)
def test_has_rows(bench):
    short, full = bench.points(full=False), bench.points(full=True)
    assert 1 <= len(short) <= 2 and len(full) >= len(short) and all(point in full for point in short)
    assert isinstance(bench, marker.Benchmark) and bench.__doc__


@pytest.mark.parametrize(("bench", "impl"), RUNS.items(), indirect=["bench"], ids=RUNS)
def test_runs_on_the_cpu(bench, impl, capsys):
    report = bench.run(full=False, impl=impl, device="cpu", cold=False, seconds=0.0)
    said = capsys.readouterr().out
    assert not report.failed, said
    results = [result for row in report.rows for result in row.results().values()]
    assert len(results) >= (len(impl) - ("liger" in impl) - ("triton" in impl)) * len(report.rows), said
    if bench.name != "host_overhead":
        assert all(result.error is not None for result in results), "each is checked"
    if "liger" in impl:
        assert "N/A liger: " in said or "liger" in said.split("\n\n")[0]


def test_an_operator_that_is_not_there_is_not_available(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    import peers

    @marker.benchmark("impl", ["jitnorm", "fi_cuda", "torch"])
    def bench(impl):
        return peers.find("no_such_operator", impl)

    assert not bench.run(device="cpu").failed
    said = capsys.readouterr().out
    assert "N/A jitnorm: jitnorm has no no_such_operator here: AttributeError" in said
    assert "N/A torch: torch has no no_such_operator here: KeyError" in said


def test_a_peer_that_is_not_installed_has_no_column(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    import peers

    monkeypatch.setitem(peers._PEERS, "peer", lambda op: importlib.import_module("no_such_peer"))

    @marker.parametrize("op", ["silu_and_mul", "gelu_and_mul"])
    @marker.benchmark("impl", ["here", "peer"])
    def bench(op, impl):
        return peers.find(op, impl) if impl == "peer" else marker.BenchResult((0.5,), (2e-6,), 0)

    bench.run(device="cpu")
    head, said = capsys.readouterr().out.split("\n\n")
    assert "peer" not in head and said.splitlines()[0] == "N/A peer: No module named 'no_such_peer'"


def test_qknorm_is_short():
    lines = [line for line in (FOLDER / "bench_qknorm.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 40


def test_lists_its_rows_as_a_script():
    words = [sys.executable, str(FOLDER / "bench_qknorm.py"), "--list", "--short"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.stdout == "head_dim=128 num_q_heads=32 num_kv_heads=8 num_tokens=64\n", done
