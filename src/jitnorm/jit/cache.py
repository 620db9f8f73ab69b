"""Keeping what was built. A cache is a folder:

    kernels/<name>.<sm>.<key>/<toolchain>/   an entry: sources, build files, manifest.json, the library
    staging/                                 builds under way, each in a folder of its own
    aside/                                   entries that were found damaged, and builds that failed
    locks/                                   one file for each build that several processes wanted at once
    toolchains/                              what compilers said of themselves
    proofs/                                  which products batch-invariant mode found to keep its promise

An entry appears whole, by one rename, and is never changed afterwards. Nothing in it is trusted: the library's hash is
compared before it is loaded, since loading a damaged one can kill the process.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from jitnorm.jit.report import say
from jitnorm.jit.spec import KernelSpec

MANIFEST = "manifest.json"
# The names of what is ours: in a folder that holds other things too, those are nobody's to list or remove.
_HOME = re.compile(r"\w+\.(sm|cpu)_\w+\.[0-9a-f]{16}")
_TOOLCHAIN = re.compile(r"[0-9a-f]{12}")
_STAGED = re.compile(r"\w+\.(sm|cpu)_\w+\.(.+)\.\d+\.\w{8}|removed\.[0-9a-f]{16}")
_ASIDE = re.compile(r"(failed\.\w+\.(sm|cpu)_\w+|" + _HOME.pattern + r")\.[0-9a-f]{8}")
_CACHEDIR_TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Compiled kernels of jitnorm; safe to delete.\n"


class BadEntry(Exception):
    """Why an entry cannot be used."""


class CannotKeep(RuntimeError):
    """Why a build cannot become an entry."""


@dataclass(frozen=True)
class Entry:
    """One kernel on disk."""

    path: Path

    @property
    def label(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        try:
            manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_bytes())
            name, digest, _ = manifest["name"], manifest["sha256"], manifest["size"]
            if manifest["library"] != _library_name(name, digest):
                raise ValueError(f"its library cannot be named {manifest['library']!r}")
        except (FileNotFoundError, NotADirectoryError, PermissionError, ValueError, KeyError, TypeError) as error:
            raise BadEntry(f"its manifest cannot be read ({error})") from None
        return manifest

    @property
    def library(self) -> Path:
        return self.path / str(self.manifest["library"])

    @property
    def size(self) -> int:
        """Bytes on disk, of all its files."""
        return sum(f.stat().st_size for f in self.path.iterdir() if f.is_file())

    @property
    def last_used(self) -> float:
        """Seconds since the epoch: every process that loads the entry touches its manifest."""
        return (self.path / MANIFEST).stat().st_mtime

    def verify(self, any_owner: bool = False, home: str | None = None) -> None:
        """Raises BadEntry unless this is what was built for the folder `home`, by default the one that it is in, and
        nobody else could have put it there."""
        for place in (self.path, self.library):
            if why := untrusted(place, any_owner):
                raise BadEntry(why)
        try:
            content = self.library.read_bytes()
        except (IsADirectoryError, PermissionError) as error:
            raise BadEntry(f"its library cannot be read ({error.strerror})") from None
        if len(content) != self.manifest["size"] or hashlib.sha256(content).hexdigest() != self.manifest["sha256"]:
            raise BadEntry("its library is not the one that was built: the hash differs")
        built = ".".join(str(self.manifest.get(field)) for field in ("name", "arch", "key"))
        if built != (home or self.path.parent.name):
            raise BadEntry(f"it is another kernel, {built}")

    def hold(self) -> None:
        """Marks the entry as in use until this process ends, so that `clear` and `prune` leave it alone."""
        with suppress(OSError):  # a file system without locks, or a read-only one: the entry is usable all the same
            self.release()  # what this path was when it was held before may be gone
            fd = _held[self.path] = os.open(self.path / MANIFEST, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_SH)  # another process that asks whether it is in use is done in a moment
            os.utime(fd)

    def release(self) -> None:
        """Takes the mark away again, for a caller that does not load the entry."""
        if (fd := _held.pop(self.path, None)) is not None:
            os.close(fd)

    def in_use(self) -> bool:
        try:
            fd = os.open(self.path / MANIFEST, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a file system without such locks: nobody can hold one
            return False
        finally:
            os.close(fd)
        return False


_held: dict[Path, int] = {}


def untrusted(place: Path, any_owner: bool = False) -> str | None:
    """Why a file or folder may not be what this user put there; None where it is fine."""
    try:
        info = place.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        return f"{place} cannot be read ({error.strerror})"
    if not any_owner and info.st_uid not in (os.geteuid(), 0):
        return f"{place} belongs to user {info.st_uid}, and this is user {os.geteuid()}"
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{place} can be written by other users (mode {stat.S_IMODE(info.st_mode):o})"
    return None


@dataclass(frozen=True)
class Cache:
    root: Path
    prebuilt: bool = False  # read-only, put there on purpose: any owner, any compiler

    def entries(self) -> Iterator[Entry]:
        for folder in sorted((self.root / "kernels").glob("*/*")):
            if _HOME.fullmatch(folder.parent.name) and _TOOLCHAIN.fullmatch(folder.name) and folder.is_dir():
                yield Entry(folder)

    def _home(self, spec: KernelSpec) -> Path:
        return self.root / "kernels" / f"{spec.name}.{spec.target.sm}.{spec.key}"

    def entry(self, spec: KernelSpec, toolchain: str) -> Entry:
        return Entry(self._home(spec) / toolchain)

    def find(self, spec: KernelSpec, toolchain: str | None, hold: bool = True) -> Entry | None:
        """The usable entry that was built by `toolchain`; by any where that is None. A bad one is set aside."""
        if not toolchain:
            try:
                candidates = [Entry(path) for path in sorted(self._home(spec).iterdir())]
            except OSError:
                return None
        else:
            candidates = [self.entry(spec, toolchain)]
        for entry in candidates:
            if not os.path.isdir(entry.path):
                continue
            if hold:
                entry.hold()
            try:
                entry.verify(any_owner=self.prebuilt)
                return entry
            except BadEntry as error:
                entry.release()
                self.set_aside(entry, str(error))
            except OSError as error:  # too many open files, a server that does not answer: no fault of the entry's
                entry.release()
                say(f"{entry.path} is not used this time: {error}")
        return None

    def set_aside(self, entry: Entry, why: str) -> None:
        if self.prebuilt:
            say(f"{entry.path} is not used: {why}")
            return
        to = self.root / "aside" / f"{entry.path.parent.name}.{secrets.token_hex(4)}"
        try:
            to.parent.mkdir(mode=0o700, exist_ok=True)
            entry.path.rename(to)
        except FileNotFoundError:
            return  # another process was first, and said so
        except OSError as error:
            _say_once(f"{entry.path} is not used: {why}. It cannot be moved out of the way: {error.strerror}")
            return
        with suppress(BadEntry, OSError):
            Entry(to).verify(
                home=entry.path.parent.name
            )  # somebody rebuilt it between the look and the move: it goes back
            to.rename(entry.path)
            return
        say(f"{entry.path} is not used: {why}. It is built again; the old one is in {to}")

    @contextmanager
    def staging(self, spec: KernelSpec) -> Iterator[Path]:
        """A private folder to build in, on the file system of the cache. Gone afterwards, unless it was renamed."""
        holder = f"{spec.name}.{spec.target.sm}.{socket.gethostname()}.{os.getpid()}"
        (self.root / "staging").mkdir(mode=0o700, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{holder}.", dir=self.root / "staging"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def builders(self, spec: KernelSpec) -> list[str]:
        """Who is building this kernel, as "process 12 on host"."""
        start = f"{spec.name}.{spec.target.sm}."
        try:
            names = [n for n in os.listdir(self.root / "staging") if n.startswith(start)]
        except OSError:
            return []
        parts = [name[len(start) :].rsplit(".", 2) for name in names]
        return [f"process {pid} on {host}" for host, pid, _ in parts]

    def publish(self, staging: Path, spec: KernelSpec, toolchain: str) -> Entry:
        """Makes a finished build an entry, whole or not at all. Who comes second uses the first one's.

        CannotKeep where what is there can neither be used nor moved away.
        """
        entry = self.entry(spec, toolchain)
        entry.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for last_try in (False, False, True):
            try:
                os.rename(staging, entry.path)
                break
            except OSError as error:
                if winner := self.find(spec, toolchain):
                    return winner
                if last_try:
                    raise CannotKeep(f"{spec} cannot be kept as {entry.path} ({error.strerror})") from None
        _fsync(entry.path.parent)
        entry.hold()
        return entry

    def remove(self, entry: Entry) -> bool:
        """False where it is in use. It disappears by one rename, so that nobody sees half of it."""
        if entry.in_use():
            return False
        (self.root / "staging").mkdir(mode=0o700, exist_ok=True)
        doomed = self.root / "staging" / f"removed.{secrets.token_hex(8)}"
        with suppress(FileNotFoundError):  # another process removed it
            entry.path.rename(doomed)
            shutil.rmtree(doomed)
        with suppress(OSError):  # it may hold another toolchain's
            entry.path.parent.rmdir()
        return True

    def leftovers(self, older_than_s: float = 86400) -> list[Path]:
        """What is in staging and aside and no longer of use: other processes' unfinished builds count after a day."""
        now = time.time()
        found = []
        for folder, ours in (("staging", _STAGED), ("aside", _ASIDE)):
            for path in sorted((self.root / folder).glob("*")):
                if not ours.fullmatch(path.name):
                    continue
                try:
                    if folder == "aside" or now - path.stat().st_mtime > older_than_s:
                        found.append(path)
                except OSError:
                    continue
        return found


_say_once = functools.cache(say)


def _library_name(name: str, digest: str) -> str:
    """The hash is part of the path because dlopen gives back the old library for a path it has seen, even if the file
    there is another by now."""
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"{name!r} is no kernel's name")
    return f"{name}-{digest[:16]}.so"


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def seal(staging: Path, library: str, manifest: dict[str, Any]) -> None:
    """Names the library by its hash, writes the manifest, and sees both to the disk."""
    content = (staging / library).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    final = staging / _library_name(manifest["name"], digest)
    (staging / library).rename(final)
    manifest = {**manifest, "library": final.name, "sha256": digest, "size": len(content)}
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    final.chmod(0o600)
    staging.chmod(0o700)
    for path in (final, staging / MANIFEST, staging):
        _fsync(path)


def prebuilt() -> Cache | None:
    """The read-only layer that JITNORM_PREBUILT_DIR names."""
    folder = os.environ.get("JITNORM_PREBUILT_DIR")
    return Cache(Path(os.path.expanduser(folder)).absolute(), prebuilt=True) if folder else None


def default_root() -> Path:
    """JITNORM_CACHE_DIR, or the platform's cache folder. Nothing is created. Not absolute where there is no home."""
    own = os.environ.get("JITNORM_CACHE_DIR")
    root = Path(os.path.expanduser(own or platformdirs.user_cache_dir("jitnorm", appauthor=False)))
    return root if str(root).startswith("~") else root.absolute()


def readable() -> Cache:
    """The cache, which need not exist, or what stands in for it."""
    return _replacement or Cache(default_root())


def own() -> list[Cache]:
    """All to look in, beside the prebuilt layer. What stands in for a cache need not have what that has."""
    return [*([_replacement] if _replacement else []), Cache(default_root())]


def writable() -> Cache:
    """The cache to build into, created if need be; where that cannot be, or is unsafe, a folder of this process."""
    if _replacement:
        return _replacement
    root = default_root()
    why = create(root)
    return replace(root, why) if why else Cache(root)


def replace(root: Path, why: str) -> Cache:
    """From now on this process keeps what it builds in a folder of its own, and not in `root`."""
    global _replacement
    from multiprocessing.util import Finalize  # unlike atexit, it also serves workers that a process forked

    try:
        temporary = Path(tempfile.mkdtemp(prefix="jitnorm-"))
    except OSError as error:
        raise RuntimeError(
            f"jitnorm cannot keep kernels in {root}: {why}; nor for this process: {error}. Set JITNORM_CACHE_DIR"
        ) from None
    say(f"cannot keep kernels in {root}: {why}. This process keeps its own in {temporary}; set JITNORM_CACHE_DIR")
    _replacement = Cache(temporary)
    Finalize(None, shutil.rmtree, args=(temporary, True), exitpriority=0)
    return _replacement


_replacement: Cache | None = None


def unusable(root: Path) -> str | None:
    """Why kernels cannot be kept in `root`, which need not exist; None where they can. Nothing is created."""
    if not root.is_absolute():
        return "there is no home folder"
    place = next(p for p in (root, *root.parents) if os.path.lexists(p))
    if not os.path.isdir(place):
        return f"{place} is not a folder"
    if not os.access(place, os.W_OK | os.X_OK):
        return "it is read-only"
    if os.statvfs(place).f_flag & os.ST_NOEXEC:
        return "no code can be loaded from its file system, which is mounted noexec"
    for name in ("kernels", "staging"):  # somebody else may have made them, as with sudo
        if os.path.isdir(root / name) and not os.access(root / name, os.W_OK | os.X_OK):
            return f"{root / name} is read-only"
    return untrusted(root) if place == root else None


def create(root: Path) -> str | None:
    """Creates `root` if need be. Why kernels cannot be kept there; None where they can."""
    if why := unusable(root):
        return why
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        tag = root / "CACHEDIR.TAG"
        if not any(root.iterdir()):  # backups leave out what has this tag, which others' files may not want
            tag.write_text(_CACHEDIR_TAG)
    except OSError as error:
        return error.strerror or str(error)
    return untrusted(root)
