"""What a cache holds, as the commands show it: one row for each kernel, of the cache and of the prebuilt layer."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitnorm.cli.output import printable
from jitnorm.jit import locations
from jitnorm.jit.cache import Cache
from jitnorm.jit.entry import BadEntry, Entry
from jitnorm.jit.folder import UntrustedPath


@dataclass(frozen=True)
class Row:
    """One kernel on disk."""

    entry: Entry
    name: str
    op: str
    kernel: str
    device: str
    arch: str
    size: int  # bytes, of all its files
    built: str  # ISO 8601
    last_used: float  # seconds since the epoch
    in_use: bool
    prebuilt: bool

    @property
    def status(self) -> str:
        """What sets it apart, if anything."""
        return "in use" if self.in_use else "prebuilt" if self.prebuilt else "unreadable" if not self.kernel else ""

    def as_json(self) -> dict[str, Any]:
        """For programs: sizes in bytes, times in ISO 8601."""
        row = {k: v for k, v in vars(self).items() if k != "entry"}
        return {
            **row,
            "last_used": _utc(self.last_used),
            "id": self.entry.label,
            "path": str(self.entry.path),
        }


def _utc(seconds: float) -> str | None:
    """ISO 8601; None for a time beyond the calendar, which a file system can hold."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return None


def places() -> list[Cache]:
    """The cache and the prebuilt layer; where they are one folder, it counts as prebuilt and is never written."""
    prebuilt, own = locations.prebuilt(), locations.readable()
    if prebuilt and os.path.realpath(prebuilt.root) == os.path.realpath(own.root):
        return [prebuilt]
    return [own, prebuilt] if prebuilt else [own]


def rows_of(place: Cache) -> Iterator[Row]:
    """The kernels of one cache, those with damaged manifests among them."""
    for entry in place.entries():
        with suppress(FileNotFoundError):  # removed meanwhile, by another process
            yield _row(entry, place.prebuilt)


def all_rows() -> list[Row]:
    """The kernels of all caches that this process would look in."""
    return [row for place in places() for row in rows_of(place)]


def find_rows(name: str) -> list[Row]:
    """By path (of the entry or a file in it), or by name: rmsnorm_4096_bf16, and more of the entry's id if need be."""
    path = Path(name).absolute()
    return [
        row
        for row in all_rows()
        if row.entry.label == name
        or row.entry.label.startswith((f"{name}.", f"{name}/"))
        or row.entry.path in (path, path.parent)
    ]


def _row(entry: Entry, prebuilt: bool) -> Row:
    try:
        manifest = entry.manifest
    except BadEntry:
        manifest = {}
    try:
        last_used, size = entry.last_used, entry.size
    except (UntrustedPath, OSError):  # it has no manifest, or others can write to it
        info = entry.path.lstat()
        last_used, size = info.st_mtime, info.st_size

    def said(field: str) -> str:
        value = manifest.get(field)
        return printable(value) if isinstance(value, str) else ""

    return Row(
        entry=entry,
        name=said("name") or entry.path.parent.name,
        op=said("op"),
        kernel=said("kernel"),
        device=said("device"),
        arch=said("arch"),
        size=size,
        built=said("built"),
        last_used=last_used,
        in_use=not prebuilt and entry.in_use(),
        prebuilt=prebuilt,
    )
