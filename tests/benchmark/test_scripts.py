"""Test the files in benchmarks/: each has the command line, and runs on the CPU as far as it can."""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

import pytest
from processes import run_before_import, start_method_with_torch

from jitnorm.benchmark import marker
from jitnorm.benchmark.runner import Axis

FOLDER = Path(__file__).parents[2] / "benchmarks"
FILES = sorted(file.stem for file in FOLDER.glob("bench_*.py"))
# The implementations that run anywhere. torch.compile takes too long for a test.
RUNS = {
    "bench_activation": ["jitnorm", "torch"],
    "bench_decode_attention": ["torch"],
    "bench_dual_rmsnorm": ["jitnorm", "separate", "torch"],
    "bench_few_rows": ["torch"],
    "bench_first_call": ["jitnorm"],
    "bench_fused_add_rmsnorm": ["jitnorm", "torch", "liger"],
    "bench_gated_linear": ["torch+silu_and_mul"],
    "bench_gated_rmsnorm": ["jitnorm", "torch"],
    "bench_general_rmsnorm": ["jitnorm", "torch"],
    "bench_host_overhead": ["jitnorm", "torch", "define+impl", "custom_op", "empty_like"],
    "bench_layernorm": ["jitnorm", "torch"],
    "bench_llama_layer": ["jitnorm", "torch"],
    "bench_matmul": ["jitnorm", "torch", "triton"],
    "bench_qknorm": ["jitnorm", "torch"],
    "bench_qknorm_rope_store": ["jitnorm", "separate"],
    "bench_quant_fp8": ["jitnorm", "torch"],
    "bench_rmsnorm": ["jitnorm", "torch", "liger"],
    "bench_row_reductions": ["jitnorm", "torch"],
    "bench_rmsnorm_cpu": ["jitnorm", "allocated", "torch"],
    "bench_store_cache": ["jitnorm", "torch"],
    "bench_transformers": ["jitnorm", "fused_projections", "transformers", "liger"],
}
# Smaller constants than the benchmark's, whose sizes take minutes on a CPU.
CONSTANTS = {
    "bench_first_call": {"SAMPLES": 1},
    "bench_host_overhead": {"CPU_CALLS": 100},
    "bench_llama_layer": {
        **{"HIDDEN": 64, "HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 16, "INTERMEDIATE": 128, "WIDTHS": (64, 32, 32)},
        "SIZES": [(128, 64), (64, 64), (256, 64), (64, 128)],
    },
    "bench_transformers": {
        **{"HIDDEN": 128, "INTERMEDIATE": 96, "HEADS": 2, "KV_HEADS": 1, "HEAD_DIM": 64, "CACHED": 5},
    },
}
# A row instead of the short lists.
ROWS = {
    "bench_llama_layer": {"batch": 2, "length": 1, "cached": 16},
    "bench_transformers": {"mode": "eager", "layers": 2, "batch": 3, "length": 1},
    "bench_matmul": {"n": 128, "k": 64, "num_tokens": 4},
}


@pytest.fixture
def bench(request, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module(request.param).bench


@pytest.fixture
def small_bench(bench, monkeypatch):
    name = f"bench_{bench.name}"
    for constant, value in CONSTANTS.get(name, {}).items():
        monkeypatch.setattr(sys.modules[name], constant, value)
    if row := ROWS.get(name):
        monkeypatch.setattr(bench, "axes", [Axis.of(axis, [value], None) for axis, value in row.items()])
    return bench


def test_every_file_is_here():
    assert {*RUNS, "bench_build", "bench_warmup"} == {*FILES}


@pytest.mark.parametrize("bench", FILES, indirect=True)
def test_has_rows(bench):
    short, full = bench.points(full=False), bench.points(full=True)
    assert 1 <= len(short) <= 2 and len(full) >= len(short) and all(point in full for point in short)
    assert isinstance(bench, marker.Benchmark) and bench.__doc__


@pytest.mark.slow
@pytest.mark.parametrize(("bench", "impl"), RUNS.items(), indirect=["bench"], ids=RUNS)
def test_runs_on_the_cpu(small_bench, bench, impl, capsys):
    report = small_bench.run(full=False, impl=impl, device="cpu", cold=False, seconds=0.0)
    said = capsys.readouterr().out
    assert not report.failed, said
    results = [result for row in report.rows for result in row.results().values()]
    assert len(results) >= (len(impl) - ("liger" in impl) - ("triton" in impl)) * len(report.rows), said
    if bench.name not in ("first_call", "host_overhead"):
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


@pytest.fixture
def builds(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import peers

    made = []

    def create(first_calls, names, seconds):
        monkeypatch.setenv("JITNORM_BENCH_BUILD_SECONDS", seconds)
        made.append(peers.Builds(first_calls, names))
        made[-1].start_method = start_method_with_torch()
        return made[-1]

    yield create
    for one in made:
        one.kill()


@pytest.mark.slow
def test_builds_are_waited_for(builds):
    """The outcome of each peer is its own, and a peer that is not in the list is not built."""
    import first_calls

    found = builds(first_calls.end_as_named, ["good", "bad", "dead"], "300")
    assert found.wait("jitnorm") is None and not found._processes
    assert found.wait("good") is None
    assert found.wait("bad") == "bad cannot be built here: ValueError: no compiler for bad"
    assert found.wait("dead") == "dead cannot be built here: its process ended with status 3"
    assert found.wait("bad") == "bad cannot be built here: ValueError: no compiler for bad"


def test_a_build_that_takes_too_long_is_killed(builds):
    import first_calls

    found = builds(first_calls.never_end, ["slow"], "0")
    assert found.wait("slow") == "slow was not built within 0 s (JITNORM_BENCH_BUILD_SECONDS)"
    assert not found._processes["slow"][0].is_alive()


def test_the_compilers_of_a_build_are_killed_with_it(builds, tmp_path):
    import first_calls

    file = str(tmp_path / "pid")
    found = builds(first_calls.start_a_compiler, [file], "300")
    found._start()
    _wait_until(Path(file).exists)
    pid = int(Path(file).read_text())
    assert _is_running(pid)
    found.kill()
    _wait_until(lambda: not _is_running(pid))


def _wait_until(condition) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_qknorm_is_short():
    lines = [line for line in (FOLDER / "bench_qknorm.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 40


def test_lists_its_rows_as_a_script():
    words = [str(FOLDER / "bench_qknorm.py"), "--list", "--short"]
    script = "sys.path[0] = os.path.dirname(sys.argv[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
    done = run_before_import(f"import os, runpy, sys; sys.argv[:] = {words}", script)
    assert done.stdout == "head_dim=128 num_q_heads=32 num_kv_heads=8 num_tokens=64\n", done


def test_ratios(tmp_path, monkeypatch, capsys):
    """Print both formats for a file whose ratios are known."""
    monkeypatch.syspath_prepend(str(FOLDER))
    ratios = importlib.import_module("ratios")

    @marker.parametrize("n", [1, 2])
    @marker.benchmark("impl", ["jitnorm", "torch"])
    def bench(n, impl):
        return marker.BenchResult.of([[n * (2e-6 if impl == "torch" else 1e-6 * n)]])

    file = tmp_path / "a.json"
    bench.run(device="cpu").write(file)
    capsys.readouterr()

    def said(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["ratios.py", str(file), *words])
        ratios.main()
        return capsys.readouterr().out

    found = json.loads(said("torch", "--format", "json"))
    assert found["columns"] == ratios.COLUMNS and found["rows"] == [
        ["jitnorm", pytest.approx(2**0.5), 2, pytest.approx(1.0), "n=2"]
    ]
    assert json.loads(said("best", "--format", "json"))["rows"] == found["rows"]
    assert said("jitnorm").splitlines()[-1].split() == ["torch", "0.7071", "2", "0.5", "n=1"]
    for words, error in (
        ((str(tmp_path / "none.json"), "torch"), "No such file"),
        ((str(file), "none"), "must be best"),
    ):
        monkeypatch.setattr(sys, "argv", ["ratios.py", *words])
        with pytest.raises(SystemExit, match="2"):
            ratios.main()
        assert error in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(file.name for file in FOLDER.glob("tune_*.py")))
def test_tuning_scripts_compile(file):
    """Compile the scripts, which only run on a GPU."""
    compile((FOLDER / file).read_text(), file, "exec")
