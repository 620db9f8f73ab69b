"""GPU time of one call: a CUDA graph of many calls over rotating buffers, the median of its replays."""

from __future__ import annotations

import statistics
from collections.abc import Callable

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
