"""Removing from the cache: what it would be, a question, and what came of it. Kernels in use are left alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from jitnorm.cli.entries import Row
from jitnorm.cli.output import plural, size
from jitnorm.jit import cleanup
from jitnorm.jit.cache import Cache
from jitnorm.jit.folder import UntrustedPath


def remove(place: Cache, rows: Sequence[Row], leftovers: Sequence[Path], dry_run: bool, yes: bool) -> bool:
    """Remove kernels and leftovers, once that is agreed to.

    What cannot be removed is said, and does not stop the rest.

    Returns:
        Whether everything that is not in use is gone.

    Raises:
        RuntimeError: nobody can be asked.
    """
    for row in rows:
        if row.in_use:
            _left_alone(row)
    rows = [row for row in rows if not row.in_use]
    weights = {path: cleanup.size_of(place, path) for path in leftovers}
    what = " and ".join(plural(n, noun) for n, noun in ((len(rows), "kernel"), (len(leftovers), "leftover")) if n)
    if not what:
        click.echo(f"nothing to remove in {place.root}")
        return True
    for row in rows:
        click.echo(f"{'would remove' if dry_run else 'to remove'}  {row.entry.label}  {size(row.size)}")
    for path, weight in weights.items():
        click.echo(f"{'would remove' if dry_run else 'to remove'}  {path.relative_to(place.root)}  {size(weight)}")
    if dry_run:
        click.echo(
            f"{what}, {size(sum(r.size for r in rows) + sum(weights.values()))}: nothing was removed (--dry-run)"
        )
        return True
    if not yes and not _agreed(f"Remove {what} from {place.root}?"):
        click.echo("nothing removed")
        raise click.exceptions.Exit(1)
    kernels, others, freed, failed = 0, 0, 0, 0
    for row in rows:
        gone = _attempt(row.entry.label, lambda row=row: place.remove(row.entry))  # type: ignore[misc]
        if gone is False:
            _left_alone(row)
        kernels, freed, failed = kernels + bool(gone), freed + bool(gone) * row.size, failed + (gone is None)
    for path, weight in weights.items():
        label = str(path.relative_to(place.root))
        gone = _attempt(label, lambda path=path: cleanup.remove(place, path))  # type: ignore[misc]
        others, freed, failed = others + bool(gone), freed + bool(gone) * weight, failed + (gone is None)
    removed = " and ".join(plural(n, noun) for n, noun in ((kernels, "kernel"), (others, "leftover")) if n)
    click.echo(f"removed {removed or 'nothing'}, freed {size(freed)}")
    return not failed


def _attempt(label: str, action: Callable[[], bool]) -> bool | None:
    """What `action` returns; None, and a line that says why, where it fails."""
    try:
        return action()
    except (OSError, UntrustedPath) as error:
        click.echo(f"cannot be removed  {label}: {error}", err=True)
        return None


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise RuntimeError(f"{question} There is no terminal to ask on: say --yes to do it, or --dry-run to look")
    return click.confirm(question)


def _left_alone(row: Row) -> None:
    click.echo(f"in use, left alone  {row.entry.label}")
