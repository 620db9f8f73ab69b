"""Writes the README's tables from results/*.json: what lies between `<!-- table:NAME -->` and `<!-- /table -->`.

python benchmarks/readme_table.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
RESULTS = Path(__file__).parent / "results"

# Decode, q/k heads, prefill, and more traffic than any cache holds; those that are lost among them.
GPU_SHAPES = [
    *((64, 1048576), (128, 64), (128, 4096), (1024, 64), (1024, 131072), (4096, 1), (4096, 64), (4096, 1024)),
    *((4096, 32768), (7168, 16384), (8192, 1), (8192, 16384)),
]
GPU_COLUMNS = {
    "copy": "copy",
    "jitnorm": "jitnorm",
    "sglang": "SGLang JIT",
    "fi_cuda": "FlashInfer CUDA",
    "fi_cute": "FlashInfer CuTe",
    "quack": "quack",
    "compile": "torch.compile",
}
CPU_SHAPES = [(64, 1), (4096, 1), (4096, 64), (4096, 4096)]
_LARGE = 100e6  # bytes read and written


def rmsnorm_h200(results: dict[str, Any]) -> list[str]:
    """Microseconds of a call; and how the package stands over all shapes that were measured."""
    times = {(row["hidden_size"], row["num_tokens"]): row["us"] for row in results["rows"]}
    lines = _header(["hidden", "tokens", *GPU_COLUMNS.values()])
    for shape in GPU_SHAPES:
        us = times[shape]
        best = min(t for name, t in us.items() if name != "copy")
        cells = [_us(us[name], us[name] == best) if name in us else "-" for name in GPU_COLUMNS]
        lines.append(_row([*map(str, shape), *cells]))
    behind = [us["jitnorm"] / min(t for n, t in us.items() if n not in ("copy", "jitnorm")) for us in times.values()]
    copies = [us["jitnorm"] / us["copy"] for (h, n), us in times.items() if 4 * h * n > _LARGE]
    machine = results["machine"]
    return [
        *lines,
        "",
        f"Over all {len(behind)} shapes of that run jitnorm is the fastest on {sum(b < 1 for b in behind)}, and takes "
        f"at most {max(behind):.3f} times as long as the best of the others. Above 100 MB of traffic it takes "
        f"{min(copies):.3f} to {max(copies):.3f} times as long as the copy. ({machine['gpu']}, CUDA {machine['cuda']}, "
        f"torch {machine['torch']}.)",
    ]


def rmsnorm_cpu(results: dict[str, Any]) -> list[str]:
    """Microseconds of a call, with and without an output of the caller's."""
    rows = {(row["hidden_size"], row["num_tokens"], row["dtype"]): row for row in results["rows"]}
    lines = _header(["hidden", "tokens", "dtype", "F.rms_norm", "jitnorm, out given", "jitnorm"])
    for shape in CPU_SHAPES:
        for dtype in ("bfloat16", "float32"):
            row = rows[(*shape, dtype)]
            cells = [_us(row[name]) for name in ("torch_us", "out_us", "allocated_us")]
            lines.append(_row([*map(str, shape), dtype, *cells]))
    least = min(row["torch_us"] / max(row["out_us"], row["allocated_us"]) for row in results["rows"])
    return [
        *lines,
        "",
        f"Over all {len(rows)} combinations of size, rows and dtype of that run jitnorm is at least {least:.1f} times "
        f"as fast as F.rms_norm. (torch {results['machine']['torch']}, {results['machine']['threads']} threads.)",
    ]


TABLES: dict[str, Callable[[dict[str, Any]], list[str]]] = {f.__name__: f for f in (rmsnorm_h200, rmsnorm_cpu)}


def with_tables(readme: str) -> str:
    """`readme` with every table as the results have it."""
    for name, table in TABLES.items():
        lines = table(json.loads((RESULTS / f"{name}.json").read_text()))
        place = re.search(rf"(?<=<!-- table:{name} -->\n).*?(?=\n<!-- /table -->)", readme, re.DOTALL)
        if not place:
            raise ValueError(f"the README has no place for the table {name}")
        readme = readme[: place.start()] + "\n".join(lines) + readme[place.end() :]
    return readme


def _header(names: list[str]) -> list[str]:
    return [_row(names), _row(["---:"] * len(names))]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _us(value: float, bold: bool = False) -> str:
    text = f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"
    return f"**{text}**" if bold else text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
