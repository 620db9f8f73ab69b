"""Decide which caches this process uses: prebuilt layers, the cache, or a temporary folder instead of it."""

from __future__ import annotations

import os
import shutil
import site
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from jitnorm.jit.cache import KERNELS, STAGING, Cache
from jitnorm.jit.folder import Folder, UntrustedPath, reason_for_distrust
from jitnorm.jit.log import logger

PACKAGES = "jitnorm_kernels"  # in site-packages, the folder of all wheels of kernels
_CACHEDIR_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# Compiled kernels of jitnorm; safe to delete.\n"

_temporary: Cache | None = None  # the cache of this process alone, after the default one could not be written


def in_search_order() -> Iterator[Cache]:
    """Yield the caches that a call looks in, one after the other.

    Those of installed packages are looked up only if no earlier one had the kernel.
    """
    if layer := prebuilt():
        yield layer
    yield from searched()
    yield from installed()


def prebuilt() -> Cache | None:
    """Return the read-only layer in the folder JITNORM_PREBUILT_DIR, or None if that is not set."""
    folder = os.environ.get("JITNORM_PREBUILT_DIR")
    return Cache(_absolute(os.path.expanduser(folder)), prebuilt=True) if folder else None


def installed() -> list[Cache]:
    """Return the read-only layers that `jitnorm wheel` packed and pip installed: PACKAGES/<name> in site-packages.

    Only folders that Python imports packages from for all programs are searched. Others on `sys.path`, such as the
    working directory, may belong to another user. Of two paths to one layer, as where `lib64` is a link to `lib`, the
    first is used.
    """
    folders = dict.fromkeys(path for path in (*site.getsitepackages(), site.getusersitepackages()) if path in sys.path)
    found: list[Path] = []
    for folder in folders:
        with suppress(OSError):
            found += [Path(folder, PACKAGES, name) for name in sorted(os.listdir(os.path.join(folder, PACKAGES)))]
    layers: dict[str, Path] = {}
    for path in found:
        if (path / KERNELS).is_dir():
            layers.setdefault(os.path.realpath(path), path)
    return [Cache(path, prebuilt=True) for path in layers.values()]


def default_root() -> Path:
    """Return JITNORM_CACHE_DIR, or the platform's cache folder. Nothing is created.

    The path is relative if the user has no home folder, or the working directory was deleted.
    """
    folder = os.environ.get("JITNORM_CACHE_DIR")
    try:
        root = os.path.expanduser(folder or _platform_folder())
    except RuntimeError:  # neither HOME nor an entry in passwd
        root = "~/.cache/jitnorm"
    return Path(root) if root.startswith("~") else _absolute(root)


def _platform_folder() -> str:
    from platformdirs import user_cache_dir  # imported here, because it would slow down `import jitnorm`

    return user_cache_dir("jitnorm", appauthor=False)


def _absolute(path: str) -> Path:
    try:
        return Path(path).absolute()
    except OSError:  # the working directory was deleted
        return Path(path)


def readable() -> Cache:
    """Return the cache of this process: the temporary one, if there is one, or the default, which need not exist."""
    return _temporary or Cache(default_root())


def searched() -> list[Cache]:
    """Return the caches to look in after the prebuilt layer: the temporary one, if there is one, and the default."""
    return [*([_temporary] if _temporary else []), Cache(default_root())]


def writable() -> Cache:
    """Return the cache to build into, which is created if it does not exist.

    If the default one cannot be created or is not private, return a temporary one of this process.
    """
    if _temporary:
        return _temporary
    root = default_root()
    reason = create(root)
    return use_temporary(root, reason) if reason else Cache(root)


def use_temporary(root: Path, reason: str) -> Cache:
    """Build into a temporary folder from now on, which is removed when this process ends.

    Args:
        root: The cache that cannot be used.
        reason: Why it cannot.

    Raises:
        RuntimeError: No temporary folder can be created either.
    """
    global _temporary
    from multiprocessing.util import Finalize  # unlike atexit, it also runs in workers that a process forked

    try:
        folder = Path(tempfile.mkdtemp(prefix="jitnorm-"))
    except OSError as error:
        raise RuntimeError(
            f"jitnorm cannot write the cache {root} ({reason}) nor create a temporary folder ({error}): "
            "set JITNORM_CACHE_DIR"
        ) from None
    logger.warning(
        "cannot keep kernels in %s: %s. This process keeps its own in %s; set JITNORM_CACHE_DIR", root, reason, folder
    )
    _temporary = Cache(folder)
    Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=0)
    return _temporary


def is_temporary() -> bool:
    """Return whether this process builds into a temporary folder."""
    return _temporary is not None


def reason_not_writable(root: Path) -> str | None:
    """Return why kernels cannot be stored in `root`, which need not exist, or None if they can. Nothing is created."""
    if not root.is_absolute():
        return "there is no home folder" if str(root).startswith("~") else "the working directory is gone"
    try:
        existing = next(path for path in (root, *root.parents) if os.path.lexists(path))
        if not os.path.isdir(existing):
            return f"{existing} is not a folder"
        if not os.access(existing, os.W_OK | os.X_OK):
            return "it is read-only"
        if os.statvfs(existing).f_flag & os.ST_NOEXEC:
            return "no code can be loaded from its file system, which is mounted noexec"
        for name in (KERNELS, STAGING):  # another user may have created them, as with sudo
            # One that is not a folder, or that its owner cannot read either, is moved to quarantine instead.
            folder = root / name
            if folder.is_dir() and os.access(folder, os.R_OK) and not os.access(folder, os.W_OK | os.X_OK):
                return f"{folder} is read-only"
        reason = reason_for_distrust(os.stat(root)) if existing == root else None
    except OSError as error:
        return f"{root} cannot be read ({error.strerror})"
    return f"{root} {reason}" if reason else None


def create(root: Path) -> str | None:
    """Create `root` and its parents for this user alone, where they do not exist.

    Returns:
        Why kernels cannot be stored there, or None if they can.
    """
    if reason := reason_not_writable(root):
        return reason
    try:
        for folder in (*reversed(root.parents), root):
            if not folder.is_dir():
                with suppress(FileExistsError):
                    folder.mkdir(mode=0o700)
        with Folder.open_root(root) as opened:
            if not opened.names():  # the tag excludes a folder from backups, so no folder with other files gets it
                opened.write("CACHEDIR.TAG", _CACHEDIR_TAG)
    except OSError as error:
        return error.strerror or str(error)
    except UntrustedPath as error:
        return str(error)
    return None
