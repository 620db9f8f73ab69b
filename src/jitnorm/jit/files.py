"""Open, lock and write files: locks that never wait, and files that are written atomically."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

# The errors of flock on a file system that has no such locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def close(fd: int) -> None:
    """Close a descriptor and ignore errors. For a file that was only read, or written and synced."""
    with suppress(OSError):
        os.close(fd)


def lock(fd: int, shared: bool = False) -> bool | None:
    """Lock an open file or folder until the descriptor is closed, without ever waiting for the lock.

    Returns:
        True if the lock was taken, False if another process holds it, None if the file system has no locks.

    Raises:
        OSError: The lock's state is unknown, as with an exclusive lock without write access on NFS.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def write_all(fd: int, content: bytes) -> None:
    """Write all of `content`, in as many system calls as it takes."""
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def replace_file(
    name: str, content: bytes, *, dir_fd: int | None = None, mode: int = 0o600, sync: bool = False
) -> None:
    """Write a file so that every reader sees either the old content or all of the new one.

    Args:
        name: Path of the file, relative to `dir_fd` if that is given.
        content: The new content.
        dir_fd: Descriptor of the folder that `name` is relative to.
        mode: Permissions of the file, less the umask.
        sync: Whether to wait until the content is on the disk.

    Raises:
        OSError: The file cannot be written. What was there before is unchanged.
    """
    for last_try in (False, False, True):
        try:
            _replace_file(name, content, dir_fd, mode, sync)
            return
        except FileNotFoundError:  # another process removed the draft, which looks abandoned between open and flock
            if last_try:
                raise


def _replace_file(name: str, content: bytes, dir_fd: int | None, mode: int, sync: bool) -> None:
    draft = f"{name}.{os.urandom(4).hex()}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(draft, flags, mode, dir_fd=dir_fd)
    try:
        lock(fd)  # while it is held, no other process considers the draft abandoned
        write_all(fd, content)
        if sync:
            os.fsync(fd)
        os.rename(draft, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(draft, dir_fd=dir_fd)
        raise
    finally:
        close(fd)


def write_bytes(path: str | os.PathLike[str], content: bytes, *, sync: bool = False) -> None:
    """Write a file that a user named, atomically.

    A link stays a link. Devices and pipes, such as /dev/stdout, are written to directly.

    Args:
        path: Path of the file.
        content: The new content.
        sync: Whether to wait until the content is on the disk.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG | 0o666
    if stat.S_ISREG(mode):
        replace_file(os.path.realpath(path), content, mode=stat.S_IMODE(mode), sync=sync)
    else:
        path.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file that a user named, atomically. Raises as `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically. Raises as `write_bytes`."""
    write_text(path, json.dumps(value, indent=1) + "\n")
