"""The remote cache: what is fetched, pushed and refused, and remotes that are malicious, broken or do not answer."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any, NamedTuple

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from helpers import relative_error, rmsnorm_reference
from processes import run_before_import

import jitnorm
from jitnorm.core.operators import OPERATORS
from jitnorm.jit import archive, find, load, locations, log, remote, toolchain
from jitnorm.jit.archive import PackedEntry
from jitnorm.jit.build import build
from jitnorm.jit.cache import Cache
from jitnorm.jit.entry import MANIFEST, Entry
from jitnorm.jit.spec import Target
from jitnorm.rmsnorm import rmsnorm_spec

from .conftest import Copier, entries, warnings

SPEC = rmsnorm_spec(512, torch.float32, torch.float32, Target("cpu"))  # whose library the fixture `copier` has
OTHER_SPEC = rmsnorm_spec(64, torch.float32, torch.float32, Target("cpu"))
KEY = bytes(range(32))
GIB = 1 << 30


class Stream:
    """A file of `size` bytes that are made when they are read."""

    def __init__(self, size: int) -> None:
        self.size, self.served = size, 0

    def read(self, count: int) -> bytes:
        part = bytes(min(count, self.size - self.served))
        self.served += len(part)
        return part

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


class FakeFileSystem(MemoryFileSystem):
    """Files in memory. Each call is recorded, and a test may answer it instead."""

    protocol = "fake"
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    calls: list[tuple[str, str]] = []  # noqa: RUF012
    answer: Callable[[str, str], Any] | None = None

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("fake://", "memory://"))

    def _called(self, name: str, path: str) -> Any:
        type(self).calls.append((name, path))
        return type(self).answer(name, path) if type(self).answer else None

    def open(self, path, mode="rb", *arguments, **keywords):
        answer = self._called("open" if mode == "rb" else "write", path)
        return super().open(path, mode, *arguments, **keywords) if answer is None else answer

    def ls(self, path, *arguments, **keywords):
        answer = self._called("ls", path)
        return super().ls(path, *arguments, **keywords) if answer is None else answer


class Setup(NamedTuple):
    """A remote cache that has the kernel SPEC, signed and listed, and an empty local cache."""

    url: str
    entry: Entry  # of another cache
    packed: PackedEntry
    digest: str
    copier: Copier
    root: Path  # of the empty cache

    @property
    def path(self) -> str:
        return f"kernels/{self.packed.label}"

    @property
    def archive_path(self) -> str:
        return f"{self.path}.{hashlib.sha256(archive.write([self.packed])).hexdigest()}.tar"


def new_process() -> None:
    """Forget what a new process would not know."""
    load._loaded.clear()
    find._failed.clear()
    log.warn_once.cache_clear()
    remote._stopped.clear()
    remote._missed.clear()
    remote._waited_s = 0.0
    for table in OPERATORS["rmsnorm"].tables:
        table.clear()


def call() -> None:
    """Call the operator, in a process that has loaded nothing, and check the result."""
    for table in OPERATORS["rmsnorm"].tables:
        table.clear()
    load._loaded.clear()
    x, w = torch.randn(5, 512), torch.randn(512)
    assert relative_error(jitnorm.rmsnorm(x, w), rmsnorm_reference(x, w, 1e-6)) < 1e-6


@pytest.fixture
def fake_files() -> Iterator[type[FakeFileSystem]]:
    fsspec.register_implementation("fake", FakeFileSystem, clobber=True)
    FakeFileSystem.store, FakeFileSystem.pseudo_dirs = {}, [""]
    FakeFileSystem.calls, FakeFileSystem.answer = [], None
    yield FakeFileSystem
    FakeFileSystem.answer = None


@pytest.fixture
def key_file(tmp_path) -> Path:
    file = tmp_path / "settings" / "kernels.key"
    file.parent.mkdir(mode=0o700)
    file.write_text(KEY.hex() + "\n")
    file.chmod(0o600)
    return file


@pytest.fixture
def trust_file(key_file) -> Path:
    """Return the path of a file, which need not exist."""
    return key_file.with_name("trusted.txt")


@pytest.fixture(params=["fake://cache"])
def setup(request, copier, cache_dir, fake_files, key_file, tmp_path, monkeypatch) -> Iterator[Setup]:
    """Push the kernel to a remote cache, and trust the key."""
    url = request.param.format(tmp_path)
    source = tmp_path / "source"
    with monkeypatch.context() as patch:
        patch.setenv("JITNORM_CACHE_DIR", str(source))
        entry = build(SPEC)
        entry.release()
    (pushed,) = remote.push(url, [entry], KEY)
    fake_files.calls.clear()
    monkeypatch.setenv("JITNORM_REMOTE_CACHE", url)
    monkeypatch.setenv("JITNORM_REMOTE_KEY", str(key_file))
    monkeypatch.delenv("JITNORM_REMOTE_TRUST", raising=False)
    monkeypatch.delenv("JITNORM_REMOTE_TIMEOUT", raising=False)
    new_process()
    (packed,) = archive.pack([entry])
    yield Setup(url, entry, packed, pushed.digest, copier, cache_dir)
    new_process()
    fsspec.filesystem("memory").store.clear()


def files(url: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(url)
    return {path[len(root) :].lstrip("/"): fs.cat_file(path) for path in fs.find(root)}


def put(setup: Setup, name: str, content: bytes) -> None:
    fs, root = fsspec.core.url_to_fs(setup.url)
    fs.pipe_file(f"{root}/{name}", content)


def signed(line: bytes, key: bytes = KEY) -> bytes:
    return line + remote._signature(line, key)


def put_archive(setup: Setup, data: bytes, **fields: object) -> None:
    """Put an archive beside a manifest that describes it and is signed, with some fields changed."""
    digest = hashlib.sha256(data).hexdigest()
    manifest = {"format": 1, "kernel": setup.packed.label, "sha256": digest, "size": len(data), **fields}
    put(setup, f"{setup.path}.{digest}.tar", data)
    put(setup, f"{setup.path}.json", signed(json.dumps(manifest).encode() + b"\n"))


def with_library(packed: PackedEntry, content: bytes, compilers: dict[str, str] | None = None) -> PackedEntry:
    """Return the same entry with another library, and perhaps of other compilers."""
    manifest = json.loads(packed.files[MANIFEST])
    compilers = compilers or manifest["compilers"]
    digest = hashlib.sha256(content).hexdigest()
    library = f"{manifest['name']}-{digest[:16]}.so"
    manifest |= {"library": library, "sha256": digest, "size": len(content), "compilers": compilers}
    texts = {name: text for name, text in packed.files.items() if name != packed.library_name}
    label = f"{packed.label.partition('/')[0]}/{toolchain.key_of(compilers)}"
    return archive.checked(label, {**texts, MANIFEST: json.dumps(manifest).encode(), library: content})


def opened(files: type[FakeFileSystem]) -> list[str]:
    return [
        path.removeprefix("/cache/").removeprefix("kernels/") for name, path in files.calls if name in ("open", "ls")
    ]


# Fetching


@pytest.mark.parametrize("setup", ["memory://cache", "file://{}/remote", "{}/remote", "fake://cache"], indirect=True)
@pytest.mark.parametrize("trusts", ["key", "digests"])
def test_what_was_pushed_is_used_and_nothing_is_built(setup, trusts, trust_file, monkeypatch, caplog):
    if trusts == "digests":
        monkeypatch.delenv("JITNORM_REMOTE_KEY")
        monkeypatch.setenv("JITNORM_REMOTE_TRUST", str(trust_file))
        trust_file.write_text(f"# kernels\n\n{'0' * 64}\n{setup.digest}  {setup.packed.label}\n")
    call()
    assert setup.copier.builds == 1 and not warnings(caplog)
    assert archive.pack(Cache(setup.root).entries()) == [setup.packed]
    modes = {path.stat().st_mode & 0o777 for path in (setup.root / "kernels").rglob("*")}
    assert modes == {0o700, 0o600}
    (entry,) = Cache(setup.root).entries()
    assert entry.in_use()
    new_process()
    monkeypatch.setattr(find, "fetch", lambda *_, **__: pytest.fail("the local cache has it"))
    call()
    assert setup.copier.builds == 1


def test_one_manifest_and_one_archive_are_read(setup, fake_files):
    call()
    kernel = setup.packed.label
    assert opened(fake_files) == [f"{kernel}.json", setup.archive_path.removeprefix("kernels/")]


@pytest.mark.slow
def test_local_caches_come_first_and_cost_no_import(setup, monkeypatch, tmp_path):
    """With the variable set, fsspec is imported when the first kernel is missing."""
    spec = "rmsnorm_spec(512, torch.float32, torch.float32, Target('cpu'))"
    script = f"""
        import sys, torch
        torch.set_num_threads(1)
        from jitnorm.jit.load import load
        from jitnorm.jit.spec import Target
        from jitnorm.rmsnorm import rmsnorm_spec
        load({spec})
        print([name for name in ("fsspec", "jitnorm.jit.remote", "jitnorm.jit.archive") if name in sys.modules])
    """
    environment = {"JITNORM_REMOTE_CACHE": f"file://{tmp_path}/remote", "JITNORM_CACHE_DIR": str(setup.entry.root)}
    done = run_before_import(script, **environment)
    assert done.stdout == "[]\n", done.stderr
    list(remote.push(environment["JITNORM_REMOTE_CACHE"], [setup.entry], KEY))
    done = run_before_import(script, **environment | {"JITNORM_CACHE_DIR": str(tmp_path / "third")})
    assert done.stdout == "['fsspec', 'jitnorm.jit.remote', 'jitnorm.jit.archive']\n", done.stderr
    assert not done.stderr and setup.copier.builds == 1


def test_warm_up_fetches_too(setup, monkeypatch):
    result = jitnorm.warmup(hidden_size=512, dtype="fp32", device="cpu")
    assert (len(result.cached), len(result.built), setup.copier.builds) == (1, 0, 1)
    (entry,) = Cache(setup.root).entries()
    assert not entry.in_use()


def test_warm_up_fetches_nothing_into_a_temporary_cache(setup, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeError, match="cannot keep kernels in"):
        jitnorm.warmup(hidden_size=512, dtype="fp32", device="cpu")


def test_a_kernel_that_is_not_there_is_built(setup, fake_files, caplog):
    fake_files.store.clear()
    call()
    assert setup.copier.builds == 2 and not warnings(caplog)


def test_the_same_kernel_is_asked_for_once(setup, fake_files, monkeypatch, caplog):
    fake_files.store.clear()
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"is not in the cache \(.*, and JITNORM_REMOTE_CACHE has none\)"):
            call()
    assert opened(fake_files) == [f"{setup.packed.label}.json", setup.packed.label.partition("/")[0]]
    assert not warnings(caplog)


OTHERS = [{"c++": "g++ 11"}, {"c++": "g++ 12"}, {"c++": "g++ 13"}]


def put_others(setup: Setup) -> list[str]:
    """Push the kernel as other compilers would have built it, and return these toolchains' keys, sorted."""
    library = setup.packed.library
    for compilers in OTHERS:
        other = with_library(setup.packed, library, compilers)
        remote._push(remote._Remote.open(setup.url), other, KEY)
    return sorted(map(toolchain.key_of, OTHERS))


def test_where_a_compiler_is_only_its_own_entries_are_used(setup, fake_files):
    put_others(setup)
    remote._Remote.open(setup.url)._fs.rm(f"/cache/{setup.path}.json")
    fake_files.calls.clear()
    call()
    assert setup.copier.builds == 2 and opened(fake_files) == [f"{setup.packed.label}.json"]


@pytest.mark.parametrize("why", ["forbidden", "no compiler"])
def test_where_nothing_can_be_built_any_toolchain_is_accepted(setup, fake_files, monkeypatch, why):
    """In the order of a local cache: this machine's own, then the others by name. Others' names are ignored."""
    keys, kernel = put_others(setup), setup.packed.label.partition("/")[0]
    for name in ("notes.json", f"{keys[0]}.json.tmp", "0" * 13 + ".json"):
        put(setup, f"kernels/{kernel}/{name}", b"")
    own = [] if why == "no compiler" else [toolchain.identify(Target("cpu"), None).key]
    monkeypatch.setenv(*("CXX", "/none") if why == "no compiler" else ("JITNORM_DISABLE_JIT", "1"))
    expected = [*own, *[key for key in sorted([*keys, setup.packed.label.rpartition("/")[2]]) if key not in own]]
    for number in range(len(expected)):
        new_process()
        fake_files.calls.clear()
        monkeypatch.setenv("JITNORM_CACHE_DIR", str(setup.root / str(number)))
        call()
        (entry,) = Cache(setup.root / str(number)).entries()
        assert entry.path.name == expected[number]
        asked = [path for path in opened(fake_files) if path.endswith(".json")]
        assert asked == [f"{kernel}/{key}.json" for key in expected[: number + 1]]
        put(setup, f"kernels/{kernel}/{expected[number]}.json", b"x")  # and the next is used
    assert setup.copier.builds == 1
    new_process()
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(setup.root / "last"))
    with pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler" if why == "no compiler" else "forbids building"):
        call()


def test_only_some_entries_of_other_toolchains_are_tried(setup, fake_files, monkeypatch):
    monkeypatch.setenv("CXX", "/none")
    kernel = setup.packed.label.partition("/")[0]
    fake_files.answer = lambda name, path: (
        [f"/x/{number:012x}.json" for number in range(10**5)] if name == "ls" else None
    )
    with pytest.raises(RuntimeError, match="needs a C"):
        call()
    assert opened(fake_files) == [kernel, *(f"{kernel}/{number:012x}.json" for number in range(16))]


def test_a_library_that_cannot_be_loaded_is_quarantined_and_built(setup, caplog):
    """As after a push from a machine with a newer glibc. It is not fetched again."""
    data = archive.write([with_library(setup.packed, b"not a library")])
    put_archive(setup, data)
    call()
    assert setup.copier.builds == 2
    (said,) = warnings(caplog)
    assert "cannot be loaded" in said and (setup.root / "quarantine").is_dir()


def test_a_library_that_cannot_be_loaded_and_another_that_can(setup, monkeypatch, caplog):
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    key = put_others(setup)[0]
    put_archive(setup, archive.write([with_library(setup.packed, b"not a library")]))
    call()
    assert [path.name for path in entries(setup.root)] == [key] and setup.copier.builds == 1


def test_a_cache_that_cannot_be_written(setup, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(tmp_path / "file" / "cache"))
    call()
    (said,) = warnings(caplog)
    assert setup.copier.builds == 1 and "This process keeps its own in" in said and locations.is_temporary()


def test_a_cache_that_is_full(setup, monkeypatch, caplog):
    real, roots = archive.add, []

    def add(cache, packed):
        roots.append(cache.root)
        if cache.root == setup.root:
            raise RuntimeError("No space left on device")
        return real(cache, packed)

    monkeypatch.setattr(archive, "add", add)
    call()
    assert setup.copier.builds == 1 and len(roots) == 2 and len(warnings(caplog)) == 1
    monkeypatch.setattr(archive, "add", lambda *_: (_ for _ in ()).throw(RuntimeError("No space left on device")))
    new_process()
    Cache(roots[1]).remove(next(Cache(roots[1]).entries()))
    assert find.fetch(SPEC) is None
    assert warnings(caplog)[1:] == [
        f"{setup.packed.label} in the remote cache is not used: No space left on device",
    ]


# Settings


def test_nothing_is_read_without_trust(setup, fake_files, monkeypatch, caplog):
    monkeypatch.delenv("JITNORM_REMOTE_KEY")
    call()
    assert find.fetch(OTHER_SPEC) is None
    (said,) = warnings(caplog)
    assert "fake://cache is not used by this process: nothing in it is trusted: set JITNORM_REMOTE_TRUST" in said
    assert setup.copier.builds == 2 and not fake_files.calls


def _open_to_others(path: Path, mode: int) -> None:
    path.chmod(path.stat().st_mode | mode)


BAD_SETTINGS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "key for the group": ("KEY", lambda file: _open_to_others(file, 0o040), r"can be read by other users \(mode 640\)"),
    "key for others": ("KEY", lambda file: _open_to_others(file, 0o004), r"can be read by other users \(mode 604\)"),
    "writable key": ("KEY", lambda file: _open_to_others(file, 0o002), r"can be read by other users \(mode 602\)"),
    "writable folder of the key": ("KEY", lambda file: _open_to_others(file.parent, 0o002), "can be written by other"),
    "no key": ("KEY", lambda file: file.unlink(), "cannot be read: No such file"),
    "key is a folder": ("KEY", lambda file: (file.unlink(), file.mkdir(0o700)), "is not a regular file"),
    "key is a FIFO": ("KEY", lambda file: (file.unlink(), os.mkfifo(file, 0o600)), "is not a regular file"),
    "short key": ("KEY", lambda file: file.write_text(KEY.hex()[:-2]), "must have 64 hexadecimal digits"),
    "empty key": ("KEY", lambda file: file.write_text(""), "must have 64 hexadecimal digits"),
    "key of other text": ("KEY", lambda file: file.write_text("x" * 64), "must have 64 hexadecimal digits"),
    "long key": ("KEY", lambda file: file.write_bytes(bytes(2000)), "has more than 1024 bytes"),
    "writable list": ("TRUST", lambda file: _open_to_others(file, 0o002), r"can be written by other users \(mode"),
    "list for the group": ("TRUST", lambda file: _open_to_others(file, 0o020), r"can be written by other users"),
    "no list": ("TRUST", lambda file: file.unlink(), "cannot be read: No such file"),
    "long list": ("TRUST", lambda file: file.write_bytes(bytes((1 << 22) + 1)), "has more than 4194304 bytes"),
    "another list": ("TRUST", lambda file: file.write_text("\nsha256:\x1b[2Jé\n"), r"line 2 of .*\\\\x1b\[2J.*xc3"),
    "half a digest": ("TRUST", lambda file: file.write_text("0" * 63), "line 1 of .* must begin with a sha256"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_settings_that_cannot_be_used(setup, fake_files, key_file, trust_file, monkeypatch, caplog, name):
    """Also where the other setting is good: nothing is read from the remote cache."""
    variable, change, message = BAD_SETTINGS[name]
    trust_file.write_text(setup.digest)
    monkeypatch.setenv("JITNORM_REMOTE_TRUST", str(trust_file))
    change(key_file if variable == "KEY" else trust_file)
    call()
    assert find.fetch(OTHER_SPEC) is None
    (said,) = warnings(caplog)
    assert setup.copier.builds == 2 and not fake_files.calls
    with pytest.raises(remote.BadSetting, match=message):
        remote.read_trust()
    assert said.isascii() and "\n" not in said and str(key_file.parent) in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_key_of_another_user_is_refused(setup, key_file, place):
    os.chown(key_file if place == "file" else key_file.parent, 12345, 12345)
    with pytest.raises(remote.BadSetting, match="belongs to user 12345"):
        remote.read_trust()


def test_a_key_may_be_a_link(setup, key_file, tmp_path):
    """As secrets are mounted into containers."""
    (tmp_path / "link").symlink_to(key_file)
    assert remote.read_key(str(tmp_path / "link")) == KEY
    assert remote.problem(setup.url) is None


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "x", "3601"])
def test_a_time_limit_that_is_none(setup, monkeypatch, caplog, value):
    monkeypatch.setenv("JITNORM_REMOTE_TIMEOUT", value)
    call()
    (said,) = warnings(caplog)
    assert setup.copier.builds == 1
    assert said == f"JITNORM_REMOTE_TIMEOUT must be seconds above 0 and up to 3600, got {value!r}: the limit is 10 s"


def test_without_fsspec(setup, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    call()
    (said,) = warnings(caplog)
    assert setup.copier.builds == 2 and "pip install 'jitnorm[remote]'" in said


def test_a_protocol_that_is_not_installed(setup, monkeypatch, caplog):
    monkeypatch.setenv("JITNORM_REMOTE_CACHE", "nosuch://user:secret@host/x?token=secret")
    call()
    (said,) = warnings(caplog)
    assert setup.copier.builds == 2 and "nosuch://host/x?..." in said and "secret" not in said
    assert "nosuch" in remote.problem("nosuch://user:secret@host/x")


# Hostile remote caches. The key is right unless the manifest is what is wrong.


def replay(setup: Setup) -> None:
    """Put another kernel, all of it signed, under the name of this one."""
    manifest = json.loads(setup.packed.files[MANIFEST]) | {"name": "rmsnorm_64_float", "key": OTHER_SPEC.key}
    library = f"rmsnorm_64_float-{manifest['sha256'][:16]}.so"
    manifest["library"] = library
    label = f"rmsnorm_64_float.{manifest['arch']}.{OTHER_SPEC.key}/{setup.packed.label.rpartition('/')[2]}"
    other = archive.checked(label, {MANIFEST: json.dumps(manifest).encode(), library: setup.packed.library})
    remote._push(remote._Remote.open(setup.url), other, KEY)
    for name, content in files(setup.url).items():
        if label in name:
            put(setup, name.replace(label, setup.packed.label), content)


def stream(setup: Setup, suffix: str, size: int = 3 * GIB) -> None:
    """Let files that end with `suffix` have GBs."""
    FakeFileSystem.answer = lambda name, path: (
        streams.append(Stream(size)) or streams[-1] if name == "open" and path.endswith(suffix) else None
    )


streams: list[Stream] = []
NO_TRUST = "its manifest has neither a digest that JITNORM_REMOTE_TRUST lists nor a signature"
DIFFERS = "its archive is not the one that its manifest names"


def evil_archive(setup: Setup) -> bytes:
    """Return an archive with a path that leads elsewhere, which only the holder of the key can have signed."""
    return archive.write([setup.packed]).replace(b"kernels/00000/build.ninja", b"kernels/../../../../x.nin", 1)


HOSTILE: dict[str, tuple[Callable[[Setup], object], str]] = {
    "altered manifest": (
        lambda s: put(s, f"{s.path}.json", files(s.url)[f"{s.path}.json"].replace(b'"format": 1', b'"format": 2')),
        NO_TRUST,
    ),
    "truncated manifest": (lambda s: put(s, f"{s.path}.json", files(s.url)[f"{s.path}.json"][:-1]), NO_TRUST),
    "empty manifest": (lambda s: put(s, f"{s.path}.json", b""), NO_TRUST),
    "manifest and more": (lambda s: put(s, f"{s.path}.json", files(s.url)[f"{s.path}.json"] + b"\n"), NO_TRUST),
    "no signature": (
        lambda s: put(s, f"{s.path}.json", files(s.url)[f"{s.path}.json"].partition(b"\n")[0] + b"\n"),
        NO_TRUST,
    ),
    "another key": (
        lambda s: put(
            s, f"{s.path}.json", signed(files(s.url)[f"{s.path}.json"].partition(b"\n")[0] + b"\n", bytes(32))
        ),
        NO_TRUST,
    ),
    "signature of another manifest": (
        lambda s: put(s, f"{s.path}.json", b"{}\n" + files(s.url)[f"{s.path}.json"].partition(b"\n")[2]),
        NO_TRUST,
    ),
    "no ASCII in the signature": (
        lambda s: put(s, f"{s.path}.json", files(s.url)[f"{s.path}.json"][:-2] + b"\xff\n"),
        NO_TRUST,
    ),
    "large manifest": (lambda s: stream(s, ".json"), "its manifest has more than 4096 bytes"),
    "large archive": (lambda s: stream(s, ".tar"), DIFFERS),
    "large archive, signed": (
        lambda s: (put_archive(s, b"", size=3 * GIB), stream(s, ".tar")),
        "its archive cannot have 3221225472 bytes: at most",
    ),
    "replayed": (replay, r"its manifest is that of another kernel, rmsnorm_64_float\."),
    "truncated archive": (
        lambda s: put(s, s.archive_path, files(s.url)[s.archive_path][:-1]),
        DIFFERS,
    ),
    "longer archive": (lambda s: put(s, s.archive_path, files(s.url)[s.archive_path] + b"\0"), DIFFERS),
    "altered archive": (
        lambda s: put(s, s.archive_path, files(s.url)[s.archive_path].replace(b"\x7fELF", b"\x7fELG")),
        DIFFERS,
    ),
    "empty archive": (lambda s: put(s, s.archive_path, b""), DIFFERS),
    "no archive": (
        lambda s: remote._Remote.open(s.url)._fs.rm(f"/cache/{s.archive_path}"),
        "its archive is missing",
    ),
    "signed: other manifest": (lambda s: put(s, f"{s.path}.json", signed(b"[]\n")), "its manifest cannot be parsed"),
    "signed: deep manifest": (lambda s: put(s, f"{s.path}.json", signed(b"[" * 4000 + b"\n")), "cannot be parsed"),
    "signed: newer format": (lambda s: put_archive(s, b"", format=2), "its manifest has format 2"),
    "signed: path as hash": (
        lambda s: put_archive(s, b"", sha256="../" + "0" * 61),
        "its archive cannot have the hash",
    ),
    "signed: negative size": (lambda s: put_archive(s, b"", size=-1), "its archive cannot have -1 bytes"),
    "signed: size is true": (lambda s: put_archive(s, b"0", size=True), "its archive cannot have True bytes"),
    "signed: no archive of jitnorm": (lambda s: put_archive(s, b"text"), "its archive is damaged: it is not a tar"),
    "signed: path that leads elsewhere": (
        lambda s: put_archive(s, evil_archive(s)),
        "its archive is damaged: .*has a path that leads elsewhere|is damaged",
    ),
    "signed: no kernels": (lambda s: put_archive(s, archive.write([])), "its archive has other kernels"),
    "signed: two kernels": (
        lambda s: put_archive(
            s, archive.write([s.packed, with_library(s.packed, s.packed.library, {"c++": "another"})])
        ),
        "its archive has other kernels",
    ),
    "signed: another toolchain": (
        lambda s: put_archive(s, archive.write([with_library(s.packed, s.packed.library, {"c++": "another"})])),
        "its archive has other kernels",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_refused(setup, monkeypatch, caplog, name):
    """One warning, and the kernel is built. Nothing is parsed before its signature or hash is right."""
    change, message = HOSTILE[name]
    streams.clear()
    change(setup)
    parsed: list[str] = []
    real = archive.read
    monkeypatch.setattr(
        remote, "json", SimpleNamespace(loads=lambda text: parsed.append("manifest") or json.loads(text))
    )
    monkeypatch.setattr(archive, "read", lambda data: parsed.append("archive") or real(data))
    call()
    (said,) = warnings(caplog)
    assert setup.copier.builds == 2 and said.isascii() and len(said) < 600
    assert said.startswith(f"{setup.packed.label} in the remote cache is not used: ")
    assert re.search(message, said), said
    caplog.clear()
    expected = [] if message == NO_TRUST or "4096" in message else ["manifest"]
    assert parsed == expected + ["archive"] * ("damaged" in message or "other kernels" in message)
    assert sum(each.served for each in streams) <= 8192 + len(archive.write([setup.packed]))
    assert [path.name for path in entries(setup.root)] == [setup.packed.label.rpartition("/")[2]]
    assert not list((setup.root / "staging").iterdir())
    assert find.fetch(SPEC) is None and not warnings(caplog)


def test_digests_do_not_make_other_manifests_trusted(setup, trust_file, monkeypatch, caplog):
    monkeypatch.delenv("JITNORM_REMOTE_KEY")
    monkeypatch.setenv("JITNORM_REMOTE_TRUST", str(trust_file))
    trust_file.write_text("".join(f"{hashlib.sha256(text).hexdigest()}\n" for text in (b"", b"\n", b"{}")))
    call()
    (said,) = warnings(caplog)
    assert setup.copier.builds == 2 and NO_TRUST in said


def test_another_kernel_is_still_asked_for_after_a_refusal(setup, fake_files):
    put(setup, f"{setup.path}.json", b"")
    call()
    fake_files.calls.clear()
    assert find.fetch(OTHER_SPEC) is None and len(fake_files.calls) == 1


# Remote caches that do not work


def raise_(error: BaseException) -> Any:
    raise error


ERRORS = [
    ConnectionError("refused\n\x1b[2J by https://user:secret@host/?key=secret"),
    PermissionError("403"),
    ValueError("é" * 1000),
    SystemExit(1),
    KeyboardInterrupt(),
    MemoryError(),
    type("Odd", (BaseException,), {})(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_file_system_that_raises(setup, fake_files, caplog, error):
    """One warning for all kernels, and no second request."""
    fake_files.answer = lambda *_: raise_(error)
    call()
    assert find.fetch(OTHER_SPEC) is None
    (said,) = warnings(caplog)
    assert setup.copier.builds == 2 and len(fake_files.calls) == 1
    assert said.startswith(f"the remote cache fake://cache is not used by this process: {type(error).__name__}: ")
    assert said.isascii() and "\n" not in said and "secret" not in said and len(said) < 400


def not_found(cause: BaseException | None) -> FileNotFoundError:
    error = FileNotFoundError("http://host/x")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize("cause", [ConnectionRefusedError("refused"), TimeoutError("late")], ids=["refused", "late"])
@pytest.mark.parametrize("place", ["open", "ls"])
def test_a_connection_that_fails_is_no_missing_file(setup, fake_files, monkeypatch, caplog, cause, place):
    """fsspec raises FileNotFoundError for an HTTP server that is down."""
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    put(setup, f"{setup.path}.json", b"")
    monkeypatch.setenv("CXX", "/none")
    fake_files.answer = lambda name, _: raise_(not_found(cause)) if name == place else None
    assert find.fetch(SPEC) is None and find.fetch(OTHER_SPEC) is None
    assert sum("is not used by this process" in said for said in warnings(caplog)) == 1


@pytest.mark.parametrize("cause", [None, FileNotFoundError("404"), ValueError("NoSuchKey")], ids=["none", "404", "S3"])
def test_a_missing_file_is_no_failure(setup, fake_files, caplog, cause):
    fake_files.answer = lambda *_: raise_(not_found(cause))
    call()
    assert setup.copier.builds == 2 and not warnings(caplog)
    assert find.fetch(OTHER_SPEC) is None and len(fake_files.calls) == 2


class Nonsense:
    """A file whose content is no bytes."""

    def __enter__(self):
        return self

    def __exit__(self, *_): ...

    def read(self, count):
        return [1]


@pytest.mark.parametrize("answer", [Nonsense(), 7, "text", {}], ids=["list", "int", "str", "dict"])
def test_a_file_system_that_returns_nonsense(setup, fake_files, monkeypatch, caplog, answer):
    fake_files.answer = lambda *_: answer
    call()
    (said,) = warnings(caplog)
    assert setup.copier.builds == 2 and "Error: " in said
    new_process()
    monkeypatch.setenv("CXX", "/none")
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(setup.root / "other"))
    with pytest.raises(RuntimeError, match="needs a C"):
        call()
    assert len(warnings(caplog)) <= 2


@pytest.fixture
def blocked(monkeypatch) -> Iterator[threading.Event]:
    """Return an event that calls of the remote wait for, until the end of the test. The limit is short."""
    event = threading.Event()
    monkeypatch.setenv("JITNORM_REMOTE_TIMEOUT", "0.01")
    yield event
    event.set()


@pytest.mark.parametrize("place", ["open", "ls", "constructor", "read"])
def test_a_file_system_that_blocks(setup, fake_files, blocked, monkeypatch, caplog, place):
    """The process goes on after the limit, and does not ask again."""

    class BlockedFile(Stream):
        def read(self, count):
            blocked.wait()
            return super().read(count)

    if place == "constructor":
        monkeypatch.setattr(FakeFileSystem, "__init__", lambda *_, **__: blocked.wait() and None)
    elif place == "read":
        fake_files.answer = lambda *_: BlockedFile(GIB)
    else:
        fake_files.answer = lambda name, _: blocked.wait() if name == place else None
    if place == "ls":
        monkeypatch.setenv("CXX", "/none")
        assert find.fetch(SPEC) is None
    else:
        call()
        assert setup.copier.builds == 2
    before = len(fake_files.calls)
    assert find.fetch(OTHER_SPEC) is None and len(fake_files.calls) == before <= 1
    (said,) = warnings(caplog)
    assert said == (
        "the remote cache fake://cache is not used by this process: it did not answer within 0.01 s "
        "(JITNORM_REMOTE_TIMEOUT)"
    )


def test_how_long_a_request_is_waited_for(setup, monkeypatch):
    """At most the limit of a request, and what is left of the limit of all requests."""
    waits: list[float] = []

    class Queue(SimpleQueue):
        def get(self, block=True, timeout=None):
            waits.append(timeout)
            return super().get(block, timeout)

    monkeypatch.setattr(remote, "SimpleQueue", Queue)
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: 0.0))
    for timeout, waited in (("", 0.0), ("", 50.0), ("", 58.5), ("30", 170.0)):
        monkeypatch.setenv("JITNORM_REMOTE_TIMEOUT", timeout)
        monkeypatch.setattr(remote, "_waited_s", waited)
        remote._within_limit(lambda abandoned: abandoned)
    assert waits == [10.0, 10.0, 1.5, 10.0]


def test_a_file_that_is_not_waited_for_is_not_read_to_its_end(setup, fake_files, blocked):
    closed = threading.Event()

    class Slow(Stream):
        def read(self, count):
            blocked.wait()
            return super().read(1)

        def __exit__(self, *_):
            closed.set()

    slow = Slow(GIB)
    fake_files.answer = lambda *_: slow
    assert find.fetch(SPEC) is None
    blocked.set()
    assert closed.wait(60) and slow.served == 1


def test_all_requests_of_a_process_have_a_limit(setup, fake_files, monkeypatch, caplog):
    """Each request takes 25 seconds of a clock that is read before and after it; three of them exceed the limit."""
    clock = iter(range(0, 10**6, 25))
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    fake_files.store.clear()
    assert find.fetch(SPEC) is None and not warnings(caplog)  # opens the file system, and a manifest
    assert find.fetch(OTHER_SPEC) is None
    assert len(fake_files.calls) == 1
    (said,) = warnings(caplog)
    assert "its requests have taken 75 s in this process" in said
    assert find.fetch(SPEC) is None and len(warnings(caplog)) == 1


def test_no_thread_can_be_started(setup, monkeypatch, caplog):
    monkeypatch.setattr("_thread.start_new_thread", lambda *_: raise_(RuntimeError("can't start new thread")))
    assert find.fetch(SPEC) is None
    assert "no thread can be started to ask it" in warnings(caplog)[0]


# Pushing


@pytest.mark.parametrize("setup", ["memory://cache", "file://{}/remote", "fake://cache"], indirect=True)
@pytest.mark.parametrize("key", [None, KEY], ids=["unsigned", "signed"])
def test_pushing_again_writes_nothing(setup, monkeypatch, key):
    before = files(setup.url)
    monkeypatch.setattr(remote._Remote, "write", lambda *_: pytest.fail("it is there"))
    assert list(remote.push(setup.url, [setup.entry, setup.entry], key)) == [(setup.packed.label, setup.digest, False)]
    assert files(setup.url) == before and sorted(before) == sorted([f"{setup.path}.json", setup.archive_path])
    line, _, rest = before[f"{setup.path}.json"].partition(b"\n")
    assert hashlib.sha256(line + b"\n").hexdigest() == setup.digest and rest.startswith(b"hmac-sha256 ")


REPAIRED = (
    *("altered archive", "truncated archive", "empty archive", "no archive", "large archive"),
    *("altered manifest", "another key", "large manifest", "replayed", "empty manifest"),
)


@pytest.mark.parametrize("name", REPAIRED)
def test_pushing_again_repairs(setup, fake_files, caplog, name):
    good = files(setup.url)
    HOSTILE[name][0](setup)
    assert list(remote.push(setup.url, [setup.entry], KEY)) == [(setup.packed.label, setup.digest, True)]
    fake_files.answer = None
    assert good.items() <= files(setup.url).items()
    call()
    assert setup.copier.builds == 1 and not warnings(caplog)


def test_a_signature_is_added(setup):
    good = files(setup.url)
    put(setup, f"{setup.path}.json", good[f"{setup.path}.json"].partition(b"\n")[0] + b"\n")
    assert [each.is_new for each in remote.push(setup.url, [setup.entry], None)] == [False]
    assert [each.is_new for each in remote.push(setup.url, [setup.entry], KEY)] == [True]
    assert files(setup.url) == good


def test_another_build_of_the_kernel_replaces_the_manifest(setup):
    other = with_library(setup.packed, b"another build")
    pushed = remote._push(remote._Remote.open(setup.url), other, KEY)
    assert pushed.is_new and pushed.digest != setup.digest and len(files(setup.url)) == 3


def test_the_archive_is_written_first(setup, fake_files):
    fake_files.store.clear()
    fake_files.calls.clear()
    list(remote.push(setup.url, [setup.entry], KEY))
    written = [path for name, path in fake_files.calls if name == "write"]
    assert written == [f"/cache/{setup.archive_path}", f"/cache/{setup.path}.json"]  # and no copy of them


@pytest.mark.parametrize("setup", ["file://{}/remote"], indirect=True)
def test_files_appear_complete(setup, monkeypatch):
    """Where the file system renames, a file is written under another name first, which is removed after a failure."""
    good, real, moved = files(setup.url), LocalFileSystem.mv, []
    put(setup, f"{setup.path}.json", b"old")

    def fails(fs, source, path, **_):
        moved.append((os.path.basename(source), os.path.basename(path), Path(source).read_bytes()))
        raise OSError("disk full")

    monkeypatch.setattr(LocalFileSystem, "mv", fails)
    with pytest.raises(RuntimeError, match=r"cannot be written to the remote cache file://.*: OSError: disk full"):
        list(remote.push(setup.url, [setup.entry], KEY))
    assert files(setup.url) == {**good, f"{setup.path}.json": b"old"}
    ((draft, name, content),) = moved
    assert draft != name and draft.endswith(".tmp") and content == good[f"{setup.path}.json"]
    monkeypatch.setattr(LocalFileSystem, "mv", real)
    list(remote.push(setup.url, [setup.entry], KEY))
    assert files(setup.url) == good


def test_a_damaged_entry_is_not_pushed(setup):
    setup.entry.library.write_bytes(b"damaged")
    before = files(setup.url)
    with pytest.raises(RuntimeError, match="cannot be exported: its library is not the one that was built"):
        list(remote.push(setup.url, [Entry(setup.entry.path)], KEY))
    assert files(setup.url) == before


def test_a_remote_cache_that_cannot_be_opened(setup):
    with pytest.raises(RuntimeError, match=r"the remote cache nosuch://host cannot be opened: .*nosuch") as caught:
        list(remote.push("nosuch://user:secret@host", [setup.entry], None))
    assert "secret" not in str(caught.value)
