"""A run: for each row of the grid the implementations in turns, and a copy of the same bytes with them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from jitnorm.benchmark import settings
from jitnorm.benchmark.machine import describe
from jitnorm.benchmark.measure import do_bench
from jitnorm.benchmark.report import COPY, Cell, Failed, Report, Row, Skipped
from jitnorm.benchmark.result import BenchResult, settle
from jitnorm.benchmark.stats import Metric


class Skip(Exception):
    """Raised by `marker.skip`."""


def run(
    fn: Callable[..., BenchResult],
    points: Sequence[dict[str, Any]],
    line_axis: str,
    lines: Sequence[str],
    report: Report,
    copy: bool,
) -> Report:
    """Fills the report's rows. Exceptions of a cell stay in it."""
    run = settings.current()
    report.settings = {"device": str(run.device), "dtype": str(run.dtype).removeprefix("torch."), "cold": run.cold}
    report.lines = [*([COPY] if copy else []), *lines]
    with tqdm(total=len(points), unit="row", disable=None, leave=False) as bar:
        for point in points:
            bar.set_postfix_str(", ".join(map(str, point.values())))
            report.rows.append(_row(fn, point, line_axis, lines, copy))
            bar.update()
    # At the end, when the clocks are those of the work.
    report.machine = describe(run.device, Path(inspect.getsourcefile(fn) or "none"))
    return report


def _row(
    fn: Callable[..., BenchResult], point: dict[str, Any], line_axis: str, lines: Sequence[str], copy: bool
) -> Row:
    with settings.using(rounds_by_runner=True) as run:
        cells: dict[str, Cell] = {
            line: _attempt(functools.partial(_result_of, fn, point | {line_axis: line})) for line in lines
        }
        if copy:
            results = [cell for cell in cells.values() if isinstance(cell, BenchResult)]
            size = max((result.memory_footprint for result in results), default=0)
            metrics = results[0].metrics if results else ()
            cells = {COPY: _attempt(lambda: copy_of(size, metrics)), **cells}
        settle(cells, run.seconds * len(cells), _attempt)
    return Row(point, {line: c.finished() if isinstance(c, BenchResult) else c for line, c in cells.items()})


def copy_of(footprint: int, metrics: Sequence[Metric] = (0.5,)) -> BenchResult:
    """`out.copy_(x)` that reads half of these bytes and writes the other half.

    Less an odd rest of up to 1%, with which the driver's copy of 128 MB takes half as long again: it is the ceiling.
    """
    if not footprint:
        raise Skip("no result of this row says how many bytes a call moves")
    half = max(1, footprint // 2 // settings.current().dtype.itemsize)
    half -= half % (1 << max(0, (half >> 7).bit_length() - 1))
    source, target = settings.create_random(half), settings.create_empty(half)
    return do_bench(
        torch.Tensor.copy_,
        input_args=(target, source),
        memory_args=(source,),
        memory_output=(target,),
        metrics=metrics,
    )


def _attempt(measure: Callable[[], BenchResult]) -> Cell:
    try:
        return measure()
    except Skip as skip:
        return Skipped(str(skip))
    except Exception as error:  # the table goes on
        message = str(error).strip().partition("\n")[0]
        return Failed(f"{type(error).__name__}: {message}" if message else type(error).__name__)


def _result_of(fn: Callable[..., Any], arguments: dict[str, Any]) -> BenchResult:
    result = fn(**arguments)
    if not isinstance(result, BenchResult):
        raise TypeError(f"a benchmark returns what do_bench returned, got {type(result).__name__}")
    return result
