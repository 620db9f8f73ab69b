"""The kernels in the cache and in the prebuilt layers, as the commands list, filter and remove them."""

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
class CachedKernel:
    """One kernel on disk. Fields that a damaged manifest lacks are empty."""

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
        """Return "in use", "prebuilt", "unreadable" or nothing."""
        return "in use" if self.in_use else "prebuilt" if self.prebuilt else "unreadable" if not self.kernel else ""

    def as_json(self) -> dict[str, Any]:
        """Return the fields for programs: sizes in bytes, times in ISO 8601."""
        fields = {name: value for name, value in vars(self).items() if name != "entry"}
        return {
            **fields,
            "last_used": _utc(self.last_used),
            "id": self.entry.label,
            "path": str(self.entry.path),
        }


def _utc(seconds: float) -> str | None:
    """Return a time in ISO 8601, or None for one beyond the calendar, which a file system can store."""
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return None


def caches() -> list[Cache]:
    """Return the cache, then the prebuilt layers. One folder that is both counts as prebuilt, and is never written."""
    prebuilt, own = locations.prebuilt(), locations.readable()
    if prebuilt and os.path.realpath(prebuilt.root) == os.path.realpath(own.root):
        return [prebuilt, *locations.installed()]
    return [own, *([prebuilt] if prebuilt else []), *locations.installed()]


def own_caches() -> list[Cache]:
    """Return the caches that commands may change. Raises RuntimeError if the only one is the prebuilt layer."""
    own = [each for each in caches() if not each.prebuilt]
    if not own:
        raise RuntimeError(
            "JITNORM_CACHE_DIR and JITNORM_PREBUILT_DIR are the same folder, and the prebuilt layer is never written: "
            "unset JITNORM_PREBUILT_DIR to change it"
        )
    return own


def kernels_in(cache: Cache) -> Iterator[CachedKernel]:
    """Yield the kernels of one cache, including those whose manifest is damaged."""
    for entry in cache.entries():
        with suppress(FileNotFoundError):  # another process removed it meanwhile
            yield _read(entry, cache.prebuilt)


def all_kernels() -> list[CachedKernel]:
    """Return the kernels of all caches that this process would look in."""
    return [kernel for cache in caches() for kernel in kernels_in(cache)]


def find_kernels(name: str) -> list[CachedKernel]:
    """Return the kernels of a name.

    Args:
        name: the path of a kernel's folder or of a file in it, a kernel's name such as rmsnorm_4096_bf16, or a name and
            the first parts of the kernel's id.
    """
    path = Path(name).absolute()
    return [
        kernel
        for kernel in all_kernels()
        if kernel.entry.label == name
        or kernel.entry.label.startswith((f"{name}.", f"{name}/"))
        or kernel.entry.path in (path, path.parent)
    ]


def _read(entry: Entry, prebuilt: bool) -> CachedKernel:
    try:
        manifest = entry.manifest
    except BadEntry:
        manifest = {}
    try:
        last_used, size = entry.last_used, entry.size
    except (UntrustedPath, OSError):  # it has no manifest, or others can write to it
        info = entry.path.lstat()
        last_used, size = info.st_mtime, info.st_size

    def text(field: str) -> str:
        value = manifest.get(field)
        return printable(value) if isinstance(value, str) else ""

    return CachedKernel(
        entry=entry,
        name=text("name") or entry.path.parent.name,
        op=text("op"),
        kernel=text("kernel"),
        device=text("device"),
        arch=text("arch"),
        size=size,
        built=text("built"),
        last_used=last_used,
        in_use=not prebuilt and entry.in_use(),
        prebuilt=prebuilt,
    )
