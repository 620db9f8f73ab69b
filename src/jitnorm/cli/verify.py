"""`jitnorm verify-invariance`: whether a row's bits depend on its batch, on this machine."""

from __future__ import annotations

import contextlib
from dataclasses import asdict

import click
import torch

from jitnorm.batch_invariant import set_batch_invariant_mode
from jitnorm.batch_invariant.verify import OPERATORS, WAYS, Result, verify
from jitnorm.checks import DTYPE_NAMES
from jitnorm.cli import output
from jitnorm.cli.base import Command

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@click.command("verify-invariance", cls=Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--op", type=click.Choice(list(OPERATORS)), multiple=True, help="Repeatable; by default all.")
@click.option("--shape", multiple=True, help="4096x14336: N and K of a product; 4096: the length of a row. Repeatable.")
@click.option("--dtype", type=click.Choice(list(_DTYPES)), multiple=True, help="Repeatable; by default all.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), help="By default CUDA where torch sees a GPU.")
@click.option("--way", type=click.Choice(WAYS), multiple=True, help="Repeatable; by default all. The last is slow.")
@click.option("--max-batch", type=click.IntRange(min=1), default=256, show_default=True, help="Rows at most.")
@click.option("--outside", is_flag=True, help="Without the mode, to see what it is for.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def verify_invariance(
    op: tuple[str, ...],
    shape: tuple[str, ...],
    dtype: tuple[str, ...],
    device: str | None,
    way: tuple[str, ...],
    max_batch: int,
    outside: bool,
    as_json: bool,
) -> None:
    """Compare a row alone with the same row in batches, bit by bit, in the mode that makes them one.

    At the first, the middle and the last place of batches of 1 to --max-batch rows; beside zeros, large values and
    NaNs; in other strides; eager, compiled and, on CUDA, captured in a graph. Stops at the first bit that differs, and
    exits 1.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    results: list[Result] = []
    with contextlib.nullcontext() if outside else set_batch_invariant_mode():
        for name in op or OPERATORS:
            operator = OPERATORS[name]
            shapes = [_shape(text, operator.sizes) for text in shape] or operator.shapes[device]
            for size in shapes:
                for d in [_DTYPES[text] for text in dtype] or operator.dtypes:
                    results.append(verify(name, operator, size, d, device, max_batch, way or WAYS))
                    if results[-1].difference:
                        _report(results, as_json)
                        raise click.exceptions.Exit(1)
    _report(results, as_json)


def _shape(text: str, sizes: str) -> tuple[int, ...]:
    numbers = text.split("x")
    if len(numbers) != len(sizes.split("x")) or not all(n.isdecimal() and int(n) for n in numbers):
        raise click.UsageError(f"--shape must be {sizes} here, such as {'x'.join(['4096'] * len(sizes.split('x')))}")
    return tuple(int(n) for n in numbers)


def _report(results: list[Result], as_json: bool) -> None:
    if as_json:
        output.as_json([asdict(result) for result in results])
        return
    output.table(
        ("OP", "SHAPE", "DTYPE", "DEVICE", "COMPARED", "RESULT"),
        [
            (
                r.op,
                "x".join(map(str, r.shape)),
                r.dtype,
                r.device,
                str(r.compared),
                "differs" if r.difference else "same",
            )
            for r in results
        ],
        right=(4,),
    )
    for r in results:
        if r.difference:
            click.echo(f"{r.op}, {r.dtype}, {'x'.join(map(str, r.shape))}: {r.difference}", err=True)
