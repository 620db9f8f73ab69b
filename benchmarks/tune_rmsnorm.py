"""Time all schedules of the RMSNorm kernel on this GPU, in microseconds per call, and a copy of the same bytes.

    python benchmarks/tune_rmsnorm.py --hidden-size 4096 --dtype bf16

The result of a row has the same bits in any batch, so one schedule serves a hidden size at every number of rows. To
improve the choice in csrc/elementwise/rmsnorm.cuh, look for a schedule that is fast in all columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from table_output import create_parser, print_table

from jitnorm.benchmark import marker
from jitnorm.benchmark.runner import bench_copy
from jitnorm.benchmark.settings import override_settings
from jitnorm.core.checks import DTYPE_NAMES
from jitnorm.core.targets import resolve_target
from jitnorm.jit.load import load
from jitnorm.jit.spec import KernelSpec
from jitnorm.rmsnorm import rmsnorm_spec

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def schedules(hidden_size: int, element_size: int) -> Iterator[tuple[int, int]]:
    """Yield (threads per row, rows per block) of the schedules that can be fast for a row."""
    vectors = hidden_size * element_size // 16
    in_one_warp = hidden_size <= 256
    for threads in (4, 8, 16, 32) if in_one_warp else range(32, 1025, 32):
        if vectors % threads or not 1 <= vectors // threads <= 8:
            continue
        for rows in (1, 2, 4, 8, 16, 32, 64):
            if 128 <= threads * rows <= 256 or (rows == 1 and threads > 256):
                yield threads, rows


def with_schedule(spec: KernelSpec, threads: int, rows: int) -> KernelSpec:
    """Return the same kernel with another schedule."""
    kernel = spec.kernel.replace(">", f", Plain, Schedule<{threads}, {rows}>>")
    return replace(spec, name=f"{spec.name}_schedule_{threads}_{rows}", kernel=kernel)


def print_times(hidden_size: int, dtype: torch.dtype, tokens: list[int], output_format: str) -> None:
    """Print the table of one hidden size, sorted by the worst ratio of a schedule to the best of all."""
    spec = rmsnorm_spec(hidden_size, dtype, dtype, resolve_target("cuda"))
    candidates = [None, *schedules(hidden_size, dtype.itemsize)]
    with ThreadPoolExecutor(16) as pool:
        kernels = [m.rmsnorm for m in pool.map(lambda s: load(with_schedule(spec, *s) if s else spec), candidates)]
    names = ["default" if schedule is None else str(schedule) for schedule in candidates]
    rows: dict[str, list[float]] = {}
    for n in tokens:
        for name, kernel in zip(names, kernels, strict=True):
            x, w, out = (marker.create_random(*shape) for shape in ((n, hidden_size), (hidden_size,), (n, hidden_size)))
            result = marker.do_bench(kernel, input_args=(x, w, out, 1e-6, True), memory_args=(x, w))
            rows.setdefault(name, []).append(result.seconds * 1e6)
        copy = bench_copy(2 * n * hidden_size * dtype.itemsize)
        rows.setdefault("copy", []).append(copy.seconds * 1e6)
    best = [min(column) for column in zip(*(row for name, row in rows.items() if name != "copy"), strict=True)]
    worst = {name: max(t / b for t, b in zip(row, best, strict=True)) for name, row in rows.items()}
    columns = ["threads per row, rows per block", *map(str, tokens), "worst ratio"]
    ordered = sorted(rows, key=worst.__getitem__)
    title = f"hidden size {hidden_size}, {DTYPE_NAMES[dtype]}: microseconds by number of rows"
    print_table(title, columns, [[name, *rows[name], worst[name]] for name in ordered], output_format)


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("--hidden-size", type=int, nargs="+", required=True)
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 256, 1024, 4096])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch finds no GPU")
    dtype = _DTYPES[options.dtype]
    for hidden_size in options.hidden_size:
        with override_settings(dtype=dtype, seconds=0.0):  # the minimum number of rounds
            tokens = [*options.tokens, (128 << 20) // (hidden_size * dtype.itemsize)]
            print_times(hidden_size, dtype, tokens, options.format)


if __name__ == "__main__":
    main()
