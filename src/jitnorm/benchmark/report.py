"""Present a report: as a table with remarks below it, as CSV and as a plot."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tabulate import tabulate

from jitnorm.benchmark.compare import summarize_peers
from jitnorm.benchmark.results import (
    COPY,
    NOISE_TARGET,
    UNITS,
    BenchResult,
    Cell,
    Failed,
    Metric,
    Report,
    Row,
    Skipped,
    metric_name,
)

_COPY_STYLE = {"color": "black", "linestyle": "--", "zorder": 1}


def format_table(report: Report) -> str:
    """Return a table of rows by implementations: metrics, noise, GB/s and the fraction of the copy's bandwidth."""
    if not report.rows:
        return f"{report.name}: no rows"
    shown = [line for line in report.lines if not _is_skipped_everywhere(report, line)] or report.lines
    headers = [f"\n{axis}" for axis in report.axes]
    for line in shown:
        first, *others = _columns(report, line)
        headers += [f"{line}\n{first}", *(f"\n{name}" for name in others)]
    body = [
        [*map(str, row.point.values()), *(text for line in shown for text in _format_cell(report, row, line))]
        for row in report.rows
    ]
    table = tabulate(body, headers, tablefmt="simple", stralign="right", disable_numparse=True)
    aligned = [line.rstrip() for line in table.splitlines()]
    return "\n".join([f"{report.name}, {report.unit} per call", *aligned, *_remarks(report)])


def format_csv(report: Report) -> str:
    """Return a line for each cell, with times in the report's unit and GB/s of 1e9 bytes."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    metrics = _metrics(report)
    writer.writerow(
        [
            *report.axes,
            "impl",
            *(f"{metric_name(m)}_{report.unit}" for m in metrics),
            *("noise", "bytes", "GB/s", "of_copy", "relative_error", "remark"),
        ]
    )
    for row, line, cell in report.cells():
        start = [*row.point.values(), line]
        if not isinstance(cell, BenchResult):
            writer.writerow([*start, *[""] * (len(metrics) + 5), _csv_remark(cell)])
            continue
        times = dict(zip(cell.metrics, cell.times, strict=True))
        writer.writerow(
            [
                *start,
                *(times[m] / UNITS[report.unit] if m in times else "" for m in metrics),
                cell.noise if cell.rounds else "",
                cell.memory_footprint or "",
                cell.bandwidth / 1e9 if cell.memory_footprint else "",
                _fraction_of_copy(row, cell) or "",
                "" if cell.error is None else cell.error,
                _csv_remark(cell),
            ]
        )
    return out.getvalue()


def _csv_remark(cell: Cell) -> str:
    if isinstance(cell, BenchResult):
        return "; ".join(cell.notes)
    return f"skipped: {cell.reason}" if isinstance(cell, Skipped) else f"error: {cell.message}"


def _metrics(report: Report) -> list[Metric]:
    """Return the metrics of all cells, in the order of their first appearance."""
    return list(dict.fromkeys(metric for result in report.results() for metric in result.metrics))


def _is_skipped_everywhere(report: Report, line: str) -> bool:
    """Return whether an implementation is N/A in every row for one reason, which a remark gives instead of columns."""
    cells = [row.cells.get(line) for row in report.rows]
    return isinstance(cells[0], Skipped) and all(cell == cells[0] for cell in cells)


def _columns(report: Report, line: str) -> list[str]:
    if not any(line in row.results() for row in report.rows):
        return [""]  # for N/A or error
    names = [*(metric_name(metric) for metric in _metrics(report)), "+-%"]
    if _has_bandwidth(report):
        names.append("GB/s")
        if COPY in report.lines and line != COPY:
            names.append("/copy")
    return names


def _format_cell(report: Report, row: Row, line: str) -> list[str]:
    width, cell = len(_columns(report, line)), row.cells.get(line)
    if not isinstance(cell, BenchResult):
        word = "" if cell is None else "N/A" if isinstance(cell, Skipped) else "error"
        return [word, *[""] * (width - 1)]
    times = dict(zip(cell.metrics, cell.times, strict=True))
    texts = [_format_number(times[m] / UNITS[report.unit]) if m in times else "" for m in _metrics(report)]
    texts[0] += "*" if cell.notes else ""
    texts.append(f"{100 * cell.noise:.1f}{'~' * (cell.noise > NOISE_TARGET)}" if cell.rounds else "?")
    if _has_bandwidth(report):
        texts.append(_format_number(cell.bandwidth / 1e9, digits=3) if cell.memory_footprint else "")
        fraction = _fraction_of_copy(row, cell)
        texts.append(f"{fraction:.2f}" if fraction else "")
    return texts[:width]


def _has_bandwidth(report: Report) -> bool:
    if os.environ.get("JITNORM_BENCH_BANDWIDTH") == "0":
        return False
    return any(result.memory_footprint for result in report.results())


def _fraction_of_copy(row: Row, cell: BenchResult) -> float | None:
    """Return the bandwidth relative to the copy's in the same row."""
    copy = row.results().get(COPY)
    return cell.bandwidth / copy.bandwidth if copy and cell.memory_footprint else None


def _format_number(value: float, digits: int = 4) -> str:
    """Return `value` with so many significant digits, at most three decimals, and all digits of its whole part."""
    decimals = digits - max(1, len(f"{value:.0f}"))
    return f"{value:.{min(3, max(0, decimals))}f}"


def _remarks(report: Report) -> list[str]:
    """Return the lines below the table, after an empty one."""
    cells = list(report.cells())
    lines = [""]
    if _has_bandwidth(report):
        lines.append(
            "GB/s: 1e9 bytes, read and written, per second" + ("; /copy: of the copy's" * (COPY in report.lines))
        )
    if any(result.rounds and result.noise > NOISE_TARGET for result in report.results()):
        lines.append(f"~ above the noise target: the median may be off by more than {NOISE_TARGET:.1%}")
    notes = [(row, line, note) for row, line, cell in cells for note in getattr(cell, "notes", ())]
    skipped = [(row, line, cell.reason) for row, line, cell in cells if isinstance(cell, Skipped)]
    failed = [(row, line, cell.message) for row, line, cell in cells if isinstance(cell, Failed)]
    for mark, remarks in (("*", notes), ("N/A", skipped), ("error", failed)):
        lines += _group_remarks(mark, remarks, len(report.rows))
    errors: dict[str, float] = {}
    for _, line, cell in cells:
        if isinstance(cell, BenchResult) and cell.error is not None:
            errors[line] = max(errors.get(line, 0.0), cell.error)
    if errors:
        worst = ", ".join(f"{line} {error:.1e}" for line, error in errors.items())
        lines.append(f"checked against the reference, maximum relative error: {worst}")
    if summary := summarize_peers(report):
        lines += str(summary).splitlines()
    return lines if len(lines) > 1 else []


def _group_remarks(mark: str, remarks: Iterable[tuple[Row, str, str]], num_rows: int) -> list[str]:
    """Return one line for each text, with its implementations and, unless they are all, its rows."""
    groups: dict[str, list[tuple[Row, str]]] = {}
    for row, line, text in remarks:
        groups.setdefault(text, []).append((row, line))
    texts = []
    for text, cells in groups.items():
        names = ", ".join(dict.fromkeys(line for _, line in cells))
        rows = list(dict.fromkeys(str(row) for row, _ in cells))
        listed = f" at {'; '.join(rows[:2])}" if len(rows) < num_rows else ""
        more = f" and {len(rows) - 2} more rows" if listed and len(rows) > 2 else ""
        texts.append(f"{mark} {names}{listed}{more}: {text}")
    return texts


def save_plot(report: Report, path: Path) -> None:
    """Write a plot of bandwidth over bytes moved, in the format of the suffix of `path`.

    There is a line for each implementation, and a dashed one for the copy.

    Raises:
        RuntimeError: matplotlib is not installed, or no result has a bandwidth.
    """
    points: dict[str, dict[int, list[float]]] = {}
    for row in report.rows:
        for line, result in row.results().items():
            if result.memory_footprint:
                points.setdefault(line, {}).setdefault(result.memory_footprint, []).append(result.bandwidth / 1e9)
    if not points:
        raise RuntimeError(f"{report.name} has no bandwidth to plot: no result says how many bytes a call moves")
    figure = create_figure()
    axes = figure.add_subplot()
    for line in report.lines:
        if line not in points:
            continue
        sizes = sorted(points[line])
        rates = [min(points[line][size]) for size in sizes]  # the slowest of several shapes of one size
        style: dict[str, Any] = _COPY_STYLE if line == COPY else {"marker": "o", "markersize": 4}
        axes.plot([size / 1e6 for size in sizes], rates, label=line, **style)
    axes.set(xscale="log", xlabel="MB read and written by a call", ylabel="GB/s", title=_plot_title(report))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def create_figure() -> Any:
    """Return an empty matplotlib figure; raise RuntimeError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which looks for a display
    except ImportError as error:
        raise RuntimeError("a plot needs matplotlib: pip install 'jitnorm[bench]'") from error
    return Figure(figsize=(9, 5.5), layout="constrained")


def _plot_title(report: Report) -> str:
    machine = report.machine
    return f"{report.name}, {report.settings.get('dtype', '')}, {machine.get('gpu') or machine.get('processor', '')}"
