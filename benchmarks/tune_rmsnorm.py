"""Tries every schedule of the CUDA kernels on this GPU: microseconds a call for each number of rows, beside a copy.

    python benchmarks/tune_rmsnorm.py --hidden-size 4096 --dtype bf16

The package promises equal bits in any batch, so one schedule serves a hidden size at every number of rows: look for the
line that is good everywhere, and put it in csrc/elementwise/rmsnorm.cuh.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from jitnorm.checks import DTYPE_NAMES
from jitnorm.jit.load import load
from jitnorm.jit.spec import KernelSpec
from jitnorm.rmsnorm import rmsnorm_spec
from jitnorm.targets import resolve_target

_WORKING_SET = 256 << 20  # bytes, several times the second-level cache
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def schedules(hidden_size: int, element_size: int) -> Iterator[tuple[int, int]]:
    """(threads a row, rows a block) that make sense for a row."""
    vectors = hidden_size * element_size // 16
    for threads in (4, 8, 16, *range(32, 1025, 32)):
        if threads > vectors or (hidden_size >= 512) != (threads >= 32):
            if not (hidden_size == 256 and threads == 32):
                continue
        if vectors % threads or vectors // threads > 8:
            continue
        for rows in (1, 2, 4, 8, 16, 32):
            if 128 <= threads * rows <= 512 or rows == 1 and threads > 512:
                yield threads, rows


def variant(base: KernelSpec, *schedule: object) -> KernelSpec:
    text = ", ".join(str(s).lower() for s in schedule)
    kernel = base.kernel.replace(">", f", Schedule<{text}>>")
    return KernelSpec(base.op, base.name + "_s" + text.replace(", ", "_"), kernel, base.target, base.warmup)


def time_us(call: Callable[[int], object], buffers: int, calls: int) -> float:
    """Median over replays of a graph that calls every buffer in turn."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(0)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(calls):
                call(i % buffers)
        times = []
        for _ in range(10):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, nargs="+", required=True)
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16")
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 64, 256, 1024, 4096])
    options = parser.parse_args()
    dtype = _DTYPES[options.dtype]
    for hidden_size in options.hidden_size:
        base = rmsnorm_spec(hidden_size, dtype, dtype, resolve_target("cuda"))
        tries = list(schedules(hidden_size, dtype.itemsize))
        with ThreadPoolExecutor(16) as pool:
            modules = list(pool.map(lambda s: load(variant(base, *s)), tries))
        tokens = [*options.tokens, (256 << 20) // (hidden_size * dtype.itemsize)]
        rows: dict[object, list[float]] = {s: [] for s in ("copy", *tries)}
        for n in tokens:
            size = 2 * n * hidden_size * dtype.itemsize
            buffers = max(2, min(1024, _WORKING_SET // size + 1))
            x = torch.randn(buffers, n, hidden_size, device="cuda").to(dtype)
            out, weight = torch.empty_like(x), torch.randn(hidden_size, device="cuda").to(dtype)
            calls = max(buffers, min(1024, int(3e9 / size) + 1))
            rows["copy"].append(time_us(lambda i: out[i].copy_(x[i]), buffers, calls))
            for schedule, module in zip(tries, modules):
                f = module.rmsnorm
                rows[schedule].append(time_us(lambda i: f(x[i], weight, out[i], 1e-6, True), buffers, calls))
            del x, out
        print(f"\n{hidden_size} {options.dtype}: microseconds at", *tokens, "rows")
        best = [min(r[i] for s, r in rows.items() if s != "copy") for i in range(len(tokens))]
        order = sorted(rows.items(), key=lambda kv: max(v / b for v, b in zip(kv[1], best)))
        for schedule, row in order:
            worst = max(v / b for v, b in zip(row, best))
            print(f"{schedule!s:>24}", *(f"{v:8.2f}" for v in row), f"  worst {worst:.3f}")


if __name__ == "__main__":
    main()
