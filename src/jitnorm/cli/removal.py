"""Removing from the cache: what it would be, a question, and what came of it. Kernels in use are left alone."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from jitnorm.cli.entries import Row
from jitnorm.cli.output import plural, size
from jitnorm.jit.cache import Cache


def remove(place: Cache, rows: Sequence[Row], leftovers: Sequence[Path], dry_run: bool, yes: bool) -> None:
    """Removes kernels and leftovers, once that is agreed to. RuntimeError where nobody can be asked."""
    for row in rows:
        if row.in_use:
            _left_alone(row)
    rows = [row for row in rows if not row.in_use]
    weights = {path: _bytes_under(path) for path in leftovers}
    what = " and ".join(plural(n, noun) for n, noun in ((len(rows), "kernel"), (len(leftovers), "leftover")) if n)
    if not what:
        click.echo(f"nothing to remove in {place.root}")
        return
    for row in rows:
        click.echo(f"{'would remove' if dry_run else 'to remove'}  {row.entry.label}  {size(row.size)}")
    for path, weight in weights.items():
        click.echo(f"{'would remove' if dry_run else 'to remove'}  {path.relative_to(place.root)}  {size(weight)}")
    if dry_run:
        click.echo(
            f"{what}, {size(sum(r.size for r in rows) + sum(weights.values()))}: nothing was removed (--dry-run)"
        )
        return
    if not yes and not _agreed(f"Remove {what} from {place.root}?"):
        click.echo("nothing removed")
        raise click.exceptions.Exit(1)
    removed, freed = 0, 0
    for row in rows:
        if place.remove(row.entry):
            removed, freed = removed + 1, freed + row.size
        else:
            _left_alone(row)
    for path, weight in weights.items():
        _discard(path)
        freed += weight
    gone = " and ".join(plural(n, noun) for n, noun in ((removed, "kernel"), (len(leftovers), "leftover")) if n)
    click.echo(f"removed {gone or 'nothing'}, freed {size(freed)}")


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise RuntimeError(f"{question} There is no terminal to ask on: say --yes to do it, or --dry-run to look")
    return click.confirm(question)


def _left_alone(row: Row) -> None:
    click.echo(f"in use, left alone  {row.entry.label}")


def _discard(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except FileNotFoundError:
        pass  # another process was first


def _bytes_under(path: Path) -> int:
    return sum(p.lstat().st_size for p in (path, *path.rglob("*")) if p.is_symlink() or p.is_file())
