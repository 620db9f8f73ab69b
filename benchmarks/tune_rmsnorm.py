"""Time schedules of the RMSNorm kernel on this GPU, in microseconds per call, and a copy of the same bytes.

    python benchmarks/tune_rmsnorm.py --hidden-size 4096 --dtype bf16

The result of a row has the same bits in any batch, so one schedule serves a hidden size at every number of rows. To
improve the choice in csrc/include/jitnorm/rms_row.h, look for a schedule that is fast in all columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import torch
from table_output import create_parser, print_table

from jitnorm.benchmark import marker
from jitnorm.benchmark.runner import bench_copy
from jitnorm.benchmark.settings import override_settings
from jitnorm.core.checks import DTYPE_NAMES
from jitnorm.core.operators import OPERATORS
from jitnorm.core.targets import resolve_target
from jitnorm.jit.load import load
from jitnorm.jit.spec import KernelSpec

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_LONG_ROW_BYTES = 32 * 1024
_REGISTERS_PER_SM = 65536


class Schedule(NamedTuple):
    """Some arguments of the C++ template of this name."""

    threads_per_row: int
    rows_per_block: int
    blocks_per_cluster: int = 1
    blocks_per_sm: int = 0


def schedules(hidden_size: int, element_size: int) -> Iterator[Schedule]:
    """Yield the schedules that can be fast for a row."""
    if hidden_size * element_size > _LONG_ROW_BYTES:
        yield from long_row_schedules(hidden_size, element_size)
        return
    vectors = hidden_size * element_size // 16
    in_one_warp = hidden_size <= 256
    for threads in (4, 8, 16, 32) if in_one_warp else range(32, 1025, 32):
        if vectors % threads or not 1 <= vectors // threads <= 8:
            continue
        for rows in (1, 2, 4, 8, 16, 32, 64):
            if 128 <= threads * rows <= 256 or (rows == 1 and threads > 256):
                yield Schedule(threads, rows)


def long_row_schedules(hidden_size: int, element_size: int) -> Iterator[Schedule]:
    """Yield schedules of one row for a block or a cluster, with as many blocks on an SM as registers allow.

    A thread has 4 registers for each vector of 16 bytes, and about 24 to 40 others.
    """
    found = set()
    for blocks, per_thread, others in itertools.product((1, 2, 4, 8), (2, 3, 4, 5, 6, 8, 10), (24, 32, 40)):
        vectors = -(-hidden_size * element_size // (16 * blocks))
        threads = -(-vectors // (32 * per_thread)) * 32
        blocks_per_sm = _REGISTERS_PER_SM // (threads * (4 * -(-vectors // threads) + others))
        if 64 <= threads <= 1024 and 1 <= blocks_per_sm <= 16:
            found.add(Schedule(threads * blocks, 1, blocks, blocks_per_sm))
    yield from sorted(found)


def with_schedule(spec: KernelSpec, schedule: Schedule) -> KernelSpec:
    """Return the same kernel with another schedule."""
    threads, rows, blocks, blocks_per_sm = schedule
    arguments = [argument.strip() for argument in spec.kernel[:-1].split(",")][:3]  # without a policy
    kernel = f"{', '.join(arguments)}, Plain, Schedule<{threads}, {rows}, {blocks}, false, {blocks_per_sm}>>"
    return replace(spec, name=f"{spec.name}_schedule_{'_'.join(map(str, schedule))}", kernel=kernel)


def print_times(hidden_size: int, dtype: torch.dtype, tokens: list[int], output_format: str) -> None:
    """Print the table of one hidden size, sorted by the worst ratio of a schedule to the best of all."""
    spec = OPERATORS["general_rmsnorm"].warmup_spec(hidden_size, dtype, dtype, resolve_target("cuda"))
    candidates = [None, *schedules(hidden_size, dtype.itemsize)]
    with ThreadPoolExecutor(16) as pool:
        kernels = [m.rmsnorm for m in pool.map(lambda s: load(with_schedule(spec, s) if s else spec), candidates)]
    names = ["default" if schedule is None else ", ".join(map(str, schedule)) for schedule in candidates]
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
    columns = [
        "threads per row, rows per block, blocks of a cluster, blocks on an SM",
        *map(str, tokens),
        "worst ratio",
    ]
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
