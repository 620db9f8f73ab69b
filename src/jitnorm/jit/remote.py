"""Fetch entries from a remote cache, and push entries to it. It is a folder of any file system that fsspec can open:

    kernels/<name>.<arch>.<key>/<toolchain>.json            a manifest: one line of JSON, and perhaps a signature
    kernels/<name>.<arch>.<key>/<toolchain>.<sha256>.tar    an archive of that one kernel, as `archive.write` makes it

The manifest names the kernel's id and the archive's size and sha256. So who trusts a manifest, by its digest or its
signature, knows all bytes of the entry. A reader does not interpret a manifest before it is trusted, and not a byte of
an archive before its hash is right.

A remote cache may be slow, damaged or malicious. Every file is read up to a limit, every request has a time limit, and
the first request that fails or takes too long is the last one of the process.
"""

from __future__ import annotations

import _thread
import hashlib
import hmac
import json
import os
import re
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

from jitnorm.jit import archive, locations
from jitnorm.jit.cache import KERNELS, TOOLCHAIN_FOLDER
from jitnorm.jit.entry import MAX_JSON_BYTES, MAX_LIBRARY_BYTES, Entry
from jitnorm.jit.folder import Folder, UntrustedPath
from jitnorm.jit.log import logger, warn_once
from jitnorm.jit.spec import KernelSpec

_FORMAT = 1
_REQUEST_LIMIT_S = 10.0
_MAX_REQUEST_LIMIT_S = 3600.0
_TOTAL_REQUESTS = 6  # all requests of a process take at most the time that this many may take
_MAX_MANIFEST_BYTES = 1 << 12
_MAX_ARCHIVE_BYTES = MAX_LIBRARY_BYTES + 8 * MAX_JSON_BYTES  # of one kernel
_MAX_TRUST_BYTES = 1 << 22
_MAX_KEY_BYTES = 1 << 10
_MAX_CANDIDATES = 16  # entries of other toolchains that are tried for one kernel
_CHUNK = 1 << 20
_SHA256 = r"[0-9a-f]{64}"
_SIGNATURE = b"hmac-sha256 "
_T = TypeVar("_T")

# The state of this process: remote caches that are not asked again, and what they did not have.
_stopped: set[str] = set()
_missed: set[tuple[object, ...]] = set()
_waited_s = 0.0


class BadSetting(RuntimeError):
    """A variable or a file that it names cannot be used; the message says why."""


class Unavailable(RuntimeError):
    """The remote cache does not work; the message says why."""


class _Refused(Exception):
    """An entry of the remote cache is not trusted, or is not what its manifest describes; the message says why."""


# Trust


class Trust(NamedTuple):
    """What this process trusts: manifests with one of these digests, and those that were signed with the key."""

    digests: frozenset[str]
    key: bytes | None

    def accepts(self, manifest: bytes, signature: bytes) -> bool:
        """Return whether the first line of a manifest file is trusted, given all that follows it."""
        signed = self.key is not None and hmac.compare_digest(signature, _signature(manifest, self.key))
        return signed or _digest(manifest) in self.digests


def read_trust() -> Trust:
    """Return what JITNORM_REMOTE_TRUST and JITNORM_REMOTE_KEY name. Raises BadSetting if that is nothing."""
    listed, key = os.environ.get("JITNORM_REMOTE_TRUST"), os.environ.get("JITNORM_REMOTE_KEY")
    if not listed and not key:
        raise BadSetting(
            "nothing in it is trusted: set JITNORM_REMOTE_TRUST to a file of the digests that jitnorm cache push "
            "prints, or JITNORM_REMOTE_KEY to the key file that it signed with"
        )
    return Trust(_read_digests(listed) if listed else frozenset(), read_key(key) if key else None)


def _read_digests(file: str) -> frozenset[str]:
    digests = set()
    text = _read_setting(file, _MAX_TRUST_BYTES).decode("ascii", "backslashreplace")
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split()
        if words and not words[0].startswith("#"):
            if not re.fullmatch(_SHA256, words[0]):
                raise BadSetting(
                    f"line {number} of {file} must begin with a sha256, as jitnorm cache push prints it, "
                    f"got {_shown(words[0])!r}"
                )
            digests.add(words[0])
    return frozenset(digests)


def read_key(file: str) -> bytes:
    """Return the secret key in a file of 64 hexadecimal digits. Raises BadSetting if other users can read it."""
    text = _read_setting(file, _MAX_KEY_BYTES, is_secret=True).strip()
    if not re.fullmatch(rb"[0-9a-fA-F]{64}", text):
        raise BadSetting(f"the key file {file} must have 64 hexadecimal digits, as openssl rand -hex 32 prints them")
    return bytes.fromhex(text.decode())


def _read_setting(file: str, limit: int, is_secret: bool = False) -> bytes:
    """Return the content of a file that only this user or root can have written, nor read if it is a secret.

    Links are resolved first: secrets are mounted into containers as links.
    """
    path = Path(os.path.realpath(os.path.expanduser(file)))
    try:
        with Folder.open_root(path.parent) as folder:
            mode = folder.stat(path.name).st_mode & 0o777
            if is_secret and mode & 0o077:
                raise UntrustedPath(path, f"can be read by other users (mode {mode:o}): chmod 600 it")
            return folder.read(path.name, limit)
    except UntrustedPath as error:
        raise BadSetting(f"the file {file} is not trusted: {error}") from None
    except OSError as error:
        raise BadSetting(f"the file {file} cannot be read: {error.strerror or error}") from None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _signature(manifest: bytes, key: bytes) -> bytes:
    """Return the second line of a signed manifest file."""
    return _SIGNATURE + hmac.digest(key, manifest, "sha256").hex().encode() + b"\n"


# Requests, each in a thread of its own, because a call of a file system may block for ever


class _Remote:
    """An open remote cache."""

    def __init__(self, file_system: Any, root: str) -> None:
        self._fs = file_system
        self._root = root.rstrip("/")

    @classmethod
    def open(cls, url: str) -> _Remote:
        """Open a remote cache. Raises Unavailable without fsspec, and what fsspec raises."""
        try:
            from fsspec.core import url_to_fs  # here, as it is optional
        except ImportError:
            raise Unavailable("it needs fsspec: pip install 'jitnorm[remote]'") from None
        return cls(*url_to_fs(url))

    def read(self, name: str, limit: int, abandoned: threading.Event | None = None) -> bytes | None:
        """Return the content of a file, and only `limit` + 1 bytes of a larger one; None if there is no such file.

        The sizes that a file system claims are ignored. Reading ends early if nobody waits for it any more.
        """
        parts, size = [], 0
        try:
            with self._fs.open(f"{self._root}/{name}", "rb") as file:
                while size <= limit and not (abandoned and abandoned.is_set()):
                    if not (part := file.read(min(_CHUNK, limit + 1 - size))):
                        break
                    parts.append(part)
                    size += len(part)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            _raise_if_disconnected(error)
            return None
        return b"".join(parts)

    def names(self, folder: str) -> list[str]:
        """Return the names in a folder, which need not exist."""
        try:
            paths = self._fs.ls(f"{self._root}/{folder}", detail=False)
        except (FileNotFoundError, NotADirectoryError) as error:
            _raise_if_disconnected(error)
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in paths]

    def write(self, name: str, content: bytes) -> None:
        """Write a file so that readers see all of it or none, as far as the file system can do that.

        A class of fsspec that renames has an `mv` of its own: there the content is written beside the file, and moved.
        In an object store `mv` copies, and a file appears when all of it was sent.
        """
        from fsspec import AbstractFileSystem

        path = f"{self._root}/{name}"
        if type(self._fs).mv is AbstractFileSystem.mv:
            self._fs.pipe_file(path, content)
            return
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        draft = f"{path}.{os.urandom(4).hex()}.tmp"
        try:
            self._fs.pipe_file(draft, content)
            self._fs.mv(draft, path)
        except BaseException:
            with suppress(Exception):
                self._fs.rm_file(draft)
            raise


def _raise_if_disconnected(error: OSError) -> None:
    """Raise the cause of an error "not found" if it is another one: fsspec also has it for an HTTP server that is down.

    S3's "not found" has a cause that is no OSError.
    """
    if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
        raise error.__cause__


def _within_limit(function: Callable[[threading.Event], _T]) -> _T:
    """Return what `function` returns in another thread. Its argument is set when the result is no longer waited for.

    Raises:
        Unavailable: It raised an exception, or took too long.
    """
    global _waited_s
    limit = _request_limit()
    left = _TOTAL_REQUESTS * limit - _waited_s
    if left <= 0:
        raise Unavailable(f"its requests have taken {_waited_s:.0f} s in this process (see JITNORM_REMOTE_TIMEOUT)")
    abandoned = threading.Event()
    outcomes: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

    def run() -> None:
        try:
            outcomes.put((function(abandoned), None))
        except BaseException as error:
            outcomes.put((None, error))

    started = time.monotonic()
    try:
        # Thread.start would wait forever for a thread that runs out of memory before its first line. A thread that
        # blocks does not keep the process from ending.
        _thread.start_new_thread(run, ())
        value, error = outcomes.get(timeout=min(limit, left))
    except Empty:
        raise Unavailable(f"it did not answer within {min(limit, left):.3g} s (JITNORM_REMOTE_TIMEOUT)") from None
    except (RuntimeError, MemoryError) as problem:  # there are too many threads
        raise Unavailable(f"no thread can be started to ask it: {problem}") from None
    finally:
        abandoned.set()
        _waited_s += time.monotonic() - started
    if isinstance(error, Unavailable):
        raise error
    if error:  # file systems raise anything
        raise Unavailable(f"{type(error).__name__}: {_shown(error)}") from error
    return value  # type: ignore[no-any-return]


def _request_limit() -> float:
    """Return how many seconds a request may take."""
    text = os.environ.get("JITNORM_REMOTE_TIMEOUT")
    if text:
        with suppress(ValueError):
            if 0 < float(text) <= _MAX_REQUEST_LIMIT_S:
                return float(text)
        warn_once(
            f"JITNORM_REMOTE_TIMEOUT must be seconds above 0 and up to {_MAX_REQUEST_LIMIT_S:.0f}, got {text!r}: "
            f"the limit is {_REQUEST_LIMIT_S:.0f} s"
        )
    return _REQUEST_LIMIT_S


# Fetching


def fetch(
    spec: KernelSpec,
    toolchain: str | None,
    accepts_others: bool = False,
    mark_in_use: bool = True,
    ignore: Container[Path] = (),
) -> Entry | None:
    """Add an entry for `spec` from the remote cache JITNORM_REMOTE_CACHE to the cache, and return it.

    Never raises for what the remote cache does: that is logged once, and None is returned.

    Args:
        spec: The kernel.
        toolchain: The key of the toolchain that built it; None for any.
        accepts_others: Whether to look for entries of other toolchains too, after that one's.
        mark_in_use: Whether this process is going to load it.
        ignore: Paths of entries in the cache to skip.
    """
    url = os.environ["JITNORM_REMOTE_CACHE"]
    request = (url, spec, toolchain, accepts_others)
    if url in _stopped or request in _missed:
        return None
    try:
        trust = read_trust()
        remote = _within_limit(lambda _: _Remote.open(url))
        for entry in _candidates(remote, spec, toolchain, accepts_others):
            if entry.path in ignore:
                continue
            if (packed := _fetch(remote, entry.label, trust)) and (added := _add(packed, spec, mark_in_use)):
                logger.debug("fetched %s from %s", entry.label, shown_url(url))
                return added
    except (BadSetting, Unavailable) as error:
        _stopped.add(url)
        warn_once(f"the remote cache {shown_url(url)} is not used by this process: {error}")
    _missed.add(request)
    return None


def _candidates(remote: _Remote, spec: KernelSpec, toolchain: str | None, accepts_others: bool) -> Iterator[Entry]:
    """Yield the entries to ask for, in the order in which a cache is searched for them."""
    cache = locations.readable()
    if toolchain:
        yield cache.entry(spec, toolchain)
    if accepts_others or not toolchain:
        kernel = cache.entry(spec, "").path.name
        found = {
            name.removesuffix(".json")
            for name in _within_limit(lambda _: remote.names(f"{KERNELS}/{kernel}"))
            if re.fullmatch(rf"{TOOLCHAIN_FOLDER}\.json", name, re.ASCII)
        }
        for name in sorted(found - {toolchain})[:_MAX_CANDIDATES]:
            yield cache.entry(spec, name)


def _fetch(remote: _Remote, label: str, trust: Trust) -> archive.PackedEntry | None:
    """Return the entry of that label in a remote cache, or None if it has none that is trusted and intact.

    Raises:
        Unavailable: The remote cache does not work.
    """
    path = f"{KERNELS}/{label}"
    content = _within_limit(lambda abandoned: remote.read(f"{path}.json", _MAX_MANIFEST_BYTES, abandoned))
    if content is None:
        return None
    try:
        sha256, size = _trusted_manifest(content, label, trust)
        data = _within_limit(lambda abandoned: remote.read(f"{path}.{sha256}.tar", size, abandoned))
        return _unpacked(data, label, sha256, size)
    except _Refused as error:
        warn_once(f"{label} in the remote cache is not used: {error}")
        return None


def _trusted_manifest(content: bytes, label: str, trust: Trust) -> tuple[str, int]:
    """Return the sha256 and the size of the archive that a manifest file names. Raises _Refused."""
    if len(content) > _MAX_MANIFEST_BYTES:
        raise _Refused(f"its manifest has more than {_MAX_MANIFEST_BYTES} bytes")
    line, newline, signature = content.partition(b"\n")
    if not trust.accepts(line + newline, signature):
        raise _Refused(
            "its manifest has neither a digest that JITNORM_REMOTE_TRUST lists nor a signature by the key "
            "JITNORM_REMOTE_KEY"
        )
    try:
        manifest = json.loads(line)
        known_format, kernel, sha256, size = (manifest[name] for name in ("format", "kernel", "sha256", "size"))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _Refused("its manifest cannot be parsed") from None
    if known_format != _FORMAT:
        raise _Refused(f"its manifest has format {_shown(known_format)}, and this release reads format {_FORMAT}")
    if kernel != label:
        raise _Refused(f"its manifest is that of another kernel, {_shown(kernel)}")
    if not isinstance(sha256, str) or not re.fullmatch(_SHA256, sha256):
        raise _Refused(f"its archive cannot have the hash {_shown(sha256)}")
    if type(size) is not int or not 0 <= size <= _MAX_ARCHIVE_BYTES:
        raise _Refused(f"its archive cannot have {_shown(size)} bytes: at most {_MAX_ARCHIVE_BYTES} are accepted")
    return sha256, size


def _unpacked(data: bytes | None, label: str, sha256: str, size: int) -> archive.PackedEntry:
    """Return the entry in an archive, which must have that hash and size. Raises _Refused."""
    if data is None:
        raise _Refused("its archive is missing")
    if len(data) != size or _digest(data) != sha256:
        raise _Refused("its archive is not the one that its manifest names: size or hash differ")
    try:
        packed = archive.read(data)
    except archive.BadArchive as error:
        raise _Refused(f"its archive is damaged: {error}") from None
    if [each.label for each in packed] != [label]:
        raise _Refused("its archive has other kernels")
    return packed[0]


def _add(packed: archive.PackedEntry, spec: KernelSpec, mark_in_use: bool) -> Entry | None:
    """Add an entry to the cache, or to a temporary one if that cannot be written. Return it, or None on failure."""
    try:
        cache = locations.writable()
        try:
            archive.add(cache, [packed])
        except RuntimeError as error:
            if locations.is_temporary():
                raise
            cache = locations.use_temporary(cache.root, str(error))
            archive.add(cache, [packed])
    except RuntimeError as error:
        warn_once(f"{packed.label} in the remote cache is not used: {error}")
        return None
    return cache.find(spec, packed.label.rpartition("/")[2], mark_in_use)


# Pushing


class Pushed(NamedTuple):
    """An entry that is in a remote cache now.

    Attributes:
        label: Its id.
        digest: The digest of its manifest.
        is_new: Whether something was written.
    """

    label: str
    digest: str
    is_new: bool


def push(url: str, entries: Iterable[Entry], key: bytes | None) -> Iterator[Pushed]:
    """Write entries to a remote cache, one after the other, and yield each. What is there already is not written.

    The archive is written before the manifest that names it, so that readers find both. Its name contains its hash: an
    archive that another manifest names, such as the one before, is not replaced.

    Args:
        url: The remote cache.
        entries: The entries. Of those with the same label the first is used.
        key: The key to sign manifests with; None to sign none.

    Raises:
        RuntimeError: An entry is damaged, or the remote cache cannot be written. Entries before it were pushed.
    """
    try:
        remote = _Remote.open(url)
    except Exception as error:  # as in `_within_limit`
        raise RuntimeError(f"the remote cache {shown_url(url)} cannot be opened: {_shown(error)}") from error
    done = set()
    for entry in entries:
        for packed in archive.pack([entry] if entry.label not in done else []):
            done.add(packed.label)
            try:
                pushed = _push(remote, packed, key)
            except Exception as error:
                raise RuntimeError(
                    f"{packed.label} cannot be written to the remote cache {shown_url(url)}: "
                    f"{type(error).__name__}: {_shown(error)}"
                ) from error
            yield pushed


def _push(remote: _Remote, packed: archive.PackedEntry, key: bytes | None) -> Pushed:
    data, path = archive.write([packed]), f"{KERNELS}/{packed.label}"
    fields = {"format": _FORMAT, "kernel": packed.label, "sha256": _digest(data), "size": len(data)}
    line = json.dumps(fields, sort_keys=True).encode() + b"\n"
    manifest = line + (_signature(line, key) if key else b"")
    is_new = False
    # What is there is compared byte by byte, not by its size: it may be damaged, or another's.
    if remote.read(file := f"{path}.{_digest(data)}.tar", len(data)) != data:
        remote.write(file, data)
        is_new = True
    there = remote.read(f"{path}.json", _MAX_MANIFEST_BYTES) or b""
    if there != manifest and (key or not there.startswith(line)):  # without a key, a signature stays
        remote.write(f"{path}.json", manifest)
        is_new = True
    return Pushed(packed.label, _digest(line), is_new)


# Texts


def problem(url: str) -> str | None:
    """Return why the settings of a remote cache do not allow to read from it, or None. It is not asked anything."""
    try:
        read_trust()
        from fsspec import get_filesystem_class
        from fsspec.core import split_protocol

        get_filesystem_class(split_protocol(url)[0] or "file")
    except BadSetting as error:
        return str(error)
    except (ImportError, ValueError) as error:  # fsspec, or what it needs for this protocol
        return f"{_shown(error)}: pip install 'jitnorm[remote]', and what fsspec needs for this URL"
    return None


def shown_url(url: str) -> str:
    """Return a URL without the user, password and query that it may have."""
    return re.sub(r"\?.*", "?...", re.sub(r"://[^/\s]*@", "://", url))


def _shown(value: object) -> str:
    """Return a text from elsewhere as one short line without control characters, passwords and queries."""
    text = shown_url(ascii(str(value))[1:-1])
    return text if len(text) <= 200 else f"{text[:200]}..."
