"""`jitnorm cache export` and `jitnorm cache import`: move compiled kernels between machines as one file."""

from __future__ import annotations

import time

import click

from jitnorm.benchmark.options import format_option
from jitnorm.cli import output
from jitnorm.cli.base import Command
from jitnorm.cli.filters import Filter, filter_option, older_than_option, select
from jitnorm.cli.kernels import caches, kernels_in, own_caches
from jitnorm.jit import locations
from jitnorm.jit.entry import Entry
from jitnorm.jit.files import write_bytes


@click.command("export", cls=Command)
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False))
@filter_option
@older_than_option
@format_option
def export(file: str, filters: tuple[Filter, ...], older_than: float | None, output_format: str) -> None:
    """Write kernels to one file, for jitnorm cache import.

    All kernels of the cache and the prebuilt layers are written, or selected ones. Each is compared with its recorded
    hash first; if one is damaged, nothing is written. The same kernels give the same bytes. The file replaces an older
    one only when it is complete.
    """
    from jitnorm.jit import archive  # here, as no other command needs it

    packed = archive.pack(selected_entries(filters, older_than))
    content = archive.write(packed)
    try:
        write_bytes(file, content, sync=True)
    except OSError as error:
        raise RuntimeError(f"cannot write {file}: {error.strerror or error}") from None
    if output_format == "json":
        output.as_json({"file": file, "size": len(content), "exported": [each.label for each in packed]})
    else:
        click.echo(f"exported {output.plural(len(packed), 'kernel')}, {output.size(len(content))}, to {file}")


def selected_entries(filters: tuple[Filter, ...], older_than: float | None, own_only: bool = False) -> list[Entry]:
    """Return the entries of the selected kernels. Raises RuntimeError if there are none.

    Args:
        filters: Conditions that must all apply.
        older_than: For how many seconds no process has loaded the kernels.
        own_only: Whether to leave out prebuilt layers and installed packages, except one that is the cache itself.
    """
    searched = caches()[:1] if own_only else caches()
    selected = select([k for cache in searched for k in kernels_in(cache)], filters, older_than, time.time())
    if not selected:
        where = " and ".join(str(each.root) for each in searched)
        raise RuntimeError(f"no kernel to export in {where}: jitnorm cache ls lists the kernels that are there")
    return [kernel.entry for kernel in selected]


@click.command("import", cls=Command)
@click.argument("file", metavar="FILE", type=click.Path(exists=True, dir_okay=False))
@format_option
def import_(file: str, output_format: str) -> None:
    """Add the kernels of a file that jitnorm cache export wrote to the cache.

    The whole file is checked before anything is written: its form, every hash, and that each kernel is the one that its
    path names. If any part is refused, nothing is imported. Kernels that the cache has already stay as they are;
    damaged ones are replaced.

    Nothing is loaded or executed by this command, but kernels are machine code, which runs when they are called: import
    only files that you trust.
    """
    from jitnorm.jit import archive  # here, as no other command needs it

    (cache,) = own_caches()
    with open(file, "rb") as opened:
        data = opened.read(archive.MAX_ARCHIVE_BYTES + 1)
    try:
        packed = archive.read(data)
    except archive.BadArchive as error:
        raise RuntimeError(f"nothing was imported from {file}: {error}") from None
    if reason := locations.create(cache.root):
        raise RuntimeError(f"kernels cannot be added to {cache.root}: {reason}")
    added = archive.add(cache, packed)
    if output_format == "json":
        output.as_json({"cache": str(cache.root), "imported": added.new, "present": added.present})
    else:
        click.echo(
            f"imported {output.plural(len(added.new), 'kernel')}, {len(added.present)} already there; "
            f"the cache is {cache.root}"
        )
