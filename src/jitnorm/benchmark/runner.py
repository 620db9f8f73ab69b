"""Run a benchmark over its grid: for each row all implementations in turns, and a copy of the same bytes."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jitnorm.benchmark.call import create_empty, create_random
from jitnorm.benchmark.machine import clock_rates, describe_machine
from jitnorm.benchmark.measure import do_bench
from jitnorm.benchmark.options import split_filter
from jitnorm.benchmark.progress import ProgressBar
from jitnorm.benchmark.results import (
    COPY,
    BenchResult,
    Cell,
    Failed,
    Metric,
    Report,
    Row,
    Skipped,
    run_until_stable,
)
from jitnorm.benchmark.settings import current_settings, override_settings


class Skip(Exception):
    """The cell that is being measured is N/A."""


@dataclass(frozen=True)
class Axis:
    """One axis of the grid or, for names such as "a,b", several that vary together."""

    names: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]
    short: tuple[tuple[Any, ...], ...]  # the values for CI

    @classmethod
    def of(cls, names: str, values: Sequence[Any], short: Sequence[Any] | None) -> Axis:
        """Return an axis as the decorators describe it."""
        if not isinstance(names, str):
            raise TypeError(f'an axis is named by a string such as "head_dim" or "q_heads,kv_heads", got {names!r}')
        split = tuple(name.strip() for name in names.split(","))
        return cls(split, _to_tuples(split, values), _to_tuples(split, values if short is None else short))

    def points(self, full: bool) -> Iterator[dict[str, Any]]:
        """Iterate over the values, by name."""
        for value in self.values if full else self.short:
            yield dict(zip(self.names, value, strict=True))


def _to_tuples(names: tuple[str, ...], values: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"the values of the axis {','.join(names)!r} must be a list, got {type(values).__name__}")
    tuples = tuple((value,) if len(names) == 1 else tuple(value) for value in values)
    for value in tuples:
        if len(value) != len(names):
            raise ValueError(f"the axis {','.join(names)!r} takes {len(names)} values together, got {value}")
    return tuples


def check_accepted(fn: Callable[..., Any], new: Sequence[str], existing: Sequence[str]) -> None:
    """Raise TypeError for an axis that the function does not take as a parameter, or has already."""
    parameters = inspect.signature(fn).parameters
    for name in new:
        if name not in parameters:
            raise TypeError(f"{fn.__name__}() takes no {name!r}: it has {', '.join(parameters) or 'no parameters'}")
        if name in existing:
            raise TypeError(f"{fn.__name__}() has the axis {name!r} twice")


def check_complete(fn: Callable[..., Any], axes: Sequence[str]) -> None:
    """Raise TypeError for a parameter of the function that is neither an axis nor has a default."""
    for name, parameter in inspect.signature(fn).parameters.items():
        if name not in axes and parameter.default is inspect.Parameter.empty:
            raise TypeError(f"no axis gives {fn.__name__}() its {name!r}: the axes are {', '.join(axes)}")


def list_points(axes: Sequence[Axis], full: bool, filters: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return every combination of values that meets all filters."""
    names = [name for axis in axes for name in axis.names]
    conditions = [parse_filter(text, names)[1] for text in filters]
    combinations = itertools.product(*(list(axis.points(full)) for axis in axes))
    points = ({name: value for part in parts for name, value in part.items()} for parts in combinations)
    return [point for point in points if all(condition(point) for condition in conditions)]


def parse_filter(text: str, names: Sequence[str]) -> tuple[str, Callable[[dict[str, Any]], bool]]:
    """Return the axis and the condition of a filter such as "num_tokens>=64" or "op=rmsnorm,gemma_rmsnorm" (either)."""
    expression = split_filter(text)
    if expression is None or expression.name not in names:
        raise ValueError(f"{text!r} is not a filter such as 'num_tokens>=64': the axes are {', '.join(names)}")
    name = expression.name
    if expression.is_equality:
        accepted = {word.strip() for word in expression.value.split(",")}
        return name, lambda point: expression.compare(str(point[name]) in accepted, True)
    try:
        bound = float(expression.value)
    except ValueError as error:
        raise ValueError(f"{text!r}: {expression.sign} needs a number") from error
    return name, lambda point: expression.compare(point[name], bound)


def run_grid(
    fn: Callable[..., BenchResult],
    points: Sequence[dict[str, Any]],
    line_axis: str,
    lines: Sequence[str],
    report: Report,
    copy: bool,
    output: Path | None = None,
) -> None:
    """Measure all points, and add a row to the report for each. The exception of a cell is stored in the cell.

    Args:
        fn: the benchmark function.
        points: the arguments of `fn` for each row, without the implementation.
        line_axis: the parameter of `fn` that takes the implementation.
        lines: the implementations.
        report: is filled in place.
        copy: whether to measure a copy of the same bytes in each row.
        output: the file to write the report to, also after each row: a run that is interrupted leaves its rows.
    """
    run = current_settings()
    source = Path(inspect.getsourcefile(fn) or "none")
    report.settings = {"device": str(run.device), "dtype": str(run.dtype).removeprefix("torch."), "cold": run.cold}
    report.lines = [*([COPY] if copy else []), *lines]
    report.machine = describe_machine(run.device, source)
    with ProgressBar(total=len(points), unit="row") as bar:
        for point in points:
            bar.set_postfix_str(", ".join(map(str, point.values())))
            report.rows.append(_measure_row(fn, point, line_axis, lines, copy))
            if run.device.type == "cuda":  # now they are the clocks of the measurement
                report.machine["clocks"] = clock_rates(run.device)
            if output:
                report.write(output)
            bar.update()


def _measure_row(
    fn: Callable[..., BenchResult], point: dict[str, Any], line_axis: str, lines: Sequence[str], copy: bool
) -> Row:
    with override_settings(rounds_by_runner=True) as run:
        cells: dict[str, Cell] = {
            line: _attempt(functools.partial(_call_benchmark, fn, point | {line_axis: line})) for line in lines
        }
        if copy:
            results = [cell for cell in cells.values() if isinstance(cell, BenchResult)]
            footprint = max((result.memory_footprint for result in results), default=0)
            metrics = results[0].metrics if results else ()
            cells = {COPY: _attempt(lambda: bench_copy(footprint, metrics)), **cells}
        run_until_stable(cells, run.seconds * len(cells), _attempt)
    return Row(point, {line: c.finished() if isinstance(c, BenchResult) else c for line, c in cells.items()})


def bench_copy(footprint: int, metrics: Sequence[Metric] = (0.5,)) -> BenchResult:
    """Measure `out.copy_(x)` of half as many bytes as `footprint`, so that it moves as many as the calls do.

    The size is rounded down by up to 1% to a multiple of a power of two: the driver takes up to 50% longer to copy
    other sizes near 128 MB, and the copy is the upper bound of the bandwidth.
    """
    if not footprint:
        raise Skip("no result of this row says how many bytes a call moves")
    half = max(1, footprint // 2 // current_settings().dtype.itemsize)
    half -= half % (1 << max(0, (half >> 7).bit_length() - 1))
    source, target = create_random(half), create_empty(half)
    return do_bench(
        torch.Tensor.copy_,
        input_args=(target, source),
        memory_args=(source,),
        memory_output=(target,),
        metrics=metrics,
    )


def _attempt(measure: Callable[[], BenchResult]) -> Cell:
    """Return the result of `measure`, or the exception that it raises as a cell, so that the run continues."""
    try:
        return measure()
    except Skip as skip:
        return Skipped(str(skip))
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        return Failed(f"{type(error).__name__}: {message}" if message else type(error).__name__)


def _call_benchmark(fn: Callable[..., Any], arguments: dict[str, Any]) -> BenchResult:
    result = fn(**arguments)
    if not isinstance(result, BenchResult):
        raise TypeError(f"a benchmark returns what do_bench returned, got {type(result).__name__}")
    return result
