"""Keeping what was built. A cache is a folder:

    kernels/<name>.<sm>.<key>/<toolchain>/   an entry: sources, build files, manifest.json, the library
    staging/                                 builds under way, each in a folder of its own, which its process locks
    quarantine/                              what lay where an entry or folder should be, and builds that failed
    locks/                                   one file for each build that is under way
    toolchains/                              the versions that compilers have answered with
    proofs/                                  which products batch-invariant mode found to keep its promise

An entry appears whole, by one rename, and is never changed afterwards. Nothing in it is trusted: every folder on the
way to it must be private, and the bytes of the library whose hash was compared are the bytes that are loaded. What does
not belong where it lies is moved to quarantine, once.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

from jitnorm.jit.folder import Folder, Unfit, close, lock, untrusted
from jitnorm.jit.report import say
from jitnorm.jit.spec import KernelSpec

MANIFEST = "manifest.json"
KERNELS, STAGING, QUARANTINE, LOCKS, TOOLCHAINS, PROOFS = (
    "kernels",
    "staging",
    "quarantine",
    "locks",
    "toolchains",
    "proofs",
)
_FORMER_QUARANTINE = "aside"  # as it was called before the first release
# The names of what is ours: in a folder that holds other things too, those are nobody's to list or remove.
_SPEC = r"\w+\.(?:sm|cpu)_\w+"
_HOME = re.compile(rf"{_SPEC}\.[0-9a-f]{{16}}")
_TOOLCHAIN = re.compile(r"[0-9a-f]{12}")
_OURS = {
    STAGING: re.compile(rf"{_SPEC}\..+\.(?P<boot>[0-9a-f]{{8}})\.\d+\.[0-9a-z_]{{8}}|removed\.[0-9a-f]{{16}}"),
    # What lay where one of the folders should be is not among them: it may be somebody's, and stays in quarantine.
    QUARANTINE: re.compile(rf"(?:failed\.{_SPEC}|{_HOME.pattern}.*|(?:cpu|cuda)-[0-9a-f]{{16}}.*)\.[0-9a-f]{{8}}"),
    _FORMER_QUARANTINE: re.compile(rf"(?:failed\.{_SPEC}|{_HOME.pattern})\.[0-9a-f]{{8}}"),
    LOCKS: re.compile(rf"{_HOME.pattern}\.[0-9a-f]{{12}}"),
    TOOLCHAINS: re.compile(r"(?:cpu|cuda)-[0-9a-f]{16}\.\S*"),
    PROOFS: re.compile(r"[0-9a-f]{24}\.\S*"),
}
_DRAFT = ".tmp"
_MAX_QUARANTINED = 16
_MAX_REMEMBERED = 64  # files of `toolchains`: one for each environment
_MAX_MANIFEST_BYTES = 1 << 20
_MAX_LIBRARY_BYTES = 1 << 28
_CLEANING_S = 0.5
_HOLD_TRIES = 5
_DAY_S = 86400.0
_CACHEDIR_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# Compiled kernels of jitnorm; safe to delete.\n"


class BadEntry(Exception):
    """Why an entry cannot be used."""


class CannotKeep(RuntimeError):
    """Why a build cannot become an entry."""


@dataclass(frozen=True)
class Entry:
    """One kernel on disk.

    Attributes:
        path: `<root>/kernels/<name>.<sm>.<key>/<toolchain>`.
        prebuilt: whether it is in the prebuilt layer, whose files may belong to any user.
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
        """Open the entry's folder. Raises Unfit or OSError, as `Folder.root`."""
        return _open(self.root, self.path.parts[-3:], self.prebuilt)

    @property
    def manifest(self) -> dict[str, Any]:
        """Return what was written when the entry was built. Raises BadEntry where that cannot be read."""
        try:
            with self.open() as folder:
                return _read_manifest(folder)
        except (Unfit, OSError) as error:
            raise BadEntry(f"its manifest cannot be read ({error})") from None

    @property
    def library(self) -> Path:
        """Return the path of the library."""
        return self.path / str(self.manifest["library"])

    @property
    def size(self) -> int:
        """Return the bytes on disk, of all files."""
        with _open(self.root, self.path.parts[-3:-1], self.prebuilt) as home:
            return home.size(self.path.name)

    @property
    def last_used(self) -> float:
        """Return seconds since the epoch: every process that loads the entry touches its manifest."""
        with self.open() as folder:
            return folder.stat(MANIFEST).st_mtime

    @property
    def content(self) -> bytes:
        """Return the bytes of the library, which are those that were built. They are read once. Raises as `verify`."""
        # Not functools.cached_property: before Python 3.12 it takes a lock, which a fork in another thread leaves held.
        content: bytes | None = self.__dict__.get("_content")
        if content is None:
            content = self.__dict__["_content"] = self.verify()
        return content

    def verify(self) -> bytes:
        """Return the library's bytes, if they are what was built for the folder that the entry is in.

        Raises:
            BadEntry: they are not, or another user could have written them.
            FileNotFoundError: the entry is gone.
            OSError: it cannot be read at the moment.
        """
        try:
            with self.open() as folder:
                return _verified(folder, self.path.parent.name)
        except Unfit as error:
            raise BadEntry(str(error)) from None

    def hold(self) -> None:
        """Mark the entry as in use until this process ends, so that `clear` and `prune` leave it alone.

        Nothing waits for the lock: somebody else may hold it for ever.
        """
        self.release()  # what this path was when it was held before may be gone
        with suppress(OSError, Unfit), self.open() as folder:
            fd = folder.open_file(MANIFEST, os.O_RDONLY)
            _held[self.path] = fd
            for _ in range(_HOLD_TRIES):
                if lock(fd, shared=True) is not False:
                    break
                time.sleep(0.002)  # another process asks whether it is in use, or removes it, or is hostile
            os.utime(fd)

    def release(self) -> None:
        """Take the mark away again, for a caller that does not load the entry."""
        if (fd := _held.pop(self.path, None)) is not None:
            close(fd)

    def in_use(self) -> bool:
        """Return whether a process has marked the entry as in use, or that cannot be found out.

        On a file system without locks nothing can be marked. Removing a loaded kernel harms no process: what it loaded
        is in its memory.
        """
        with self._removable() as removable:
            return not removable

    @contextmanager
    def _removable(self) -> Iterator[bool]:
        """Yield whether nobody has the entry loaded. Nobody marks it as in use before the block ends."""
        with ExitStack() as stack:
            try:
                folder = stack.enter_context(self.open())
                try:
                    fd = folder.open_file(MANIFEST, os.O_RDWR)  # as NFS grants no exclusive lock without
                except OSError as error:
                    if error.errno != errno.EROFS:
                        raise
                    fd = folder.open_file(MANIFEST, os.O_RDONLY)
                stack.callback(close, fd)
                free = lock(fd) is not False
            except (Unfit, FileNotFoundError):
                free = True  # damaged: nobody can have loaded it
            except OSError:
                free = False
            yield free


_held: dict[Path, int] = {}


def _read_manifest(folder: Folder) -> dict[str, Any]:
    try:
        manifest = json.loads(folder.read(MANIFEST, _MAX_MANIFEST_BYTES))
        name, digest, size = manifest["name"], manifest["sha256"], manifest["size"]
        if manifest["library"] != _library_name(name, digest):
            raise ValueError(f"its library cannot be named {manifest['library']!r}")
        if type(size) is not int or size < 0:
            raise ValueError(f"its library cannot have {size!r} bytes")
    except (Unfit, FileNotFoundError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadEntry(f"its manifest cannot be read ({error})") from None
    return manifest  # type: ignore[no-any-return]


def _verified(folder: Folder, home: str) -> bytes:
    """Return the library in an entry's folder. Raises BadEntry unless it is what was built for the folder `home`."""
    manifest = _read_manifest(folder)
    size = manifest["size"]
    try:
        content = folder.read(manifest["library"], min(size, _MAX_LIBRARY_BYTES))
    except (Unfit, FileNotFoundError) as error:
        raise BadEntry(f"its library cannot be read ({error})") from None
    if len(content) != size or hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        raise BadEntry("its library is not the one that was built: the hash differs")
    built = ".".join(str(manifest.get(name)) for name in ("name", "arch", "key"))
    if built != home:
        raise BadEntry(f"it is another kernel, {built}")
    return content


def _open(root: Path, names: tuple[str, ...], prebuilt: bool) -> Folder:
    """Open `root/names[0]/names[1]/...`, each step of which only its owner can write to."""
    folder = Folder.root(root, any_owner=prebuilt)
    for name in names:
        with folder:
            folder = folder.folder(name)
    return folder


@dataclass(frozen=True)
class Cache:
    """A cache's folder, which need not exist.

    Attributes:
        root: the folder.
        prebuilt: whether it is read-only and was put there on purpose: any owner, any compiler.
    """

    root: Path
    prebuilt: bool = False

    def open(self, *names: str, create: bool = False) -> Folder:
        """Open the folder `root/names[0]/...`; with `create`, it is made where it is not there.

        What lies there instead is moved to quarantine, and not in the prebuilt layer.

        Raises:
            Unfit: the root itself is no folder or not private, or this is the prebuilt layer.
            OSError: it is not there, or cannot be opened or made.
        """
        for last_try in (False, False, True):
            try:
                folder = Folder.root(self.root, any_owner=self.prebuilt)
                for name in names:
                    with folder:
                        folder = folder.make_folder(name) if create else folder.folder(name)
                return folder
            except Unfit as unfit:
                if last_try or self.prebuilt or unfit.path == self.root:
                    raise
                self.quarantine(unfit.path, str(unfit))
        raise AssertionError

    def exists(self) -> bool:
        """Return whether there is such a folder, and nobody else can write to it."""
        with suppress(OSError, Unfit), Folder.root(self.root, any_owner=self.prebuilt):
            return True
        return False

    def entries(self) -> Iterator[Entry]:
        """Yield what looks like an entry, whole or not, sorted by name."""
        for names, is_entry in self._in_kernels():
            if is_entry:
                yield Entry(self.root.joinpath(KERNELS, *names), self.prebuilt)

    def _in_kernels(self) -> Iterator[tuple[tuple[str, ...], bool]]:
        """Yield the names under `kernels` where entries or their folders should be, and whether it looks like one."""
        try:
            folder = _open(self.root, (KERNELS,), self.prebuilt)
        except (Unfit, OSError):
            return
        with folder:
            for home in filter(_HOME.fullmatch, folder.names()):
                there: list[tuple[tuple[str, ...], bool]]
                try:
                    with folder.folder(home) as inner:
                        there = [((home, n), inner.is_folder(n)) for n in filter(_TOOLCHAIN.fullmatch, inner.names())]
                except Unfit:
                    there = [((home,), False)]
                except OSError:
                    continue  # removed meanwhile, or not to be read now
                yield from there

    def _home(self, spec: KernelSpec) -> str:
        return f"{spec.name}.{spec.target.sm}.{spec.key}"

    def entry(self, spec: KernelSpec, toolchain: str) -> Entry:
        """Return the entry that `toolchain` makes of `spec`, which need not exist."""
        return Entry(self.root / KERNELS / self._home(spec) / toolchain, self.prebuilt)

    def find(self, spec: KernelSpec, toolchain: str | None, hold: bool = True) -> Entry | None:
        """Return the usable entry that was built by `toolchain`; by any where that is None.

        A bad one is moved to quarantine. The entry is marked as in use, unless `hold` is false, and its `content` is
        verified.
        """
        for entry in self._candidates(spec, toolchain):
            if hold:
                entry.hold()
            try:
                entry.content  # noqa: B018
                return entry
            except FileNotFoundError:
                entry.release()  # there is none, or another process is removing it
            except BadEntry as error:
                entry.release()
                self.quarantine(entry.path, str(error))
            except OSError as error:  # too many open files, a server that does not answer: no fault of the entry's
                entry.release()
                say(f"{entry.path} is not used this time: {error}")
        return None

    def _candidates(self, spec: KernelSpec, toolchain: str | None) -> list[Entry]:
        """Return the entries of `spec`, unverified. What is in the way of their folder is moved to quarantine."""
        try:
            with self.open(KERNELS, self._home(spec)) as home:
                there = home.names()
        except FileNotFoundError:
            return []
        except (Unfit, OSError) as error:
            _say_once(f"{self.root} is not used: {error}")
            return []
        names = [name for name in there if name == toolchain or (not toolchain and _TOOLCHAIN.fullmatch(name))]
        return [self.entry(spec, name) for name in names]

    def quarantine(self, path: Path, why: str, even_if_sound: bool = False) -> None:
        """Move `path`, which lies in this cache, out of the way, and say so. The newest few are kept.

        Nothing is raised where it cannot be moved. An entry that turns out to be what was built stays: another process
        has built it meanwhile. `even_if_sound` is for one that cannot be loaded all the same.
        """
        names = path.relative_to(self.root).parts
        if self.prebuilt or not names:
            _say_once(f"{path} is not used: {why}")
            return
        kept = f"{names[-2] if len(names) == 3 else names[-1]}.{secrets.token_hex(4)}"
        try:
            with _open(self.root, names[:-1], False) as folder, self._quarantine() as quarantine:
                if names == (QUARANTINE,):
                    return  # opening it has moved away what was there
                folder.move(names[-1], quarantine, kept)
                if len(names) == 3 and not even_if_sound and _is_sound(quarantine, kept, names[1]):
                    quarantine.move(kept, folder, names[-1])  # somebody rebuilt it between the look and the move
                    return
                say(f"{path} is not used: {why}. It is now in {quarantine.path / kept}")
                _remove_oldest(quarantine, _OURS[QUARANTINE], _MAX_QUARANTINED)
        except FileNotFoundError:
            return  # another process was first, and said so
        except (Unfit, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            _say_once(f"{path} is not used: {why}. It cannot be moved out of the way: {reason}")

    def _quarantine(self) -> Folder:
        with Folder.root(self.root) as root:
            try:
                return root.make_folder(QUARANTINE)
            except Unfit as unfit:
                blocked = f"{QUARANTINE}.{secrets.token_hex(4)}"
                root.move(QUARANTINE, root, blocked)
                folder = root.make_folder(QUARANTINE)
                root.move(blocked, folder, blocked)
                say(f"{unfit.path} is not used: {unfit}. It is now in {folder.path / blocked}")
                return folder

    @contextmanager
    def staging(self, spec: KernelSpec) -> Iterator[Folder]:
        """Create a private folder to build in, on the file system of the cache.

        It is removed at the end of the block, unless it was renamed. What dead processes left there is removed first.
        """
        with self.open(STAGING, create=True) as staging:
            self.clean(_CLEANING_S)
            holder = f"{spec.name}.{spec.target.sm}.{socket.gethostname()}.{_boot()}.{os.getpid()}"
            with staging.temporary_folder(holder) as folder:
                yield folder

    def builders(self, spec: KernelSpec) -> list[str]:
        """Return who is building this kernel, as "process 12 on host"."""
        start = f"{spec.name}.{spec.target.sm}."
        try:
            with _open(self.root, (STAGING,), False) as staging:
                names = [name for name in staging.names() if name.startswith(start) and name.count(".") >= 5]
        except (Unfit, OSError):
            return []
        parts = [name[len(start) :].rsplit(".", 3) for name in names]
        return [f"process {pid} on {host}" for host, _, pid, _ in parts]

    def publish(self, staging: Folder, spec: KernelSpec, toolchain: str) -> Entry:
        """Make a finished build an entry, whole or not at all. If another process was first, its entry is returned.

        Raises:
            CannotKeep: what is there can neither be used nor moved away.
        """
        entry = self.entry(spec, toolchain)
        problem: OSError | Unfit | None = None
        for _ in range(3):
            try:
                with (
                    self.open(STAGING) as source,
                    self.open(KERNELS, entry.path.parent.name, create=True) as home,
                ):
                    source.move(staging.path.name, home, toolchain)
                    home.sync()
                entry.hold()
                return entry
            except (OSError, Unfit) as error:
                problem = error
                if winner := self.find(spec, toolchain):
                    return winner
        reason = getattr(problem, "strerror", None) or problem
        raise CannotKeep(f"{spec} cannot be kept as {entry.path} ({reason})") from None

    def remove(self, entry: Entry) -> bool:
        """Remove an entry, by one rename, so that nobody sees half of it. Return False where it is in use."""
        home, toolchain = entry.path.parts[-2:]
        with entry._removable() as removable:
            if not removable:
                return False
            with suppress(FileNotFoundError):  # another process removed it
                self._discard((KERNELS, home), toolchain)
        with suppress(OSError, Unfit), _open(self.root, (KERNELS,), False) as kernels:
            os.rmdir(home, dir_fd=kernels.fd)  # which it may not, as it holds another toolchain's
        return True

    def _discard(self, names: tuple[str, ...], name: str) -> None:
        """Remove what lies at `root/names/name`, first by one rename."""
        with _open(self.root, names, False) as folder, self.open(STAGING, create=True) as staging:
            doomed = f"removed.{secrets.token_hex(8)}"
            folder.move(name, staging, doomed)
            staging.remove(doomed)

    def keep_failed(self, staging: Folder, spec: KernelSpec) -> Path | None:
        """Move the folder of a failed build to quarantine, for its log. Return where it is; None where that fails."""
        kept = f"failed.{spec.name}.{spec.target.sm}.{secrets.token_hex(4)}"
        try:
            with self.open(STAGING) as source, self._quarantine() as quarantine:
                source.move(staging.path.name, quarantine, kept)
                _remove_oldest(quarantine, _OURS[QUARANTINE], _MAX_QUARANTINED)
                return quarantine.path / kept
        except (OSError, Unfit):
            return None

    def clean(self, seconds: float) -> None:
        """Remove what dead processes of this host left, and what is kept in bounded number. Nothing is raised.

        Args:
            seconds: after this long no more is begun.
        """
        deadline = time.monotonic() + seconds
        for path in self._abandoned():
            if time.monotonic() > deadline:
                return
            with suppress(OSError, Unfit), _open(self.root, (path.parent.name,), False) as folder:
                folder.remove_abandoned(path.name)
        with suppress(OSError, Unfit), _open(self.root, (TOOLCHAINS,), False) as folder:
            _remove_oldest(folder, _OURS[TOOLCHAINS], _MAX_REMEMBERED)

    def _abandoned(self) -> Iterator[Path]:
        """Yield this host's staging folders, drafts and lock files that no living process has locked."""
        for part in (STAGING, LOCKS, TOOLCHAINS, PROOFS):
            for name in self._ours(part):
                if part in (TOOLCHAINS, PROOFS) and not name.endswith(_DRAFT):
                    continue
                if part == STAGING and _boot_of(name) not in (None, _boot()):
                    continue  # on NFS, the locks of folders are each host's own
                with suppress(OSError, Unfit), _open(self.root, (part,), False) as folder:
                    if folder.is_abandoned(name):
                        yield folder.path / name

    def _ours(self, part: str) -> list[str]:
        try:
            with _open(self.root, (part,), False) as folder:
                return [name for name in folder.names() if _OURS[part].fullmatch(name)]
        except (Unfit, OSError):
            return []

    def leftovers(self) -> list[Path]:
        """Return what is of no more use: what failed, damaged and unfinished builds left behind.

        Unfinished builds of other hosts count a day after their last change, by the clock of the file system.
        """
        found = {*self._abandoned(), *self._overdue()}
        for part in (QUARANTINE, _FORMER_QUARANTINE):
            found |= {self.root / part / name for name in self._ours(part)}
        found |= {self.root.joinpath(KERNELS, *names) for names, is_entry in self._in_kernels() if not is_entry}
        return sorted(found)

    def _overdue(self) -> Iterator[Path]:
        """Yield unfinished builds, a day old, of which no lock can tell whether they are under way."""
        with suppress(OSError, Unfit), _open(self.root, (STAGING,), False) as staging:
            names = [name for name in self._ours(STAGING) if not staging.is_locked(name)]
            if not names:
                return
            # This host's clock may be wrong, and a file server's is another.
            with staging.temporary_folder("removed") as probe:
                now = os.fstat(probe.fd).st_mtime
            for name in names:
                if now - staging.stat(name).st_mtime > _DAY_S:
                    yield staging.path / name

    def remembered(self) -> list[Path]:
        """Return the files of `toolchains` and `proofs`, which are found out again where they are missing."""
        return [self.root / part / name for part in (TOOLCHAINS, PROOFS) for name in self._ours(part)]

    def discard(self, path: Path) -> bool:
        """Remove one of `leftovers` or `remembered`, following no link. Return True, also where it was gone."""
        *names, name = path.relative_to(self.root).parts
        with suppress(FileNotFoundError):
            self._discard(tuple(names), name)
        return True

    def bytes_at(self, path: Path) -> int:
        """Return the bytes on disk under one of `leftovers` or `remembered`."""
        *names, name = path.relative_to(self.root).parts
        try:
            with _open(self.root, tuple(names), False) as folder:
                return folder.size(name)
        except (OSError, Unfit):
            return 0

    def recall(self, part: str, name: str) -> Any:
        """Return the JSON value that `remember` wrote; None where there is none that can be trusted and read."""
        try:
            with _open(self.root, (part,), self.prebuilt) as folder:
                return json.loads(folder.read(name, _MAX_MANIFEST_BYTES))
        except (Unfit, OSError, ValueError, RecursionError):
            return None

    def remember(self, part: str, name: str, value: Any) -> None:
        """Write a JSON value to the file `name` of the folder `part`, whole or not at all.

        Raises:
            OSError, Unfit: it cannot be written.
        """
        content = json.dumps(value, indent=1).encode()
        with self.open(part, create=True) as folder:
            try:
                folder.write(name, content)
            except IsADirectoryError:
                self.quarantine(folder.path / name, "it is a folder")
                folder.write(name, content)

    @contextmanager
    def build_lock(self, spec: KernelSpec, toolchain: str) -> Iterator[bool]:
        """Try to become the one process that builds `spec`; say whether that succeeded.

        It also counts as success where there are no locks. Nothing but work is lost without.
        """
        name = f"{self._home(spec)}.{toolchain}"
        with ExitStack() as stack:
            taken = True
            for _ in range(2):
                try:
                    locks = stack.enter_context(self.open(LOCKS, create=True))
                    taken = stack.enter_context(locks.lock_file(name))
                    break
                except Unfit as unfit:
                    self.quarantine(unfit.path, str(unfit))
                except OSError:
                    break
            yield taken


_say_once = functools.cache(say)


def _boot_of(staged: str) -> str | None:
    """Return the `_boot` of the host that made a folder of `staging`; None for what is only to be removed."""
    match = _OURS[STAGING].fullmatch(staged)
    return match["boot"] if match else None


@functools.cache
def _boot() -> str:
    """Return what tells this host, with all its containers, from others: a hash of the kernel's boot id."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            identity = file.read(64)
    except OSError:
        identity = socket.gethostname().encode()
    return hashlib.sha256(identity).hexdigest()[:8]


def _is_sound(quarantine: Folder, name: str, home: str) -> bool:
    """Return whether what was moved into quarantine from the folder `home` is a good entry after all."""
    with suppress(BadEntry, OSError, Unfit), quarantine.folder(name) as folder:
        _verified(folder, home)
        return True
    return False


def _remove_oldest(folder: Folder, ours: re.Pattern[str], most: int) -> None:
    """Remove all but the newest `most` of the names that match."""
    times = {}
    for name in filter(ours.fullmatch, folder.names()):
        with suppress(OSError):
            times[name] = folder.stat(name).st_ctime_ns
    for name in sorted(times, key=lambda name: times[name])[:-most]:
        with suppress(OSError):
            folder.remove(name)


def _library_name(name: str, digest: str) -> str:
    """Return the file name of a library. Raises ValueError where one cannot be made of `name` and `digest`."""
    fits = isinstance(name, str) and name.replace("_", "").isalnum()
    if not fits or not isinstance(digest, str) or len(digest) != 64 or not digest.isalnum():
        raise ValueError(f"{name!r} is no kernel's name, or {digest!r} is no hash")
    return f"{name}-{digest[:16]}.so"


def seal(staging: Folder, content: bytes, manifest: dict[str, Any]) -> None:
    """Write the library, named by its hash, and the manifest into `staging`, and see both to the disk."""
    digest = hashlib.sha256(content).hexdigest()
    name = _library_name(manifest["name"], digest)
    manifest = {**manifest, "library": name, "sha256": digest, "size": len(content)}
    staging.write(name, content, sync=True)
    staging.write(MANIFEST, json.dumps(manifest, indent=2).encode() + b"\n", sync=True)
    staging.sync()


def prebuilt() -> Cache | None:
    """Return the read-only layer that JITNORM_PREBUILT_DIR names, if any."""
    folder = os.environ.get("JITNORM_PREBUILT_DIR")
    return Cache(_absolute(os.path.expanduser(folder)), prebuilt=True) if folder else None


def default_root() -> Path:
    """Return JITNORM_CACHE_DIR, or the platform's cache folder. Nothing is created.

    It is not absolute where there is no home folder, or no working directory to start from.
    """
    own = os.environ.get("JITNORM_CACHE_DIR")
    try:
        root = os.path.expanduser(own or platformdirs.user_cache_dir("jitnorm", appauthor=False))
    except RuntimeError:  # neither HOME nor an entry in passwd
        root = "~/.cache/jitnorm"
    return Path(root) if root.startswith("~") else _absolute(root)


def _absolute(path: str) -> Path:
    try:
        return Path(path).absolute()
    except OSError:  # the working directory was deleted
        return Path(path)


def readable() -> Cache:
    """Return the cache, which need not exist, or what stands in for it."""
    return _replacement or Cache(default_root())


def own() -> list[Cache]:
    """Return all caches to look in, beside the prebuilt layer. What stands in for one need not have what that has."""
    return [*([_replacement] if _replacement else []), Cache(default_root())]


def writable() -> Cache:
    """Return the cache to build into, created if need be.

    Where it cannot be created, or is not safe, that is a temporary folder of this process.
    """
    if _replacement:
        return _replacement
    root = default_root()
    why = create(root)
    return replace(root, why) if why else Cache(root)


def replace(root: Path, why: str) -> Cache:
    """Keep what this process builds in a temporary folder of its own from now on, and not in `root`.

    Raises:
        RuntimeError: no temporary folder can be made either.
    """
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


def is_replaced() -> bool:
    """Return whether this process keeps what it builds in a temporary folder."""
    return _replacement is not None


_replacement: Cache | None = None


def unusable(root: Path) -> str | None:
    """Return why kernels cannot be kept in `root`, which need not exist; None where they can. Nothing is created."""
    if not root.is_absolute():
        return "there is no home folder" if str(root).startswith("~") else "the working directory is gone"
    try:
        place = next(p for p in (root, *root.parents) if os.path.lexists(p))
        if not os.path.isdir(place):
            return f"{place} is not a folder"
        if not os.access(place, os.W_OK | os.X_OK):
            return "it is read-only"
        if os.statvfs(place).f_flag & os.ST_NOEXEC:
            return "no code can be loaded from its file system, which is mounted noexec"
        for name in (KERNELS, STAGING):  # somebody else may have made them, as with sudo
            # What is no folder, or is closed to its owner too, is moved to quarantine.
            folder = root / name
            if folder.is_dir() and os.access(folder, os.R_OK) and not os.access(folder, os.W_OK | os.X_OK):
                return f"{folder} is read-only"
        why = untrusted(os.stat(root)) if place == root else None
    except OSError as error:
        return f"{root} cannot be read ({error.strerror})"
    return f"{root} {why}" if why else None


def create(root: Path) -> str | None:
    """Create `root`, and the folders on the way to it, for this user alone, if need be.

    Returns:
        Why kernels cannot be kept there; None where they can.
    """
    if why := unusable(root):
        return why
    try:
        for folder in (*reversed(root.parents), root):
            if not folder.is_dir():
                with suppress(FileExistsError):
                    folder.mkdir(mode=0o700)
        with Folder.root(root) as opened:
            if not opened.names():  # backups leave out what has this tag, which others' files may not want
                opened.write("CACHEDIR.TAG", _CACHEDIR_TAG)
    except OSError as error:
        return error.strerror or str(error)
    except Unfit as unfit:
        return str(unfit)
    return None
