"""Measure the time of one call: `do_bench`, and the timers that it takes samples with."""

from __future__ import annotations

import collections
import functools
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from jitnorm.benchmark.call import (
    Call,
    Selection,
    check_result,
    check_selection,
    count_bytes,
    count_copied_bytes,
    memory_range,
    output_tensors,
    rotating_copies,
    select_tensors,
    unique_tensors,
)
from jitnorm.benchmark.machine import throttle_reasons
from jitnorm.benchmark.results import BenchResult, Metric, compute_metric, run_until_stable
from jitnorm.benchmark.settings import current_settings

_MAX_COPIES = {"cuda": 32768, "cpu": 4096}  # of tiny arguments: capturing a graph of more calls takes long
_GRAPH_SECONDS = 2e-3  # makes the gap between two replays, which is counted as well, negligible
_CPU_SECONDS = 1e-3  # makes the clock's resolution negligible
_CACHE_FACTOR = 3  # the working set of cold calls, relative to the last-level cache
_DEFAULT_CACHE_BYTES = 32 << 20  # where the operating system does not report a size


def do_bench(
    fn: Callable[..., Any],
    *,
    input_args: Sequence[Any] = (),
    input_kwargs: dict[str, Any] | None = None,
    use_cuda_graph: bool = True,
    warmup_iters: int = 3,
    replay_iters: int = 9,
    metrics: Sequence[Metric] = (0.5, "avg"),
    stream: torch.cuda.Stream | None = None,
    graph_clone_args: Selection = "all",
    graph_clone_kwargs: Selection = "all",
    memory_args: Literal["all"] | Sequence[torch.Tensor] | None = "all",
    memory_output: Literal["out"] | Sequence[torch.Tensor] | None = "out",
    extra_memory_args: Sequence[torch.Tensor] | None = None,
    extra_memory_footprint: int = 0,
    disable_log_bandwidth: bool = False,
    check: Callable[..., Any] | None = None,
    tolerance: float | None = None,
    cold: bool | None = None,
) -> BenchResult:
    """Measure the time of `fn(*input_args, **input_kwargs)`.

    The device is the GPU if an argument is a CUDA tensor, else the CPU. On CUDA, calls are captured in a graph on a
    stream that waits for the caller's. Each call takes the next of so many copies of the arguments that together they
    exceed the L2 cache three times. On the CPU the same is done with the monotonic clock. The caller's tensors are not
    written, unless they are excluded from copying. Rounds are repeated until the noise is below 0.5%, or until the time
    limit of the run; in a run, implementations take their rounds in turns.

    Args:
        fn: the function to measure.
        input_args, input_kwargs: the arguments. Tensors inside lists are neither copied nor counted.
        use_cuda_graph: False for what cannot be captured: single launches, each after overwriting the L2 cache.
        warmup_iters: calls before capture and timing.
        replay_iters: samples in a round. A sample is the mean over one replay of the graph.
        metrics: what to report: quantiles such as 0.5, and "avg", "min", "max".
        stream: the stream to run on, instead of a new one.
        graph_clone_args, graph_clone_kwargs: the arguments to copy, by position and name; None for none.
        memory_args: tensors that a call reads, for its bandwidth. "all": all arguments, except a keyword argument
            `out`, which is only written. None: none.
        memory_output: tensors that a call writes. An argument updated in place is in both, and counts twice.
            "out": what the call returns, and the keyword argument `out`.
        extra_memory_args, extra_memory_footprint: further tensors, and bytes, that a call reads or writes.
        disable_log_bandwidth: report no bandwidth for this result.
        check: a function of the same arguments that returns the correct tensor or tensors. What the call returns, or
            else leaves in `memory_output`, is compared with them before timing.
        tolerance: the relative error to allow; None for what rounding to the dtype of the result accounts for.
        cold: False lets the arguments stay in the cache. None: the setting of the run.

    Returns:
        The times of `metrics` in seconds, the bytes moved, and every sample.

    Raises:
        TypeError: fn or a selection of arguments has a type that is not accepted.
        ValueError: a result is wrong, or a metric or an argument does not exist.
        Exception: whatever `fn` raises.
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function, got {type(fn).__name__}")
    if not isinstance(input_args, (tuple, list)):
        raise TypeError(f"input_args must be a tuple, got {type(input_args).__name__}")
    check_selection("graph_clone_args", graph_clone_args, "all", "positions")
    check_selection("graph_clone_kwargs", graph_clone_kwargs, "all", "names")
    check_selection("memory_args", memory_args, "all", "tensors")
    check_selection("memory_output", memory_output, "out", "tensors")
    call = Call(fn, tuple(input_args), dict(input_kwargs or {}))
    if replay_iters < 1 or warmup_iters < 0:
        raise ValueError(
            f"replay_iters must be 1 or more and warmup_iters 0 or more, got {replay_iters}, {warmup_iters}"
        )
    for metric in metrics:
        compute_metric([0.0], metric)  # raises before the measurement rather than after it
    device = _find_device(call, stream)
    cloned = select_tensors(call, graph_clone_args, graph_clone_kwargs)
    read = _tensors_read(call, memory_args)
    written = _tensors_written(call, memory_output)
    with torch.no_grad():
        error = None
        if check:
            keys, poisoned = _find_keys(call, written), _find_keys(call, written, exclude=read)
            error = check_result(call.copy(), keys, poisoned, check, tolerance)
        footprint = 0
        if not disable_log_bandwidth:
            allocated = count_bytes(_allocated_outputs(call)) if memory_output == "out" else 0
            extra = count_bytes(extra_memory_args or ()) + extra_memory_footprint
            footprint = count_bytes(unique_tensors(read)) + count_bytes(unique_tensors(written)) + allocated + extra
        is_cold = current_settings().cold if cold is None else cold
        note = None
        if is_cold and (use_cuda_graph or device.type != "cuda"):
            calls, note = _cold_calls(call, cloned, [*read, *written], device)
        else:
            calls = rotating_copies(call, cloned, 1)
        timer = _create_timer(calls, device, use_cuda_graph, warmup_iters, stream, is_cold)

        def measure_round() -> tuple[list[float], str | None]:
            with torch.no_grad():
                return timer.samples(replay_iters), throttle_reasons(device)

        samples, throttled = measure_round()
    result = BenchResult.of(
        [samples],
        metrics,
        memory_footprint=footprint,
        error=error,
        notes=tuple(n for n in (note, throttled) if n),
        measure_round=measure_round,
    )
    if current_settings().rounds_by_runner:
        return result
    cells = {"": result}
    run_until_stable(cells, current_settings().seconds)
    return cells[""].finished()


def _find_device(call: Call, stream: torch.cuda.Stream | None) -> torch.device:
    if stream:
        return stream.device
    devices = [tensor.device for tensor in call.tensors().values()]
    device = next((d for d in devices if d.type == "cuda"), devices[0] if devices else current_settings().device)
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _tensors_read(call: Call, memory_args: Literal["all"] | Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
    if memory_args == "all":
        return [tensor for key, tensor in call.tensors().items() if key != "out"]
    return [*(memory_args or ())]


def _tensors_written(call: Call, memory_output: Literal["out"] | Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
    if memory_output == "out":
        return [tensor for key, tensor in call.tensors().items() if key == "out"]
    return [*(memory_output or ())]


def _find_keys(call: Call, tensors: Sequence[torch.Tensor], exclude: Sequence[torch.Tensor] = ()) -> list[int | str]:
    """Return the positions and names of `tensors` among the arguments, without those of `exclude`."""
    keys = {memory_range(tensor): key for key, tensor in call.tensors().items()}
    excluded = {memory_range(tensor) for tensor in exclude}
    ranges = [memory_range(tensor) for tensor in tensors]
    return [keys[memory] for memory in ranges if memory in keys and memory not in excluded]


def _allocated_outputs(call: Call) -> list[torch.Tensor]:
    """Return what a call returns besides the keyword argument `out`."""
    copy = call.copy()
    result = output_tensors(copy())
    out = copy.kwargs.get("out")
    return [
        t for t in unique_tensors(result) if not isinstance(out, torch.Tensor) or memory_range(t) != memory_range(out)
    ]


def _cold_calls(
    call: Call, cloned: Sequence[int | str], touched: Sequence[torch.Tensor], device: torch.device
) -> tuple[list[Call], str | None]:
    """Return calls on rotating copies, and a note where memory or _MAX_COPIES allow too few to make them cold."""
    tensors, ranges = call.tensors(), {memory_range(tensor) for tensor in touched}
    copied = unique_tensors(tensors[key] for key in cloned)
    each = count_bytes(t for t in copied if memory_range(t) in ranges) or count_bytes(copied)
    needed = working_set(device)
    fitting = _free_memory(device) // 2 // max(1, count_copied_bytes(call, cloned))
    count = max(1, min(needed // each + 1, _MAX_COPIES[device.type], fitting)) if each else 1
    reached = max(count * each, count_bytes(unique_tensors(touched)))
    note = None
    if reached < needed:
        note = (
            f"not cold: calls touch {reached / 1e6:.1f} MB until one repeats; more than {needed / 1e6:.0f} MB would be"
        )
    return rotating_copies(call, cloned, count), note


class Timer(Protocol):
    """Takes samples of the time of one call."""

    def samples(self, count: int) -> list[float]:
        """Return `count` samples in seconds per call, each the mean over one replay."""
        ...


def _create_timer(
    calls: list[Call],
    device: torch.device,
    use_cuda_graph: bool,
    warmup_iters: int,
    stream: torch.cuda.Stream | None,
    cold: bool,
) -> Timer:
    if device.type != "cuda":
        return CPUTimer(calls, warmup_iters)
    with torch.cuda.device(device):
        stream = stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
    if use_cuda_graph:
        return CUDAGraphTimer(calls, stream, warmup_iters)
    return LaunchTimer(calls, stream, warmup_iters, flush=cold)


def working_set(device: torch.device) -> int:
    """Return the bytes that calls must touch before they repeat, so that none of them are in the last-level cache."""
    if device.type == "cuda":
        return _CACHE_FACTOR * int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        size = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):
        size = 0
    return _CACHE_FACTOR * (size if size > 0 else _DEFAULT_CACHE_BYTES)


def _free_memory(device: torch.device) -> int:
    """Return the bytes that can be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    return int(available[1]) << 10 if available else 1 << 30


class CUDAGraphTimer:
    """Times replays of a CUDA graph of calls.

    The results of a call live until its next turn, so that what it allocates is as cold as its arguments are.
    """

    def __init__(self, calls: Sequence[Call], stream: torch.cuda.Stream, warmup_iters: int) -> None:
        self._calls, self._stream = calls, stream
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            for call in itertools.islice(itertools.cycle(calls), warmup_iters):
                call()
            self._capture(1)
            once = min(self._time_replays(3))
            if once < _GRAPH_SECONDS:
                self._capture(math.ceil(_GRAPH_SECONDS / once))

    def _capture(self, passes: int) -> None:
        self.calls_per_replay = passes * len(self._calls)  # whole passes use all copies equally often
        self._graph = torch.cuda.CUDAGraph()
        alive: collections.deque[object] = collections.deque(maxlen=len(self._calls))
        failure: Exception | None = None
        try:
            with torch.cuda.graph(self._graph, stream=self._stream):
                try:
                    for _ in range(passes):
                        alive.extend(call() for call in self._calls)
                except Exception as error:
                    failure = error
                    raise
        except Exception as error:  # ending a failed capture raises another exception, which is less specific
            raise failure or error from None

    def samples(self, count: int) -> list[float]:
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            return [seconds / self.calls_per_replay for seconds in self._time_replays(count)]

    def _time_replays(self, count: int) -> list[float]:
        """Return the seconds of replays in a row after one that is not counted: the GPU never waits for the host."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        for event in events:
            self._graph.replay()
            event.record(self._stream)
        events[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(events)]


class LaunchTimer:
    """Times single calls that cannot be captured, each after overwriting the L2 cache.

    A launch that takes the host longer than overwriting the cache takes the GPU counts the wait as well.
    """

    def __init__(self, calls: Sequence[Call], stream: torch.cuda.Stream, warmup_iters: int, flush: bool) -> None:
        self._calls, self._stream = itertools.cycle(calls), stream
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            size = working_set(stream.device) if flush else 0
            self._flush_buffer = torch.empty(size, dtype=torch.uint8, device=stream.device)
            for _ in range(warmup_iters):
                next(self._calls)()

    def samples(self, count: int) -> list[float]:
        events = []
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            for _ in range(count):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self._flush_buffer.zero_()
                start.record(self._stream)
                next(self._calls)()
                end.record(self._stream)
                events.append((start, end))
            self._stream.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


class CPUTimer:
    """Times as many calls as take a millisecond by the monotonic clock; the rotation continues across samples."""

    def __init__(self, calls: Sequence[Call], warmup_iters: int) -> None:
        self._calls = itertools.cycle([functools.partial(c.fn, *c.args, **c.kwargs) for c in calls])
        self._calls_per_sample = 1
        for _ in range(max(1, warmup_iters)):
            once = self._time_calls()
        while once < _CPU_SECONDS:
            self._calls_per_sample *= max(2, min(100, math.ceil(_CPU_SECONDS / max(once, 1e-9))))
            once = self._time_calls()

    def samples(self, count: int) -> list[float]:
        return [self._time_calls() / self._calls_per_sample for _ in range(count)]

    def _time_calls(self) -> float:
        start = time.perf_counter()
        for call in itertools.islice(self._calls, self._calls_per_sample):
            call()
        return time.perf_counter() - start
