"""Samples of the time of one call, in seconds: from a CUDA graph, from single launches, and from the CPU's clock."""

from __future__ import annotations

import collections
import functools
import itertools
import math
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch

from jitnorm.benchmark.arguments import Call

_GRAPH_SECONDS = 2e-3  # long beside what lies between two replays, which is counted as well
_CPU_SECONDS = 1e-3  # long beside the clock's resolution
_CACHE_FACTOR = 3  # a working set of so many times the last cache is not in it
_UNKNOWN_CACHE = 32 << 20


class Timer(Protocol):
    def samples(self, count: int) -> list[float]:
        """Seconds of a call, each the mean over one replay."""
        ...


def working_set(device: torch.device) -> int:
    """Bytes that calls must touch before memory is touched again, so that it comes from beyond the last cache."""
    if device.type == "cuda":
        return _CACHE_FACTOR * int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        size = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):
        size = 0
    return _CACHE_FACTOR * (size if size > 0 else _UNKNOWN_CACHE)


def free_memory(device: torch.device) -> int:
    """Bytes that can be had without taking them from anybody."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    return int(available[1]) << 10 if available else 1 << 30


class GraphTimer:
    """A CUDA graph of calls on a stream of its own. Every call's results live until its turn comes again, so that
    what a call allocates is no more in the cache than its arguments are."""

    def __init__(self, calls: Sequence[Call], stream: torch.cuda.Stream, warmup_iters: int) -> None:
        self._calls, self._stream = calls, stream
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            for call in itertools.islice(itertools.cycle(calls), warmup_iters):
                call()
            self._capture(1)
            once = min(self._replays(3))
            if once < _GRAPH_SECONDS:
                self._capture(math.ceil(_GRAPH_SECONDS / once))

    def _capture(self, passes: int) -> None:
        self.captured = passes * len(self._calls)  # whole passes: every copy is used, and as often as any other
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
        except Exception as error:  # a capture that is broken off raises again as it ends, and says less
            raise failure or error from None

    def samples(self, count: int) -> list[float]:
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            return [seconds / self.captured for seconds in self._replays(count)]

    def _replays(self, count: int) -> list[float]:
        """Replays in a row behind one that is not counted: the GPU never waits for the host between them."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        for event in events:
            self._graph.replay()
            event.record(self._stream)
        events[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(events)]


class LaunchTimer:
    """Single calls on a stream of their own, for what cannot be captured: the cache is overwritten before each. A
    call whose launch takes the host longer than that counts the wait as well."""

    def __init__(self, calls: Sequence[Call], stream: torch.cuda.Stream, warmup_iters: int, flush: bool) -> None:
        self._calls, self._stream = itertools.cycle(calls), stream
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            size = working_set(stream.device) if flush else 0
            self._flushed = torch.empty(size, dtype=torch.uint8, device=stream.device)
            for _ in range(warmup_iters):
                next(self._calls)()

    def samples(self, count: int) -> list[float]:
        events = []
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            for _ in range(count):
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                self._flushed.zero_()
                start.record(self._stream)
                next(self._calls)()
                end.record(self._stream)
                events.append((start, end))
            self._stream.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


class CpuTimer:
    """The monotonic clock around as many calls as take a millisecond. The rotation goes on from sample to sample."""

    def __init__(self, calls: Sequence[Call], warmup_iters: int) -> None:
        self._calls = itertools.cycle([functools.partial(c.fn, *c.args, **c.kwargs) for c in calls])
        self._each = 1
        for _ in range(max(1, warmup_iters)):
            once = self._seconds()
        while once < _CPU_SECONDS:
            self._each *= max(2, min(100, math.ceil(_CPU_SECONDS / max(once, 1e-9))))
            once = self._seconds()

    def samples(self, count: int) -> list[float]:
        return [self._seconds() / self._each for _ in range(count)]

    def _seconds(self) -> float:
        start = time.perf_counter()
        for call in itertools.islice(self._calls, self._each):
            call()
        return time.perf_counter() - start
