"""One compiled kernel in a cache: its manifest, its verified bytes, and whether a process has it loaded.

An entry is a folder with the sources, the build files, `manifest.json` and the library: a shared library for the CPU, a
cubin for CUDA. It appears atomically, and is
never changed afterwards. Nothing in it is trusted: every folder of its path must be private, and the library must have
the hash that the manifest names.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jitnorm.jit.files import close, lock
from jitnorm.jit.folder import Folder, UntrustedPath

MANIFEST = "manifest.json"
MAX_JSON_BYTES = 1 << 20
MAX_LIBRARY_BYTES = 1 << 28
_LOCK_TRIES = 5


class BadEntry(Exception):
    """The entry cannot be used; the message says why."""


@dataclass(frozen=True)
class Entry:
    """One kernel on disk, which need not exist.

    Attributes:
        path: `<root>/kernels/<name>.<arch>.<key>/<toolchain>`.
        prebuilt: Whether it is in the prebuilt layer, whose files may belong to any user.
    """

    path: Path
    prebuilt: bool = field(default=False, compare=False)

    @property
    def label(self) -> str:
        """Return the kernel's id, as `jitnorm cache ls` prints it."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def root(self) -> Path:
        """Return the folder of the cache that the entry is in."""
        return self.path.parents[2]

    def open(self) -> Folder:
        """Open the entry's folder. Raises UntrustedPath or OSError, as `Folder.open_root`."""
        return open_path(self.root, self.path.parts[-3:], self.prebuilt)

    @property
    def manifest(self) -> dict[str, Any]:
        """Return the manifest, which was written when the entry was built. Raises BadEntry if it cannot be read."""
        try:
            with self.open() as folder:
                return _read_manifest(folder)
        except (UntrustedPath, OSError) as error:
            raise BadEntry(f"its manifest cannot be read ({error})") from None

    @property
    def library(self) -> Path:
        """Return the path of the library."""
        return self.path / str(self.manifest["library"])

    @property
    def size(self) -> int:
        """Return the total size of its files in bytes."""
        with open_path(self.root, self.path.parts[-3:-1], self.prebuilt) as parent:
            return parent.size(self.path.name)

    @property
    def last_used(self) -> float:
        """Return the time of the last load in seconds since the epoch: each one touches the manifest."""
        with self.open() as folder:
            return folder.stat(MANIFEST).st_mtime

    @property
    def content(self) -> bytes:
        """Return the library's verified bytes, which are read once. Raises as `verify`."""
        # Not functools.cached_property: before Python 3.12 it takes a lock, which a fork in another thread leaves held.
        content: bytes | None = self.__dict__.get("_content")
        if content is None:
            content = self.__dict__["_content"] = self.verify()
        return content

    def verify(self) -> bytes:
        """Return the library's bytes if they are the bytes that were built for this entry's path.

        Raises:
            BadEntry: They are not, or another user could have written them.
            FileNotFoundError: The entry does not exist.
            OSError: It cannot be read at the moment.
        """
        try:
            with self.open() as folder:
                return verified_library(folder, self.path.parent.name)
        except UntrustedPath as error:
            raise BadEntry(str(error)) from None

    def mark_in_use(self) -> None:
        """Mark the entry as loaded until this process ends, so that `clear` and `prune` leave it alone.

        The mark is a shared lock on the manifest. No process waits for it, because any user who can read the file can
        lock it.
        """
        self.release()  # the descriptor may be that of an earlier entry at this path
        with suppress(OSError, UntrustedPath), self.open() as folder:
            fd = folder.open_file(MANIFEST, os.O_RDONLY)
            _locked[self.path] = fd
            for _ in range(_LOCK_TRIES):
                if lock(fd, shared=True) is not False:
                    break
                time.sleep(0.002)  # another process tests whether it is in use, removes it, or is malicious
            os.utime(fd)

    def release(self) -> None:
        """Remove the mark of `mark_in_use`, for a caller that does not load the entry."""
        if (fd := _locked.pop(self.path, None)) is not None:
            close(fd)

    def in_use(self) -> bool:
        """Return whether a process has marked the entry as in use. True also if that cannot be determined.

        On a file system without locks no entry can be marked. Removing a loaded kernel harms no process: its library
        is loaded from memory.
        """
        with self.lock_unused() as unused:
            return not unused

    @contextmanager
    def lock_unused(self) -> Iterator[bool]:
        """Yield whether no process uses the entry. Until the block ends, no process can mark it as in use."""
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(self.open())
                try:
                    fd = folder.open_file(MANIFEST, os.O_RDWR)  # NFS grants an exclusive lock only with write access
                except OSError as error:
                    if error.errno != errno.EROFS:
                        raise
                    fd = folder.open_file(MANIFEST, os.O_RDONLY)
                stack.callback(close, fd)
                unused = lock(fd) is not False
            except (UntrustedPath, FileNotFoundError):
                unused = True  # the entry is damaged: no process can have loaded it
            except OSError:
                unused = False
            yield unused


# The descriptors of the manifests that this process has locked.
_locked: dict[Path, int] = {}


def open_path(root: Path, names: tuple[str, ...], any_owner: bool = False) -> Folder:
    """Open `root/names[0]/names[1]/...`, each folder of which only its owner may write to.

    Raises:
        UntrustedPath: One of the folders is not private.
        OSError: One cannot be opened.
    """
    folder = Folder.open_root(root, any_owner=any_owner)
    for name in names:
        with folder:
            folder = folder.open_folder(name)
    return folder


def verified_library(folder: Folder, expected: str) -> bytes:
    """Return the library in an entry's folder.

    Args:
        folder: The entry's folder.
        expected: The name of its parent, `<name>.<arch>.<key>`, which the manifest must agree with.

    Raises:
        BadEntry: The entry is damaged, or was built for another kernel.
        OSError: It cannot be read at the moment.
    """
    manifest = _read_manifest(folder)
    try:
        content = folder.read(manifest["library"], min(manifest["size"], MAX_LIBRARY_BYTES))
    except (UntrustedPath, FileNotFoundError) as error:
        raise BadEntry(f"its library cannot be read ({error})") from None
    check_library_content(manifest, content, expected)
    return content


def check_library_content(manifest: dict[str, Any], content: bytes, expected: str) -> None:
    """Raise BadEntry unless `content` is the library that `manifest` describes, and that of the kernel `expected`."""
    if len(content) != manifest["size"] or hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        raise BadEntry("its library is not the one that was built: the hash differs")
    built = ".".join(str(manifest.get(name)) for name in ("name", "arch", "key"))
    if built != expected:
        raise BadEntry(f"it is another kernel, {built}")


def _read_manifest(folder: Folder) -> dict[str, Any]:
    try:
        text = folder.read(MANIFEST, MAX_JSON_BYTES)
    except (UntrustedPath, FileNotFoundError) as error:
        raise BadEntry(f"its manifest cannot be read ({error})") from None
    return parse_manifest(text)


def parse_manifest(text: bytes) -> dict[str, Any]:
    """Return the manifest in `text`, whose library has a valid name and size. Raises BadEntry for any other text."""
    try:
        manifest = json.loads(text)
        name, digest, size = manifest["name"], manifest["sha256"], manifest["size"]
        if manifest["library"] not in (_library_name(name, digest, device) for device in ("cpu", "cuda")):
            raise ValueError(f"its library cannot be named {manifest['library']!r}")
        if type(size) is not int or size < 0:
            raise ValueError(f"its library cannot have {size!r} bytes")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadEntry(f"its manifest cannot be read ({error})") from None
    return manifest  # type: ignore[no-any-return]


def _library_name(name: str, digest: str, device: str) -> str:
    """Return the file name of a library. Raises ValueError if `name` or `digest` cannot be part of one."""
    is_kernel_name = isinstance(name, str) and name.replace("_", "").isalnum()
    if not is_kernel_name or not isinstance(digest, str) or len(digest) != 64 or not digest.isalnum():
        raise ValueError(f"{name!r} is not a kernel's name, or {digest!r} is not a hash")
    return f"{name}-{digest[:16]}.{'cubin' if device == 'cuda' else 'so'}"


def write_entry(staging: Folder, content: bytes, manifest: dict[str, Any]) -> None:
    """Write the library, whose name contains its hash, and the manifest, and wait until both are on the disk.

    Args:
        staging: The folder that becomes the entry.
        content: The library.
        manifest: All fields but the library's name, hash and size, which are added.
    """
    digest = hashlib.sha256(content).hexdigest()
    name = _library_name(manifest["name"], digest, manifest["device"])
    manifest = {**manifest, "library": name, "sha256": digest, "size": len(content)}
    staging.write(name, content, sync=True)
    staging.write(MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n", sync=True)
    staging.sync()
