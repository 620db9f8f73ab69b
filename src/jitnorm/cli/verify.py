"""`jitnorm verify-invariance`: check on this machine whether a row's bits depend on its batch."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import asdict

import click
import torch

from jitnorm.batch_invariant import set_batch_invariant_mode
from jitnorm.batch_invariant.verify import MODES, OPERATORS, Result, verify
from jitnorm.benchmark.options import format_option
from jitnorm.benchmark.progress import ProgressBar
from jitnorm.cli import output
from jitnorm.cli.base import Command, several
from jitnorm.core.checks import DTYPE_NAMES

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
_HEADER = ("OP", "SHAPE", "DTYPE", "DEVICE", "COMPARED", "RESULT")
_RIGHT_ALIGNED = (4,)
_SIZE = re.compile(r"0*[1-9][0-9]{0,8}")  # a larger size is a mistake, and would exhaust the memory


@click.command("verify-invariance", cls=Command, short_help="Compare rows alone and in batches, bit by bit.")
@click.option("--op", **several(click.Choice(list(OPERATORS))), metavar="NAME", help=f"{', '.join(OPERATORS)}.")
@click.option("--shape", **several(click.STRING), help="4096x14336: N and K of a GEMM; 4096: the length of a row.")
@click.option("--dtype", **several(click.Choice(list(_DTYPES))), help="By default all.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="By default CUDA where torch sees a GPU.")
@click.option(
    "--mode",
    **several(click.Choice(MODES)),
    help="Execution modes, by default all; cudagraph is for CUDA only, and compiled is slow.",
)
@click.option("--max-batch", type=click.IntRange(min=2), default=256, show_default=True, help="The largest batch size.")
@click.option("--outside", is_flag=True, help="Without batch-invariant mode, to see what it changes.")
@format_option
def verify_invariance(
    op: tuple[str, ...],
    shape: tuple[str, ...],
    dtype: tuple[str, ...],
    device: str | None,
    mode: tuple[str, ...],
    max_batch: int,
    outside: bool,
    output_format: str,
) -> None:
    """Compare a row alone with the same row in batches, bit by bit, in batch-invariant mode.

    The row is compared at the first, the middle and the last place of batches of 1 to --max-batch rows; beside zeros,
    large values and NaNs; in other strides; eager, compiled and, on CUDA, in a CUDA graph. Stops at the first
    difference and exits 1, and also exits 1 if nothing was compared. All operators take some minutes. For several
    values, give an option a list (mm,bmm) or repeat it.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda needs a GPU, and torch sees no GPU here")
    if device == "cpu" and "cudagraph" in mode:
        raise click.UsageError("--mode cudagraph needs --device cuda, got the CPU")
    dtypes = [_DTYPES[text] for text in dtype]
    for name in op:
        accepted = OPERATORS[name].dtypes
        if unaccepted := [DTYPE_NAMES[d] for d in dtypes if d not in accepted]:
            names = " or ".join(DTYPE_NAMES[d] for d in accepted)
            raise click.UsageError(f"--dtype must be {names} for {name}, got {unaccepted[0]}")
    plan = [
        (name, size, d)
        for name in op or OPERATORS
        for size in [_shape(text, name) for text in shape] or OPERATORS[name].shapes[device]
        for d in dtypes or OPERATORS[name].dtypes
        if d in OPERATORS[name].dtypes
    ]
    results: list[Result] = []
    widths = _widths(plan, device)
    if output_format == "table":
        output.head(_HEADER, widths, _RIGHT_ALIGNED)
    with contextlib.nullcontext() if outside else set_batch_invariant_mode(), warnings.catch_warnings():
        # The mode disables Inductor's caches, and dynamo warns about that at each compilation.
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
        with ProgressBar(plan) as bar:
            for name, size, d in bar:
                bar.set_postfix_str(f"{name} {_text(size)} {DTYPE_NAMES[d]}")
                results.append(verify(name, OPERATORS[name], size, d, device, max_batch, mode or MODES))
                if output_format == "table":
                    with ProgressBar.external_write_mode():
                        output.line(_cells(results[-1]), widths, _RIGHT_ALIGNED)
                if results[-1].difference:
                    break
    last = results[-1]
    if output_format == "json":
        output.as_json([asdict(result) for result in results])
    elif last.difference:
        click.echo(f"{last.op}, {last.dtype}, {_text(last.shape)}: {last.difference}", err=True)
    if last.difference:
        raise click.exceptions.Exit(1)
    if nothing := dict.fromkeys(result.op for result in results if not result.compared):
        raise RuntimeError(f"nothing was compared of {', '.join(nothing)}")


def _shape(text: str, op: str) -> tuple[int, ...]:
    """Return the sizes that `text` names. Raise click.UsageError unless it names those of the operator."""
    sizes = OPERATORS[op].sizes
    numbers = text.split("x")
    if len(numbers) != len(sizes.split("x")) or not all(_SIZE.fullmatch(n) for n in numbers):
        example = _text((4096,) * len(sizes.split("x")))
        shown = text if len(text) <= 60 else f"{text[:60]}..."
        raise click.UsageError(f"--shape must be {sizes} for {op}, such as {example}, got {shown!r}")
    return tuple(int(n) for n in numbers)


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _widths(plan: Sequence[tuple[str, tuple[int, ...], torch.dtype]], device: str) -> list[int]:
    """Return the widths of the columns, before their cells are known."""
    rows = [(name, _text(size), DTYPE_NAMES[d], device, "", "not compared") for name, size, d in plan]
    return [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]


def _cells(result: Result) -> list[str]:
    found = "differs" if result.difference else "same" if result.compared else "not compared"
    return [result.op, _text(result.shape), result.dtype, result.device, str(result.compared), found]
