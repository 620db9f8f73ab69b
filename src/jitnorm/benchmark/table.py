"""A report as an aligned table, with what its reader should know below it; and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

from jitnorm.benchmark import settings, stats
from jitnorm.benchmark.report import COPY, UNITS, Cell, Failed, Report, Row, Skipped
from jitnorm.benchmark.result import QUIET, BenchResult
from jitnorm.benchmark.standing import standing


def as_table(report: Report) -> str:
    """Rows of the grid; for each implementation its metrics, their noise, GB/s, and the fraction of the copy's rate."""
    if not report.rows:
        return f"{report.name}: no rows"
    shown = [line for line in report.lines if not _is_absent(report, line)] or report.lines
    heads = [("", axis) for axis in report.axes]
    heads += [(line, name) for line in shown for name in _columns(report, line)]
    body = [
        [
            *(str(value) for value in row.point.values()),
            *(c for line in shown for c in _cells(report, row, line)),
        ]
        for row in report.rows
    ]
    lines = [f"{report.name}, {report.unit} a call", *_aligned(heads, body)]
    return "\n".join([*lines, *_footer(report)])


def as_csv(report: Report) -> str:
    """A line for each cell; times in the report's unit, GB/s of 1e9 bytes."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    metrics = _metrics(report)
    writer.writerow(
        [
            *report.axes,
            "impl",
            *(f"{stats.metric_name(m)}_{report.unit}" for m in metrics),
            *("noise", "bytes", "GB/s", "of_copy", "relative_error", "remark"),
        ]
    )
    for row, line, cell in report.cells():
        start = [*row.point.values(), line]
        if not isinstance(cell, BenchResult):
            writer.writerow([*start, *[""] * (len(metrics) + 5), _remark(cell)])
            continue
        times = dict(zip(cell.metrics, cell.times, strict=True))
        writer.writerow(
            [
                *start,
                *(times[m] / UNITS[report.unit] if m in times else "" for m in metrics),
                cell.noise if cell.rounds else "",
                cell.memory_footprint or "",
                cell.bandwidth / 1e9 if cell.memory_footprint else "",
                _of_copy(row, cell) or "",
                "" if cell.error is None else cell.error,
                _remark(cell),
            ]
        )
    return out.getvalue()


def _metrics(report: Report) -> list[stats.Metric]:
    """All that any cell has, in the order of their first appearance."""
    results = (cell for _, _, cell in report.cells() if isinstance(cell, BenchResult))
    return list(dict.fromkeys(metric for result in results for metric in result.metrics))


def _is_absent(report: Report, line: str) -> bool:
    """Whether it is N/A in every row, and for one reason, which the line below the table says."""
    cells = [row.cells.get(line) for row in report.rows]
    return isinstance(cells[0], Skipped) and all(cell == cells[0] for cell in cells)


def _columns(report: Report, line: str) -> list[str]:
    if not any(line in row.results() for row in report.rows):
        return [""]  # a word a row
    names = [*(stats.metric_name(metric) for metric in _metrics(report)), "+-%"]
    if _has_bandwidth(report):
        names.append("GB/s")
        if COPY in report.lines and line != COPY:
            names.append("/copy")
    return names


def _cells(report: Report, row: Row, line: str) -> list[str]:
    width, cell = len(_columns(report, line)), row.cells.get(line)
    if not isinstance(cell, BenchResult):
        word = "" if cell is None else "N/A" if isinstance(cell, Skipped) else "error"
        return [word, *[""] * (width - 1)]
    times = dict(zip(cell.metrics, cell.times, strict=True))
    texts = [_number(times[m] / UNITS[report.unit]) if m in times else "" for m in _metrics(report)]
    texts[0] += "*" if cell.notes else ""
    texts.append(f"{100 * cell.noise:.1f}{'~' * (cell.noise > QUIET)}" if cell.rounds else "?")
    if _has_bandwidth(report):
        texts.append(_number(cell.bandwidth / 1e9, digits=3) if cell.memory_footprint else "")
        fraction = _of_copy(row, cell)
        texts.append(f"{fraction:.2f}" if fraction else "")
    return texts[:width]


def _has_bandwidth(report: Report) -> bool:
    results = (cell for _, _, cell in report.cells() if isinstance(cell, BenchResult))
    return settings.shows_bandwidth() and any(result.memory_footprint for result in results)


def _of_copy(row: Row, cell: BenchResult) -> float | None:
    """The bandwidth as a fraction of the copy's in the same row."""
    copy = row.results().get(COPY)
    return cell.bandwidth / copy.bandwidth if copy and cell.memory_footprint else None


def _number(value: float, digits: int = 4) -> str:
    """With so many digits, but no more than three of them after the point, and none of a large number left out."""
    places = digits - max(1, len(f"{value:.0f}"))
    return f"{value:.{min(3, max(0, places))}f}"


def _aligned(heads: Sequence[tuple[str, str]], body: Sequence[Sequence[str]]) -> list[str]:
    """To the right, under two header lines: whose columns, left above the first of them, and what they are."""
    rows = [[name for _, name in heads], *body]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    groups: dict[str, list[int]] = {}
    for i, (group, _) in enumerate(heads):
        groups.setdefault(group, []).append(i)
    top = []
    for group, columns in groups.items():
        room = sum(widths[i] for i in columns) + 2 * (len(columns) - 1)
        widths[columns[-1]] += max(0, len(group) - room)
        top.append(group.ljust(max(room, len(group))))
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in ["  ".join(top), lines[0], "  ".join("-" * w for w in widths), *lines[1:]]]


def _footer(report: Report) -> list[str]:
    cells = list(report.cells())
    results = [cell for _, _, cell in cells if isinstance(cell, BenchResult)]
    lines = [""]
    if _has_bandwidth(report):
        lines.append(
            "GB/s: 1e9 bytes, read and written, a second" + ("; /copy: of the copy's" * (COPY in report.lines))
        )
    if any(result.rounds and result.noise > QUIET for result in results):
        lines.append(f"~ stayed noisy: the median may be off by more than {QUIET:.1%}")
    notes = [(row, line, note) for row, line, cell in cells for note in getattr(cell, "notes", ())]
    skipped = [(row, line, cell.reason) for row, line, cell in cells if isinstance(cell, Skipped)]
    failed = [(row, line, cell.message) for row, line, cell in cells if isinstance(cell, Failed)]
    for mark, remarks in (("*", notes), ("N/A", skipped), ("error", failed)):
        lines += _grouped(mark, remarks, len(report.rows))
    errors: dict[str, float] = {}
    for _, line, cell in cells:
        if isinstance(cell, BenchResult) and cell.error is not None:
            errors[line] = max(errors.get(line, 0.0), cell.error)
    if errors:
        worst = ", ".join(f"{line} {error:.1e}" for line, error in errors.items())
        lines.append(f"checked against the reference, relative error at most: {worst}")
    if place := standing(report):
        lines += str(place).splitlines()
    return lines if len(lines) > 1 else []


def _grouped(mark: str, remarks: Iterable[tuple[Row, str, str]], num_rows: int) -> list[str]:
    """One line for each text: whose it is and, unless that is everywhere, at which rows."""
    groups: dict[str, list[tuple[Row, str]]] = {}
    for row, line, text in remarks:
        groups.setdefault(text, []).append((row, line))
    texts = []
    for text, places in groups.items():
        names = ", ".join(dict.fromkeys(line for _, line in places))
        rows = list(dict.fromkeys(str(row) for row, _ in places))
        where = f" at {'; '.join(rows[:2])}" if len(rows) < num_rows else ""
        more = f" and {len(rows) - 2} more rows" if where and len(rows) > 2 else ""
        texts.append(f"{mark} {names}{where}{more}: {text}")
    return texts


def _remark(cell: Cell) -> Any:
    if isinstance(cell, BenchResult):
        return "; ".join(cell.notes)
    return f"skipped: {cell.reason}" if isinstance(cell, Skipped) else f"error: {cell.message}"
