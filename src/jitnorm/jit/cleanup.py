"""Remove what builds leave behind in a cache: folders of processes that have ended, quarantine, records.

A process that creates a folder in `staging`, a lock file or a draft of a record keeps it locked until it is done. What
is not locked belongs to a process that has ended. Age does not matter, except for builds of other hosts, whose locks
may not be visible on a network file system.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from jitnorm.jit.cache import (
    KERNELS,
    LOCKS,
    OWN_NAMES,
    QUARANTINE,
    RECORDS,
    STAGING,
    TOOLCHAINS,
    Cache,
    host_id,
    host_of_build,
    remove_oldest,
)
from jitnorm.jit.entry import open_path
from jitnorm.jit.folder import UntrustedPath

_DRAFT = ".tmp"
_MAX_TOOLCHAIN_RECORDS = 64  # there is one for each environment
_DAY_S = 86400.0


def remove_abandoned(cache: Cache, limit_s: float) -> None:
    """Remove what ended processes of this host left, and the oldest toolchain records. Raises nothing.

    Args:
        cache: The cache.
        limit_s: After this many seconds no further removal is started.
    """
    deadline = time.monotonic() + limit_s
    for path in _abandoned(cache):
        if time.monotonic() > deadline:
            return
        with suppress(OSError, UntrustedPath), open_path(cache.root, (path.parent.name,)) as folder:
            folder.remove_abandoned(path.name)
    with suppress(OSError, UntrustedPath), open_path(cache.root, (TOOLCHAINS,)) as folder:
        remove_oldest(folder, OWN_NAMES[TOOLCHAINS], _MAX_TOOLCHAIN_RECORDS)


def leftovers(cache: Cache) -> list[Path]:
    """Return what can be deleted: the remains of failed, damaged and unfinished builds.

    An unfinished build of another host counts a day after its last change, by the clock of the file system.
    """
    found = {*_abandoned(cache), *_expired_builds(cache)}
    found |= {cache.root / QUARANTINE / name for name in _own_names(cache, QUARANTINE)}
    found |= {cache.root.joinpath(KERNELS, *names) for names, is_entry in cache.kernel_paths() if not is_entry}
    return sorted(found)


def records(cache: Cache) -> list[Path]:
    """Return the files of RECORDS, which are made again if they are missing."""
    return [cache.root / part / name for part in RECORDS for name in _own_names(cache, part)]


def remove(cache: Cache, path: Path) -> bool:
    """Remove one of `leftovers` or `records`, following no link. Return True, also if it did not exist."""
    *names, name = path.relative_to(cache.root).parts
    with suppress(FileNotFoundError):
        cache.discard(tuple(names), name)
    return True


def size_of(cache: Cache, path: Path) -> int:
    """Return the size in bytes of one of `leftovers` or `records`."""
    *names, name = path.relative_to(cache.root).parts
    try:
        with open_path(cache.root, tuple(names)) as folder:
            return folder.size(name)
    except (OSError, UntrustedPath):
        return 0


def _abandoned(cache: Cache) -> Iterator[Path]:
    """Yield this host's staging folders, drafts and lock files that no running process has locked."""
    for part in (STAGING, LOCKS, *RECORDS):
        for name in _own_names(cache, part):
            if part in RECORDS and not name.endswith(_DRAFT):
                continue
            if part == STAGING and host_of_build(name) not in (None, host_id()):
                continue  # on NFS, a host does not see the locks that others hold on folders
            with suppress(OSError, UntrustedPath), open_path(cache.root, (part,)) as folder:
                if folder.is_abandoned(name):
                    yield folder.path / name


def _expired_builds(cache: Cache) -> Iterator[Path]:
    """Yield unfinished builds that are not locked and older than a day, such as those of other hosts."""
    with suppress(OSError, UntrustedPath), open_path(cache.root, (STAGING,)) as staging:
        names = [name for name in _own_names(cache, STAGING) if not staging.is_locked(name)]
        if not names:
            return
        # The file server's clock, as this host's may differ from it.
        with staging.temporary_folder("removed") as probe:
            now = os.fstat(probe.fd).st_mtime
        for name in names:
            if now - staging.stat(name).st_mtime > _DAY_S:
                yield staging.path / name


def _own_names(cache: Cache, part: str) -> list[str]:
    try:
        with open_path(cache.root, (part,)) as folder:
            return [name for name in folder.names() if re.fullmatch(OWN_NAMES[part], name)]
    except (UntrustedPath, OSError):
        return []
