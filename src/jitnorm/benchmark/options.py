"""The command line of a bench file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import torch

from jitnorm.benchmark.report import COPY
from jitnorm.benchmark.result import BenchResult
from jitnorm.benchmark.table import as_csv
from jitnorm.core.checks import DTYPE_NAMES

if TYPE_CHECKING:
    from jitnorm.benchmark.marker import Benchmark

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_FILE = click.Path(dir_okay=False, writable=True, path_type=Path)


def _in_a_folder(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """A file is written at the end of a run, which nobody wants to lose: its folder is looked for at the beginning."""
    if path and not path.parent.is_dir():
        raise click.BadParameter(f"there is no folder {str(path.parent)!r}", ctx, param)
    return path


def command(benchmark: Benchmark, copy: bool) -> click.Command:
    """`python benchmarks/bench_rmsnorm.py --filter hidden_size=4096 --impl jitnorm --json FILE`."""
    lines = benchmark.lines()

    @click.command(help=(benchmark.__doc__ or benchmark.name).strip())
    @click.option("--filter", "filters", multiple=True, metavar="AXIS=VALUE", help="Also != < <= > >=. Repeatable.")
    @click.option("--full/--short", default=None, help="The long lists of values, or CI's. [default: short in CI]")
    @click.option("--list", "only_list", is_flag=True, help="Print the rows, and measure nothing.")
    @click.option("--impl", multiple=True, type=click.Choice(lines), help="Only these. Repeatable.")
    @click.option("--copy/--no-copy", default=copy, show_default=True, help="A copy of the same bytes in each row.")
    @click.option("--device", help="By default CUDA where torch sees a GPU, else the CPU.")
    @click.option("--dtype", type=click.Choice(list(_DTYPES)), default="bf16", show_default=True)
    @click.option("--warm", is_flag=True, help="Let the arguments stay in the cache.")
    @click.option(
        "--seconds",
        type=click.FloatRange(min=0),
        help="At most, for each implementation in a row, for quiet figures. [1]",
    )
    @click.option("--json", "json_file", type=_FILE, callback=_in_a_folder, help="Machine, versions and every sample.")
    @click.option("--csv", "csv_file", type=_FILE, callback=_in_a_folder)
    @click.option(
        "--plot",
        "plot_file",
        type=_FILE,
        callback=_in_a_folder,
        help="Bandwidth over size, with the copy as the ceiling.",
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
        json_file: Path | None,
        csv_file: Path | None,
        plot_file: Path | None,
    ) -> None:
        try:
            points = benchmark.points(full, filters)
            if filters and not points:
                raise ValueError(benchmark.no_rows(full, filters))
            if only_list:
                for point in points:
                    click.echo(" ".join(f"{axis}={value}" for axis, value in point.items()) or "the only row")
                return
            if plot_file:
                from jitnorm.benchmark.plot import plot, require_matplotlib

                require_matplotlib()
            report = benchmark.run(
                full=full,
                filters=filters,
                impl=impl,
                copy=copy or plot_file is not None,
                device=_device(device),
                dtype=_DTYPES[dtype],
                cold=not warm,
                seconds=seconds,
            )
            if json_file:
                json_file.write_text(report.to_json())
            if csv_file:
                csv_file.write_text(as_csv(report))
            if plot_file:
                plot(report, plot_file)
        except (ValueError, TypeError, RuntimeError, OSError) as error:
            raise click.ClickException(str(error)) from error
        if report.failed:
            raise click.exceptions.Exit(1)
        if not any(isinstance(cell, BenchResult) for _, line, cell in report.cells() if line != COPY):
            raise click.ClickException("nothing was measured: no implementation is available here")

    return run


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be such as cpu, cuda or cuda:1, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here")
    return device
