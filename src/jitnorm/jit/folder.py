"""Access a folder that other users may have changed: by descriptor, following no link, checking owner and mode.

A path is resolved anew at every use, and a user who can write to one of its folders can replace what it names between
two uses. A descriptor always refers to the same folder. So everything in the cache is opened from its root downwards,
each folder relative to the descriptor of its parent, and type, owner and mode are read from the open descriptor.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from jitnorm.jit.files import close, lock, replace_file

_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Without O_NONBLOCK, opening a FIFO waits until a process opens it for writing.
_OPEN_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
# The errors of open() for a link, for a file in place of a folder, for a socket, and for missing permissions.
_UNTRUSTED_ERRORS = (errno.ELOOP, errno.EMLINK, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.EACCES, errno.EPERM)


class UntrustedPath(RuntimeError):
    """A file or folder has the wrong type or owner, or other users can write to it.

    Attributes:
        path: The path of the file or folder.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path = path


def reason_for_distrust(info: os.stat_result, any_owner: bool = False) -> str | None:
    """Return why the file that `info` describes may have been written by another user, or None if it cannot have been.

    Args:
        info: The result of `os.stat` or `os.fstat`.
        any_owner: Whether any owner is accepted, as in the prebuilt layer.
    """
    if not any_owner and info.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {info.st_uid}, and this is user {os.geteuid()}"
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by other users (mode {stat.S_IMODE(info.st_mode):o})"
    return None


class Folder:
    """An open folder that no other user can write to. Use it in a `with` statement.

    Methods raise UntrustedPath for a file or folder of the wrong type or owner, or that other users can write to, and
    OSError where a system call fails otherwise.
    """

    def __init__(self, fd: int, path: Path, any_owner: bool) -> None:
        self.fd = fd
        self.path = path
        self._any_owner = any_owner

    @classmethod
    def open_root(cls, path: Path, any_owner: bool = False) -> Folder:
        """Open the top folder. Only its path may contain links.

        Args:
            path: Path of the folder.
            any_owner: Whether the folder and its contents may belong to any user.

        Raises:
            UntrustedPath: It is not a folder, or other users can write to it.
            OSError: It cannot be opened.
        """
        return cls._open(os.fspath(path), None, path, any_owner)

    def open_folder(self, name: str) -> Folder:
        """Open the folder `name` in this one. Raises as `open_root`, and FileNotFoundError if it does not exist."""
        return self._open(name, self.fd, self.path / name, self._any_owner)

    @classmethod
    def _open(cls, name: str, dir_fd: int | None, path: Path, any_owner: bool) -> Folder:
        try:
            fd = os.open(name, _OPEN_FOLDER | (0 if dir_fd is None else os.O_NOFOLLOW), dir_fd=dir_fd)
        except OSError as error:
            if error.errno in _UNTRUSTED_ERRORS:
                raise UntrustedPath(path, f"cannot be opened as a folder ({error.strerror})") from None
            raise
        folder = cls(fd, path, any_owner)
        try:
            if reason := reason_for_distrust(os.fstat(fd), any_owner):
                raise UntrustedPath(path, reason)
        except BaseException:
            folder.close()
            raise
        return folder

    def create_folder(self, name: str) -> Folder:
        """Open the folder `name`, and create it for this user alone if it does not exist."""
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=self.fd)
        return self.open_folder(name)

    def close(self) -> None:
        """Close the descriptor."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            close(fd)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def names(self) -> list[str]:
        """Return the names in this folder, sorted."""
        return sorted(os.listdir(self.fd))

    def stat(self, name: str) -> os.stat_result:
        """Return the status of `name`. Links are not followed."""
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def is_folder(self, name: str) -> bool:
        """Return whether `name` is a folder, and not a link to one."""
        with suppress(OSError):
            return stat.S_ISDIR(self.stat(name).st_mode)
        return False

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of the file `name`.

        Raises:
            UntrustedPath: It is not a regular file, other users can write to it, or it has more than `limit` bytes.
            OSError: It does not exist, or cannot be read.
        """
        fd = self.open_file(name, os.O_RDONLY)
        try:
            info = os.fstat(fd)
            if reason := reason_for_distrust(info, self._any_owner):
                raise UntrustedPath(self.path / name, reason)
            content = b""
            while len(content) <= limit and (part := os.read(fd, min(limit, info.st_size) + 1)):
                content += part
            if len(content) > limit:
                raise UntrustedPath(self.path / name, f"has more than {limit} bytes")
            return content
        finally:
            close(fd)

    def open_file(self, name: str, flags: int) -> int:
        """Open the regular file `name`, and return the descriptor. Raises UntrustedPath if it is something else."""
        try:
            fd = os.open(name, flags | _OPEN_FILE, 0o600, dir_fd=self.fd)
        except OSError as error:
            if error.errno in _UNTRUSTED_ERRORS:
                raise UntrustedPath(self.path / name, f"cannot be opened as a file ({error.strerror})") from None
            raise
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise UntrustedPath(self.path / name, "is not a regular file")
        except BaseException:
            close(fd)
            raise
        return fd

    def write(self, name: str, content: bytes, sync: bool = False) -> None:
        """Write the file `name` atomically. With `sync`, wait until it is on the disk."""
        replace_file(name, content, dir_fd=self.fd, sync=sync)

    def move(self, name: str, destination: Folder, new_name: str) -> None:
        """Move the file or folder `name` into `destination`, a folder of the same file system, by one rename."""
        try:
            os.rename(name, new_name, src_dir_fd=self.fd, dst_dir_fd=destination.fd)
        except PermissionError:
            if not self.is_folder(name):
                raise
            self._grant_access(name)  # moving a folder rewrites its "..", which needs write access to it
            os.rename(name, new_name, src_dir_fd=self.fd, dst_dir_fd=destination.fd)

    def remove(self, name: str) -> None:
        """Remove the file or folder `name`, with all that is in it. Links are not followed.

        Does nothing if `name` does not exist.
        """
        try:
            if not self.is_folder(name):
                os.unlink(name, dir_fd=self.fd)
                return
            with self._open_any_folder(name) as folder:
                for inner in folder.names():
                    folder.remove(inner)
            os.rmdir(name, dir_fd=self.fd)
        except FileNotFoundError:
            pass
        except RecursionError:
            raise OSError(errno.ENAMETOOLONG, "folders are nested too deep", os.fspath(self.path)) from None

    def size(self, name: str) -> int:
        """Return the total size in bytes of all files under `name`, without following links."""
        info = self.stat(name)
        if not stat.S_ISDIR(info.st_mode):
            return info.st_size
        total = 0
        with suppress(OSError), self._open_any_folder(name) as folder:
            for inner in folder.names():
                with suppress(OSError):
                    total += folder.size(inner)
        return total

    def _open_any_folder(self, name: str) -> Folder:
        """Open the folder `name`, even if other users can write to it. Only for removing it and measuring its size."""
        try:
            fd = os.open(name, _OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=self.fd)
        except PermissionError:
            self._grant_access(name)
            fd = os.open(name, _OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=self.fd)
        return Folder(fd, self.path / name, self._any_owner)

    def _grant_access(self, name: str) -> None:
        """Give this user access to its own folder `name`, whose mode denies it."""
        fd = os.open(name, os.O_PATH | _OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=self.fd)
        try:
            os.chmod(f"/proc/self/fd/{fd}", 0o700)  # this very folder, even if `name` was replaced meanwhile
        finally:
            close(fd)

    def is_abandoned(self, name: str) -> bool:
        """Return whether the process that created the file or folder `name` has ended, and its lock with it."""
        with self._if_abandoned(name) as abandoned:
            return abandoned

    def is_locked(self, name: str) -> bool:
        """Return whether a running process has locked the file or folder `name`."""
        with suppress(OSError):
            fd = os.open(name, os.O_RDONLY | _OPEN_FILE, dir_fd=self.fd)
            try:
                return lock(fd) is False
            finally:
                close(fd)
        return False

    def remove_abandoned(self, name: str) -> bool:
        """Remove the file or folder `name` if it is abandoned, and return whether it was."""
        with self._if_abandoned(name) as abandoned:  # a process that creates it again sees that it is locked, or gone
            if abandoned:
                self.remove(name)
            return abandoned

    @contextmanager
    def _if_abandoned(self, name: str) -> Iterator[bool]:
        fd = -1
        try:
            fd = os.open(name, os.O_RDONLY | _OPEN_FILE, dir_fd=self.fd)
            # On a file system without locks (None), `name` counts as in use. The process that held this lock may have
            # removed the file.
            abandoned = lock(fd) is True and self._is_at(name, fd)
        except OSError as error:
            abandoned = error.errno in _UNTRUSTED_ERRORS  # a link or a socket, which jitnorm never creates
        try:
            yield abandoned
        finally:
            if fd >= 0:
                close(fd)

    @contextmanager
    def temporary_folder(self, prefix: str) -> Iterator[Folder]:
        """Create a folder for this user alone, lock it for the block, and remove it at the end if it still exists."""
        while True:
            name = f"{prefix}.{os.urandom(4).hex()}"
            os.mkdir(name, 0o700, dir_fd=self.fd)
            # Until it is locked it looks abandoned: another process may have removed it, or be removing it.
            try:
                made = self.open_folder(name)
            except FileNotFoundError:
                continue
            if lock(made.fd) is not False and self._is_at(name, made.fd):
                break
            made.close()
        with made:
            try:
                yield made
            finally:
                with suppress(OSError):
                    if self._is_at(name, made.fd):
                        self.remove(name)

    @contextmanager
    def lock_file(self, name: str) -> Iterator[bool]:
        """Try to lock the file `name` for the block, without waiting, and yield whether it is locked.

        On a file system without locks it counts as locked. The file is removed with the lock.
        """
        fd = self.open_file(name, os.O_RDWR | os.O_CREAT)
        try:
            # The previous holder may have removed the file after it was opened here: such a lock excludes nobody.
            taken = lock(fd) is not False and self._is_at(name, fd)
            try:
                yield taken
            finally:
                if taken:
                    with suppress(OSError):
                        os.unlink(name, dir_fd=self.fd)
        finally:
            close(fd)

    def _is_at(self, name: str, fd: int) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(self.stat(name), os.fstat(fd))
        return False

    @property
    def descriptor_path(self) -> str:
        """Return a path, valid in this process, that survives renames of this folder; without /proc, its plain path."""
        path = f"/proc/self/fd/{self.fd}"
        return path if os.path.isdir(path) else os.fspath(self.path)

    def sync(self) -> None:
        """Wait until the names in this folder are on the disk."""
        os.fsync(self.fd)
