"""Measure the host time of one call with `out` given, and its peers: on a GPU the launch, on the CPU a small kernel."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from peers import EPS, IMPLS, find

import jitnorm
from jitnorm.benchmark import marker

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
GPU_CALLS, CPU_CALLS = 1000, 20000  # in a sample


def run(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
    jitnorm.rmsnorm(x, w, EPS, out)


def defined_operator() -> Call:
    """Return the same kernel as an operator of torch's dispatcher, registered with `Library.define` and `impl`."""
    library = torch.library.Library("jitnorm_bench", "FRAGMENT")
    library.define("defined(Tensor x, Tensor w, Tensor(a!) out) -> ()")
    for key in ("CPU", "CUDA"):
        library.impl("defined", run, key)
    return lambda x, w, out, _alive=library: torch.ops.jitnorm_bench.defined(x, w, out)


OTHERS: dict[str, Callable[[], Call]] = {
    "copy_": lambda: lambda x, w, out: out.copy_(x),
    "torch.add": lambda: lambda x, w, out: torch.add(x, x, out=out),
    "empty_like": lambda: lambda x, w, out: torch.empty_like(x),
    "torch.ops": lambda: lambda x, w, out: torch.ops.jitnorm.rmsnorm_out(x, w, out, EPS, None),
    "define+impl": defined_operator,
    "custom_op": lambda: torch.library.custom_op("jitnorm_bench::custom", run, mutates_args=("out",)),
    "compiled": lambda: torch.compile(run, fullgraph=True),
}


@marker.benchmark("impl", [*IMPLS, *OTHERS], unit="ns")
def bench(impl: str) -> marker.BenchResult:
    """Measure the host time of one call with `out` given: on a GPU the launch, on the CPU a small kernel."""
    on_gpu = marker.create_empty(0).is_cuda
    num_tokens, hidden_size = (64, 4096) if on_gpu else (1, 64)
    count = GPU_CALLS if on_gpu else CPU_CALLS
    x, w = marker.create_random(num_tokens, hidden_size), marker.create_random(hidden_size)
    out = torch.empty_like(x)
    call = OTHERS[impl]() if impl in OTHERS else find("rmsnorm", impl)
    wait = torch.cuda.synchronize if on_gpu else lambda: None

    def measure_round() -> tuple[list[float], None]:
        with torch.no_grad():
            call(x, w, out)
            wait()
            start = time.perf_counter()
            for _ in range(count):
                call(x, w, out)
            seconds = time.perf_counter() - start
            wait()
        return [seconds / count], None

    return marker.BenchResult.of([measure_round()[0]], metrics=(0.5,), measure_round=measure_round)


if __name__ == "__main__":
    bench.main()
