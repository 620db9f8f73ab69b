"""Tables, JSON, sizes, ages and dates as the commands print them, and the error where a file cannot be written."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Print a table, without characters that could control the terminal.

    Args:
        header: the titles of the columns.
        rows: the cells, as text; at least one row.
        right: the indices of the columns that are aligned to the right.
    """
    from tabulate import tabulate  # here, as importing it takes as long as `jitnorm cache dir` does without

    text = tabulate(
        [[printable(cell) for cell in row] for row in rows],
        headers=[printable(title) for title in header],
        tablefmt="simple",
        disable_numparse=True,
        colalign=["right" if i in right else "left" for i in range(len(header))],
    )
    click.echo("\n".join(line.rstrip() for line in text.splitlines()))


def head(header: Sequence[str], widths: Sequence[int], right: Sequence[int] = ()) -> None:
    """Print the first two lines of a table whose rows follow one by one, through `line`."""
    line(header, widths, right)
    line(["-" * width for width in widths], widths)


def line(row: Sequence[str], widths: Sequence[int], right: Sequence[int] = ()) -> None:
    """Print one row of a table whose columns have the given widths."""
    row = [printable(cell) for cell in row]
    cells = [row[i].rjust(w) if i in right else row[i].ljust(w) for i, w in enumerate(widths)]
    click.echo("  ".join(cells).rstrip())


def printable(text: str) -> str:
    """Return `text` with a replacement for every character that controls a terminal, breaks a line or has no encoding.

    Names and manifests come from files, which may hold anything.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def as_json(value: Any) -> None:
    """Print the whole result as JSON."""
    click.echo(json.dumps(value, indent=2))


def size(count: float) -> str:
    """Return a number of bytes in powers of 1000, as disks and `--filter` count them."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 999.95 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def age(seconds: float) -> str:
    """Return how long ago something happened, in the largest unit that is not zero."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= length:
            return f"{int(seconds // length)}{unit} ago"
    return "just now"


def date(iso: str) -> str:
    """Return an ISO 8601 date in local time and to the minute.

    What is no date is returned as it is, and so is a date without a local time: one of year 9999 may be in year 10000.
    """
    try:
        return datetime.datetime.fromisoformat(iso).astimezone().strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return iso


def plural(count: int, noun: str) -> str:
    """Return a count and its noun: "1 kernel", "2 kernels"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


@contextmanager
def writing(file: str) -> Iterator[None]:
    """Raise RuntimeError that names `file` for an OSError in the block, which writes it."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(f"cannot write {file}: {error.strerror or error}") from None
