"""Packing entries into one file, refusing what is no such file, and adding entries to a cache."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_entries import fake

import jitnorm
from jitnorm.jit import archive, files, find, locations, toolchain
from jitnorm.jit.archive import BadArchive, PackedEntry
from jitnorm.jit.build import build
from jitnorm.jit.cache import Cache, CacheNotWritable
from jitnorm.jit.entry import MANIFEST, Entry
from jitnorm.jit.folder import Folder
from jitnorm.jit.spec import Target
from jitnorm.rmsnorm import rmsnorm_spec
from jitnorm.warmup import OPS, make_plan

from .conftest import entries

SPEC = rmsnorm_spec(64, torch.float32, torch.float32, Target("cpu"))
INDEX = "jitnorm-cache.json"
ONE = fake()
TWO = fake("rmsnorm_128_bf16", content=b"other code")
MANIFEST_OF_ONE = json.loads(ONE.files[MANIFEST])
PREFIX = "kernels/00000/"


def snapshot(root: Path) -> dict[str, bytes | None]:
    """Return all files of a cache and its empty folders, without the folder for work in progress if that is empty."""
    found = {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else None
        for path in sorted(root.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }
    found.pop("staging", None)
    return found


@pytest.fixture
def cache(cache_dir) -> Cache:
    """Return an empty cache."""
    assert locations.create(cache_dir) is None
    return Cache(cache_dir)


# Packing


def test_what_was_exported_is_imported_and_used(cache_dir, tmp_path, monkeypatch):
    built = build(SPEC)
    data = archive.write(archive.pack([built]))
    other = tmp_path / "other"
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(other))
    assert find.find(SPEC) is None
    locations.create(other)
    added = archive.add(Cache(other), archive.read(data))
    assert added == ([built.label], [])
    assert snapshot(other / "kernels") == snapshot(cache_dir / "kernels")
    assert find.find(SPEC, mark_in_use=False).path == other / built.path.relative_to(cache_dir)
    modes = {path.stat().st_mode & 0o777 for path in (other / "kernels").rglob("*")}
    assert modes == {0o700, 0o600}


def test_the_same_entries_give_the_same_bytes(tmp_path):
    data = archive.write([ONE, TWO])
    assert archive.write([TWO, ONE]) == data and archive.write(archive.read(data)) == data
    assert archive.write([ONE]) != data
    for root in (tmp_path / "first", tmp_path / "second"):
        locations.create(root)
        archive.add(Cache(root), [ONE, TWO])
        for number, path in enumerate(root.rglob("*")):
            os.utime(path, (number, number))
        assert archive.write(archive.pack(Cache(root).entries())) == data


def test_tar_can_read_it(tmp_path):
    (tmp_path / "file").write_bytes(archive.write([ONE, TWO]))
    with tarfile.open(tmp_path / "file") as tar:
        names = tar.getnames()
        assert tar.extractfile("kernels/00001/module.cu").read() == b"// the source\n"
    files = ("library.so", MANIFEST, "module.cu")
    assert names == [INDEX, *(f"kernels/0000{number}/{name}" for number in range(2) for name in files)]


def longest_name() -> str:
    """Return the longest name of a kernel that warm-up can build."""
    options = {
        "rotary_dim": (64, 128),
        "cos_sin_dtype": ("bf16", "fp32"),
        "cache_dtype": ("bf16", "fp8"),
        "q_out_dtype": ("bf16", "fp8"),
        "interleaved": (False, True),
        "mrope": (False, True),
        "form": ("rows", "strided", "unaligned+no_weight+bias"),
    }
    names = set()
    for op, operator in OPS.items():
        accepted = {name: values for name, values in options.items() if name in operator.options}
        if op.startswith("gated_"):
            accepted["form"] = ("strided", "unaligned+no_weight+fp32_gate+sigmoid")
        if "rounding" in operator.options:
            accepted["rounding"] = ("once", "hf" if "form" in operator.options else "each_step")
        size = None if operator.size_name is None else (128, 256, 16384)
        weights = ("bf16", "fp32") if operator.has_weight else None
        plan = make_plan(op, size, "bf16", weights, device="cpu", skip_unsupported=True, **accepted)
        names |= {spec.name for spec in plan.specs}
    return max(names, key=len)


def test_the_longest_names(tmp_path):
    """A path in a tar archive is limited, and a label is not part of one."""
    longest = longest_name()
    assert len(longest) >= 111
    locations.create(tmp_path)
    for name in (longest, longest.ljust(180, "x")):
        packed = [fake(name, arch=arch) for arch in ("cpu_aarch64", "sm_100a")]
        data = archive.write(packed)
        assert archive.read(data) == packed
        archive.add(Cache(tmp_path), packed)
        assert (
            archive.write(archive.pack(e for e in Cache(tmp_path).entries() if e.label.startswith(f"{name}."))) == data
        )


def test_a_parsed_manifest_is_not_kept():
    """It takes more memory than the file that it came from."""
    entries = [fake(f"rmsnorm_{size}_bf16", notes=[[]] * 7500) for size in range(64, 84)]
    data = archive.write(entries)
    tracemalloc.start()
    try:
        packed = archive.read(data)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert packed == entries and kept < 1.5 * len(data)


def test_a_large_manifest_is_not_exported(cache):
    archive.add(cache, [ONE])
    (entry,) = cache.entries()
    (entry.path / MANIFEST).write_bytes(ONE.files[MANIFEST].ljust((1 << 16) + 1))
    with pytest.raises(RuntimeError, match=r"cannot be exported: .*manifest\.json has more than 65536 bytes"):
        archive.pack([entry])


def test_other_files_and_records_are_left_out(cache):
    archive.add(cache, [ONE])
    entry = next(cache.entries())
    (entry.path / "notes").write_text("mine")
    assert archive.write(archive.pack([entry])) == archive.write([ONE])


DAMAGES = {
    "library": (lambda entry: entry.library.write_bytes(b"machine c0de"), "the hash differs"),
    "no library": (lambda entry: entry.library.unlink(), "its library cannot be read"),
    "manifest": (lambda entry: (entry.path / MANIFEST).write_text("{"), "its manifest cannot be read"),
    "no manifest": (lambda entry: (entry.path / MANIFEST).unlink(), "its manifest cannot be read"),
    "writable": (lambda entry: entry.path.chmod(0o777), "can be written by other users"),
    "link": (lambda entry: _replace_by_link(entry.path / "module.cu"), "cannot be opened as a file"),
    "large": (lambda entry: (entry.path / "module.cu").write_bytes(bytes(1 << 21)), "has more than 1048576 bytes"),
    "moved": (
        lambda entry: entry.path.parent.rename(entry.path.parent.with_suffix(".fedcba9876543210")),
        "it is another",
    ),
    "toolchain": (
        lambda entry: entry.path.rename(entry.path.with_name("0123456789ab")),
        "names compilers with the key",
    ),
}


def _replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_not_exported(cache, damage):
    archive.add(cache, [ONE, TWO])
    change, message = DAMAGES[damage]
    change(next(entry for entry in cache.entries() if "_64_" in entry.label))
    with pytest.raises(RuntimeError, match=rf"rmsnorm_64_bf16.* cannot be exported: .*({message})"):
        archive.pack(cache.entries())


def test_an_entry_that_is_removed_meanwhile_is_left_out(cache):
    archive.add(cache, [ONE, TWO])
    listed = list(cache.entries())
    shutil.rmtree(listed[0].path)
    assert [entry.label for entry in archive.pack(listed)] == [listed[1].label]


@pytest.mark.parametrize("limit", ["MAX_ARCHIVE_BYTES", "MAX_MEMBERS"])
def test_too_much_for_one_file(cache, monkeypatch, limit):
    data = archive.write([ONE])
    allowed = {"MAX_ARCHIVE_BYTES": len(data), "MAX_MEMBERS": len(ONE.files) + 1}[limit]
    monkeypatch.setattr(archive, limit, allowed)
    assert archive.read(archive.write([ONE])) == [ONE]
    monkeypatch.setattr(archive, limit, allowed - 1)
    with pytest.raises(ValueError, match="export fewer kernels at a time"):
        archive.write([ONE])
    if limit == "MAX_MEMBERS":
        archive.add(cache, [ONE])
        with pytest.raises(ValueError, match="export fewer kernels at a time"):
            archive.pack(cache.entries())
    with pytest.raises(BadArchive, match=f"it has more than {allowed - 1} (bytes|members)"):
        archive.read(data)


# Refusals. Each is crafted with a correct index, unless the index is what is wrong.


def tar(members: list[tuple[tarfile.TarInfo, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    parts = []
    for info, content in members:
        info.size = info.size or len(content)
        parts += [info.tobuf(format), content, bytes(-len(content) % 512)]
    return b"".join([*parts, bytes(1024)])


def crafted(contents: dict[str, bytes], *more: tarfile.TarInfo, hashes: dict[str, str] | None = None, **index) -> bytes:
    """Return an archive of these members, and of `more` at its end. Its only kernel is ONE unless `index` says so."""
    hashes = hashes or {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    hashes = {info.name: hashlib.sha256(b"").hexdigest() for info in more} | hashes
    text = (
        json.dumps({"files": hashes, "format": 1, "kernels": [ONE.label], **index}, indent=1, sort_keys=True).encode()
        + b"\n"
    )
    members = [(tarfile.TarInfo(name), content) for name, content in {INDEX: text, **contents}.items()]
    return tar([*members, *((info, b"") for info in more)])


def contents(entry: PackedEntry = ONE, number: int = 0, **changed: bytes | None) -> dict[str, bytes]:
    """Return the members of an entry, with some changed or removed."""
    files = {**entry.files, "library.so": entry.library, **changed}
    del files[entry.library_name]
    return {f"kernels/{number:05}/{name}": files[name] for name in sorted(files) if files[name] is not None}


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def other_manifest(**fields) -> dict[str, bytes]:
    return contents(**{MANIFEST: json.dumps({**MANIFEST_OF_ONE, **fields}).encode()})


def with_byte(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


DATA = archive.write([ONE])
LIBRARY = "library.so"
BOTH = [TWO.label, ONE.label]
EVIL = member("x", tarfile.SYMTYPE, linkname="/etc/passwd")
REFUSED: dict[str, tuple[bytes, str]] = {
    "traversal": (crafted(contents(), member("kernels/../../x")), r"member 'kernels/../../x' has a path that leads"),
    "traversal at once": (crafted(contents(), member("../x")), r"member '../x' has a path that leads elsewhere"),
    "a dot": (crafted(contents(), member("./x")), r"member './x' has a path that leads elsewhere"),
    "two slashes": (crafted(contents(), member("kernels//x")), r"member 'kernels//x' has a path that leads"),
    "absolute": (crafted(contents(), member("/etc/passwd")), r"member '/etc/passwd' has an absolute path"),
    "symbolic link": (crafted(contents(), EVIL), r"member 'x' is a symbolic link: an export contains regular files"),
    "hard link": (crafted(contents(), member("x", tarfile.LNKTYPE, linkname=INDEX)), "member 'x' is a hard link"),
    "character device": (crafted(contents(), member("x", tarfile.CHRTYPE)), "member 'x' is a device"),
    "block device": (crafted(contents(), member("x", tarfile.BLKTYPE)), "member 'x' is a device"),
    "fifo": (crafted(contents(), member("x", tarfile.FIFOTYPE)), "member 'x' is a FIFO"),
    "folder": (crafted(contents(), member("kernels", tarfile.DIRTYPE)), "member 'kernels' is a folder"),
    "long name": (crafted(contents(), member("x", tarfile.GNUTYPE_LONGNAME)), "member 'x' is of the type b'L'"),
    "extended header": (crafted(contents(), member("x", tarfile.XHDTYPE)), "member 'x' is of the type b'x'"),
    "sparse file": (crafted(contents(), member("x", tarfile.GNUTYPE_SPARSE)), "the header of member 'x' was altered"),
    "duplicate": (
        crafted(contents(), member(PREFIX + "module.cu")),
        r"member 'kernels/00000/module.cu' is there twice",
    ),
    "second index": (crafted(contents(), member(INDEX)), f"member '{INDEX}' is there twice"),
    "large text": (
        crafted(contents(), member(PREFIX + "cubin.s", size=(1 << 20) + 1)),
        r"member '.*/cubin.s' has 1048577 bytes: at most 1048576 are accepted",
    ),
    "large library": (
        crafted(contents(), member(PREFIX + LIBRARY, size=(1 << 28) + 1)),
        r"member '.*/library.so' has 268435457 bytes: at most 268435456 are accepted",
    ),
    "negative size": (tar([(member(INDEX, size=-1), b"")], tarfile.GNU_FORMAT), r"has -1 bytes: at most"),
    "large manifest": (
        crafted(contents(**{MANIFEST: ONE.files[MANIFEST].ljust((1 << 16) + 1)})),
        r"member '.*/manifest.json' has 65537 bytes: at most 65536 are accepted",
    ),
    "unknown member": (crafted(contents(), member(PREFIX + "notes")), r"member '.*/notes' is unknown"),
    "unknown folder": (crafted(contents(), member("staging/x")), "member 'staging/x' is unknown"),
    "another library": (crafted(contents(), member(PREFIX + "x-0.so")), r"member '.*/x-0.so' is unknown"),
    "its own name": (
        crafted({**contents(**{LIBRARY: None}), PREFIX + ONE.library_name: ONE.library}),
        r"member '.*/rmsnorm_64_bf16-\w+\.so' is unknown",
    ),
    "control characters": (crafted(contents(), member("a\x1b[2J\nb")), r"member 'a\\x1b\[2J\\nb' is unknown"),
    "no ASCII": (crafted(contents(), member("kernels/é")), "the header of member .* was altered"),
    "owner": (crafted(contents(), member(PREFIX + "cubin.s", uid=1000)), "the header of member .*/cubin.s' was alt"),
    "time": (crafted(contents(), member(PREFIX + "cubin.s", mtime=1)), "the header of member .*/cubin.s' was alt"),
    "not in the index": (
        crafted(contents(), hashes={name: "0" * 64 for name in contents() if not name.endswith(".cu")}),
        "was altered: its hash|is unknown",
    ),
    "missing": (crafted({**contents(), PREFIX + "cubin.s": b""})[: -1024 - 512] + bytes(1024), "cubin.s' is missing"),
    "altered library": (DATA.replace(b"machine code", b"machine c0de"), rf"member '.*/{LIBRARY}' was altered"),
    "altered source": (DATA.replace(b"the source", b"the s0urce"), r"member '.*/module.cu' was altered"),
    "altered header": (DATA.replace(b"module.cu", b"m0dule.cu"), f"member {INDEX} was altered|is damaged|altered"),
    "altered padding": (with_byte(DATA, len(DATA) - 1025), "is followed by other bytes than zeros"),
    "altered end": (with_byte(DATA, len(DATA) - 1), "it does not end after its last member"),
    "more data": (DATA + bytes(512), "it does not end after its last member, with 1024 zero bytes"),
    "two archives": (DATA + DATA, "it does not end after its last member"),
    "truncated": (DATA[:-1300], r"it is truncated: it ends in member '.*'"),
    "truncated between members": (DATA[:-1024], "it is truncated: it has"),
    "half an end": (DATA[:-512], "it does not end after its last member"),
    "empty": (b"", "it is not a tar archive"),
    "text": (b"# A text\n" * 100, r"it is not a tar archive \(invalid header\)"),
    "gzip": (b"\x1f\x8b\x08" + bytes(1000), "it is not a tar archive"),
    "zeros": (bytes(10240), f"its first member is not {INDEX}|does not end"),
    "another archive": (tar([(member("README.md"), b"text")]), f"its first member is not {INDEX}"),
    "index is no JSON": (tar([(member(INDEX), b"{")]), f"member {INDEX} cannot be read"),
    "index is a list": (tar([(member(INDEX), b"[]")]), f"member {INDEX} cannot be read"),
    "deep index": (tar([(member(INDEX), b"[" * 100_000)]), f"member {INDEX} cannot be read"),
    "other index": (crafted(contents(), comment="x"), f"member {INDEX} was altered"),
    "hashes are a list": (tar([(member(INDEX), b'{"files": [], "format": 1, "kernels": []}')]), f"{INDEX} was altered"),
    "hashes are a number": (tar([(member(INDEX), b'{"files": 1, "format": 1}')]), f"member {INDEX} cannot be read"),
    "deep hashes": (
        tar([(member(INDEX), b'{"files": {"x": ' + b"[" * 400 + b"]" * 400 + b'}, "format": 1, "kernels": []}')]),
        f"member {INDEX} was altered",
    ),
    "no kernels in the index": (tar([(member(INDEX), b'{"files": {}, "format": 1}')]), f"{INDEX} cannot be read"),
    "kernels are a text": (crafted(contents(), kernels=ONE.label), f"member {INDEX} was altered"),
    "kernels are numbers": (crafted(contents(), kernels=[1]), f"member {INDEX} was altered"),
    "kernels are not sorted": (
        crafted({**contents(ONE), **contents(TWO, 1)}, kernels=BOTH[::-1]),
        f"member {INDEX} was altered",
    ),
    "a kernel twice": (
        crafted({**contents(), **contents(ONE, 1)}, kernels=[ONE.label, ONE.label]),
        f"member {INDEX} was altered",
    ),
    "a kernel that leads elsewhere": (crafted(contents(), kernels=["../x/5f78e909ad82"]), f"{INDEX} was altered"),
    "a kernel's name with a line break": (crafted(contents(), kernels=[ONE.label + "\n"]), f"{INDEX} was altered"),
    "a kernel without members": (crafted(contents(TWO), kernels=BOTH), f"{ONE.label} is refused: its manifest cannot"),
    "members without a kernel": (crafted(contents(), kernels=[]), r"member 'kernels/00000/.*' is unknown"),
    "a number that is not the next": (crafted(contents(ONE, 1)), r"member 'kernels/00001/.*' is unknown"),
    "the label of another kernel": (crafted(contents(), kernels=[TWO.label]), "refused: it is another kernel"),
    "format is infinite": (crafted(contents(), format=float("inf")), f"member {INDEX} cannot be read"),
    "format is a text": (crafted(contents(), format="x"), f"member {INDEX} cannot be read"),
    "format is true": (crafted(contents(), format=True), f"member {INDEX} was altered"),
    "newer format": (crafted(contents(), format=2), "it has format 2, and this release of jitnorm reads format 1"),
    "library differs": (
        crafted(contents(**{LIBRARY: b"machine c0de"})),
        f"the kernel {ONE.label} is refused: its library is not the one that was built: the hash differs",
    ),
    "size differs": (crafted(other_manifest(size=3)), "is refused: its library is not the one that was built"),
    "no manifest": (crafted(contents(**{MANIFEST: None})), f"{ONE.label} is refused: its manifest cannot be read"),
    "bad manifest": (crafted(contents(**{MANIFEST: b"{}"})), "is refused: its manifest cannot be read"),
    "no library": (crafted(contents(**{LIBRARY: None})), f"is refused: its library {ONE.library_name} is missing"),
    "path as library": (crafted(other_manifest(library="../x.so")), "its library cannot be named '../x.so'"),
    "other name": (crafted(other_manifest(key="f" * 16)), "is refused: it is another kernel, rmsnorm_64_bf16.sm_90a.f"),
    "control characters in a key": (crafted(other_manifest(key="\n\x1b[2J")), r"another kernel, .*\\n\\x1b\[2J"),
    "a long key": (crafted(other_manifest(key="x" * 10**4)), "it is another kernel"),
    "a long library": (crafted(other_manifest(library="x" * 10**4)), "its library cannot be named"),
    "other architecture": (crafted(other_manifest(arch="sm_80")), "is refused: it is another kernel"),
    "other compilers": (crafted(other_manifest(compilers={"c++": "x"})), "its manifest names compilers with the key"),
    "no compilers": (crafted(other_manifest(compilers=None)), "names compilers with the key unknown"),
    "odd compilers": (crafted(other_manifest(compilers={"c++": "\ud800"})), "names compilers with the key unknown"),
    "second kernel": (
        crafted({**contents(TWO), **contents(ONE, 1, **{LIBRARY: b"?"})}, kernels=BOTH),
        f"the kernel {ONE.label} is refused",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(cache, name):
    data, message = REFUSED[name]
    with pytest.raises(BadArchive, match=message) as caught:
        jitnorm.cache.load(data)
    assert "\n" not in str(caught.value) and str(caught.value).isascii() and len(str(caught.value)) < 500
    assert list(snapshot(cache.root)) == ["CACHEDIR.TAG"]


def test_what_is_crafted_is_accepted_without_a_fault():
    """Otherwise an archive might be refused for how this file writes it."""
    assert crafted(contents()) == DATA and archive.read(DATA) == [ONE]
    assert archive.read(crafted(contents(TWO) | contents(ONE, 1), kernels=BOTH)) == sorted([ONE, TWO])
    assert archive.read(archive.write([])) == []


def test_every_altered_byte_is_noticed():
    for position in range(len(DATA)):
        with pytest.raises(BadArchive):
            archive.read(with_byte(DATA, position))


def test_every_truncation_is_noticed():
    for size in range(len(DATA)):
        with pytest.raises(BadArchive):
            archive.read(DATA[:size])


# Adding to a cache


def test_importing_again_changes_nothing(cache):
    assert archive.add(cache, [ONE, TWO]).new == [ONE.label, TWO.label]
    before = snapshot(cache.root)
    times = {path: path.stat().st_mtime_ns for path in cache.root.rglob("*")}
    assert archive.add(cache, [TWO, ONE]) == ([], sorted([ONE.label, TWO.label]))
    assert snapshot(cache.root) == before
    assert {path: path.stat().st_mtime_ns for path in cache.root.rglob("*")} == times


def test_an_intact_entry_stays_and_a_damaged_one_is_replaced(cache, caplog):
    own = fake(built="at another time")
    assert own.label == ONE.label and own.files != ONE.files
    archive.add(cache, [own, TWO])
    (entry,) = (Entry(path) for path in entries(cache.root) if "_128_" in str(path))
    entry.library.write_bytes(b"0ther code")
    assert archive.add(cache, [ONE, TWO]) == ([TWO.label], [ONE.label])
    assert archive.pack(cache.entries()) == sorted([own, TWO])
    assert [path.name for path in (cache.root / "quarantine").iterdir()] and caplog.text.count("is not used") == 1


def test_a_file_in_the_place_of_an_entry_is_replaced(cache):
    (cache.root / "kernels" / ONE.label).parent.mkdir(parents=True, mode=0o700)
    (cache.root / "kernels").chmod(0o700)
    (cache.root / "kernels" / ONE.label).write_text("mine")
    archive.add(cache, [ONE])
    assert archive.pack(cache.entries()) == [ONE]


def test_other_architectures(cache, tmp_path):
    packed = [fake(arch="sm_120"), fake(arch="cpu_aarch64"), fake(arch="sm_90a")]
    archive.add(cache, archive.read(archive.write(packed)))
    assert {path.parent.name.split(".")[1] for path in entries(cache.root)} == {"sm_120", "cpu_aarch64", "sm_90a"}
    assert find.find(SPEC) is None and not (cache.root / "quarantine").exists()


@pytest.mark.parametrize("failing", ["write_all", "fsync", "rename"])
def test_a_full_disk_leaves_the_cache_as_it_was(cache, monkeypatch, failing):
    """Whichever write fails, nothing is published."""
    archive.add(cache, [TWO])
    before, calls = snapshot(cache.root), 0

    def fails_at(number: int, real: Callable) -> Callable:
        def call(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments, **keywords)

        return call

    place, name = {"write_all": (files, "write_all"), "fsync": (os, "fsync"), "rename": (os, "rename")}[failing]
    for number in range(1, 7):  # of two entries with three files each
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fails_at(number, getattr(place, name)))
            with pytest.raises(RuntimeError, match=rf"cannot be added to {cache.root}: .*No space left"):
                archive.add(cache, [ONE, TWO, fake("rmsnorm_512_bf16")])
        assert calls == number and snapshot(cache.root) == before
        assert not list((cache.root / "staging").iterdir())
    assert len(archive.add(cache, [ONE, TWO, fake("rmsnorm_512_bf16")]).new) == 2


@pytest.mark.parametrize("has_kernels", [False, True])
def test_a_disk_that_is_full_when_folders_are_created(cache, monkeypatch, has_kernels):
    """The disk stays full from some new folder on. Nothing is published then."""
    if has_kernels:
        archive.add(cache, [TWO])
    before, real, calls = snapshot(cache.root), os.mkdir, 0

    def mkdir(limit, path, *arguments, **keywords):
        nonlocal calls
        if calls >= limit and not os.path.isdir(f"/proc/self/fd/{keywords['dir_fd']}/{path}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, *arguments, **keywords)
        calls += 1

    for number in range(20):
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(os, "mkdir", functools.partial(mkdir, number))
            try:
                archive.add(cache, [ONE, TWO, fake("rmsnorm_512_bf16")])
                break
            except RuntimeError as error:
                assert "No space left" in str(error)
        after = snapshot(cache.root)
        assert {name: after[name] for name in after if name != "kernels"} == before  # which may be empty
        assert not list((cache.root / "staging").glob("*"))
    assert 4 < number < 19 and archive.add(cache, [ONE, TWO, fake("rmsnorm_512_bf16")]).new == []


def test_an_entry_that_cannot_be_published(cache, monkeypatch):
    """What was published before it stays, and importing again adds the rest."""
    real = Folder.move

    def move(folder, name, destination, new_name):
        if "rmsnorm_128" in str(destination.path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(folder, name, destination, new_name)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "move", move)
        with pytest.raises(CacheNotWritable, match=r"rmsnorm_128_bf16.* cannot be kept as .*Input/output error"):
            archive.add(cache, [ONE, TWO])
    assert archive.pack(cache.entries()) == [ONE] and not list((cache.root / "staging").iterdir())
    assert archive.add(cache, [ONE, TWO]) == ([TWO.label], [ONE.label])


# Runs in a Python without torch. Each child is killed before another of its system calls, or imports at the same time
# as the others.
_CHILDREN = """
import os, signal, sys, time
import _jitnorm_command
from pathlib import Path
from jitnorm.jit import archive, locations
from jitnorm.jit.cache import Cache

def die_at(number):
    def counted(real):
        def call(*arguments, **keywords):
            nonlocal number
            number -= 1
            if not number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **keywords)
        return call
    for name in ("write", "rename", "mkdir", "unlink", "fsync"):
        setattr(os, name, counted(getattr(os, name)))

def fork(root, data, number=0, pipe=None):
    if pid := os.fork():
        return pid
    try:
        locations.create(root)
        packed = archive.read(data)
        if pipe:
            os.read(pipe, 1)
        if number:
            die_at(number)
        archive.add(Cache(root), packed)
        os._exit(0)
    finally:
        os._exit(1)

def status(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""
_KILL = """
folder, data = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes()
number = 1
while (code := status(fork(folder / str(number), data, number))) == -signal.SIGKILL:
    number += 1
print(number, code)
"""
_TOGETHER = """
root, data = Path(sys.argv[1]), Path(sys.argv[2]).read_bytes()
go, start = os.pipe()
pids = [fork(root, data, pipe=go) for _ in range(6)]
os.write(start, b"x" * 6)
print(*[status(pid) for pid in pids])
"""


def in_children(script: str, *arguments: Path) -> list[int]:
    source = str(Path(jitnorm.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}
    command = [sys.executable, "-c", _CHILDREN + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert not done.returncode and not done.stderr, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_an_import_that_is_killed_anywhere(cache, tmp_path):
    """No entry is incomplete, and importing again adds what is missing and removes what was left."""
    (tmp_path / "file").write_bytes(archive.write([ONE, TWO]))
    tries, code = in_children(_KILL, tmp_path, tmp_path / "file")
    assert tries > 20 and code == 0
    published = set()
    for number in range(1, tries + 1):
        root = tmp_path / str(number)
        found = archive.pack(Cache(root).entries())
        assert {entry.label for entry in found} <= {ONE.label, TWO.label}
        published.add(len(found))
        archive.add(Cache(root), [ONE, TWO])
        assert archive.pack(Cache(root).entries()) == sorted([ONE, TWO])
        assert not list((root / "staging").iterdir()) and not (root / "quarantine").exists()
    assert published == {0, 1, 2}  # it was killed before, between and after the entries


def test_imports_at_the_same_time(cache, tmp_path):
    many = [fake(f"rmsnorm_{size}_bf16") for size in range(64, 84)]
    (tmp_path / "file").write_bytes(archive.write(many))
    assert in_children(_TOGETHER, cache.root, tmp_path / "file") == [0] * 6
    assert archive.pack(cache.entries()) == sorted(many)
    assert not list((cache.root / "staging").iterdir()) and not (cache.root / "quarantine").exists()


def test_nothing_is_loaded_by_importing(cache, tmp_path):
    """The library writes a file when it is loaded."""
    marker, library = tmp_path / "marker", tmp_path / "library.so"
    source = f'#include <fcntl.h>\n__attribute__((constructor)) void run() {{ creat("{marker}", 0600); }}\n'
    subprocess.run(["c++", "-xc", "-shared", "-fPIC", "-", "-o", library], input=source.encode(), check=True)
    entry = fake(content=library.read_bytes())
    data = archive.write([entry])
    assert jitnorm.cache.load(data) == [entry.label]
    assert jitnorm.cache.save() == data and not marker.exists()
    (imported,) = entries(cache.root)
    subprocess.run([sys.executable, "-c", f"import ctypes; ctypes.CDLL({str(Entry(imported).library)!r})"], check=True)
    assert marker.exists()


def test_compilers_of_another_version(cache, monkeypatch):
    """An imported entry is used where nothing newer could be built: no compiler, or none that may be used."""
    built = build(SPEC)
    (packed,) = archive.pack([built])
    shutil.rmtree(cache.root / "kernels")
    versions = {"c++": "g++ 1.0"}
    manifest = {**json.loads(packed.files[MANIFEST]), "compilers": versions}
    contents = {**packed.files, MANIFEST: json.dumps(manifest).encode()}
    label = f"{packed.label.partition('/')[0]}/{toolchain.key_of(versions)}"
    archive.add(cache, [archive.checked(label, contents)])
    assert find.find(SPEC) is None
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    assert find.find(SPEC, mark_in_use=False).label == label


# jitnorm.cache


def test_save_and_load(cache, tmp_path, monkeypatch):
    archive.add(cache, [ONE, TWO])
    everything = jitnorm.cache.save()
    assert everything == archive.write([ONE, TWO])
    assert jitnorm.cache.save("rmsnorm_64_*") == jitnorm.cache.save("*_64_*.sm_90a.*") == archive.write([ONE])
    assert jitnorm.cache.save("no_such_kernel") == archive.write([])
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(tmp_path / "other"))
    assert jitnorm.cache.load(everything) == jitnorm.cache.load(everything) == sorted([ONE.label, TWO.label])
    assert jitnorm.cache.save() == everything
    assert jitnorm.cache.load(archive.write([])) == []


def test_save_includes_the_prebuilt_layer_once(cache, tmp_path, monkeypatch):
    archive.add(cache, [ONE, TWO])
    monkeypatch.setenv("JITNORM_PREBUILT_DIR", str(cache.root))
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(tmp_path / "other"))
    jitnorm.cache.load(archive.write([ONE]))
    assert jitnorm.cache.save() == archive.write([ONE, TWO])


def test_load_into_a_cache_that_cannot_be_written(cache_dir, caplog):
    cache_dir.write_text("a file")
    assert jitnorm.cache.load(archive.write([ONE])) == [ONE.label]
    assert locations.is_temporary() and jitnorm.cache.save() == archive.write([ONE])
    assert caplog.text.count("cannot keep kernels in") == 1


@pytest.mark.parametrize("data", ["text", None, bytearray(DATA)])
def test_load_of_other_types(cache_dir, data):
    with pytest.raises(TypeError, match=f"data must be bytes, got {type(data).__name__}"):
        jitnorm.cache.load(data)
    with pytest.raises(TypeError, match="pattern must be a str, got int"):
        jitnorm.cache.save(5)
    assert not cache_dir.exists()
