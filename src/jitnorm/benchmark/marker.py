"""Declare benchmarks as decorated functions, in the style of pytest.

    from jitnorm.benchmark import marker

    @marker.parametrize("hidden_size", [1024, 4096], [4096])
    @marker.benchmark("impl", ["jitnorm", "torch"])
    def bench(hidden_size, impl):
        x, weight = marker.create_random(64, hidden_size), marker.create_random(hidden_size)
        return marker.do_bench(FUNCTIONS[impl], input_args=(x, weight))

    if __name__ == "__main__":
        bench.main()

docs/guides/benchmarking.md is the guide.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
import torch

from jitnorm.benchmark import runner, settings
from jitnorm.benchmark.call import create_empty, create_random
from jitnorm.benchmark.measure import do_bench
from jitnorm.benchmark.options import format_option
from jitnorm.benchmark.report import create_figure, format_csv, format_table, save_plot
from jitnorm.benchmark.results import COPIES, COPY, UNITS, BenchResult, Report
from jitnorm.core.checks import DTYPE_NAMES
from jitnorm.jit.files import write_text

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


_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)


class Benchmark:
    """A function of the axes of a grid that returns the BenchResult of one point. A call is a call of the function."""

    def __init__(self, fn: Callable[..., BenchResult], line_axis: runner.Axis, unit: str) -> None:
        self.fn, self.line_axis, self.unit = fn, line_axis, unit
        self.axes: list[runner.Axis] = []
        self.name = _benchmark_name(fn)
        self.__doc__ = fn.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> BenchResult:
        return self.fn(*args, **kwargs)

    @property
    def names(self) -> list[str]:
        """Return the names of all axes, the implementations' last."""
        return [name for axis in (*self.axes, self.line_axis) for name in axis.names]

    def points(self, full: bool | None = None, filters: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Return the rows; by default those of the short lists in CI (`CI=true`, `JITNORM_BENCH_CI=1`), else all."""
        runner.check_complete(self.fn, self.names)
        return runner.list_points(self.axes, not settings.is_ci() if full is None else full, filters)

    def explain_no_rows(self, full: bool | None, filters: Sequence[str]) -> str:
        """Return the error message for filters that no row meets: the values that there are."""
        rows = self.points(full)
        names = dict.fromkeys(runner.parse_filter(text, self.names)[0] for text in filters)
        values = (f"{name} is {', '.join(dict.fromkeys(str(row[name]) for row in rows))}" for name in names)
        return f"no row meets {' and '.join(filters)}: {'; '.join(values)}"

    def lines(self, impl: Sequence[str] | None = None) -> list[str]:
        """Return the implementations: all, or those in `impl`."""
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
        output_format: str = "table",
        output: Path | None = None,
    ) -> Report:
        """Measure the grid, print the results and return the report.

        Args:
            full: True for all values, False for the short lists; None for the short lists in CI.
            filters: conditions such as "num_tokens>=64", all of which a row must meet.
            impl: the implementations; None for all.
            copy: measure a copy of the same bytes in each row, and show the fraction of its bandwidth.
            device, dtype: the defaults of `create_random` and `create_empty`: CUDA if there is a GPU, and bfloat16.
            cold: False lets arguments stay in the cache.
            seconds: the time limit for each implementation in a row to become stable.
            output_format: "table", or "json" for every sample.
            output: a file for the JSON. It is written after each row, so that an interrupted run leaves its rows.

        Raises:
            TypeError: a parameter of the function is not an axis.
            ValueError: a filter, an implementation or a format does not exist, or `seconds` is not finite.
        """
        points, lines = self.points(full, filters), self.lines(impl)
        if seconds is not None and not 0 <= seconds < math.inf:
            raise ValueError(f"seconds must be a finite number and 0 or more, got {seconds}")
        if copy and COPY in lines:
            raise ValueError(f"{COPY!r} is reserved for the copy that the framework measures")
        if output_format not in ("table", "json"):
            raise ValueError(f"output_format must be table or json, got {output_format!r}")
        axes = [name for axis in self.axes for name in axis.names]
        report = Report(self.name, self.unit, axes, lines)
        run_device = torch.device(device) if device is not None else None
        with settings.override_settings(device=run_device, dtype=dtype, cold=cold, seconds=seconds):
            runner.run_grid(self.fn, points, self.line_axis.names[0], lines, report, copy, output)
        print(report.to_json().rstrip("\n") if output_format == "json" else format_table(report))
        return report

    def main(self, args: Sequence[str] | None = None, *, copy: bool = False) -> NoReturn:
        """Run the command line of a benchmark file. The exit status is 1 if a cell ended with an exception."""
        command(self, copy=copy).main(args, standalone_mode=True)
        raise SystemExit  # unreachable: click ends the process


def benchmark(
    name: str, values: Sequence[str], *, unit: str = "us"
) -> Callable[[Callable[..., BenchResult]], Benchmark]:
    """Declare a benchmark. This is the innermost decorator.

    Args:
        name: the parameter that takes the implementation.
        values: the implementations, which are compared within each row.
        unit: of the table: ns, us, ms or s.
    """
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {', '.join(UNITS)}, got {unit!r}")
    axis = runner.Axis.of(name, values, None)
    if len(axis.names) != 1:
        raise ValueError(f"the implementation is one parameter, got {name!r}")

    def decorate(fn: Callable[..., BenchResult]) -> Benchmark:
        if isinstance(fn, Benchmark):
            raise TypeError("@marker.benchmark is the innermost decorator, and there is one")
        runner.check_accepted(fn, axis.names, ())
        decorated = Benchmark(fn, axis, unit)
        _check_if_outermost(decorated)
        return decorated

    return decorate


def parametrize(
    names: str, values: Sequence[Any], short: Sequence[Any] | None = None
) -> Callable[[Benchmark], Benchmark]:
    """Add an axis to the grid. The axis that is written first varies slowest.

    Args:
        names: a parameter, or several that vary together, such as "a,b".
        values: its values; tuples for several parameters.
        short: the values for CI; by default all.
    """
    axis = runner.Axis.of(names, values, short)

    def decorate(decorated: Benchmark) -> Benchmark:
        if not isinstance(decorated, Benchmark):
            raise TypeError(f"@marker.parametrize({names!r}) goes above @marker.benchmark, which is innermost")
        runner.check_accepted(decorated.fn, axis.names, decorated.names)
        decorated.axes.insert(0, axis)
        _check_if_outermost(decorated)
        return decorated

    return decorate


def skip(reason: str) -> NoReturn:
    """Make the cell that is being measured N/A; the reason is listed below the table."""
    raise runner.Skip(reason)


def _check_if_outermost(decorated: Benchmark) -> None:
    """Raise TypeError where a function is decorated, rather than run, if a parameter is not an axis.

    While a decorator is applied its caller is at that decorator's line, and a function begins with the line of its
    first. (Not for a lambda, whose whole expression may be one line. `points` checks all again.)
    """
    caller, code = sys._getframe(2), decorated.fn.__code__
    position = (caller.f_code.co_filename, caller.f_lineno)
    if position == (code.co_filename, code.co_firstlineno) and decorated.fn.__name__ != "<lambda>":
        runner.check_complete(decorated.fn, decorated.names)


def _benchmark_name(fn: Callable[..., Any]) -> str:
    """Return "rmsnorm" for a function in bench_rmsnorm.py, else the name of the function."""
    file = Path(fn.__code__.co_filename).stem
    return file.removeprefix("bench_") if file.startswith("bench_") else fn.__name__


def _check_folder(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Raise for a file in a folder that does not exist, before the run rather than after it."""
    if path and not path.parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(path.parent)!r}", ctx, param)
    return path


def command(benchmark: Benchmark, copy: bool) -> click.Command:
    """Return the command line of a benchmark, such as `--filter hidden_size=4096 --impl jitnorm --output FILE`."""
    lines = benchmark.lines()

    @click.command(help=(benchmark.__doc__ or benchmark.name).strip())
    @click.option("--filter", "filters", multiple=True, metavar="AXIS=VALUE", help="Also != < <= > >=. Repeatable.")
    @click.option("--full/--short", default=None, help="All values, or the few for CI. [default: short in CI]")
    @click.option("--list", "only_list", is_flag=True, help="Print the rows without measuring them.")
    @click.option("--impl", multiple=True, type=click.Choice(lines), help="Only these implementations. Repeatable.")
    @click.option("--copy/--no-copy", default=copy, show_default=True, help="Measure a copy of the same bytes as well.")
    @click.option("--device", help="By default CUDA if there is a GPU, else the CPU.")
    @click.option("--dtype", type=click.Choice(list(_DTYPES)), default="bf16", show_default=True)
    @click.option("--warm", is_flag=True, help="Let the arguments stay in the cache.")
    @click.option(
        "--seconds",
        type=click.FloatRange(min=0),
        help="Time limit for each implementation in a row to become stable. [1]",
    )
    @format_option
    @click.option(
        "--output",
        type=_FILE,
        callback=_check_folder,
        help="Write JSON after each row: machine, versions, every sample.",
    )
    @click.option("--csv", "csv_file", type=_FILE, callback=_check_folder, help="Write the table as CSV.")
    @click.option(
        "--plot", "plot_file", type=_FILE, callback=_check_folder, help="Plot bandwidth over bytes, with the copy's."
    )
    def run(
        filters: tuple[str, ...],
        full: bool | None,
        only_list: bool,
        impl: tuple[str, ...],
        copy: bool,
        device: str | None,
        dtype: str,
        warm: bool,
        seconds: float | None,
        output_format: str,
        output: Path | None,
        csv_file: Path | None,
        plot_file: Path | None,
    ) -> None:
        try:
            points = benchmark.points(full, filters)
            if filters and not points:
                raise ValueError(benchmark.explain_no_rows(full, filters))
            if only_list:
                _print_points(points, output_format)
                return
            if plot_file:
                create_figure()  # raises before the run if matplotlib is missing
            report = benchmark.run(
                full=full,
                filters=filters,
                impl=impl,
                copy=copy or plot_file is not None,
                device=_parse_device(device),
                dtype=_DTYPES[dtype],
                cold=not warm,
                seconds=seconds,
                output_format=output_format,
                output=output,
            )
            if csv_file:
                write_text(csv_file, format_csv(report))
            if plot_file:
                save_plot(report, plot_file)
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            raise click.ClickException(str(error)) from error
        if report.failed:
            raise click.exceptions.Exit(1)
        if not any(isinstance(cell, BenchResult) for _, line, cell in report.cells() if line not in COPIES):
            raise click.ClickException("nothing was measured: no implementation is available here")

    return run


def _print_points(points: list[dict[str, Any]], output_format: str) -> None:
    if output_format == "json":
        click.echo(json.dumps(points, indent=1, default=str))
        return
    for point in points:
        click.echo(" ".join(f"{axis}={value}" for axis, value in point.items()) or "the only row")


def _parse_device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be such as cpu, cuda or cuda:1, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch finds no GPU")
    return device
