"""`do_bench`: the time of one call, cold, with its noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from jitnorm.benchmark import nvml, settings, stats
from jitnorm.benchmark.arguments import (
    Call,
    Chosen,
    bytes_of,
    check_chosen,
    chosen,
    copied_bytes,
    distinct,
    memory,
    returned,
    rotate,
)
from jitnorm.benchmark.check import relative_error
from jitnorm.benchmark.result import BenchResult, settle
from jitnorm.benchmark.timers import CpuTimer, GraphTimer, LaunchTimer, Timer, free_memory, working_set

_MAX_COPIES = {"cuda": 32768, "cpu": 4096}  # of tiny arguments: a graph of more calls takes long to capture


def do_bench(
    fn: Callable[..., Any],
    *,
    input_args: Sequence[Any] = (),
    input_kwargs: dict[str, Any] | None = None,
    use_cuda_graph: bool = True,
    warmup_iters: int = 3,
    replay_iters: int = 9,
    metrics: Sequence[stats.Metric] = (0.5, "avg"),
    stream: torch.cuda.Stream | None = None,
    graph_clone_args: Chosen = "all",
    graph_clone_kwargs: Chosen = "all",
    memory_args: Literal["all"] | Sequence[torch.Tensor] | None = "all",
    memory_output: Literal["out"] | Sequence[torch.Tensor] | None = "out",
    extra_memory_args: Sequence[torch.Tensor] | None = None,
    extra_memory_footprint: int = 0,
    disable_log_bandwidth: bool = False,
    check: Callable[..., Any] | None = None,
    tolerance: float | None = None,
    cold: bool | None = None,
) -> BenchResult:
    """The time of `fn(*input_args, **input_kwargs)`, on the GPU where a tensor is there, else on the CPU.

    On CUDA: calls in a graph, on a stream that waits for the caller's, each on the next of so many copies of the
    arguments that together they exceed the L2 cache three times over. On the CPU: the same by the monotonic clock.
    The caller's tensors are read, and those that are copied not written. Rounds go on until the noise is below 0.5%,
    but not beyond the run's time limit; in a run, implementations take their rounds in turns.

    Args:
        input_args, input_kwargs: the arguments. Tensors inside lists are neither copied nor counted.
        use_cuda_graph: False for what cannot be captured: single launches, the L2 cache overwritten before each.
        warmup_iters: calls before anything is captured or timed.
        replay_iters: samples a round. A sample is the mean over a replay of the graph.
        metrics: which to report: quantiles such as 0.5, and "avg", "min", "max".
        stream: the stream to run on, instead of one of its own.
        graph_clone_args, graph_clone_kwargs: the arguments that have copies, by position and name; None for none.
        memory_args: tensors that a call reads, for its bandwidth. "all": all arguments, except a keyword argument
            `out`, which is written only. None: none.
        memory_output: tensors that a call writes. An argument updated in place is among both, and counts twice.
            "out": what the call returns, and the keyword argument `out`.
        extra_memory_args, extra_memory_footprint: further tensors, and bytes, that a call reads or writes.
        disable_log_bandwidth: no bandwidth for this result.
        check: a function of the same arguments that returns what is right, a tensor or several: what the call
            returns, or else leaves in `memory_output`, is compared with it before anything is timed.
        tolerance: the relative error to allow; None for what the result's dtype explains.
        cold: False lets the arguments stay in the cache. None: as the run has it.

    Raises:
        TypeError: fn or a choice of arguments is of a type that is not accepted.
        ValueError: a wrong result, a metric or an argument that does not exist.
        Whatever `fn` raises.
    """
    if not callable(fn):
        raise TypeError(f"fn must be a function, got {type(fn).__name__}")
    if not isinstance(input_args, (tuple, list)):
        raise TypeError(f"input_args must be a tuple, got {type(input_args).__name__}")
    check_chosen("graph_clone_args", graph_clone_args, "all", "positions")
    check_chosen("graph_clone_kwargs", graph_clone_kwargs, "all", "names")
    check_chosen("memory_args", memory_args, "all", "tensors")
    check_chosen("memory_output", memory_output, "out", "tensors")
    call = Call(fn, tuple(input_args), dict(input_kwargs or {}))
    if replay_iters < 1 or warmup_iters < 0:
        raise ValueError(
            f"replay_iters must be 1 or more and warmup_iters 0 or more, got {replay_iters}, {warmup_iters}"
        )
    for metric in metrics:
        stats.measure([0.0], metric)  # before the work, not after it
    device = _device(call, stream)
    cloned = chosen(call, graph_clone_args, graph_clone_kwargs)
    read = _read(call, memory_args)
    written = _written(call, memory_output)
    with torch.no_grad():
        error = None
        if check:
            keys, poisoned = _keys(call, written), _keys(call, written, without=read)
            error = relative_error(_copy(call), keys, poisoned, check, tolerance)
        footprint = 0
        if not disable_log_bandwidth:
            new = bytes_of(_allocated(call)) if memory_output == "out" else 0
            extra = bytes_of(extra_memory_args or ()) + extra_memory_footprint
            footprint = bytes_of(distinct(read)) + bytes_of(distinct(written)) + new + extra
        is_cold = settings.current().cold if cold is None else cold
        note = None
        if is_cold and (use_cuda_graph or device.type != "cuda"):
            calls, note = _rotation(call, cloned, [*read, *written], device)
        else:
            calls = rotate(call, cloned, 1)
        timer = _timer(calls, device, use_cuda_graph, warmup_iters, stream, is_cold)

        def more() -> tuple[list[float], str | None]:
            with torch.no_grad():
                return timer.samples(replay_iters), nvml.throttled(device)

        samples, throttled = more()
    result = BenchResult.of(
        [samples],
        metrics,
        memory_footprint=footprint,
        error=error,
        notes=tuple(n for n in (note, throttled) if n),
        more=more,
    )
    if settings.current().rounds_by_runner:
        return result
    cells = {"": result}
    settle(cells, settings.current().seconds)
    return cells[""].finished()


def _device(call: Call, stream: torch.cuda.Stream | None) -> torch.device:
    if stream:
        return stream.device
    devices = [tensor.device for tensor in call.tensors().values()]
    device = next((d for d in devices if d.type == "cuda"), devices[0] if devices else settings.current().device)
    return torch.device("cuda", torch.cuda.current_device()) if device == torch.device("cuda") else device


def _read(call: Call, memory_args: Literal["all"] | Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
    if memory_args == "all":
        return [tensor for key, tensor in call.tensors().items() if key != "out"]
    return [*(memory_args or ())]


def _written(call: Call, memory_output: Literal["out"] | Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
    if memory_output == "out":
        return [tensor for key, tensor in call.tensors().items() if key == "out"]
    return [*(memory_output or ())]


def _keys(call: Call, tensors: Sequence[torch.Tensor], without: Sequence[torch.Tensor] = ()) -> list[int | str]:
    """Where these tensors are among the arguments."""
    places = {memory(tensor): key for key, tensor in call.tensors().items()}
    left = {memory(tensor) for tensor in tensors} - {memory(tensor) for tensor in without}
    return [places[memory(t)] for t in tensors if memory(t) in places and memory(t) in left]


def _allocated(call: Call) -> list[torch.Tensor]:
    """What a call returns besides the keyword argument `out`."""
    copy = _copy(call)
    result = returned(copy())
    out = copy.kwargs.get("out")
    return [t for t in distinct(result) if not isinstance(out, torch.Tensor) or memory(t) != memory(out)]


def _copy(call: Call) -> Call:
    return rotate(call, list(call.tensors()), 1)[0]


def _rotation(
    call: Call, cloned: Sequence[int | str], touched: Sequence[torch.Tensor], device: torch.device
) -> tuple[list[Call], str | None]:
    """Copies for the calls to take in turn, and a note where there cannot be enough to make the calls cold."""
    tensors, places = call.tensors(), {memory(tensor) for tensor in touched}
    copies = distinct(tensors[key] for key in cloned)
    each = bytes_of(t for t in copies if memory(t) in places) or bytes_of(copies)
    needed = working_set(device)
    room = free_memory(device) // 2 // max(1, copied_bytes(call, cloned))
    count = max(1, min(needed // each + 1, _MAX_COPIES[device.type], room)) if each else 1
    reached = max(count * each, bytes_of(distinct(touched)))
    note = None
    if reached < needed:
        note = (
            f"not cold: calls touch {reached / 1e6:.1f} MB until one repeats; more than {needed / 1e6:.0f} MB would be"
        )
    return rotate(call, cloned, count), note


def _timer(
    calls: list[Call],
    device: torch.device,
    use_cuda_graph: bool,
    warmup_iters: int,
    stream: torch.cuda.Stream | None,
    cold: bool,
) -> Timer:
    if device.type != "cuda":
        return CpuTimer(calls, warmup_iters)
    with torch.cuda.device(device):
        stream = stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
    if use_cuda_graph:
        return GraphTimer(calls, stream, warmup_iters)
    return LaunchTimer(calls, stream, warmup_iters, flush=cold)
