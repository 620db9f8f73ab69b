"""`jitnorm bench`: compare two runs of a benchmark, and measure a server. Each imports what it needs when it is run."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import click

from jitnorm.benchmark.options import format_option
from jitnorm.cli import output
from jitnorm.cli.base import BadValue, Group

_JSON = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(cls=Group)
def bench() -> None:
    """Compare runs of a benchmark, and measure a server."""


@bench.command(short_help="Compare two runs of a benchmark.")
@click.argument("a", type=_JSON, metavar="A.json")
@click.argument("b", type=_JSON, metavar="B.json")
@click.option(
    "--threshold",
    type=click.FloatRange(min=0),
    default=2.0,
    show_default=True,
    help="Report smaller changes, in per cent, as SAME.",
)
@format_option
def compare(a: Path, b: Path, threshold: float, output_format: str) -> None:
    """Report whether each row is SAME, FASTER, SLOWER or AMBIGUOUS in B, from the samples of both.

    A.json and B.json are files that a benchmark wrote with --output. Exits 1 if a row got slower beyond noise or
    failed, and if every row is AMBIGUOUS.
    """
    from jitnorm.benchmark.compare import Verdict, comparison_rows, differing_conditions
    from jitnorm.benchmark.compare import compare as compared
    from jitnorm.benchmark.results import Report

    before, after = Report.read(a), Report.read(b)
    if before.name != after.name:
        raise ValueError(f"{a} is of the benchmark {before.name}, {b} of {after.name}")
    found = compared(before, after, threshold / 100)
    if not found:
        raise ValueError(f"{a} and {b} have no row and implementation in common")
    for text in differing_conditions(before, after):
        click.echo(f"warning: {text}", err=True)
    counts = Counter(comparison.verdict for comparison in found)
    if output_format == "json":
        output.as_json([comparison.as_dict() for comparison in found])
    else:
        header = ("ROW", "IMPL", f"A {before.unit}", f"B {before.unit}", "CHANGE", "VERDICT", "WHY")
        output.table(header, comparison_rows(found, before.unit), right=[2, 3, 4])
        click.echo("\n" + ", ".join(f"{counts[v]} {v.value}" for v in Verdict if counts[v]))
        if gone := len(before.results()) - len(found):
            click.echo(f"{gone} more in {a} have no counterpart in {b}")
    if counts[Verdict.AMBIGUOUS] == len(found):
        raise RuntimeError("every row is AMBIGUOUS, so that these two runs tell nothing: see WHY")
    if counts[Verdict.SLOWER] or counts[Verdict.FAILED]:
        raise click.exceptions.Exit(1)


@bench.command(short_help="Send one batch to a server, and time it.")
@click.option("--url", required=True, help="Send requests to this URL, such as http://localhost:30000.")
@click.option(
    "--api", type=click.Choice(["openai", "sglang"]), default="openai", show_default=True, help="Use this API."
)
@click.option(
    "--model", default="default", show_default=True, help="Send this model name, which the OpenAI API requires."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Send this many requests.")
@click.option(
    "--input-len", type=click.IntRange(min=1), default=1024, show_default=True, help="Send prompts of this many tokens."
)
@click.option(
    "--output-len",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Request answers of this many tokens.",
)
@click.option("--timeout", type=float, default=120.0, show_default=True, help="Stop after this many seconds.")
@format_option
def server(
    url: str, api: str, model: str, batch_size: int, input_len: int, output_len: int, timeout: float, output_format: str
) -> None:
    """Send one batch, and report time to first token, inter-token latency, throughput and cache hits.

    All requests start together. Exits 1 if one of them fails; the rest is reported.
    """
    try:
        from jitnorm.benchmark.server import run_batch
    except ImportError as error:  # of httpx: the message says what to install
        raise RuntimeError(str(error)) from error

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        try:
            result = run_batch(url, api, model, batch_size, input_len, output_len, timeout)
        except ValueError as error:  # an argument: what goes wrong with a request is in the result
            raise BadValue(str(error)) from error
    for warning in caught:
        click.echo(f"warning: {warning.message}", err=True)
    if output_format == "json":
        output.as_json(result.as_dict())
    else:
        click.echo(result.as_text())
    if result.errors:
        raise click.exceptions.Exit(1)
