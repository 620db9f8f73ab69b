"""Define the options of a run: as settings that `do_bench` reads, and as the command line of a benchmark file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch

from jitnorm.benchmark.report import create_figure, format_csv, save_plot
from jitnorm.benchmark.results import COPY, BenchResult
from jitnorm.core.checks import DTYPE_NAMES
from jitnorm.jit.files import write_text

if TYPE_CHECKING:
    from jitnorm.benchmark.marker import Benchmark

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)


@dataclass(frozen=True)
class Settings:
    """The settings of a run."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    cold: bool = True  # the arguments of a call are in no cache
    seconds: float = 1.0  # the time limit for each implementation in a row
    rounds_by_runner: bool = False  # do_bench measures one round, because the runner lets implementations take turns


_current: Settings | None = None


def current_settings() -> Settings:
    """Return the settings of the current run, or the defaults outside of one."""
    return _current or Settings(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextlib.contextmanager
def override_settings(**changes: Any) -> Iterator[Settings]:
    """Change settings inside a `with` block; None leaves a setting unchanged."""
    global _current
    before = _current
    _current = replace(current_settings(), **{name: value for name, value in changes.items() if value is not None})
    try:
        yield _current
    finally:
        _current = before


def is_ci() -> bool:
    """Return whether to use the short lists of values: CI=true, as most services set it, or JITNORM_BENCH_CI=1."""
    return os.environ.get("CI", "").lower() in ("true", "1") or os.environ.get("JITNORM_BENCH_CI") == "1"


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
    @click.option(
        "--format",
        "output_format",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="What to print: a table for people, or JSON for programs.",
    )
    @click.option("--output", type=_FILE, callback=_check_folder, help="Write JSON: machine, versions, every sample.")
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
            )
            if output:
                report.write(output)
            if csv_file:
                write_text(csv_file, format_csv(report))
            if plot_file:
                save_plot(report, plot_file)
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            raise click.ClickException(str(error)) from error
        if report.failed:
            raise click.exceptions.Exit(1)
        if not any(isinstance(cell, BenchResult) for _, line, cell in report.cells() if line != COPY):
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
