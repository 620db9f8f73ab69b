"""The time of one call, for the demo's table. The figures of the project come from its benchmarks, not from here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_BUDGET_S = 0.2
_SAMPLE_S = 0.002  # long beside the clock's resolution, and beside the wait for a GPU at its end
_MIN_SAMPLES = 5


def median_us(call: Callable[[], object], device: str) -> float:
    """Microseconds, the median of samples; each is as many calls in a row as make it long enough to measure."""
    _seconds(call, 1, device)  # the first call allocates, and may start threads
    count = max(1, int(_SAMPLE_S / _seconds(call, 3, device)))
    samples: list[float] = []
    ends = time.perf_counter() + _BUDGET_S
    while len(samples) < _MIN_SAMPLES or time.perf_counter() < ends:
        samples.append(_seconds(call, count, device))
    return 1e6 * statistics.median(samples)


def _seconds(call: Callable[[], object], count: int, device: str) -> float:
    """Of one call, over `count` of them."""
    started = time.perf_counter()
    for _ in range(count):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count
