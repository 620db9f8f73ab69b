"""Pack cache entries into one file, and add the entries of such a file to a cache.

The file is an uncompressed tar archive: `jitnorm-cache.json` with the kernels' labels and the sha256 of every other
member, then the files of the entries, as `kernels/00000/library.so`. Entries are numbered in the order of their labels,
because a path in a tar archive has a limit that names of kernels exceed. Equal entries give equal bytes, and only these
bytes are accepted: whatever else tar can express is refused. So no name, link or header in a file from elsewhere can do
harm, and every altered byte is noticed.

Nothing from the file is written before all of it was checked. Nothing is loaded, built or executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jitnorm.jit import cleanup, toolchain
from jitnorm.jit.cache import KERNEL_FOLDER, KERNELS, TOOLCHAIN_FOLDER, Cache
from jitnorm.jit.entry import (
    MANIFEST,
    MAX_JSON_BYTES,
    MAX_LIBRARY_BYTES,
    BadEntry,
    Entry,
    check_library_content,
    parse_manifest,
    verified_library,
)
from jitnorm.jit.folder import Folder, UntrustedPath

MAX_ARCHIVE_BYTES = 1 << 30
MAX_MEMBERS = 1 << 16
MAX_MANIFEST_BYTES = 1 << 16
_MAX_INDEX_BYTES = 1 << 25
_FORMAT = 1
_INDEX = "jitnorm-cache.json"
_LIBRARY = "library.so"
_MAX_RELEASE_CHARACTERS = 100
_TEXT_FILES = ("build.ninja", "cubin.s", MANIFEST, "module.cc", "module.cu", "paths.ninja")
_FILES = (*_TEXT_FILES, _LIBRARY)  # of an entry in an archive
_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_CLEANUP_LIMIT_S = 0.5
_TYPES = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a FIFO",
    tarfile.DIRTYPE: "a folder",
}


class BadArchive(ValueError):
    """The data is not an intact export of a cache; the message names the member that is refused."""


class PackedEntry(NamedTuple):
    """An entry outside a cache, whose files were checked.

    Attributes:
        label: Its path below `kernels`, `<name>.<arch>.<key>/<toolchain>`.
        files: The content of each file.
        library_name: The name of the library among them.
        jitnorm: The release of jitnorm that built it, as the manifest names it; "" if it names none.
        tvm_ffi: The release of tvm-ffi, likewise.
    """

    label: str
    files: dict[str, bytes]
    library_name: str
    jitnorm: str
    tvm_ffi: str

    @property
    def library(self) -> bytes:
        """Return the content of the library."""
        return self.files[self.library_name]


# Packing


def pack(entries: Iterable[Entry]) -> list[PackedEntry]:
    """Read and check entries. Of entries with the same label the first is used.

    Raises:
        ValueError: They are more than an archive may contain.
        RuntimeError: One is damaged, or another user could have written it.
        OSError: One cannot be read at the moment.
    """
    packed: dict[str, PackedEntry] = {}
    members = size = 0
    for entry in entries:
        if entry.label not in packed:
            try:
                packed[entry.label] = _pack(entry)
            except (BadEntry, FileNotFoundError) as error:
                if not os.path.lexists(entry.path):
                    continue  # another process removed it meanwhile
                raise RuntimeError(
                    f"{entry.path} cannot be exported: {error}. Remove it, or export others; jitnorm cache verify "
                    "lists all that are damaged"
                ) from None
            members += len(packed[entry.label].files)
            size += sum(map(len, packed[entry.label].files.values()))
            _check_size(size, members + 1)
    return list(packed.values())


def _pack(entry: Entry) -> PackedEntry:
    try:
        with entry.open() as folder:
            content = verified_library(folder, entry.path.parent.name)
            names = [name for name in folder.names() if name in _TEXT_FILES]
            files = {name: folder.read(name, _limit(name)) for name in names}
            files[parse_manifest(files[MANIFEST])["library"]] = content
    except UntrustedPath as error:
        raise BadEntry(str(error)) from None
    return checked(entry.label, files)


def checked(label: str, files: dict[str, bytes]) -> PackedEntry:
    """Return the entry of that label with these files. Raises BadEntry unless its hash and manifest are right.

    Of the manifest only what PackedEntry has is kept: a parsed one may take twenty times the memory of its text.
    """
    kernel, _, tools = label.partition("/")
    manifest = parse_manifest(files.get(MANIFEST, b""))
    content = files.get(manifest["library"])
    if content is None:
        raise BadEntry(f"its library {manifest['library']} is missing")
    check_library_content(manifest, content, kernel)
    try:
        built_by = toolchain.key_of(manifest["compilers"])
    except (KeyError, TypeError, AttributeError, ValueError):
        built_by = "unknown"
    if built_by != tools:
        raise BadEntry(f"its manifest names compilers with the key {built_by}, and its folder is {tools}")
    releases = [value if isinstance(value, str) else "" for value in map(manifest.get, ("jitnorm", "tvm_ffi"))]
    return PackedEntry(label, files, manifest["library"], *(value[:_MAX_RELEASE_CHARACTERS] for value in releases))


def write(entries: Iterable[PackedEntry]) -> bytes:
    """Return the archive of some entries. It depends on their content alone.

    Raises:
        ValueError: They are more than an archive may contain.
    """
    by_label = {entry.label: entry for entry in entries}
    labels, contents = sorted(by_label), {}
    for number, label in enumerate(labels):
        for name, content in by_label[label].files.items():
            contents[_member_name(number, _LIBRARY if name == by_label[label].library_name else name)] = content
    index = _index_of(labels, {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()})
    parts = [_header(_INDEX, len(index)), index, _padding(len(index))]
    for name in sorted(contents):
        parts += [_header(name, len(contents[name])), contents[name], _padding(len(contents[name]))]
    size = sum(map(len, parts)) + len(_END)
    _check_size(size, len(contents) + 1)
    return b"".join([*parts, _END])


def _check_size(size: int, members: int) -> None:
    """Raise ValueError if an archive has more bytes or members than are accepted."""
    if size > MAX_ARCHIVE_BYTES or members > MAX_MEMBERS:
        raise ValueError(
            f"an export may have {MAX_ARCHIVE_BYTES} bytes and {MAX_MEMBERS} members, got {size} and {members} or "
            "more: export fewer kernels at a time"
        )


def _member_name(number: int, file: str) -> str:
    return f"{KERNELS}/{number:05}/{file}"


def _index_of(labels: list[str], hashes: dict[str, str]) -> bytes:
    index = {"files": hashes, "format": _FORMAT, "kernels": labels}
    return json.dumps(index, indent=1, sort_keys=True).encode() + b"\n"


def _header(name: str, size: int) -> bytes:
    """Return the only header that a member of that name and size may have."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


# Reading


def read(data: bytes) -> list[PackedEntry]:
    """Return the entries of an archive, sorted by their labels. Nothing is written.

    Raises:
        BadArchive: It is not an intact archive, of which `write` could have written every byte.
    """
    if len(data) > MAX_ARCHIVE_BYTES:
        raise BadArchive(f"it has more than {MAX_ARCHIVE_BYTES} bytes")
    members = _members(data)
    name, content = next(members, ("", b""))
    if name != _INDEX:
        raise BadArchive(f"it is not an export of jitnorm's cache: its first member is not {_INDEX}")
    labels, hashes = _parsed_index(content)
    entries: list[dict[str, bytes]] = [{} for _ in labels]
    for name, content in members:
        match = re.fullmatch(rf"{KERNELS}/([0-9]{{5}})/([\w.]+)", name, re.ASCII)
        if name not in hashes or not match or match[2] not in _FILES or int(match[1]) >= len(labels):
            raise BadArchive(f"member {_shown(name)} is unknown: no export contains it")
        if hashlib.sha256(content).hexdigest() != hashes.pop(name):
            raise BadArchive(f"member {_shown(name)} was altered: its hash is not the one in {_INDEX}")
        entries[int(match[1])][match[2]] = content
    for name in hashes:
        raise BadArchive(f"member {_shown(name)} is missing")
    packed = []
    for label, files in zip(labels, entries, strict=True):
        try:
            if _LIBRARY in files:
                files[parse_manifest(files.get(MANIFEST, b""))["library"]] = files.pop(_LIBRARY)
            packed.append(checked(label, files))
        except BadEntry as error:
            raise BadArchive(f"the kernel {_shown(label)[1:-1]} is refused: {_shown(str(error))[1:-1]}") from None
    return packed


def _parsed_index(content: bytes) -> tuple[list[str], dict[str, str]]:
    """Return the labels, and the hash of each member. Raises BadArchive unless `_index_of` wrote this index."""
    try:
        index = json.loads(content)
        known_format, hashes = int(index["format"]), dict(index["files"])
        labels = index["kernels"] if known_format == _FORMAT else []
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise BadArchive(f"member {_INDEX} cannot be read") from None
    if known_format != _FORMAT:
        raise BadArchive(f"it has format {known_format}, and this release of jitnorm reads format {_FORMAT}")
    if (
        not isinstance(labels, list)
        or not all(isinstance(text, str) for text in (*labels, *hashes.values()))
        or not all(re.fullmatch(rf"{KERNEL_FOLDER}/{TOOLCHAIN_FOLDER}", label, re.ASCII) for label in labels)
        or labels != sorted({*labels})
        or _index_of(labels, hashes) != content
    ):
        raise BadArchive(f"member {_INDEX} was altered")
    return labels, hashes


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each member. Raises BadArchive for the first that an export cannot contain."""
    view, start = memoryview(data), 0
    seen: set[str] = set()
    while (header := bytes(view[start : start + _BLOCK])) != bytes(_BLOCK):
        if len(header) < _BLOCK:
            raise BadArchive(f"it is truncated: it has {len(data)} bytes" if seen else "it is not a tar archive")
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            if seen:
                raise BadArchive(f"the header at byte {start} is damaged ({error})") from None
            raise BadArchive(f"it is not a tar archive ({error})") from None
        _check_header(info, header)
        if info.name in seen:
            raise BadArchive(f"member {_shown(info.name)} is there twice")
        seen.add(info.name)
        if len(seen) > MAX_MEMBERS:
            raise BadArchive(f"it has more than {MAX_MEMBERS} members")
        start += _BLOCK
        content, padding = view[start : start + info.size], _padding(info.size)
        start += info.size + len(padding)
        if start > len(data):
            raise BadArchive(f"it is truncated: it ends in member {_shown(info.name)}")
        if view[start - len(padding) : start] != padding:
            raise BadArchive(f"member {_shown(info.name)} was altered: it is followed by other bytes than zeros")
        yield info.name, bytes(content)
    if view[start:] != _END:
        raise BadArchive(f"it does not end after its last member, with {len(_END)} zero bytes")


def _check_header(info: tarfile.TarInfo, header: bytes) -> None:
    """Raise BadArchive for a member that an export cannot contain, and for one that is too large."""
    name = _shown(info.name)
    if not info.isreg():
        kind = _TYPES.get(info.type, f"of the type {info.type!r}")
        raise BadArchive(f"member {name} is {kind}: an export contains regular files only")
    if info.name.startswith("/"):
        raise BadArchive(f"member {name} has an absolute path")
    if {"..", ".", ""} & {*info.name.split("/")}:
        raise BadArchive(f"member {name} has a path that leads elsewhere")
    limit = _limit(info.name.rpartition("/")[2])
    if not 0 <= info.size <= limit:
        raise BadArchive(f"member {name} has {info.size} bytes: at most {limit} are accepted")
    try:
        is_own = header == _header(info.name, info.size)
    except ValueError:  # a name that no member of an export has
        is_own = False
    if not is_own:
        raise BadArchive(f"the header of member {name} was altered: it has fields that no export writes")


def _limit(name: str) -> int:
    """Return how many bytes a member may have whose path ends with `name`."""
    limits = {_INDEX: _MAX_INDEX_BYTES, _LIBRARY: MAX_LIBRARY_BYTES, MANIFEST: MAX_MANIFEST_BYTES}
    return limits.get(name, MAX_JSON_BYTES)


def _shown(value: str) -> str:
    """Return a text from an archive as one short line without control characters."""
    text = ascii(value)
    return text if len(text) <= 200 else f"{text[:200]}...{text[-1]}"


# Adding to a cache


class Added(NamedTuple):
    """The labels of the entries that were added to a cache, and of those that it contained already."""

    new: list[str]
    present: list[str]


def add(cache: Cache, packed: Iterable[PackedEntry]) -> Added:
    """Add entries to a cache, which exists. A damaged entry is replaced, an intact one stays.

    All entries are written beside the cache's own, and the folders that they move to are created, before the first is
    published, each by one rename as after a build. So a disk that is full before the renames leaves the cache as it
    was. Another process may build the same kernel: what is published first is used.

    Raises:
        RuntimeError: They cannot be written. Entries that were published before stay, and are complete.
    """
    entries = [(each, Entry(cache.root.joinpath(KERNELS, *each.label.split("/")))) for each in packed]
    cleanup.remove_abandoned(cache, _CLEANUP_LIMIT_S)
    try:
        missing = [(each, entry) for each, entry in entries if not _is_intact(entry)]
        if missing:
            with cache.staging() as staging:
                for each, entry in missing:
                    _write(staging, _staged_name(entry), each)
                with cache.kernel_folders(entry for _, entry in missing):
                    for _, entry in missing:
                        cache.publish(staging.path / _staged_name(entry), entry).release()
    except (OSError, UntrustedPath) as error:
        raise RuntimeError(f"kernels cannot be added to {cache.root}: {error}") from error
    new = [each.label for each, _ in missing]
    return Added(new, sorted({each.label for each, _ in entries} - {*new}))


def _staged_name(entry: Entry) -> str:
    return f"{entry.path.parent.name}.{entry.path.name}"


def _write(staging: Folder, name: str, packed: PackedEntry) -> None:
    """Write an entry's files to the folder `name`, and wait until the library and the manifest are on the disk."""
    with staging.create_folder(name) as folder:
        last = (packed.library_name, MANIFEST)
        for file in (*(packed.files.keys() - last), *last):
            folder.write(file, packed.files[file], sync=file in last)
        folder.sync()


def _is_intact(entry: Entry) -> bool:
    try:
        entry.verify()
    except (BadEntry, FileNotFoundError):
        return False
    return True
