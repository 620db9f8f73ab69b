"""Host time of one call, `out` given: nanoseconds on the CPU, microseconds with the launch on a GPU; beside the peers.

python benchmarks/bench_host_overhead.py [--json results/FILE.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_rmsnorm import machine
from peers import EPS, PEERS, available


def host_s(calls: dict[str, Callable[[], object]], count: int, sync: Callable[[], object]) -> dict[str, float]:
    """Seconds a call: the median of nine rounds that take the calls in turn."""
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(9):
        for name, call in calls.items():
            call()
            sync()
            start = time.perf_counter()
            for _ in range(count):
                call()
            rounds[name].append((time.perf_counter() - start) / count)
            sync()
    return {name: statistics.median(times) for name, times in rounds.items()}


def registrations(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> dict[str, Callable[[], object]]:
    """The same kernel called by way of torch's dispatcher: as this package registers it, as others do, and compiled."""
    import jitnorm

    def run(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
        jitnorm.rmsnorm(x, w, EPS, out)

    library = torch.library.Library("jitnorm_bench", "DEF")
    library.define("defined(Tensor x, Tensor w, Tensor(a!) out) -> ()")
    for key in ("CPU", "CUDA"):
        library.impl("defined", run, key)
    custom = torch.library.custom_op("jitnorm_bench::custom", run, mutates_args=("out",))
    compiled = torch.compile(lambda x, w, out: jitnorm.rmsnorm(x, w, EPS, out), fullgraph=True)
    return {
        "torch.ops": lambda: torch.ops.jitnorm.rmsnorm_out(x, w, out, EPS, None),
        "define+impl": lambda _alive=library: torch.ops.jitnorm_bench.defined(x, w, out),
        "custom_op": lambda: custom(x, w, out),
        "compiled": lambda: compiled(x, w, out),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    hidden_size, num_tokens, dtype = (4096, 64, torch.bfloat16) if on_gpu else (64, 1, torch.float32)
    x = torch.randn(num_tokens, hidden_size, device=options.device).to(dtype)
    w, out = torch.randn(hidden_size, device=options.device).to(dtype), torch.empty_like(x)
    names = [n for n in PEERS if on_gpu or n in ("copy", "jitnorm", "torch")]
    found, absent = available(names, "rmsnorm")
    calls: dict[str, Callable[[], object]] = {name: (lambda call=call: call(x, w, out)) for name, call in found.items()}
    calls |= registrations(x, w, out)
    calls["torch.add"] = lambda: torch.add(x, x, out=out)
    calls["empty_like"] = lambda: torch.empty_like(x)
    times = host_s(calls, 1000 if on_gpu else 20000, torch.cuda.synchronize if on_gpu else lambda: None)
    print(f"host microseconds a call, {num_tokens} x {hidden_size} {dtype} on {options.device}")
    for name, seconds in times.items():
        print(f"{name:>12} {seconds * 1e6:8.3f}   jitnorm takes {times['jitnorm'] / seconds:.3f} of it")
    for name, why in absent.items():
        print(f"{name:>12} absent: {why}")
    if options.json:
        result = {"machine": machine(options.device), "shape": [num_tokens, hidden_size], "seconds": times}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
