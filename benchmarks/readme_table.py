"""Writes the README's plot and tables, between `<!-- table:NAME -->` and `<!-- /table -->`, from results/*.json.

python benchmarks/readme_table.py
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from jitnorm.benchmark.compare import format_range, summarize_peers
from jitnorm.benchmark.results import COPY, Report

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "results"

# Decode, q/k heads, prefill, and more traffic than any cache holds; those that are lost among them.
GPU_SHAPES = [
    *((64, 1048576), (128, 64), (128, 4096), (1024, 64), (1024, 131072), (4096, 1), (4096, 64), (4096, 1024)),
    *((4096, 32768), (7168, 16384), (8192, 1), (8192, 16384)),
]
PEERS = {
    "sglang": "SGLang JIT",
    "flashinfer": "FlashInfer",
    "fi_cuda": "FlashInfer CUDA",
    "fi_cute": "FlashInfer CuTe",
    "quack": "quack",
    "liger": "Liger",
    "compile": "torch.compile",
    "torch": "torch",
}
GPU_COLUMNS = {COPY: COPY, "jitnorm": "jitnorm"} | PEERS
OPERATORS = ("rmsnorm", "fused_add_rmsnorm", "qknorm", "activation", "store_cache", "quant_fp8")
CPU_SHAPES = [(64, 1), (4096, 1), (4096, 64), (4096, 4096)]
CPU_COLUMNS = {"torch": "F.rms_norm", "jitnorm": "jitnorm, out given", "allocated": "jitnorm"}
# Bandwidth grows with the number of rows: one size each.
PLOTTED: dict[str, dict[str, object]] = {
    "rmsnorm_h200": {"op": "rmsnorm", "hidden_size": 4096},
    "fused_add_rmsnorm_h200": {"op": "fused_add_rmsnorm", "hidden_size": 4096},
    "qknorm_h200": {"head_dim": 128, "num_q_heads": 32},
    "activation_h200": {"op": "silu_and_mul", "size": 14336},
    "store_cache_h200": {"row_size": 1024, "slots": "random"},
}


def rmsnorm_h200() -> list[str]:
    """Microseconds of a call."""
    report = _only(_read("rmsnorm_h200"), op="rmsnorm")
    rows = {(row.point["hidden_size"], row.point["num_tokens"]): row.results() for row in report.rows}
    columns = {line: title for line, title in GPU_COLUMNS.items() if any(line in cells for cells in rows.values())}
    lines = _header(["hidden", "tokens", *columns.values()])
    for shape in GPU_SHAPES:
        us = {line: result.seconds * 1e6 for line, result in rows[shape].items()}
        best = min(time for line, time in us.items() if line != "copy")
        cells = [_us(us[line], us[line] == best) if line in us else "-" for line in columns]
        lines.append(_row([*map(str, shape), *cells]))
    machine = report.machine
    return [*lines, "", f"({machine['gpu']}, CUDA {machine['cuda']}, torch {machine['torch']}.)"]


def operators_h200() -> list[str]:
    """How the package stands over all shapes that were measured."""
    lines = [
        _row(["benchmark", "shapes", "fastest on", "time / best peer's", "time / copy's, above 100 MB", "peers"]),
        _row(["---", *["---:"] * 4, "---"]),
    ]
    for name in OPERATORS:
        report = _read(f"{name}_h200")
        for op in dict.fromkeys(row.point.get("op", name) for row in report.rows):
            part = _only(report, op=op) if "op" in report.axes else report
            place = summarize_peers(part)
            won = sum(ratio < 1 for ratio, _ in place.vs_best)
            present = {line for row in part.rows for line in row.results()} - {COPY, place.subject}
            peers = ", ".join(title for line, title in PEERS.items() if line in present)
            cells = (
                op,
                len(place.vs_best),
                won,
                format_range(place.vs_best),
                format_range(place.vs_copy) if place.vs_copy else "-",
                peers,
            )
            lines.append(_row([*map(str, cells)]))
    return lines


def rmsnorm_cpu() -> list[str]:
    """Microseconds of a call, with and without an output of the caller's."""
    report = _read("rmsnorm_cpu")
    axes = ("hidden_size", "num_tokens", "dtype")
    rows = {tuple(row.point[axis] for axis in axes): row.results() for row in report.rows}
    lines = _header(["hidden", "tokens", "dtype", *CPU_COLUMNS.values()])
    for shape in CPU_SHAPES:
        for dtype in ("bfloat16", "float32"):
            cells = [_us(rows[(*shape, dtype)][line].seconds * 1e6) for line in CPU_COLUMNS]
            lines.append(_row([*map(str, shape), dtype, *cells]))
    least = min(r["torch"].seconds / max(r["jitnorm"].seconds, r["allocated"].seconds) for r in rows.values())
    return [
        *lines,
        "",
        f"Over all {len(rows)} combinations of size, rows and dtype of that run jitnorm is at least {least:.1f} times "
        f"as fast as F.rms_norm. (torch {report.machine['torch']}, {report.machine['threads']} threads.)",
    ]


def build() -> list[str]:
    """First calls beside the compiler's own time for an empty kernel."""
    seconds = {line: result.seconds for line, result in _read("build").rows[0].results().items()}
    empty = seconds["nvcc -c"]
    return [
        "| first call of a new size | of `nvcc -c` of an empty kernel |",
        "|---|---:|",
        f"| CUDA, built for sm_90a | {seconds['sm_90a cold'] / empty:.2f} |",
        f"| CPU | {seconds['CPU cold'] / empty:.2f} |",
        "",
        f"That empty kernel took {empty:.2f} s. With the cache warm, the first call in a new process took "
        f"{seconds['sm_90a warm'] * 1e3:.1f} ms for CUDA and {seconds['CPU warm'] * 1e3:.1f} ms for the CPU, with no "
        f"compiler and no `PATH`. `import jitnorm` added {seconds['import'] * 1e3:.0f} ms to `import torch`.",
    ]


TABLES: dict[str, Callable[[], list[str]]] = {f.__name__: f for f in (rmsnorm_h200, operators_h200, rmsnorm_cpu, build)}


def with_tables(readme: str) -> str:
    """`readme` with every table as the results have it."""
    for name, table in TABLES.items():
        place = re.search(rf"(?<=<!-- table:{name} -->\n).*?(?=<!-- /table -->)", readme, re.DOTALL)
        if not place:
            raise ValueError(f"the README has no place for the table {name}")
        readme = readme[: place.start()] + "".join(f"{line}\n" for line in table()) + readme[place.end() :]
    return readme


def write_plots() -> None:
    from jitnorm.benchmark.report import save_plot

    for name, point in PLOTTED.items():
        save_plot(_only(_read(name), **point), RESULTS / f"{name}.png")


def _read(name: str) -> Report:
    return Report.read(RESULTS / f"{name}.json")


def _only(report: Report, **point: object) -> Report:
    """The rows of these values."""
    return replace(report, rows=[row for row in report.rows if point.items() <= row.point.items()])


def _header(names: list[str]) -> list[str]:
    return [_row(names), _row(["---:"] * len(names))]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _us(value: float, bold: bool = False) -> str:
    text = f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
    return f"**{text}**" if bold else text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
    write_plots()
