"""How the commands write tables, sizes, ages and JSON."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from typing import Any

import click


def table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Columns as wide as they need to be, two spaces apart; those in `right` are aligned to the right."""
    widths = [max(len(printable(row[i])) for row in (header, *rows)) for i in range(len(header))]
    head(header, widths, right)
    for row in rows:
        line(row, widths, right)


def head(header: Sequence[str], widths: Sequence[int], right: Sequence[int] = ()) -> None:
    """What stands above the lines of a table."""
    line(header, widths, right)
    line(["-" * width for width in widths], widths)


def line(row: Sequence[str], widths: Sequence[int], right: Sequence[int] = ()) -> None:
    row = [printable(cell) for cell in row]
    cells = [row[i].rjust(w) if i in right else row[i].ljust(w) for i, w in enumerate(widths)]
    click.echo("  ".join(cells).rstrip())


def printable(text: str) -> str:
    """Return `text` without what would command a terminal, break a line or not be encoded: what it holds may come from
    a file that anybody wrote."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def as_json(value: Any) -> None:
    """The whole answer, for programs."""
    click.echo(json.dumps(value, indent=2))


def size(count: float) -> str:
    """Bytes in powers of 1000, as disks and `--filter` count them."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 999.95 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def age(seconds: float) -> str:
    """How long ago, in its largest unit."""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= length:
            return f"{int(seconds // length)}{unit} ago"
    return "just now"


def date(iso: str) -> str:
    """In local time and to the minute; as it is where it is no date, or one that has no local time: that of year 9999
    may be in year 10000."""
    try:
        return datetime.datetime.fromisoformat(iso).astimezone().strftime("%Y-%m-%d %H:%M")
    except (ValueError, OverflowError, OSError):
        return iso


def plural(count: int, noun: str) -> str:
    """ "1 kernel", "2 kernels"."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
