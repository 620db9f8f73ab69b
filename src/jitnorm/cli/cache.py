"""`jitnorm cache`: what was built, where it is, whether it is sound, and removing it."""

from __future__ import annotations

import time

import click
import tvm_ffi

from jitnorm._version import __version__
from jitnorm.cli import output
from jitnorm.cli.base import Group, json_option
from jitnorm.cli.entries import Row, all_rows, find_rows, places, rows_of
from jitnorm.cli.filters import Filter, filter_option, max_size_option, older_than_option, select
from jitnorm.cli.removal import remove
from jitnorm.jit import cleanup, locations
from jitnorm.jit.cache import Cache
from jitnorm.jit.entry import MANIFEST, BadEntry
from jitnorm.jit.folder import Folder, UntrustedPath
from jitnorm.jit.library import BadLibrary, ChildCheck, check_library

_MAX_SHOWN_BYTES = 1 << 20

dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")
yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")


@click.group(cls=Group)
def cache() -> None:
    """The folder that keeps compiled kernels."""


@cache.command("dir")
def dir_() -> None:
    """Print the cache's folder, which need not exist. JITNORM_CACHE_DIR names another."""
    click.echo(locations.readable().root)


@cache.command("ls")
@filter_option
@older_than_option
@json_option
def ls(filters: tuple[Filter, ...], older_than: float | None, form: str) -> None:
    """List the kernels in the cache and the prebuilt layer (JITNORM_PREBUILT_DIR)."""
    now, rows = time.time(), all_rows()
    chosen = select(rows, filters, older_than, now)
    if form == "json":
        output.as_json([row.as_json() for row in chosen])
        return
    where = " and ".join(str(place.root) for place in places())
    if not rows:
        click.echo(f"empty: no kernels in {where}")
        return
    if chosen:
        header = ("NAME", "KERNEL", "ARCH", "SIZE", "BUILT", "LAST USED", "STATUS")
        output.table(header, [_cells(row, now) for row in chosen], right=[3])
        click.echo()
    click.echo(f"{output.plural(len(chosen), 'kernel')}, {output.size(sum(row.size for row in chosen))} in {where}")


@cache.command("show")
@click.argument("name", metavar="NAME|PATH")
def show(name: str) -> None:
    """Show all about one kernel: its manifest, its files, its source.

    NAME is as `jitnorm cache ls` prints it, with more of the kernel's id where several have that name; PATH is its
    folder, or a file in it.
    """
    found = find_rows(name)
    if not found:
        raise RuntimeError(
            f"no kernel {name!r} in {' or '.join(str(place.root) for place in places())}: see jitnorm cache ls"
        )
    if len(found) > 1:
        labels = "".join(f"\n{row.entry.label}" for row in found)
        raise RuntimeError(f"{name!r} is the name of {len(found)} kernels. Give one of these:{labels}")
    row = found[0]
    for field, value in row.as_json().items():
        click.echo(f"{field:10} {output.printable(str(value))}")
    with row.entry.open() as folder:
        sizes = {name: folder.size(name) for name in folder.names()}
        click.echo("\nfiles")
        for name, weight in sizes.items():
            click.echo(f"  {output.size(weight):>9}  {output.printable(name)}")
        for name in (MANIFEST, *(name for name in sizes if name.startswith("module."))):
            if name in sizes:
                click.echo(f"\n{output.printable(name)}\n{_text(folder, name)}")


def _text(folder: Folder, name: str) -> str:
    try:
        text = folder.read(name, _MAX_SHOWN_BYTES).decode(errors="replace").rstrip()
        return "\n".join(output.printable(line.expandtabs()) for line in text.split("\n"))
    except (UntrustedPath, OSError) as error:
        return f"cannot be read: {error}"


@cache.command("verify")
@json_option
def verify(form: str) -> None:
    """Compare every kernel's library with the hash it was built with, open it in a process of its own, and check that
    only you can have put it there.

    Removes nothing: a bad kernel is never loaded, and is built again when it is called. Exits 1 if one is bad.
    """
    results = [(row, _problem(row)) for row in all_rows()]
    bad = sum(problem is not None for _, problem in results)
    if form == "json":
        output.as_json(
            [{"id": r.entry.label, "path": str(r.entry.path), "ok": not p, "problem": p} for r, p in results]
        )
    else:
        for row, problem in results:
            click.echo(f"bad  {row.entry.label}: {problem}" if problem else f"ok   {row.entry.label}")
        click.echo(f"{output.plural(len(results), 'kernel')}, {bad} bad" if results else "empty: no kernels")
    if bad:
        raise click.exceptions.Exit(1)


@cache.command("clear")
@filter_option
@older_than_option
@dry_run_option
@yes_option
def clear(filters: tuple[Filter, ...], older_than: float | None, dry_run: bool, yes: bool) -> None:
    """Remove kernels from the cache: all of them, or those that were chosen.

    Kernels that a process has loaded are left alone. Without --filter and --older-than, everything else that is
    jitnorm's goes as well: what failed, damaged and unfinished builds left behind, and what was remembered of compilers
    and of batch-invariant mode's products. Builds under way stay, and so do those of other hosts, which may be under
    way, for a day. The prebuilt layer is never touched.
    """
    done = True
    for place in _own():
        everything = not filters and older_than is None
        chosen = select(list(rows_of(place)), filters, older_than, time.time())
        others = [*cleanup.leftovers(place), *cleanup.records(place)] if everything else []
        done &= remove(place, chosen, others, dry_run, yes)
    if not done:
        raise click.exceptions.Exit(1)


@cache.command("prune")
@older_than_option
@max_size_option
@dry_run_option
@yes_option
def prune(older_than: float | None, max_size: int | None, dry_run: bool, yes: bool) -> None:
    """Remove what is no longer of use.

    That is what failed, damaged and unfinished builds left behind, and kernels that nobody has used for long
    (--older-than) or for the longest time (--max-size); with neither option, kernels that another version of jitnorm or
    tvm-ffi built.
    Kernels that a process has loaded are left alone.
    """
    done = True
    for place in _own():
        rows = list(rows_of(place))
        if older_than is None and max_size is None:
            chosen = [row for row in rows if _is_stale(row)]
        else:
            chosen = select(rows, (), older_than, time.time()) if older_than is not None else []
            if max_size is not None:
                chosen += _least_recently_used([row for row in rows if row.in_use or row not in chosen], max_size)
        done &= remove(place, chosen, cleanup.leftovers(place), dry_run, yes)
    if not done:
        raise click.exceptions.Exit(1)


def _own() -> list[Cache]:
    own = [place for place in places() if not place.prebuilt]
    if not own:
        raise RuntimeError(
            "JITNORM_CACHE_DIR and JITNORM_PREBUILT_DIR are one folder: the prebuilt layer is never written"
        )
    return own


def _is_stale(row: Row) -> bool:
    try:
        manifest = row.entry.manifest
    except BadEntry:
        return True
    return (manifest.get("jitnorm"), manifest.get("tvm_ffi")) != (__version__, tvm_ffi.__version__)


def _least_recently_used(rows: list[Row], max_size: int) -> list[Row]:
    """Those to remove so that the rest takes no more than `max_size` bytes."""
    total, chosen = sum(row.size for row in rows), []
    for row in sorted((row for row in rows if not row.in_use), key=lambda row: row.last_used):
        if total <= max_size:
            break
        chosen.append(row)
        total -= row.size
    return chosen


def _problem(row: Row) -> str | None:
    try:
        content = row.entry.verify()
        library = check_library(content, [])
        with ChildCheck() as child:
            child.check(content, library)
    except (BadEntry, BadLibrary, OSError) as problem:
        return str(problem)
    return None


def _cells(row: Row, now: float) -> tuple[str, ...]:
    size, used = output.size(row.size), output.age(now - row.last_used)
    return row.name, row.kernel, row.arch, size, output.date(row.built), used, row.status
