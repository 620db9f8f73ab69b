"""Files of a folder that others may have touched: reached by descriptor, never through a link, read without trust.

A path is looked up anew at every use, and whoever can write to one of its folders can exchange what it names between
two uses. An open folder stays the same folder. So everything in the cache is opened from its root downwards, each step
relative to the descriptor of the step before, and each step's owner, mode and type are asked of the open descriptor.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

_OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# Without O_NONBLOCK, opening a FIFO waits for somebody to write into it.
_OPEN_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
# What open() says of a link, of a file where a folder should be, of a socket, and of what may not be opened.
_UNFIT_ERRORS = (errno.ELOOP, errno.EMLINK, errno.ENOTDIR, errno.EISDIR, errno.ENXIO, errno.EACCES, errno.EPERM)
# What flock says on a file system that has no such locks.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Unfit(RuntimeError):
    """What lies at a path is not what belongs there: another type, another owner, or open to others.

    Attributes:
        path: where it lies.
    """

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} {why}")
        self.path = path


def untrusted(info: os.stat_result, any_owner: bool = False) -> str | None:
    """Return why another user could have written what `info` describes, or None if nobody else can."""
    if not any_owner and info.st_uid not in (os.geteuid(), 0):
        return f"belongs to user {info.st_uid}, and this is user {os.geteuid()}"
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written by other users (mode {stat.S_IMODE(info.st_mode):o})"
    return None


class Folder:
    """An open folder that nobody else can write to. Use it in a `with` statement."""

    def __init__(self, fd: int, path: Path, any_owner: bool) -> None:
        self.fd = fd
        self.path = path
        self._any_owner = any_owner

    @classmethod
    def root(cls, path: Path, any_owner: bool = False) -> Folder:
        """Open the folder that all others lie in. It alone may be reached through links.

        Raises:
            Unfit: it is no folder, or other users can write to it.
            OSError: it cannot be opened.
        """
        return cls._open(os.fspath(path), None, path, any_owner)

    def folder(self, name: str) -> Folder:
        """Open the folder `name` in this one. Raises as `root`; FileNotFoundError where there is nothing."""
        return self._open(name, self.fd, self.path / name, self._any_owner)

    @classmethod
    def _open(cls, name: str, dir_fd: int | None, path: Path, any_owner: bool) -> Folder:
        try:
            fd = os.open(name, _OPEN_FOLDER | (0 if dir_fd is None else os.O_NOFOLLOW), dir_fd=dir_fd)
        except OSError as error:
            if error.errno in _UNFIT_ERRORS:
                raise Unfit(path, f"cannot be opened as a folder ({error.strerror})") from None
            raise
        folder = cls(fd, path, any_owner)
        try:
            if why := untrusted(os.fstat(fd), any_owner):
                raise Unfit(path, why)
        except BaseException:
            folder.close()
            raise
        return folder

    def make_folder(self, name: str) -> Folder:
        """Open the folder `name`, which is created, for this user alone, if there is nothing."""
        with suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=self.fd)
        return self.folder(name)

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
        """Return what lies at `name`: of a link, the link itself."""
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def is_folder(self, name: str) -> bool:
        """Return whether `name` is a folder, and no link to one."""
        with suppress(OSError):
            return stat.S_ISDIR(self.stat(name).st_mode)
        return False

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of the file `name`.

        Raises:
            Unfit: it is no regular file, other users can write to it, or it has more than `limit` bytes.
            OSError: it is not there, or cannot be read.
        """
        fd = self.open_file(name, os.O_RDONLY)
        try:
            info = os.fstat(fd)
            if why := untrusted(info, self._any_owner):
                raise Unfit(self.path / name, why)
            content = b""
            while len(content) <= limit and (part := os.read(fd, min(limit, info.st_size) + 1)):
                content += part
            if len(content) > limit:
                raise Unfit(self.path / name, f"has more than {limit} bytes")
            return content
        finally:
            close(fd)

    def open_file(self, name: str, flags: int) -> int:
        """Return a descriptor of the regular file `name`. Raises Unfit where it is something else."""
        try:
            fd = os.open(name, flags | _OPEN_FILE, 0o600, dir_fd=self.fd)
        except OSError as error:
            if error.errno in _UNFIT_ERRORS:
                raise Unfit(self.path / name, f"cannot be opened as a file ({error.strerror})") from None
            raise
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise Unfit(self.path / name, "is not a regular file")
        except BaseException:
            close(fd)
            raise
        return fd

    def write(self, name: str, content: bytes, sync: bool = False) -> None:
        """Write the file `name`, whole or not at all: no reader sees a part of it. `sync` sees it to the disk."""
        draft = f"{name}.{secrets.token_hex(4)}.tmp"
        fd = self.open_file(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            lock(fd)  # as long as it is held, `is_abandoned` says no
            view = memoryview(content)
            while view:
                view = view[os.write(fd, view) :]
            if sync:
                os.fsync(fd)
            self.move(draft, self, name)
        except BaseException:
            with suppress(OSError):
                os.unlink(draft, dir_fd=self.fd)
            raise
        finally:
            close(fd)

    def move(self, name: str, to: Folder, new_name: str) -> None:
        """Rename what lies at `name`, whatever it is, into another folder of the same file system."""
        try:
            os.rename(name, new_name, src_dir_fd=self.fd, dst_dir_fd=to.fd)
        except PermissionError:
            if not self.is_folder(name):
                raise
            self._open_up(name)  # the ".." of a folder that its owner cannot write cannot be changed
            os.rename(name, new_name, src_dir_fd=self.fd, dst_dir_fd=to.fd)

    def remove(self, name: str) -> None:
        """Remove what lies at `name`, a folder with all that is in it; of a link, the link itself.

        Nothing is raised where it is already gone.
        """
        try:
            if not self.is_folder(name):
                os.unlink(name, dir_fd=self.fd)
                return
            with self._any_folder(name) as folder:
                for inner in folder.names():
                    folder.remove(inner)
            os.rmdir(name, dir_fd=self.fd)
        except FileNotFoundError:
            pass
        except RecursionError:
            raise OSError(errno.ENAMETOOLONG, "folders are nested too deep", os.fspath(self.path)) from None

    def size(self, name: str) -> int:
        """Return the bytes on disk of all files under `name`; links are not followed."""
        info = self.stat(name)
        if not stat.S_ISDIR(info.st_mode):
            return info.st_size
        total = 0
        with suppress(OSError), self._any_folder(name) as folder:
            for inner in folder.names():
                with suppress(OSError):
                    total += folder.size(inner)
        return total

    def _any_folder(self, name: str) -> Folder:
        """Open the folder `name`, whoever can write to it: for removing, which reads no content."""
        try:
            fd = os.open(name, _OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=self.fd)
        except PermissionError:
            self._open_up(name)
            fd = os.open(name, _OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=self.fd)
        return Folder(fd, self.path / name, self._any_owner)

    def _open_up(self, name: str) -> None:
        """Let this user into its own folder `name`, which is closed to its owner too."""
        fd = os.open(name, os.O_PATH | _OPEN_FOLDER | os.O_NOFOLLOW, dir_fd=self.fd)
        try:
            os.chmod(f"/proc/self/fd/{fd}", 0o700)  # which is this very folder, whatever lies at `name` by now
        finally:
            close(fd)

    def is_abandoned(self, name: str) -> bool:
        """Return whether whoever made the file or folder `name` no longer holds its lock: it has ended, somehow."""
        with self._if_abandoned(name) as abandoned:
            return abandoned

    def is_locked(self, name: str) -> bool:
        """Return whether a living process holds the lock of the file or folder `name`."""
        with suppress(OSError):
            fd = os.open(name, os.O_RDONLY | _OPEN_FILE, dir_fd=self.fd)
            try:
                return lock(fd) is False
            finally:
                close(fd)
        return False

    def remove_abandoned(self, name: str) -> bool:
        """Remove the file or folder `name` if it is abandoned; return whether it was."""
        with self._if_abandoned(name) as abandoned:  # who makes it anew meanwhile sees that it is locked, or gone
            if abandoned:
                self.remove(name)
            return abandoned

    @contextmanager
    def _if_abandoned(self, name: str) -> Iterator[bool]:
        fd = -1
        try:
            fd = os.open(name, os.O_RDONLY | _OPEN_FILE, dir_fd=self.fd)
            # Where there are no locks, nothing can be said; and whoever held this one may have removed the file.
            abandoned = lock(fd) is True and self._is_at(name, fd)
        except OSError as error:
            abandoned = error.errno in _UNFIT_ERRORS  # a link or a socket, say, which nobody locks
        try:
            yield abandoned
        finally:
            if fd >= 0:
                close(fd)

    @contextmanager
    def temporary_folder(self, prefix: str) -> Iterator[Folder]:
        """Create a folder for this user alone, locked until the end of the block, and removed then if it is there."""
        while True:
            name = f"{prefix}.{secrets.token_hex(4)}"
            os.mkdir(name, 0o700, dir_fd=self.fd)
            made = self.folder(name)
            # Between mkdir and flock it looks abandoned, and another process may have begun to remove it.
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
        """Try to take the lock file `name` until the end of the block, and say whether that succeeded.

        It also counts as taken on a file system without locks. The file is removed with the lock.
        """
        fd = self.open_file(name, os.O_RDWR | os.O_CREAT)
        try:
            # Whoever held it before has removed the file: a lock on what is no longer there excludes nobody.
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
        """Return a path that leads to this very folder in this process, whatever is renamed; its name without /proc."""
        path = f"/proc/self/fd/{self.fd}"
        return path if os.path.isdir(path) else os.fspath(self.path)

    def sync(self) -> None:
        """Write this folder's names to the disk."""
        os.fsync(self.fd)


def close(fd: int) -> None:
    """Close a descriptor of what was only read, or written and synced: an error changes nothing."""
    with suppress(OSError):
        os.close(fd)


def lock(fd: int, shared: bool = False) -> bool | None:
    """Take the lock of an open file or folder until the descriptor is closed, without ever waiting for it.

    Returns:
        True where it is taken, False where another process holds it, None where the file system has no locks.

    Raises:
        OSError: whether it is held cannot be found out, as of an exclusive lock without write access on NFS.
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
