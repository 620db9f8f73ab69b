"""Collect what was measured of an engine with and without the plugin, and print it as tables.

    python benchmarks/engines/engine_report.py FILE   # written by --output of the other scripts here

The file is a result file of `jitnorm.benchmark`, which `jitnorm bench compare` and `benchmarks/ratios.py` read too.
Its settings contain the checks, the kernels, and a description of each variant.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from jitnorm.benchmark.results import UNITS, BenchResult, Cell, Failed, Report, Row, Skipped

AXES = ["model", "mode", "measure", "batch"]
# "default stock" is the engine without the plugin in its default mode, in rows of another mode.
STOCK, PLUGIN, DEFAULT_STOCK = "stock", "plugin", "default stock"
LINES = [STOCK, PLUGIN, DEFAULT_STOCK]
DECODE, GRAPH, PREFILL, STARTUP = "decode step", "decode graph", "prefill", "start-up"
FIRST_TOKEN, BETWEEN_TOKENS, ALL_TOKENS = "first token", "between tokens", "all tokens"  # of a server
_SHOWN_IN = {DECODE: "us", GRAPH: "us", PREFILL: "ms", STARTUP: "s"}
_SHOWN_IN |= dict.fromkeys((FIRST_TOKEN, BETWEEN_TOKENS, ALL_TOKENS), "ms")
_REPLAYS = 20  # of a graph

Point = tuple[str, str, str, int]  # the values of AXES


class Results:
    """The samples of a run, by point and line, and what it checked."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.name, self.settings = name, settings
        self._samples: dict[Point, dict[str, list[float]]] = {}
        self._remarks: dict[Point, dict[str, Cell]] = {}

    def add(self, point: Point, line: str, seconds: float) -> None:
        """Add a sample."""
        self._samples.setdefault(point, {}).setdefault(line, []).append(seconds)

    def fail(self, point: Point, line: str, message: str) -> None:
        """Note that a measurement ended with an error; samples that it has do not count."""
        self._remarks.setdefault(point, {})[line] = Failed(message)

    def skip(self, point: Point, line: str, reason: str) -> None:
        """Note why something was not measured, or not as often as it should be."""
        self._remarks.setdefault(point, {})[line] = Skipped(reason)

    def add_check(self, kind: str, **values: Any) -> None:
        """Add a row to `settings[kind]`: of bits, perplexity, errors or kernels."""
        self.settings.setdefault(kind, []).append(values)

    def report(self) -> Report:
        """Return everything so far as a report, one sample a round."""
        rows: dict[Point, Row] = {}
        for point in [*self._samples, *self._remarks]:
            rows.setdefault(point, Row(dict(zip(AXES, point, strict=True))))
        for point, row in rows.items():
            samples, remarks = self._samples.get(point, {}), self._remarks.get(point, {})
            for line in LINES:
                remark = remarks.get(line)
                if line in samples and not isinstance(remark, Failed):
                    notes = (remark.reason,) if isinstance(remark, Skipped) else ()
                    rounds = [[sample] for sample in samples[line]]
                    row.cells[line] = BenchResult.of(rounds, (0.5, "min", "max"), notes=notes)
                elif remark:
                    row.cells[line] = remark
        return Report(self.name, "us", AXES, LINES, [*rows.values()], settings=self.settings)


def ratio(row: Row, line: str, reference: str) -> float | None:
    """Return the time of `line` divided by that of `reference`."""
    results = row.results()
    return results[line].seconds / results[reference].seconds if {line, reference} <= results.keys() else None


def format_times(report: Report) -> str:
    """Return a table of medians, with the fastest and the slowest sample, and of the plugin's ratios."""
    ratios = {f"{PLUGIN} / {reference}": reference for reference in (STOCK, DEFAULT_STOCK)}
    body = []
    for row in report.rows:
        unit = _SHOWN_IN.get(row.point["measure"], "us")
        cells = [_format_cell(row.cells.get(line), unit) for line in LINES]
        found = [ratio(row, PLUGIN, reference) for reference in ratios.values()]
        body.append([*map(str, row.point.values()), unit, *cells, *("" if r is None else f"{r:.3f}" for r in found)])
    table = _table([*AXES, "unit", *LINES, *ratios], body, len(AXES))
    remarks = [
        f"{'N/A' if isinstance(cell, Skipped) else 'error'} {line} at {row}: "
        f"{cell.reason if isinstance(cell, Skipped) else cell.message}"
        for row, line, cell in report.cells()
        if not isinstance(cell, BenchResult)
    ]
    return "\n".join([f"{report.name}: median (minimum-maximum)", table, *remarks])


def _format_cell(cell: Cell | None, unit: str) -> str:
    if cell is None:
        return ""
    if not isinstance(cell, BenchResult):
        return "N/A" if isinstance(cell, Skipped) else "error"
    samples = [sample / UNITS[unit] for samples in cell.rounds for sample in samples]
    middle, low, high = (_format_number(x) for x in (cell.seconds / UNITS[unit], min(samples), max(samples)))
    return f"{middle} ({low}-{high})"


def _format_number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def format_checks(report: Report) -> list[str]:
    """Return a table for each kind of check that the run made: bits, perplexity, errors, kernels."""
    texts = []
    if bits := report.settings.get("bits"):
        counts = ("batch", "repeats", "rows", "unequal")
        body = [[*(r[name] for name in ("model", "mode", "line", *counts)), f"{r['max_difference']:.3g}"] for r in bits]
        heads = ["model", "mode", "line", "batch", "repeats", "rows compared", "unequal", "largest difference"]
        texts.append("logits of a prompt in a batch, compared bit for bit with those alone\n" + _table(heads, body, 3))
    if found := report.settings.get("perplexity"):
        stock = {(r["model"], r["mode"]): r["nll"] for r in found if r["line"] == STOCK}
        body = []
        for r in found:
            reference = stock.get((r["model"], r["mode"]))
            change = "" if reference is None else f"{math.expm1(r['nll'] - reference):+.2e}"
            perplexity = f"{math.exp(r['nll']):.7g}"
            body.append([r["model"], r["mode"], r["line"], r["tokens"], f"{r['nll']:.7f}", perplexity, change])
        heads = ["model", "mode", "line", "tokens", "nats per token", "perplexity", "relative to stock"]
        texts.append("perplexity of a fixed token sequence\n" + _table(heads, body, 3))
    if found := report.settings.get("errors"):
        stock = {(r["model"], r["mode"]): r["error"] for r in found if r["line"] == STOCK}
        body = []
        for r in found:
            reference = stock.get((r["model"], r["mode"]))
            relative = "" if reference is None else f"{r['error'] / reference:.4f}"
            body.append([r["model"], r["mode"], r["line"], r["tokens"], f"{r['error']:.5f}", relative])
        heads = ["model", "mode", "line", "tokens", "relative error", "of stock's"]
        texts.append("hidden states of a fixed token sequence, compared with float32\n" + _table(heads, body, 3))
    for r in report.settings.get("kernels", []):
        title = f"kernels of a decode step: {r['model']}, {r['mode']}, {r['line']}, batch {r['batch']}"
        body = [[name, f"{calls:g}", f"{us:.2f}"] for name, calls, us in r["kernels"]]
        texts.append(f"{title}\n" + _table(["kernel", "calls", "us"], body, 1))
    return texts


def _table(heads: Sequence[str], body: Iterable[Sequence[object]], left: int) -> str:
    alignment = ["left"] * left + ["right"] * (len(heads) - left)
    rows = [[str(cell) for cell in row] for row in body]
    return tabulate(rows, heads, tablefmt="simple", disable_numparse=True, colalign=alignment if rows else None)


def replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    """Return the mean seconds of a replay of a CUDA graph, of replays one after another."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        graph.replay()
    start.record()
    for _ in range(_REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / _REPLAYS / 1e3


def profile_kernels(function: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """Return calls and microseconds of each kernel that a function runs on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        function()
    return {event.key: (event.count, float(event.self_device_time_total)) for event in found.key_averages()}


def subtract_kernels(
    whole: dict[str, tuple[int, float]], part: dict[str, tuple[int, float]], steps: int, top: int
) -> list[list[Any]]:
    """Return [name, calls, microseconds] of one of the `steps` by which two profiles differ, the longest first.

    Args:
        whole, part: calls and microseconds by kernel, of runs that differ by `steps` decode steps.
        steps: their number.
        top: how many kernels to return.
    """
    rows = []
    for name, (calls, us) in whole.items():
        calls_before, us_before = part.get(name, (0, 0.0))
        rows.append([name[:110], round((calls - calls_before) / steps, 2), round((us - us_before) / steps, 3)])
    return sorted((row for row in rows if row[1] > 0), key=lambda row: -row[2])[:top]


def print_report(report: Report) -> None:
    """Print all tables."""
    for text in (format_times(report), *format_checks(report)):
        print(f"\n{text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path)
    try:
        report = Report.read(parser.parse_args().file)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if report.axes != AXES:
        parser.error(f"the file has the axes {', '.join(report.axes)}; those of an engine are {', '.join(AXES)}")
    print_report(report)


if __name__ == "__main__":
    main()
