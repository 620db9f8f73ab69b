"""GPU time of one call: a CUDA graph of many calls over rotating buffers, the median of its replays; and its table."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch

_WORKING_SET = 256 << 20  # bytes of buffers at most, several times the second-level cache
_BUFFERS = 64  # pairs at most: small shapes stay in the cache, as they do behind the kernel that wrote them


def rotating_buffers(num_tokens: int, hidden_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs and poisoned outputs, `[buffers, num_tokens, hidden_size]` each."""
    pair = 2 * num_tokens * hidden_size * dtype.itemsize
    buffers = max(2, min(_BUFFERS, _WORKING_SET // pair + 1))
    inputs = torch.randn(buffers, num_tokens, hidden_size, device="cuda").to(dtype)
    return inputs, torch.full_like(inputs, float("nan"))


def time_us(call: Callable[[int], object], buffers: int, replays: int = 9) -> float:
    """Microseconds a call. `call(i)` works on the i-th buffer; every buffer is used, a graph lasts a millisecond."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(buffers):
            call(i)
        one = _replay_us(_capture(call, buffers, buffers, stream)) / buffers
        calls = buffers * max(1, min(1024, round(1000 / one)) // buffers)
        graph = _capture(call, buffers, calls, stream)
        _replay_us(graph)
        return statistics.median(_replay_us(graph) / calls for _ in range(replays))


def _capture(
    call: Callable[[int], object], buffers: int, calls: int, stream: torch.cuda.Stream
) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            call(i % buffers)
    return graph


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def in_turn_us(calls: dict[str, Callable[[int], object]], buffers: int, rounds: int = 3) -> dict[str, list[float]]:
    """`time_us` of several calls, which take turns, so that a drift of the clocks meets them alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(time_us(call, buffers))
    return times


def print_table(rows: list[dict[str, Any]], names: list[str]) -> None:
    """One line a shape: microseconds, and jitnorm's as a multiple of the best peer's and of copy's."""
    heads = (f"{name:>8}" for name in names)
    print(f"{'hidden':>6} {'rows':>8}", *heads, f"{'/best':>7} {'/copy':>7}   (microseconds)")
    behind, copies = [], []
    for row in rows:
        us = row["us"]
        peers = [t for name, t in us.items() if name not in ("copy", "jitnorm")]
        to_best = us["jitnorm"] / min(peers) if peers else float("nan")
        to_copy = us["jitnorm"] / us["copy"]
        behind.append(to_best)
        if row["bytes"] > 100e6:
            copies.append(to_copy)
        cells = (f"{us[n]:8.2f}" if n in us else f"{'-':>8}" for n in names)
        print(f"{row['hidden_size']:>6} {row['num_tokens']:>8}", *cells, f"{to_best:7.3f} {to_copy:7.3f}")
    won = sum(b < 1 for b in behind)
    print(f"faster than every peer on {won} of {len(behind)} rows; at worst {max(behind):.3f} of the best")
    if copies:
        print(f"above 100 MB of traffic: at most {max(copies):.3f} of copy")


def usable(calls: dict[str, Any], error_of: Callable[[Any], float], shape: str) -> dict[str, Any]:
    """The calls whose relative error is that of bf16: nobody is fast by being wrong. Says who drops out."""
    good = {}
    for name, call in calls.items():
        try:
            error = error_of(call)
            if not error < 5e-3:
                raise ValueError(f"wrong result, relative error {error:.1e}")
            good[name] = call
        except Exception as why:
            print(f"{shape} {name}: {why}".splitlines()[0], file=sys.stderr)
    return good
