"""What other users may have put into a cache, or may do to it: none of it is executed, and nothing waits for them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import stat
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import relative_error, rmsnorm_reference

from jitnorm.cli import main
from jitnorm.core.operators import OPERATORS
from jitnorm.jit import cache, cleanup, log
from jitnorm.jit import entry as _entry
from jitnorm.jit import find as engine
from jitnorm.jit import load as loaded
from jitnorm.jit.build import build, write_sources
from jitnorm.jit.cache import Cache
from jitnorm.jit.entry import Entry
from jitnorm.jit.folder import Folder
from jitnorm.jit.spec import Target
from jitnorm.jit.toolchain import Compiler, Toolchain
from jitnorm.rmsnorm import rmsnorm_spec

from .conftest import entries, warnings

SPEC = rmsnorm_spec(512, torch.float32, torch.float32, Target("cpu"))


def forget() -> None:
    """What a new process would know."""
    loaded._loaded.clear()
    engine._failed.clear()
    log.warn_once.cache_clear()


def call() -> None:
    """A call in a process that has loaded nothing, whose result is right."""
    import jitnorm

    forget()
    for table in OPERATORS["rmsnorm"].tables:
        table.clear()
    x, w = torch.randn(5, 512), torch.randn(512)
    out = torch.full_like(x, float("nan"))
    jitnorm.rmsnorm(x, w, out=out)
    assert relative_error(out, rmsnorm_reference(x, w, 1e-6)) < 1e-6


@pytest.mark.parametrize("umask", [0o002, 0o000])
def test_folders_are_private_whatever_the_umask(copier, cache_dir, monkeypatch, umask):
    monkeypatch.setenv("JITNORM_CACHE_DIR", str(cache_dir / "deep" / "down"))
    before = os.umask(umask)
    try:
        entry = build(SPEC)
    finally:
        os.umask(before)
    folders = [cache_dir, *(p for p in cache_dir.rglob("*") if p.is_dir())]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}
    for file in (entry.library, entry.path / "manifest.json"):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


@pytest.mark.parametrize("place", ["kernels", "home", "entry", "library", "manifest.json"])
def test_what_others_can_write_is_moved_away_once(copier, cache_dir, caplog, place):
    entry = build(SPEC)
    paths = {"kernels": cache_dir / "kernels", "home": entry.path.parent, "entry": entry.path, "library": entry.library}
    path = paths.get(place, entry.path / place)
    path.chmod(path.stat().st_mode | 0o020)
    call()
    assert copier.builds == 2
    said = caplog.text
    assert said.count("can be written by other users") == 1 and str(cache_dir / "quarantine") in said
    caplog.clear()
    call()
    assert copier.builds == 2 and not warnings(caplog)


@pytest.mark.parametrize("place", ["", "kernels", "home", "entry", "library"])
def test_a_prebuilt_layer_that_others_can_write_is_not_used(copier, cache_dir, tmp_path, monkeypatch, caplog, place):
    entry = build(SPEC)
    entry.release()
    shutil.copytree(cache_dir, tmp_path / "prebuilt")
    monkeypatch.setenv("JITNORM_PREBUILT_DIR", str(tmp_path / "prebuilt"))
    forget()
    assert engine.find(SPEC).prebuilt
    moved = tmp_path / "prebuilt" / entry.path.relative_to(cache_dir)
    path = {"": tmp_path / "prebuilt", "kernels": moved.parents[1], "home": moved.parent, "entry": moved}.get(
        place, moved / entry.library.name
    )
    path.chmod(path.stat().st_mode | 0o002)
    assert not engine.find(SPEC).prebuilt
    assert caplog.text.count("can be written by other users") == 1
    assert path.exists()


@pytest.mark.parametrize("place", ["kernels", "home", "entry", "library", "manifest.json"])
def test_links_are_not_followed(copier, cache_dir, tmp_path, place):
    """Whoever exchanges one while the entry is looked at would choose what is loaded."""
    entry = build(SPEC)
    paths = {"kernels": cache_dir / "kernels", "home": entry.path.parent, "entry": entry.path, "library": entry.library}
    path = paths.get(place, entry.path / place)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.joinpath("elsewhere").rglob("*"))
    call()
    assert copier.builds == 2 and not path.is_symlink()
    assert sorted(tmp_path.joinpath("elsewhere").rglob("*")) == before


def test_the_bytes_that_were_hashed_are_those_that_are_loaded(copier, cache_dir):
    build(SPEC).release()
    entry = Cache(cache_dir).find(SPEC, None)
    entry.library.write_bytes(b"exchanged after it was verified")
    module = engine._open(SPEC, entry, pytest.fail)
    x, w = torch.randn(5, 512), torch.randn(512)
    out = torch.full_like(x, float("nan"))
    assert module.rmsnorm(x, w, out, 1e-6, None) == 0
    assert relative_error(out, rmsnorm_reference(x, w, 1e-6)) < 1e-6


def test_each_library_is_loaded_though_descriptors_are_used_again(copier, cache_dir, monkeypatch):
    """dlopen gives back the library that it has for a path which it has seen."""
    monkeypatch.delenv("CXX")
    modules = {}
    for size in (64, 128, 256):
        spec = rmsnorm_spec(size, torch.float32, torch.float32, Target("cpu"))
        modules[size] = loaded.load(spec)
    for size, module in modules.items():
        x, w = torch.randn(3, size), torch.randn(size)
        assert module.rmsnorm(x, w, torch.empty_like(x), 1e-6, None) == 0


def test_a_foreign_lock_stops_nobody(copier, cache_dir):
    """Anyone who can read a manifest can lock it for ever."""
    entry = build(SPEC)
    entry.release()
    with open(entry.path / "manifest.json") as manifest:
        fcntl.flock(manifest, fcntl.LOCK_EX)
        call()
        assert entry.in_use() and not Cache(cache_dir).remove(entry)
    assert copier.builds == 1


@pytest.mark.parametrize("command", ["clear", "prune"])
def test_removing_never_leaves_the_cache(copier, cache_dir, tmp_path, command):
    entry = build(SPEC)
    entry.release()
    canary = tmp_path / "canary"
    for folder in ("a", "b", "c", "d"):
        (canary / folder).mkdir(parents=True)
        (canary / folder / "file").write_text("not ours")
    home, quarantined = entry.path.parent.name, f"{entry.path.parent.name}.0123abcd"
    os.utime(canary / "a", (0, 0))
    shutil.copytree(cache_dir / "kernels", canary / "kernels")
    (cache_dir / "kernels" / home.replace("512", "768")).symlink_to(canary / "kernels" / home)
    (cache_dir / "quarantine").symlink_to(canary / "b")
    (canary / "b" / quarantined).mkdir()
    (cache_dir / "staging" / "removed.0123456789abcdef").symlink_to(canary / "c")
    shutil.rmtree(cache_dir / "locks")
    (cache_dir / "locks").symlink_to(canary / "d")
    (canary / "d" / f"{home}.0123456789ab").write_text("")
    before = sorted(canary.rglob("*"))
    result = CliRunner().invoke(main, ["cache", command, "--yes"])
    assert result.exit_code == 0, result.output
    assert sorted(canary.rglob("*")) == before
    assert not os.path.lexists(cache_dir / "staging" / "removed.0123456789abcdef")


def test_a_path_that_ninja_cannot_write_is_refused(copier, cache_dir, tmp_path, monkeypatch):
    folder = tmp_path / "x\n  command = touch injected\n"
    folder.mkdir()
    compiler = Path(shutil.copy(copier.path, folder / "g++"))
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeError, match="it has control characters") as caught:
        loaded.load(SPEC)
    assert "\n" not in str(caught.value)
    assert not entries(cache_dir) and not copier.log.exists()


def test_a_path_of_any_bytes_builds(copier, cache_dir, tmp_path, monkeypatch):
    folder = os.fsencode(tmp_path) + b"/caf\xe9 $x 'y' \xff"
    os.mkdir(folder)
    shutil.copy(copier.path, folder + b"/g++")
    monkeypatch.setenv("CXX", os.fsdecode(folder + b"/g++"))
    monkeypatch.setenv("JITNORM_CACHE_DIR", os.fsdecode(folder + b"/cache"))
    call()
    assert copier.builds == 1


def test_paths_are_quoted_for_the_shell_and_for_ninja(tmp_path):
    odd = Compiler("/x/$HOME `id` 'q'/g++", "1", 0, 0)
    with Folder.open_root(tmp_path) as folder:
        write_sources(SPEC, folder, Toolchain(odd))
    line = (tmp_path / "paths.ninja").read_text().splitlines()[0]
    assert line == """cxx = '/x/$$HOME `id` '"'"'q'"'"'/g++'"""


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(64 << 30)


def bound_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket may not be long
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.chdir(here)


THINGS = {
    "fifo": os.mkfifo,
    "socket": bound_socket,
    "folder": lambda path: (path / "inner").mkdir(parents=True),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "loop of links": lambda path: path.symlink_to(path.name),
    "file": lambda path: path.write_bytes(b"x"),
    "closed file": lambda path: (path.write_bytes(b"x"), path.chmod(0)),
    "sparse file": sparse,
    "nested JSON": lambda path: path.write_text("[" * 100_000),
    "another type": lambda path: path.write_text(json.dumps({"name": 5, "cxx": [1], "library": {}, "size": "9"})),
}
# Each thing is tried at places where it is the most likely to hurt: all at files that are read, some elsewhere.
PLACES = {
    "manifest": THINGS,
    "library": ("fifo", "folder", "loop of links", "sparse file"),
    "toolchain file": THINGS,
    "entry": ("fifo", "file", "dangling link", "socket"),
    "home": ("fifo", "file", "loop of links"),
    "kernels": ("fifo", "file", "dangling link"),
    "staging": ("fifo", "file", "loop of links"),
    "locks": ("fifo", "dangling link"),
    "lock file": ("fifo", "folder", "loop of links"),
    "toolchains": ("file", "loop of links"),
    "quarantine": ("fifo", "file", "dangling link"),
}


@pytest.mark.parametrize(("place", "thing"), [(place, thing) for place, things in PLACES.items() for thing in things])
def test_whatever_lies_there_is_moved_away_and_hangs_nothing(copier, cache_dir, place, thing):
    entry = build(SPEC)
    entry.release()
    library = entry.library
    paths = {
        "manifest": entry.path / "manifest.json",
        "library": library,
        "toolchain file": next((cache_dir / "toolchains").iterdir()),
        "entry": entry.path,
        "home": entry.path.parent,
        "lock file": cache_dir / "locks" / f"{entry.path.parent.name}.{entry.path.name}",
    }
    path = paths.get(place, cache_dir / place)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    THINGS[thing](path)
    if place in ("lock file", "quarantine", "staging", "locks"):
        shutil.rmtree(cache_dir / "kernels")  # so that there is something to build
    commands = (["ls"], ["ls", "--format", "json"], ["verify"], ["prune", "--dry-run"], ["clear", "--dry-run"])
    for command in commands:
        result = CliRunner().invoke(main, ["cache", *command])
        assert result.exit_code in (0, 1) and not isinstance(result.exception, Exception), result.output
    call()
    builds = copier.builds
    call()
    assert copier.builds == builds, "it is circumvented and not healed"
    Cache(cache_dir).find(SPEC, None).verify()
    for held in list(_entry._locked):
        Entry(held).release()
    result = CliRunner().invoke(main, ["cache", "clear", "--yes"])
    assert result.exit_code == 0, result.output
    left = {p.name.partition(".")[0] for p in cache_dir.rglob("*") if not p.is_dir() or p.is_symlink()}
    # What lies where one of the cache's own folders should be may be somebody's, and is kept.
    assert left <= {"CACHEDIR", place if place in cache.OWN_NAMES or place == "kernels" else "CACHEDIR"}


def test_one_bad_entry_stops_no_command(copier, cache_dir):
    entry = build(SPEC)
    entry.release()
    bad = entry.path.parent / "0123456789ab"
    bad.mkdir(mode=0o700)
    os.mkfifo(bad / "manifest.json")
    listed = CliRunner().invoke(main, ["cache", "ls"])
    assert "2 kernels" in listed.output and "rmsnorm_512_fp32" in listed.output
    verified = CliRunner().invoke(main, ["cache", "verify"])
    assert verified.exit_code == 1 and "2 kernels, 1 bad" in verified.output
    assert CliRunner().invoke(main, ["cache", "clear", "--yes"]).exit_code == 0
    assert not entries(cache_dir)


def test_a_jump_of_the_clock_removes_no_build_under_way(copier, cache_dir, monkeypatch):
    build(SPEC).release()
    with Cache(cache_dir).staging(SPEC) as staging:
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + 10 * 86400)
        assert staging.path not in cleanup.leftovers(Cache(cache_dir))
        CliRunner().invoke(main, ["cache", "clear", "--yes"])
        assert staging.path.is_dir()
