"""`jitnorm cache`: list, show, verify, export, import, push and remove compiled kernels."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from jitnorm._version import __version__
from jitnorm.benchmark.options import format_option
from jitnorm.cli import output
from jitnorm.cli.archive import export, import_
from jitnorm.cli.base import Group
from jitnorm.cli.filters import Filter, filter_option, max_size_option, older_than_option, select
from jitnorm.cli.kernels import CachedKernel, all_kernels, caches, find_kernels, kernels_in, own_caches
from jitnorm.cli.push import push
from jitnorm.jit import cleanup, locations
from jitnorm.jit.cache import Cache
from jitnorm.jit.entry import MANIFEST, BadEntry
from jitnorm.jit.folder import Folder, UntrustedPath

_MAX_SHOWN_BYTES = 1 << 20

dry_run_option = click.option("--dry-run", is_flag=True, help="Print what would be removed, and remove nothing.")
yes_option = click.option("--yes", "-y", is_flag=True, help="Remove without asking.")


@click.group(cls=Group)
def cache() -> None:
    """List, verify, move and remove compiled kernels."""


cache.add_command(export)
cache.add_command(import_)
cache.add_command(push)


@cache.command("dir")
def dir_() -> None:
    """Print the cache's folder, which need not exist.

    Set JITNORM_CACHE_DIR to use another one.
    """
    click.echo(locations.readable().root)


@cache.command("ls")
@filter_option
@older_than_option
@format_option
def ls(filters: tuple[Filter, ...], older_than: float | None, output_format: str) -> None:
    """List the kernels in the cache and the prebuilt layers.

    JITNORM_PREBUILT_DIR is the folder of one prebuilt layer; installed packages of jitnorm wheel are others.
    """
    now, kernels = time.time(), all_kernels()
    selected = select(kernels, filters, older_than, now)
    if output_format == "json":
        output.as_json([kernel.as_json() for kernel in selected])
        return
    where = " and ".join(str(each.root) for each in caches())
    if not kernels:
        click.echo(f"empty: no kernels in {where}")
        return
    if selected:
        header = ("NAME", "KERNEL", "ARCH", "SIZE", "BUILT", "LAST USED", "STATUS")
        output.table(header, [_cells(kernel, now) for kernel in selected], right=[3])
        click.echo()
    total = output.size(sum(kernel.size for kernel in selected))
    click.echo(f"{output.plural(len(selected), 'kernel')}, {total} in {where}")


def _cells(kernel: CachedKernel, now: float) -> tuple[str, ...]:
    size, last_used = output.size(kernel.size), output.age(now - kernel.last_used)
    return kernel.name, kernel.kernel, kernel.arch, size, output.date(kernel.built), last_used, kernel.status


@cache.command("show")
@click.argument("name", metavar="NAME|PATH")
@format_option
def show(name: str, output_format: str) -> None:
    """Show a kernel's manifest, files and source.

    NAME is as `jitnorm cache ls` prints it; where several kernels have that name, add the first parts of the kernel's
    id. PATH is its folder, or a file in it.
    """
    found = find_kernels(name)
    if not found:
        where = " or ".join(str(each.root) for each in caches())
        raise RuntimeError(f"no kernel {name!r} in {where}: jitnorm cache ls lists the kernels that are there")
    if len(found) > 1:
        labels = "".join(f"\n{kernel.entry.label}" for kernel in found)
        raise RuntimeError(f"{name!r} is the name of {len(found)} kernels. Give one of these:{labels}")
    kernel = found[0]
    with kernel.entry.open() as folder:
        sizes = {file: folder.size(file) for file in folder.names()}
        texts = [file for file in (MANIFEST, *(f for f in sizes if f.startswith("module."))) if file in sizes]
        contents = {file: _text(folder, file) for file in texts}
    if output_format == "json":
        output.as_json({**kernel.as_json(), "files": sizes, "contents": contents})
        return
    for field, value in kernel.as_json().items():
        click.echo(f"{field:10} {output.printable(str(value))}")
    click.echo("\nfiles")
    for file, size in sizes.items():
        click.echo(f"  {output.size(size):>9}  {output.printable(file)}")
    for file, text in contents.items():
        click.echo(f"\n{output.printable(file)}\n{text}")


def _text(folder: Folder, name: str) -> str:
    try:
        text = folder.read(name, _MAX_SHOWN_BYTES).decode(errors="replace").rstrip()
        return "\n".join(output.printable(line.expandtabs()) for line in text.split("\n"))
    except (UntrustedPath, OSError) as error:
        return f"cannot be read: {error}"


@cache.command("verify")
@format_option
def verify(output_format: str) -> None:
    """Check that every kernel is intact.

    Each kernel's library is compared with the hash that was recorded when it was built, and opened in a process of its
    own; no other user may be able to write to it. Nothing is removed: a bad kernel is never loaded, and is built again
    when it is called. Exits 1 if one is bad.
    """
    from jitnorm.jit.environment import import_tvm_ffi  # here, as no other command needs it

    kernels = all_kernels()
    if kernels:
        import_tvm_ffi()  # CPU kernels depend on its library, which the loader finds only if it is loaded
    results = [(kernel, _problem(kernel)) for kernel in kernels]
    bad = sum(problem is not None for _, problem in results)
    if output_format == "json":
        output.as_json(
            [{"id": k.entry.label, "path": str(k.entry.path), "ok": not p, "problem": p} for k, p in results]
        )
    else:
        for kernel, problem in results:
            click.echo(f"bad  {kernel.entry.label}: {problem}" if problem else f"ok   {kernel.entry.label}")
        click.echo(f"{output.plural(len(results), 'kernel')}, {bad} bad" if results else "empty: no kernels")
    if bad:
        raise click.exceptions.Exit(1)


def _problem(kernel: CachedKernel) -> str | None:
    """Return what is wrong with a kernel, if anything."""
    # Here, as no other command needs it.
    from jitnorm.jit.library import BadLibrary, ChildCheck, check_cubin, check_library

    try:
        content = kernel.entry.verify()
        if kernel.entry.library.suffix == ".cubin":
            check_cubin(content, [kernel.entry.manifest["name"]])
            return None
        library = check_library(content, [])
        with ChildCheck() as child:
            child.check(content, library)
    except (BadEntry, BadLibrary, OSError) as problem:
        return str(problem)
    return None


@cache.command("clear")
@filter_option
@older_than_option
@dry_run_option
@yes_option
def clear(filters: tuple[Filter, ...], older_than: float | None, dry_run: bool, yes: bool) -> None:
    """Remove all kernels, or selected ones.

    --filter and --older-than select kernels. Kernels that a process has loaded are kept. Without --filter and --older-
    than, jitnorm's other files are removed as well: leftovers of failed, damaged and unfinished builds, and records of
    compiler versions, of batch-invariant mode's checks and of the fastest GEMMs. Builds that are running are kept;
    builds of other hosts are taken to be running for a day. Prebuilt layers are never written.
    """
    complete = True
    for own in own_caches():
        everything = not filters and older_than is None
        selected = select(list(kernels_in(own)), filters, older_than, time.time())
        others = [*cleanup.leftovers(own), *cleanup.records(own)] if everything else []
        complete &= _remove(own, selected, others, dry_run, yes)
    if not complete:
        raise click.exceptions.Exit(1)


@cache.command("prune")
@older_than_option
@max_size_option
@dry_run_option
@yes_option
def prune(older_than: float | None, max_size: int | None, dry_run: bool, yes: bool) -> None:
    """Remove leftovers of builds, and kernels that are no longer used.

    Leftovers are those of failed, damaged and unfinished builds. The kernels are those that have not been loaded for
    some time (--older-than), or the least recently used ones (--max-size); with neither option, those that another
    version of jitnorm or tvm-ffi built. Kernels that a process has loaded are kept.
    """
    complete = True
    for own in own_caches():
        kernels = list(kernels_in(own))
        if older_than is None and max_size is None:
            selected = [kernel for kernel in kernels if _is_stale(kernel)]
        else:
            selected = select(kernels, (), older_than, time.time()) if older_than is not None else []
            if max_size is not None:
                rest = [kernel for kernel in kernels if kernel.in_use or kernel not in selected]
                selected += _least_recently_used(rest, max_size)
        complete &= _remove(own, selected, cleanup.leftovers(own), dry_run, yes)
    if not complete:
        raise click.exceptions.Exit(1)


def _is_stale(kernel: CachedKernel) -> bool:
    import tvm_ffi  # here, as it imports torch

    try:
        manifest = kernel.entry.manifest
    except BadEntry:
        return True
    return (manifest.get("jitnorm"), manifest.get("tvm_ffi")) != (__version__, tvm_ffi.__version__)


def _least_recently_used(kernels: list[CachedKernel], max_size: int) -> list[CachedKernel]:
    """Return the kernels to remove so that the rest takes no more than `max_size` bytes."""
    total, selected = sum(kernel.size for kernel in kernels), []
    for kernel in sorted((kernel for kernel in kernels if not kernel.in_use), key=lambda kernel: kernel.last_used):
        if total <= max_size:
            break
        selected.append(kernel)
        total -= kernel.size
    return selected


def _remove(cache: Cache, kernels: Sequence[CachedKernel], others: Sequence[Path], dry_run: bool, yes: bool) -> bool:
    """Remove kernels and other files after the user has agreed.

    What cannot be removed is reported on stderr, and the rest is removed.

    Returns:
        Whether everything that is not in use was removed.

    Raises:
        RuntimeError: there is no terminal to ask on.
    """
    for kernel in kernels:
        if kernel.in_use:
            _report_in_use(kernel)
    kernels = [kernel for kernel in kernels if not kernel.in_use]
    sizes = {path: cleanup.size_of(cache, path) for path in others}
    found = _count(len(kernels), len(others))
    if not found:
        click.echo(f"nothing to remove in {cache.root}")
        return True
    for kernel in kernels:
        click.echo(f"{'would remove' if dry_run else 'to remove'}  {kernel.entry.label}  {output.size(kernel.size)}")
    for path, size in sizes.items():
        click.echo(f"{'would remove' if dry_run else 'to remove'}  {path.relative_to(cache.root)}  {output.size(size)}")
    if dry_run:
        total = output.size(sum(kernel.size for kernel in kernels) + sum(sizes.values()))
        click.echo(f"{found}, {total}: nothing was removed (--dry-run)")
        return True
    if not yes and not _confirm(f"Remove {found} from {cache.root}?"):
        click.echo("nothing removed")
        raise click.exceptions.Exit(1)
    removed_kernels, removed_others, freed, failed = 0, 0, 0, 0
    for kernel in kernels:
        removed = _try_removing(kernel.entry.label, lambda kernel=kernel: cache.remove(kernel.entry))  # type: ignore[misc]
        if removed is False:
            _report_in_use(kernel)
        removed_kernels += bool(removed)
        freed += bool(removed) * kernel.size
        failed += removed is None
    for path, size in sizes.items():
        label = str(path.relative_to(cache.root))
        removed = _try_removing(label, lambda path=path: cleanup.remove(cache, path))  # type: ignore[misc]
        removed_others += bool(removed)
        freed += bool(removed) * size
        failed += removed is None
    click.echo(f"removed {_count(removed_kernels, removed_others) or 'nothing'}, freed {output.size(freed)}")
    return not failed


def _count(kernels: int, others: int) -> str:
    """Return how many of each there are, or nothing if there are none."""
    return " and ".join(output.plural(n, noun) for n, noun in ((kernels, "kernel"), (others, "leftover")) if n)


def _try_removing(label: str, action: Callable[[], bool]) -> bool | None:
    """Return what `action` returns, or None after reporting why it failed."""
    try:
        return action()
    except (OSError, UntrustedPath) as error:
        click.echo(f"cannot be removed  {label}: {error}", err=True)
        return None


def _confirm(question: str) -> bool:
    if not sys.stdin.isatty():
        raise RuntimeError(
            f"{question} There is no terminal to ask on: add --yes to remove it, or --dry-run to list what would be "
            "removed"
        )
    return click.confirm(question)


def _report_in_use(kernel: CachedKernel) -> None:
    click.echo(f"in use, not removed  {kernel.entry.label}")
