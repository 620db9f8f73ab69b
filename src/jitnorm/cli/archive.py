"""`jitnorm cache export` and `jitnorm cache import`: move compiled kernels between machines as one file."""

from __future__ import annotations

import os
import time
from contextlib import suppress

import click

from jitnorm.benchmark.options import format_option
from jitnorm.cli import output
from jitnorm.cli.base import BadValue, Command
from jitnorm.cli.filters import Filter, filter_option, older_than_option, select
from jitnorm.cli.kernels import caches, kernels_in, own_caches
from jitnorm.jit import locations
from jitnorm.jit.entry import Entry
from jitnorm.jit.files import write_bytes

_CHUNK = 1 << 24


@click.command("export", cls=Command)
@click.argument("file", metavar="FILE", type=click.Path(dir_okay=False))
@filter_option
@older_than_option
@format_option
def export(file: str, filters: tuple[Filter, ...], older_than: float | None, output_format: str) -> None:
    """Write kernels to one file, for jitnorm cache import.

    All kernels of the cache and the prebuilt layers are written, or selected ones; of several with one id, the first
    that jitnorm cache ls lists. Each is compared with its recorded hash first; if one is damaged, nothing is written.
    The same kernels give the same bytes. The file replaces an older one only when it is complete.
    """
    from jitnorm.jit import archive  # here, as no other command needs it

    is_stdout = _is_stdout(file)
    if is_stdout and output_format == "json":
        raise BadValue(f"--format json prints to the standard output, which {file} is: name another file")
    packed = archive.pack(selected_entries(filters, older_than))
    content = archive.write(packed)
    with output.writing(file):
        write_bytes(file, content, sync=True)
    if output_format == "json":
        output.as_json({"file": file, "size": len(content), "exported": [each.label for each in packed]})
    else:
        line = f"exported {output.plural(len(packed), 'kernel')}, {output.size(len(content))}, to {file}"
        click.echo(line, err=is_stdout)


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


def _is_stdout(file: str) -> bool:
    """Return whether a file is what this process writes its output to, as `/dev/stdout` is."""
    with suppress(OSError):
        return os.path.samestat(os.stat(file), os.fstat(1))
    return False


def _content(file: str, limit: int) -> bytes:
    """Return what is in a file, or what a pipe yields; more than `limit` bytes of it only if there are more.

    Memory is allocated for what is there, not for the limit.
    """
    with open(file, "rb") as opened:
        if os.fstat(opened.fileno()).st_size > limit:
            raise RuntimeError(f"nothing was imported from {file}: it has more than {limit} bytes")
        parts, size = [], 0
        while size <= limit and (part := opened.read(min(_CHUNK, limit + 1 - size))):
            parts.append(part)
            size += len(part)
    return b"".join(parts)


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
    try:
        packed = archive.read(_content(file, archive.MAX_ARCHIVE_BYTES))
    except archive.BadArchive as error:
        raise RuntimeError(f"nothing was imported from {file}: {error}") from None
    except MemoryError:
        raise RuntimeError(f"nothing was imported from {file}: there is not enough memory") from None
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
