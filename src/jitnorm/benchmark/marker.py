"""Benchmarks as decorated functions, in pytest's manner.

    from jitnorm.benchmark import marker

    @marker.parametrize("hidden_size", [1024, 4096], [4096])
    @marker.benchmark("impl", ["jitnorm", "torch"])
    def bench(hidden_size, impl):
        x, weight = marker.create_random(64, hidden_size), marker.create_random(hidden_size)
        return marker.do_bench(FUNCTIONS[impl], input_args=(x, weight))

    if __name__ == "__main__":
        bench.main()

docs/benchmarking.md tells the rest.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from jitnorm.benchmark import grid, runner, settings
from jitnorm.benchmark.measure import do_bench
from jitnorm.benchmark.report import COPY, UNITS, Report
from jitnorm.benchmark.result import BenchResult
from jitnorm.benchmark.settings import create_empty, create_random
from jitnorm.benchmark.table import as_table

__all__ = [
    "BenchResult",
    "Benchmark",
    "benchmark",
    "create_empty",
    "create_random",
    "do_bench",
    "parametrize",
    "skip",
]


class Benchmark:
    """A function of a grid's axes that returns the BenchResult of one point. Called, it is that function."""

    def __init__(self, fn: Callable[..., BenchResult], line_axis: grid.Axis, unit: str) -> None:
        self.fn, self.line_axis, self.unit = fn, line_axis, unit
        self.axes: list[grid.Axis] = []
        self.name = _name(fn)
        self.__doc__ = fn.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> BenchResult:
        return self.fn(*args, **kwargs)

    @property
    def names(self) -> list[str]:
        """Of all axes, the one whose values stand side by side last."""
        return [name for axis in (*self.axes, self.line_axis) for name in axis.names]

    def points(self, full: bool | None = None, filters: Sequence[str] = ()) -> list[dict[str, Any]]:
        """The rows: of the short lists in CI (`CI=true`, `JITNORM_BENCH_CI=1`), unless `full` says which."""
        grid.check_complete(self.fn, self.names)
        return grid.points(self.axes, not settings.is_ci() if full is None else full, filters)

    def no_rows(self, full: bool | None, filters: Sequence[str]) -> str:
        """What to say where no row meets the filters: which values there are."""
        rows = self.points(full)
        names = dict.fromkeys(grid.condition(text, self.names)[0] for text in filters)
        have = (f"{name} is {', '.join(dict.fromkeys(str(row[name]) for row in rows))}" for name in names)
        return f"no row meets {' and '.join(filters)}: {'; '.join(have)}"

    def lines(self, impl: Sequence[str] | None = None) -> list[str]:
        """The values that stand side by side: all, or those of `impl`."""
        known = [value for (value,) in self.line_axis.values]
        for name in impl or ():
            if name not in known:
                raise ValueError(f"{self.line_axis.names[0]} must be one of {', '.join(known)}, got {name!r}")
        return [line for line in known if not impl or line in impl]

    def run(
        self,
        *,
        full: bool | None = None,
        filters: Sequence[str] = (),
        impl: Sequence[str] | None = None,
        copy: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        cold: bool | None = None,
        seconds: float | None = None,
    ) -> Report:
        """Measures the grid, prints the table and returns the report.

        Args:
            full: the long lists or the short ones; None for the short ones in CI.
            filters: conditions such as "num_tokens>=64" that rows must meet, all of them.
            impl: the implementations; None for all.
            copy: measure a copy of the same bytes in each row, and show the fraction of it that is reached.
            device, dtype: the defaults of `create_random` and `create_empty`; CUDA where it is, and bfloat16.
            cold: False lets arguments stay in the cache.
            seconds: at most, for each implementation in a row, to wait for its figure to be quiet.

        Raises:
            TypeError: a parameter of the function that no axis gives.
            ValueError: a filter or an implementation that does not exist; seconds that would never end.
        """
        points, lines = self.points(full, filters), self.lines(impl)
        if seconds is not None and not 0 <= seconds < math.inf:
            raise ValueError(f"seconds must be a finite number and 0 or more, got {seconds}")
        if copy and COPY in lines:
            raise ValueError(f"{COPY!r} is the name of the framework's own copy")
        axes = [name for axis in self.axes for name in axis.names]
        report = Report(self.name, self.unit, axes, lines)
        where = torch.device(device) if device is not None else None
        with settings.using(device=where, dtype=dtype, cold=cold, seconds=seconds):
            runner.run(self.fn, points, self.line_axis.names[0], lines, report, copy)
        print(as_table(report))
        return report

    def main(self, args: Sequence[str] | None = None, *, copy: bool = False) -> NoReturn:
        """The command line of a bench file. Exits 1 where a cell ended with an exception."""
        from jitnorm.benchmark.options import command

        command(self, copy=copy).main(args, standalone_mode=True)
        raise SystemExit  # click has ended the process already


def benchmark(
    name: str, values: Sequence[str], *, unit: str = "us"
) -> Callable[[Callable[..., BenchResult]], Benchmark]:
    """The innermost decorator: the axis whose values stand side by side, and the table's unit (ns, us, ms or s)."""
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    axis = grid.Axis.of(name, values, None)
    if len(axis.names) != 1:
        raise ValueError(f"one axis stands side by side, got {name!r}")

    def decorate(fn: Callable[..., BenchResult]) -> Benchmark:
        if isinstance(fn, Benchmark):
            raise TypeError("@marker.benchmark is the innermost decorator, and there is one")
        grid.check_taken(fn, axis.names, ())
        made = Benchmark(fn, axis, unit)
        _check_if_outermost(made)
        return made

    return decorate


def parametrize(
    names: str, values: Sequence[Any], short: Sequence[Any] | None = None
) -> Callable[[Benchmark], Benchmark]:
    """An axis of the grid. `"a,b"` takes tuples; `short` is the list for CI, and `values` where it is not given.

    The axis that is written first varies slowest.
    """
    axis = grid.Axis.of(names, values, short)

    def decorate(decorated: Benchmark) -> Benchmark:
        if not isinstance(decorated, Benchmark):
            raise TypeError(f"@marker.parametrize({names!r}) goes above @marker.benchmark, which is innermost")
        grid.check_taken(decorated.fn, axis.names, decorated.names)
        decorated.axes.insert(0, axis)
        _check_if_outermost(decorated)
        return decorated

    return decorate


def skip(reason: str) -> NoReturn:
    """Makes the cell that is being measured N/A; the reason is listed below the table."""
    raise runner.Skip(reason)


def _check_if_outermost(decorated: Benchmark) -> None:
    """A parameter that no axis gives is an error where the function is decorated, not where it is run.

    While a decorator is applied its caller is at that decorator's line, and a function begins with its first. (Not for
    a lambda, whose whole expression may be one line. `points` checks all again.)
    """
    caller, code = sys._getframe(2), decorated.fn.__code__
    place = (caller.f_code.co_filename, caller.f_lineno)
    if place == (code.co_filename, code.co_firstlineno) and decorated.fn.__name__ != "<lambda>":
        grid.check_complete(decorated.fn, decorated.names)


def _name(fn: Callable[..., Any]) -> str:
    """ "rmsnorm" for a function of bench_rmsnorm.py, else the function's own."""
    file = Path(fn.__code__.co_filename).stem
    return file.removeprefix("bench_") if file.startswith("bench_") else fn.__name__
