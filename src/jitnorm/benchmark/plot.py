"""A report as a picture: bandwidth over bytes moved, one line for each implementation, under the copy's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jitnorm.benchmark.report import COPY, Report

_CEILING = {"color": "black", "linestyle": "--", "zorder": 1}


def plot(report: Report, path: Path) -> None:
    """Writes `path`, in the format that its suffix names. RuntimeError without matplotlib or bandwidths."""
    points: dict[str, dict[int, list[float]]] = {}
    for row in report.rows:
        for line, result in row.results().items():
            if result.memory_footprint:
                points.setdefault(line, {}).setdefault(result.memory_footprint, []).append(result.bandwidth / 1e9)
    if not points:
        raise RuntimeError(f"{report.name} has no bandwidth to plot: no result says how many bytes a call moves")
    figure = require_matplotlib()(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for line in report.lines:
        if line not in points:
            continue
        sizes = sorted(points[line])
        # Several shapes may move as many bytes: the slowest counts.
        rates = [min(points[line][size]) for size in sizes]
        style: dict[str, Any] = _CEILING if line == COPY else {"marker": "o", "markersize": 4}
        axes.plot([size / 1e6 for size in sizes], rates, label=line, **style)
    axes.set(xscale="log", xlabel="MB read and written by a call", ylabel="GB/s", title=_title(report))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def require_matplotlib() -> Any:
    """Its Figure. RuntimeError where it is not installed."""
    try:
        from matplotlib.figure import Figure  # without pyplot, which looks for a display
    except ImportError as error:
        raise RuntimeError("a plot needs matplotlib: pip install 'jitnorm[bench]'") from error
    return Figure


def _title(report: Report) -> str:
    machine = report.machine
    return f"{report.name}, {report.settings.get('dtype', '')}, {machine.get('gpu') or machine.get('processor', '')}"
