"""Test do_bench on the CPU: what it copies, counts and checks."""

from __future__ import annotations

import math

import pytest
import torch

from jitnorm.benchmark import marker, measure
from jitnorm.benchmark.call import Call, rotating_copies
from jitnorm.benchmark.results import NOISE_TARGET, run_until_stable
from jitnorm.benchmark.settings import override_settings


@pytest.fixture(autouse=True)
def one_short_run():
    with override_settings(seconds=0.0, device=torch.device("cpu")):
        yield


@pytest.fixture
def small_cache(monkeypatch):
    """Set the size of the last-level cache to 4 KiB, which few copies exceed three times."""
    monkeypatch.setattr(
        measure.os, "sysconf", lambda name, real=measure.os.sysconf: 4096 if "CACHE" in name else real(name)
    )


def bench(fn, *args, **options):
    return marker.do_bench(fn, input_args=args, replay_iters=2, **options)


# What is copied


def test_every_copy_is_used_and_together_they_exceed_the_cache(small_cache):
    x, out = torch.randn(64), torch.zeros(64)
    used = []

    def fn(x, out):
        used.append((x.data_ptr(), out.data_ptr()))
        return out.copy_(x)

    result = bench(fn, x, out, memory_args=(x,), memory_output=(out,))
    inputs, outs = {i for i, _ in used}, {o for _, o in used}
    assert len(inputs) == len(outs) == 3 * 4096 // 512 + 1 and x.data_ptr() not in inputs
    assert used[: len(inputs)] == used[len(inputs) : 2 * len(inputs)], "in the same order again"
    assert not out.any(), "the caller's is not written"
    assert result.notes == ()


def test_tensors_that_are_not_read_or_written_do_not_count_as_working_set(small_cache):
    used, big, x = set(), torch.zeros(1 << 16), torch.randn(64)
    bench(lambda big, x: used.add(x.data_ptr()), big, x, memory_args=(x,), memory_output=None)
    assert len(used) == 3 * 4096 // 256 + 1


def test_warm(small_cache):
    used = set()
    bench(lambda x: used.add(x.data_ptr()), torch.randn(64), memory_output=None, cold=False)
    assert len(used) == 1
    with override_settings(cold=False):
        bench(lambda x: used.add(x.data_ptr()), torch.randn(64), memory_output=None)
    assert len(used) <= 2


def test_chosen_arguments_are_copied():
    x, y, z = (torch.randn(64) for _ in range(3))
    seen = []

    def fn(x, y, *, z):
        seen.append((x.data_ptr(), y.data_ptr(), z.data_ptr()))

    marker.do_bench(
        fn, input_args=(x, y), input_kwargs={"z": z}, graph_clone_args=(1,), graph_clone_kwargs=None, cold=False
    )
    assert {s[0] for s in seen[-1:]} == {x.data_ptr()} and seen[-1][1] != y.data_ptr() and seen[-1][2] == z.data_ptr()
    with pytest.raises(ValueError, match="no tensor among the arguments at 2"):
        bench(fn, x, y, graph_clone_args=(2,))
    with pytest.raises(ValueError, match="'w'"):
        bench(fn, x, y, graph_clone_kwargs=("w",))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"fn": 1}, TypeError, "fn must be a function, got int"),
        ({"input_args": torch.zeros(3)}, TypeError, "input_args must be a tuple, got Tensor"),
        ({"memory_args": "ale"}, ValueError, "memory_args must be 'all' or tensors, got 'ale'"),
        ({"memory_output": "all"}, ValueError, "memory_output must be 'out' or tensors, got 'all'"),
        ({"memory_args": torch.zeros(3)}, TypeError, "memory_args must be 'all' or a tuple of tensors, got Tensor"),
        ({"graph_clone_args": "ale"}, ValueError, "graph_clone_args must be 'all' or positions, got 'ale'"),
        ({"graph_clone_kwargs": "x"}, ValueError, "graph_clone_kwargs must be 'all' or names, got 'x'"),
        ({"graph_clone_args": 0}, TypeError, "graph_clone_args must be 'all' or a tuple of positions, got int"),
    ],
)
def test_arguments_of_other_types(options, error, words):
    with pytest.raises(error, match=words):
        marker.do_bench(**{"fn": torch.clone, "input_args": [torch.zeros(3)], **options})


def test_too_few_copies_are_reported(small_cache, monkeypatch):
    monkeypatch.setitem(measure._MAX_COPIES, "cpu", 4)
    result = bench(torch.clone, torch.randn(64))
    assert result.notes == ("not cold: calls touch 0.0 MB until one repeats; more than 0 MB would be",)
    assert "not cold" in bench(lambda: None).notes[0], "the tensors of a closure are not copied"
    assert bench(torch.clone, torch.randn(1 << 14)).notes == ()


def test_copies_keep_strides_alignment_and_shared_memory():
    qkv = torch.randn(5, 96)
    q, k = qkv[:, :32], qkv[1:, 33:65]
    expanded = torch.randn(7, 1).expand(7, 3)
    calls = rotating_copies(Call(lambda *a: None, (q, k, qkv, expanded, 3)), [0, 1, 2, 3], 3)
    for call in calls:
        for copy, original in zip(call.args[:4], (q, k, qkv, expanded), strict=True):
            assert torch.equal(copy, original) and copy.stride() == original.stride()
        assert [t.data_ptr() % 64 for t in call.args[:3]] == [t.data_ptr() % 64 for t in (q, k, qkv)]
        call.args[0].zero_()
        assert not call.args[2][:, :32].any() and torch.equal(call.args[1], k), "q is a part of qkv, k another"
    assert qkv.all(), "the original is as it was"
    assert calls[0].args[4] == 3


@pytest.mark.parametrize("tensor", [torch.empty(0, 4), torch.tensor(3.0), torch.randn(3, 4).t()])
def test_copies_of_unusual_tensors(tensor):
    copy = rotating_copies(Call(id, (tensor,)), [0], 2)[1].args[0]
    assert torch.equal(copy, tensor) and copy.stride() == tensor.stride()


# What is counted

X, OUT = torch.randn(1000, dtype=torch.float64), torch.empty(1000, dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"fn": torch.clone}, 16000),  # what is read, and what is returned
        ({"fn": torch.clone, "memory_output": None}, 8000),
        ({"fn": torch.clone, "memory_args": None}, 8000),
        ({"fn": lambda x: None}, 8000),
        ({"fn": lambda x: x.neg_()}, 16000),  # returns its argument: read, and written
        ({"fn": lambda x: None, "memory_output": (X,)}, 16000),  # in place, and declared
        ({"fn": torch.neg, "input_kwargs": {"out": OUT}}, 16000),  # `out` is not read, and not counted twice
        ({"fn": torch.neg, "input_kwargs": {"out": OUT}, "memory_args": (X,), "memory_output": (OUT,)}, 16000),
        ({"fn": lambda x: (x + 1, x + 2)}, 24000),
        ({"fn": torch.clone, "extra_memory_args": (X, OUT), "extra_memory_footprint": 5}, 32005),
        ({"fn": lambda x: x[::2] * 1, "input_args": (X[:10],)}, 80 + 40),
        ({"fn": lambda x, y: None, "input_args": (X, X.view(10, 100))}, 8000),  # the same memory
        ({"fn": torch.clone, "disable_log_bandwidth": True}, 0),
    ],
)
def test_footprint(options, expected):
    fn = options.pop("fn")
    result = marker.do_bench(fn, **{"input_args": (X,), "cold": False, **options})
    assert result.memory_footprint == expected
    assert result.bandwidth == pytest.approx(expected / result.seconds)


# Statistics and metrics


def test_metrics():
    result = bench(torch.clone, X, metrics=("min", 0.25, 0.5, "avg", "max"), cold=False)
    samples = [s for one in result.rounds for s in one]
    assert result.metrics == ("min", 0.25, 0.5, "avg", "max") and list(result.times[:3]) == sorted(result.times[:3])
    assert result.times[0] == min(samples) and result.times[-1] == max(samples) and len(result.rounds) == 5
    assert result.measure_round is None
    for metric in (1.5, "p50"):
        with pytest.raises(ValueError, match="metric"):
            bench(torch.clone, X, metrics=(metric,))
    with pytest.raises(ValueError, match="replay_iters"):
        marker.do_bench(torch.clone, input_args=(X,), replay_iters=0)


def test_time_of_a_known_duration(monkeypatch):
    """Measure a function by a clock that only this function advances."""
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def takes_3_us():
        now[0] += 3e-6

    result = marker.do_bench(takes_3_us)
    assert result.seconds == pytest.approx(3e-6) and result.noise == pytest.approx(0, abs=1e-9)


def test_rounds_continue_until_stable_or_the_time_limit(monkeypatch):
    values = iter([1.0, 1.1, 0.9, 1.2, 0.8] + [1.0] * 1000)
    result = marker.BenchResult.of([[next(values)]], measure_round=lambda: ([next(values)], None))
    noisy = {"": result}
    run_until_stable(noisy, 60)
    assert noisy[""].noise <= NOISE_TARGET and 5 < len(noisy[""].rounds) < 1000
    over = {"": result}
    run_until_stable(over, 0)
    assert len(over[""].rounds) == 5


def test_a_result_needs_a_sample():
    with pytest.raises(ValueError, match="at least one sample"):
        marker.BenchResult.of([[]])
    assert marker.BenchResult((0.5,), (2.0,), 0).noise == math.inf


# Correctness


def test_check():
    x, w, out = torch.randn(33, 64), torch.randn(64), torch.empty(33, 64)
    error = bench(torch.mul, x, w, check=lambda x, w: x.double() * w.double()).error
    assert 0 < error < 1e-6
    into_out = {"memory_args": (x, w), "memory_output": (out,), "check": lambda x, w, out: x.double() * w.double()}
    assert bench(lambda x, w, out: [out.copy_(x * w)].clear(), x, w, out, **into_out).error == error
    with pytest.raises(ValueError, match=r"wrong result, relative error nan"):
        bench(lambda x, w, out: [out[:-1].copy_(x[:-1] * w)].clear(), x, w, out, **into_out)  # one row left as it was
    with pytest.raises(ValueError, match=r"relative error 1\.0e-01"):
        bench(lambda x, w: 1.1 * x * w, x, w, check=torch.mul)
    assert bench(lambda x, w: 1.1 * x * w, x, w, check=torch.mul, tolerance=0.2).error == pytest.approx(0.1, rel=1e-3)
    with pytest.raises(ValueError, match="1 results to check, and the reference 2"):
        bench(torch.mul, x, w, check=lambda x, w: (x, w))
    with pytest.raises(ValueError, match="0 results to check"):
        bench(lambda x, w: None, x, w, check=torch.mul)
    with pytest.raises(ValueError, match="shape"):
        bench(torch.mul, x, w, check=lambda x, w: x[:1])


def test_check_of_what_is_updated_in_place():
    x = torch.ones(64)
    result = bench(lambda x: [x.mul_(2)].clear(), x, memory_output=(x,), check=lambda x: x * 2)
    assert result.error == 0 and (x == 1).all()


def test_integers_are_right_or_wrong():
    x = torch.arange(10_000)
    assert bench(torch.neg, x, check=lambda x: -x, cold=False).error == 0
    with pytest.raises(ValueError, match="wrong result"):
        bench(lambda x: torch.neg(x).index_fill_(0, torch.tensor([5]), 0), x, check=lambda x: -x)


def test_no_gradients_are_recorded():
    w = torch.ones(4, requires_grad=True)
    seen = []
    bench(lambda w: seen.append((w * 2).requires_grad), w, cold=False)
    assert not any(seen)
