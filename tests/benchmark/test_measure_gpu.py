"""Test times on a GPU: against an independent harness, against a second run, against a slower kernel.

Under a minute in all.
"""

from __future__ import annotations

import statistics

import pytest
import torch
from click.testing import CliRunner

import jitnorm
from jitnorm.benchmark import marker
from jitnorm.benchmark.call import Call
from jitnorm.benchmark.compare import Verdict, compare
from jitnorm.benchmark.measure import CUDAGraphTimer, working_set
from jitnorm.benchmark.settings import override_settings
from jitnorm.cli import main

pytestmark = pytest.mark.gpu

# (hidden size, rows): 1 to 150 us on an H200.
SHAPES = [
    *((1024, 64), (128, 4096), (4096, 1), (4096, 64), (4096, 256)),
    *((4096, 1024), (8192, 1024), (4096, 4096), (2048, 65536), (4096, 32768)),
]


def rms_norm(x, weight, out):
    jitnorm.rmsnorm(x, weight, 1e-6, out)


def framework_seconds(hidden_size: int, num_tokens: int) -> float:
    x, weight = marker.create_random(num_tokens, hidden_size), marker.create_random(hidden_size)
    out = torch.empty_like(x)
    with override_settings(seconds=0.0):
        result = marker.do_bench(rms_norm, input_args=(x, weight, out), memory_args=(x, weight), memory_output=(out,))
    assert not any("not cold" in note for note in result.notes)
    return result.seconds


def independent_seconds(hidden_size: int, num_tokens: int) -> float:
    """Time a graph of calls on rotating buffers of more than three times the L2 cache, between two events."""
    each = (2 * num_tokens + 1) * hidden_size * 2
    buffers = 3 * torch.cuda.get_device_properties(0).L2_cache_size // each + 2
    x = torch.randn(buffers, num_tokens, hidden_size, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(buffers, hidden_size, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(x)
    calls = buffers * max(1, round(2e-3 / max(1e-6, each / 4e12) / buffers))  # for some 2 ms
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        rms_norm(x[0], weight[0], out[0])
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(calls):
                rms_norm(x[i % buffers], weight[i % buffers], out[i % buffers])
        times = []
        for _ in range(12):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / calls / 1e3)
    return statistics.median(times[2:])


def test_agrees_with_an_independent_harness():
    rows = []
    for shape in SHAPES:
        before, ours, after = independent_seconds(*shape), framework_seconds(*shape), independent_seconds(*shape)
        rows.append((shape, ours * 1e6, ours / statistics.mean([before, after]) - 1))
    for shape, us, difference in rows:
        print(f"{shape[0]:>6} x {shape[1]:>6}: {us:8.3f} us, {difference:+.2%}")
    assert all(abs(difference) <= 0.03 for _, _, difference in rows), rows


@marker.parametrize("hidden_size,num_tokens", [(128, 4096), (4096, 64), (4096, 1024), (4096, 32768)])
@marker.benchmark("impl", ["jitnorm", "torch"])
def bench(hidden_size, num_tokens, impl):
    x, weight = marker.create_random(num_tokens, hidden_size), marker.create_random(hidden_size)
    call = rms_norm if impl == "jitnorm" else lambda x, w, out: torch.nn.functional.rms_norm(x, (hidden_size,), w, 1e-6)
    out = torch.empty_like(x)
    return marker.do_bench(call, input_args=(x, weight, out), memory_args=(x, weight), memory_output=(out,))


def test_two_runs_are_the_same(tmp_path):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    reports = [bench.run(copy=True) for _ in files]
    for file, report in zip(files, reports, strict=True):
        assert not report.failed
        report.write(file)
    said = CliRunner().invoke(main, ["bench", "compare", *map(str, files)])
    print(said.output)
    assert said.exit_code == 0
    found = [c for c in compare(*reports) if c.line == "jitnorm"]
    assert len(found) == 4 and all(c.verdict == Verdict.SAME and abs(c.difference) <= 0.02 for c in found), said.output


def slowed(rows: dict[int, int]) -> marker.Benchmark:
    """Return a benchmark that measures the norm of `rows[num_tokens]` rows as that of `num_tokens`."""

    @marker.parametrize("num_tokens", list(rows))
    @marker.benchmark("impl", ["jitnorm"])
    def slowed(num_tokens, impl):
        x, weight = marker.create_random(rows[num_tokens], 4096), marker.create_random(4096)
        return marker.do_bench(rms_norm, input_args=(x, weight, torch.empty_like(x)), memory_args=(x, weight))

    return slowed


def test_a_kernel_made_5_percent_slower_is_slower():
    """Expect 5% more time for 5% more rows, of a kernel that is limited by memory bandwidth."""
    tokens = (8192, 32768)
    honest = slowed({n: n for n in tokens}).run()
    slower = slowed({n: n * 105 // 100 for n in tokens}).run()
    found = compare(honest, slower)
    assert [c.verdict for c in found] == [Verdict.SLOWER] * 2, found
    assert all(0.03 < c.difference < 0.07 for c in found), found
    assert {c.verdict for c in compare(slower, honest)} == {Verdict.FASTER}


def test_every_copy_is_in_the_graph_and_the_results_rotate_too():
    x, used, outs = torch.randn(1 << 20, device="cuda"), [], []

    def fn(x):
        result = x + 1
        used.append(x.data_ptr())
        outs.append(result.data_ptr())
        return result

    marker.do_bench(fn, input_args=(x,), replay_iters=2)
    needed = working_set(x.device) // (4 << 20)
    assert len({*used} - {x.data_ptr()}) > needed and len({*outs}) > needed


def test_small_calls_fill_a_graph_with_whole_passes():
    x = torch.randn(256, device="cuda")
    calls = [Call(torch.Tensor.add_, (x, i)) for i in range(7)]
    timer = CUDAGraphTimer(calls, torch.cuda.Stream(), 1)
    assert timer.calls_per_replay % 7 == 0 and timer.calls_per_replay > 7
    (seconds,) = timer.samples(1)
    assert 0.5e-3 < seconds * timer.calls_per_replay < 20e-3


def test_cold_is_slower_than_warm():
    """Measure a copy of 4 MB, which stays in the L2 cache where it may."""
    x = torch.randn(1 << 20, device="cuda")
    calls = {"input_args": (x, torch.empty_like(x)), "memory_output": None}
    cold, warm = (marker.do_bench(lambda x, out: out.copy_(x), cold=cold, **calls).seconds for cold in (True, False))
    assert cold > 1.1 * warm


def test_waits_for_the_stream_of_the_caller():
    x, out = torch.zeros(1 << 20, device="cuda"), torch.zeros(1 << 20, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    torch.cuda._sleep(200_000_000)  # about 0.1 s, after which x is filled
    x.fill_(2)
    seen = []

    def fn(x, out):
        assert torch.cuda.current_stream() == stream
        out.copy_(x)
        if not torch.cuda.is_current_stream_capturing():
            seen.append(out.sum())

    marker.do_bench(
        fn,
        input_args=(x, out),
        stream=stream,
        graph_clone_args=None,
        memory_output=None,
        replay_iters=1,
        disable_log_bandwidth=True,
    )
    assert [float(s) for s in seen] == [2 * (1 << 20)] * 3


def test_what_cannot_be_captured():
    """Expect a little more time for single launches: the overwritten cache is written back meanwhile."""
    x = torch.randn(1 << 26, device="cuda")
    captured = marker.do_bench(torch.neg, input_args=(x,))
    launched = marker.do_bench(torch.neg, input_args=(x,), use_cuda_graph=False)
    assert 0.95 < launched.seconds / captured.seconds < 1.4
    synced = marker.do_bench(lambda x: x.sum().item(), input_args=(x,), use_cuda_graph=False)
    assert synced.seconds > 0


def test_a_capture_that_fails_stays_in_its_cell():
    @marker.benchmark("impl", ["good", "syncs", "good too"])
    def bench(impl):
        x = marker.create_random(1 << 16)
        return marker.do_bench(lambda x: x.cpu() if impl == "syncs" else x + 1, input_args=(x,))

    report = bench.run(copy=True)
    assert report.failed and [*report.rows[0].results()] == ["copy", "good", "good too"]


def test_the_machine_is_described():
    report = bench.run(filters=["hidden_size=128"], impl=["jitnorm"])
    machine = report.machine
    assert machine["gpu"] == torch.cuda.get_device_name() and machine["torch"] == torch.__version__
    if machine["clocks"]:
        assert machine["clocks"]["sm_max_mhz"] >= machine["clocks"]["sm_mhz"] > 0
