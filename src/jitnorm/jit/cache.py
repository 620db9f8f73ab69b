"""Find, publish and quarantine compiled kernels. A cache is a folder:

    kernels/<name>.<arch>.<key>/<toolchain>/   an entry: sources, build files, manifest.json, the library
    staging/                                   builds and imports in progress, in folders that processes have locked
    quarantine/                                damaged entries and folders, and failed builds with their logs
    locks/                                     one file for each build in progress
    toolchains/                                the versions of compilers
    invariance/                                results of batch-invariant mode's checks
    gemms/                                     the fastest GEMMs for the shapes of weights

An entry is published by one rename. A damaged or untrusted file or folder is moved to quarantine, logged once, and
built again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import socket
from collections.abc import Container, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitnorm.jit.entry import MAX_JSON_BYTES, BadEntry, Entry, open_path, verified_library
from jitnorm.jit.folder import Folder, UntrustedPath
from jitnorm.jit.log import logger, warn_once
from jitnorm.jit.spec import KernelSpec

KERNELS = "kernels"
STAGING = "staging"
QUARANTINE = "quarantine"
LOCKS = "locks"
TOOLCHAINS = "toolchains"
INVARIANCE = "invariance"
GEMMS = "gemms"
# The folders of records, which are made again if they are missing.
RECORDS = (TOOLCHAINS, INVARIANCE, GEMMS)

# The folder of the cache may contain other files too. Only names of these forms are listed or removed.
# Regular expressions are compiled when they are used: `import jitnorm` would pay for it.
_KERNEL = r"\w+\.(?:sm|cpu)_\w+"  # rmsnorm_4096_bf16.sm_90a
KERNEL_FOLDER = rf"{_KERNEL}\.[0-9a-f]{{16}}"  # and the spec's key
TOOLCHAIN_FOLDER = r"[0-9a-f]{12}"
_TOOLCHAIN_RECORD = r"(?:cpu|cuda)-[0-9a-f]{16}"
_HASHED_RECORD = r"[0-9a-f]{24}\.\S*"
_TOKEN = r"[0-9a-f]{8}"
# A build's or an import's folder: and host name, host id, process id, token
_BUILD = rf"(?:{_KERNEL}|import)\..+\.(?P<host>[0-9a-f]{{8}})\.\d+\.[0-9a-z_]{{8}}"
OWN_NAMES = {
    STAGING: rf"{_BUILD}|removed\.[0-9a-f]{{16}}",
    # A file found in place of one of the cache's folders is not among them: it may be the user's, and is kept.
    QUARANTINE: rf"(?:failed\.{_KERNEL}|{KERNEL_FOLDER}.*|{_TOOLCHAIN_RECORD}.*|{_HASHED_RECORD})\.{_TOKEN}",
    LOCKS: rf"{KERNEL_FOLDER}\.{TOOLCHAIN_FOLDER}",
    TOOLCHAINS: rf"{_TOOLCHAIN_RECORD}\.\S*",
    INVARIANCE: _HASHED_RECORD,
    GEMMS: _HASHED_RECORD,
}
_MAX_QUARANTINED = 16


class CacheNotWritable(RuntimeError):
    """A build cannot be stored in the cache."""


@dataclass(frozen=True)
class Cache:
    """A cache's folder, which need not exist.

    Attributes:
        root: The folder.
        prebuilt: Whether it is the prebuilt layer: never written, accepted from any owner and any compiler.
    """

    root: Path
    prebuilt: bool = False

    def open(self, *names: str, create: bool = False) -> Folder:
        """Open the folder `root/names[0]/...`. Anything else in the place of a folder is moved to quarantine.

        Args:
            names: Names of the folders below the root.
            create: Whether to create the folders that do not exist.

        Raises:
            UntrustedPath: The root itself is not a private folder, or a folder of the prebuilt layer is not.
            OSError: A folder does not exist, or cannot be opened or created.
        """
        for last_try in (False, False, True):
            try:
                folder = Folder.open_root(self.root, any_owner=self.prebuilt)
                for name in names:
                    with folder:
                        folder = folder.create_folder(name) if create else folder.open_folder(name)
                return folder
            except UntrustedPath as error:
                if last_try or self.prebuilt or error.path == self.root:
                    raise
                self.quarantine(error.path, str(error))
        raise AssertionError

    def exists(self) -> bool:
        """Return whether the folder exists, and no other user can write to it."""
        with suppress(OSError, UntrustedPath), Folder.open_root(self.root, any_owner=self.prebuilt):
            return True
        return False

    # Entries

    def entry(self, spec: KernelSpec, toolchain: str) -> Entry:
        """Return the entry for `spec` built by the toolchain with that key. It need not exist."""
        return Entry(self.root / KERNELS / kernel_folder(spec) / toolchain, self.prebuilt)

    def entries(self) -> Iterator[Entry]:
        """Yield the entries, damaged ones included, sorted by name."""
        for names, is_folder in self.kernel_paths():
            if is_folder:
                yield Entry(self.root.joinpath(KERNELS, *names), self.prebuilt)

    def kernel_paths(self) -> Iterator[tuple[tuple[str, ...], bool]]:
        """Yield the paths below `kernels` that are named like entries, and whether each is a folder."""
        try:
            folder = open_path(self.root, (KERNELS,), self.prebuilt)
        except (UntrustedPath, OSError):
            return
        with folder:
            for kernel in (name for name in folder.names() if re.fullmatch(KERNEL_FOLDER, name)):
                found: list[tuple[tuple[str, ...], bool]]
                try:
                    with folder.open_folder(kernel) as parent:
                        names = [name for name in parent.names() if re.fullmatch(TOOLCHAIN_FOLDER, name)]
                        found = [((kernel, name), parent.is_folder(name)) for name in names]
                except UntrustedPath:
                    found = [((kernel,), False)]
                except OSError:
                    continue  # it was removed meanwhile, or cannot be read now
                yield from found

    def find(
        self,
        spec: KernelSpec,
        toolchain: str | None,
        mark_in_use: bool = True,
        accepts_others: bool = False,
        ignore: Container[Path] = (),
    ) -> Entry | None:
        """Return a usable entry for `spec`, whose `content` is verified. Damaged ones are moved to quarantine.

        Args:
            spec: The kernel.
            toolchain: The key of the toolchain that built it; None for any.
            mark_in_use: Whether this process is going to load it.
            accepts_others: Whether to look for entries of other toolchains too, after that one's.
            ignore: Paths of entries to skip.
        """
        return self._find(kernel_folder(spec), toolchain, mark_in_use, accepts_others, ignore)

    def _find(
        self,
        kernel: str,
        toolchain: str | None,
        mark_in_use: bool,
        accepts_others: bool = False,
        ignore: Container[Path] = (),
    ) -> Entry | None:
        for entry in self._candidates(kernel, toolchain, accepts_others):
            if entry.path in ignore:
                continue
            if mark_in_use:
                entry.mark_in_use()
            try:
                entry.content  # noqa: B018
                return entry
            except FileNotFoundError:
                entry.release()  # it does not exist, or another process is removing it
            except BadEntry as error:
                entry.release()
                self.quarantine(entry.path, str(error))
            except OSError as error:  # too many open files or a file server that is down: the entry may be good
                entry.release()
                logger.warning("%s is not used this time: %s", entry.path, error)
        return None

    def _candidates(self, kernel: str, toolchain: str | None, accepts_others: bool) -> list[Entry]:
        try:
            with self.open(KERNELS, kernel) as folder:
                path, names = folder.path, folder.names()
        except FileNotFoundError:
            return []
        except (UntrustedPath, OSError) as error:
            warn_once(f"{self.root} is not used: {error}")
            return []
        found = [name for name in names if name == toolchain]
        if accepts_others or not toolchain:
            found += sorted(name for name in names if name != toolchain and re.fullmatch(TOOLCHAIN_FOLDER, name))
        return [Entry(path / name, self.prebuilt) for name in found]

    def publish(self, staged: Path, entry: Entry) -> Entry:
        """Rename a finished folder to its entry's path. If another process was first, return its entry.

        Args:
            staged: The folder, which is below this cache's `staging`.
            entry: The entry that it becomes.

        Returns:
            The entry, marked as in use.

        Raises:
            CacheNotWritable: The path is occupied by something that can neither be used nor moved.
        """
        kernel, toolchain = entry.path.parts[-2:]
        problem: OSError | UntrustedPath | None = None
        for _ in range(3):
            try:
                with (
                    self.open(*staged.parent.relative_to(self.root).parts) as source,
                    self.open(KERNELS, kernel, create=True) as target,
                ):
                    source.move(staged.name, target, toolchain)
                    target.sync()
                entry.mark_in_use()
                return entry
            except (OSError, UntrustedPath) as error:
                problem = error
                if winner := self._find(kernel, toolchain, mark_in_use=True):
                    return winner
        reason = getattr(problem, "strerror", None) or problem
        raise CacheNotWritable(f"{entry.label} cannot be kept as {entry.path} ({reason})") from None

    @contextmanager
    def kernel_folders(self, entries: Iterable[Entry]) -> Iterator[None]:
        """Create the folders that entries are published in. If the block raises, those still empty are removed."""
        created = []
        try:
            for kernel in dict.fromkeys(entry.path.parent.name for entry in entries):
                with self.open(KERNELS, create=True) as kernels:
                    if not kernels.is_folder(kernel):
                        created.append(kernel)
                self.open(KERNELS, kernel, create=True).close()
            yield
        except BaseException:
            with suppress(OSError, UntrustedPath), open_path(self.root, (KERNELS,)) as kernels:
                for kernel in created:
                    with suppress(OSError):  # it contains an entry, or was not created
                        os.rmdir(kernel, dir_fd=kernels.fd)
            raise

    def remove(self, entry: Entry) -> bool:
        """Remove an entry. Return False if a process has it loaded."""
        kernel, toolchain = entry.path.parts[-2:]
        with entry.lock_unused() as unused:
            if not unused:
                return False
            with suppress(FileNotFoundError):  # another process removed it
                self.discard((KERNELS, kernel), toolchain)
        with suppress(OSError, UntrustedPath), open_path(self.root, (KERNELS,)) as kernels:
            os.rmdir(kernel, dir_fd=kernels.fd)  # fails if another toolchain's entry is in it
        return True

    def discard(self, names: tuple[str, ...], name: str) -> None:
        """Remove `root/names/name`, by a rename first, so that no process sees a part of it."""
        with open_path(self.root, names) as folder, self.open(STAGING, create=True) as staging:
            removed = f"removed.{os.urandom(8).hex()}"
            folder.move(name, staging, removed)
            staging.remove(removed)

    # Quarantine

    def quarantine(self, path: Path, reason: str, even_if_valid: bool = False) -> None:
        """Move a damaged file or folder of this cache to quarantine, and log it. The newest 16 are kept.

        If it cannot be moved, that is logged and nothing is raised. An entry that turns out to be valid is kept,
        because another process has built it meanwhile.

        Args:
            path: The file or folder.
            reason: What is wrong with it.
            even_if_valid: Whether to move an entry whose hash is right, because it cannot be loaded.
        """
        names = path.relative_to(self.root).parts
        if self.prebuilt or not names:
            warn_once(f"{path} is not used: {reason}")
            return
        is_entry = len(names) == 3
        new_name = f"{names[-2] if is_entry else names[-1]}.{os.urandom(4).hex()}"
        try:
            with open_path(self.root, names[:-1]) as folder, self._open_quarantine() as quarantine:
                if names == (QUARANTINE,):
                    return  # _open_quarantine has moved it
                folder.move(names[-1], quarantine, new_name)
                if is_entry and not even_if_valid and _is_valid(quarantine, new_name, names[1]):
                    quarantine.move(new_name, folder, names[-1])  # it was rebuilt before the move
                    return
                logger.warning("%s is not used: %s. It is now in %s", path, reason, quarantine.path / new_name)
                remove_oldest(quarantine, OWN_NAMES[QUARANTINE], _MAX_QUARANTINED)
        except FileNotFoundError:
            return  # another process was first, and logged it
        except (UntrustedPath, OSError) as error:
            problem = getattr(error, "strerror", None) or error
            warn_once(f"{path} is not used: {reason}. It cannot be moved to quarantine: {problem}")

    def quarantine_failed_build(self, staging: Folder, spec: KernelSpec) -> Path | None:
        """Move the folder of a failed build to quarantine, for its log. Return its new path, or None on failure."""
        new_name = f"failed.{spec.name}.{spec.target.sm}.{os.urandom(4).hex()}"
        try:
            with self.open(STAGING) as source, self._open_quarantine() as quarantine:
                source.move(staging.path.name, quarantine, new_name)
                remove_oldest(quarantine, OWN_NAMES[QUARANTINE], _MAX_QUARANTINED)
                return quarantine.path / new_name
        except (OSError, UntrustedPath):
            return None

    def _open_quarantine(self) -> Folder:
        """Open the quarantine. Anything else in its place is moved into a new one."""
        with Folder.open_root(self.root) as root:
            try:
                return root.create_folder(QUARANTINE)
            except UntrustedPath as error:
                new_name = f"{QUARANTINE}.{os.urandom(4).hex()}"
                root.move(QUARANTINE, root, new_name)
                folder = root.create_folder(QUARANTINE)
                root.move(new_name, folder, new_name)
                logger.warning("%s is not used: %s. It is now in %s", error.path, error, folder.path / new_name)
                return folder

    # Builds in progress

    @contextmanager
    def staging(self, spec: KernelSpec | None = None) -> Iterator[Folder]:
        """Create a private folder to build in, on the file system of the cache.

        It is removed at the end of the block, unless it was renamed.

        Args:
            spec: The kernel that is built; None for an import of several.
        """
        what = f"{spec.name}.{spec.target.sm}" if spec else "import"
        builder = f"{what}.{socket.gethostname()}.{host_id()}.{os.getpid()}"
        with self.open(STAGING, create=True) as staging, staging.temporary_folder(builder) as folder:
            yield folder

    def builders(self, spec: KernelSpec) -> list[str]:
        """Return the processes that are building this kernel, as "process 12 on host"."""
        prefix = f"{spec.name}.{spec.target.sm}."
        parts = [name.removeprefix(prefix).rsplit(".", 3) for name in self._builds(spec)]
        return [f"process {pid} on {host}" for host, _, pid, _ in parts]

    def has_running_builder(self, spec: KernelSpec) -> bool:
        """Return whether a process of this host builds this kernel, and is neither ended nor stopped.

        A network file system may not show the locks of other hosts, so nothing is known about their processes.
        """
        builds = [name for name in self._builds(spec) if host_of_build(name) == host_id()]
        with suppress(UntrustedPath, OSError), open_path(self.root, (STAGING,)) as staging:
            return any(staging.is_locked(name) and not _is_stopped(name.rsplit(".", 2)[1]) for name in builds)
        return False

    def _builds(self, spec: KernelSpec) -> list[str]:
        """Return the names of the folders in `staging` in which this kernel is built."""
        prefix = f"{spec.name}.{spec.target.sm}."
        try:
            with open_path(self.root, (STAGING,)) as staging:
                return [name for name in staging.names() if name.startswith(prefix) and name.count(".") >= 5]
        except (UntrustedPath, OSError):
            return []

    @contextmanager
    def build_lock(self, spec: KernelSpec, toolchain: str) -> Iterator[bool]:
        """Try to take the lock of a build, without waiting, and yield whether this process may build.

        It may also on a file system without locks: two processes then do the same work.
        """
        with ExitStack() as stack:
            locked = True
            for _ in range(2):
                try:
                    locks = stack.enter_context(self.open(LOCKS, create=True))
                    locked = stack.enter_context(locks.lock_file(f"{kernel_folder(spec)}.{toolchain}"))
                    break
                except UntrustedPath as error:
                    self.quarantine(error.path, str(error))
                except OSError:
                    break
            yield locked

    # Records: small JSON files that are computed again if they are missing

    def read_record(self, part: str, name: str) -> Any:
        """Return the JSON value that `write_record` wrote, or None if there is none that can be trusted and read."""
        try:
            with open_path(self.root, (part,), self.prebuilt) as folder:
                return json.loads(folder.read(name, MAX_JSON_BYTES))
        except (UntrustedPath, OSError, ValueError, RecursionError):
            return None

    def write_record(self, part: str, name: str, value: Any) -> None:
        """Write a JSON value to the file `name` of the folder `part`, atomically.

        Raises:
            OSError, UntrustedPath: It cannot be written.
        """
        content = json.dumps(value, indent=1).encode()
        with self.open(part, create=True) as folder:
            try:
                folder.write(name, content)
            except IsADirectoryError:
                self.quarantine(folder.path / name, "it is a folder")
                folder.write(name, content)


def kernel_folder(spec: KernelSpec) -> str:
    """Return the name of the folder of a kernel's entries."""
    return f"{spec.name}.{spec.target.sm}.{spec.key}"


def host_of_build(name: str) -> str | None:
    """Return the `host_id` in the name of a folder in `staging`, or None if it is not a build's."""
    match = re.fullmatch(OWN_NAMES[STAGING], name)
    return match["host"] if match else None


@functools.cache
def host_id() -> str:
    """Return an id that this machine and all its containers share: a hash of the kernel's boot id."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            identity = file.read(64)
    except OSError:
        identity = socket.gethostname().encode()
    return hashlib.sha256(identity).hexdigest()[:8]


def _is_stopped(pid: str) -> bool:
    """Return whether a process was stopped by a signal or a debugger."""
    with suppress(OSError, IndexError), open(f"/proc/{pid}/stat", errors="replace") as file:
        return file.read().rpartition(")")[2].split()[0] in ("T", "t")
    return False


def _is_valid(quarantine: Folder, name: str, kernel_folder: str) -> bool:
    """Return whether what was moved to quarantine from `kernel_folder` is a valid entry after all."""
    with suppress(BadEntry, OSError, UntrustedPath), quarantine.open_folder(name) as folder:
        verified_library(folder, kernel_folder)
        return True
    return False


def remove_oldest(folder: Folder, pattern: str, max_kept: int) -> None:
    """Remove all but the newest `max_kept` of the names that match `pattern`."""
    times = {}
    for name in (name for name in folder.names() if re.fullmatch(pattern, name)):
        with suppress(OSError):
            times[name] = folder.stat(name).st_ctime_ns
    for name in sorted(times, key=lambda name: times[name])[:-max_kept]:
        with suppress(OSError):
            folder.remove(name)
