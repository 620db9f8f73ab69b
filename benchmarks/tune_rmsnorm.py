"""Tries every schedule of the CUDA kernels on this GPU: microseconds a call for each number of rows, beside a copy.

    python benchmarks/tune_rmsnorm.py --hidden-size 4096 --dtype bf16

The package promises equal bits in any batch, so one schedule serves a hidden size at every number of rows: look for the
line that is good everywhere, and see what csrc/elementwise/rmsnorm.cuh would have to say to choose it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from jitnorm.benchmark import marker, settings
from jitnorm.benchmark.runner import copy_of
from jitnorm.core.checks import DTYPE_NAMES
from jitnorm.core.targets import resolve_target
from jitnorm.jit.load import load
from jitnorm.jit.spec import KernelSpec
from jitnorm.rmsnorm import rmsnorm_spec

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def schedules(hidden_size: int, element_size: int) -> Iterator[tuple[int, int]]:
    """(threads a row, rows a block) that make sense for a row."""
    vectors = hidden_size * element_size // 16
    in_one_warp = hidden_size <= 256
    for threads in (4, 8, 16, 32) if in_one_warp else range(32, 1025, 32):
        if vectors % threads or not 1 <= vectors // threads <= 8:
            continue
        for rows in (1, 2, 4, 8, 16, 32, 64):
            if 128 <= threads * rows <= 256 or (rows == 1 and threads > 256):
                yield threads, rows


def with_schedule(spec: KernelSpec, threads: int, rows: int) -> KernelSpec:
    """The same kernel with a schedule of the caller's."""
    kernel = spec.kernel.replace(">", f", Plain, Schedule<{threads}, {rows}>>")
    return replace(spec, name=f"{spec.name}_schedule_{threads}_{rows}", kernel=kernel)


def table(hidden_size: int, dtype: torch.dtype, tokens: list[int]) -> None:
    """Prints one hidden size, the best schedule first: by its worst ratio to the best of all."""
    spec = rmsnorm_spec(hidden_size, dtype, dtype, resolve_target("cuda"))
    tries = [None, *schedules(hidden_size, dtype.itemsize)]
    with ThreadPoolExecutor(16) as pool:
        kernels = [m.rmsnorm for m in pool.map(lambda s: load(with_schedule(spec, *s) if s else spec), tries)]
    calls = {"as shipped" if schedule is None else str(schedule): k for schedule, k in zip(tries, kernels, strict=True)}
    rows: dict[str, list[float]] = {}
    for n in tokens:
        for name, kernel in calls.items():
            x, w, out = (marker.create_random(*shape) for shape in ((n, hidden_size), (hidden_size,), (n, hidden_size)))
            result = marker.do_bench(kernel, input_args=(x, w, out, 1e-6, True), memory_args=(x, w))
            rows.setdefault(name, []).append(result.seconds * 1e6)
        copy = copy_of(2 * n * hidden_size * dtype.itemsize)
        rows.setdefault("copy", []).append(copy.seconds * 1e6)
    best = [min(column) for column in zip(*(row for name, row in rows.items() if name != "copy"), strict=True)]
    worst = {name: max(t / b for t, b in zip(row, best, strict=True)) for name, row in rows.items()}
    print(f"\n{hidden_size} {DTYPE_NAMES[dtype]}: microseconds at", *tokens, "rows; threads a row, rows a block")
    for name in sorted(rows, key=worst.__getitem__):
        print(f"{name:>12}", *(f"{t:8.2f}" for t in rows[name]), f"  worst {worst[name]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden-size", type=int, nargs="+", required=True)
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 256, 1024, 4096])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    dtype = _DTYPES[options.dtype]
    for hidden_size in options.hidden_size:
        with settings.using(dtype=dtype, seconds=0.0):  # five rounds, and no more
            table(hidden_size, dtype, [*options.tokens, (128 << 20) // (hidden_size * dtype.itemsize)])


if __name__ == "__main__":
    main()
