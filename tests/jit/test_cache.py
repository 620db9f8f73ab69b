"""Publishing entries, locking, and removing what builds left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from processes import start

from jitnorm.jit import build as builder
from jitnorm.jit import cache, cleanup, locations
from jitnorm.jit import entry as _entry
from jitnorm.jit import spec as spec_module
from jitnorm.jit import toolchain as toolchain_module
from jitnorm.jit.build import build, first_error
from jitnorm.jit.cache import Cache
from jitnorm.jit.entry import BadEntry, Entry
from jitnorm.jit.spec import Target
from jitnorm.rmsnorm import rmsnorm_spec

from .conftest import entries, warnings

SPEC = rmsnorm_spec(64, torch.float32, torch.float32, Target("cpu"))


def test_who_comes_second_uses_the_first_ones(cache_dir):
    first = build(SPEC)
    place = Cache(cache_dir)
    with place.staging(SPEC) as staging:
        staging.write("manifest.json", b"{}")
        assert place.publish(staging.path, Entry(first.path)).path == first.path
    assert entries(cache_dir) == [first.path] and not list((cache_dir / "staging").iterdir())
    first.verify()


def test_publishing_over_a_damaged_entry(cache_dir, caplog):
    first = build(SPEC)
    content = first.library.read_bytes()
    first.library.write_bytes(b"")
    place = Cache(cache_dir)
    with place.staging(SPEC) as staging:
        staging.write(first.library.name, content)
        staging.write("manifest.json", (first.path / "manifest.json").read_bytes())
        place.publish(staging.path, Entry(first.path)).verify()
    assert caplog.text.count("is not used") == 1


def test_a_lock_that_is_never_released_delays_a_build_and_no_more(cache_dir, monkeypatch, caplog):
    build(SPEC)
    monkeypatch.setattr(builder, "_FIRST_MESSAGE_S", 0.05)
    monkeypatch.setattr(builder, "_LOCK_LIMIT_S", 0.2)
    other = rmsnorm_spec(128, torch.float32, torch.float32, Target("cpu"))
    toolchain = toolchain_module.require(Target("cpu"), None).key
    (cache_dir / "staging" / f"{other.name}.{other.target.sm}.some.host.0a1b2c3d.4711.0123abcd").mkdir()
    with Cache(cache_dir).build_lock(other, toolchain) as taken:
        assert taken
        started = time.monotonic()
        build(other).verify()
        assert time.monotonic() - started < 60
    said = caplog.text
    assert "waiting for process 4711 on some.host" in said and "no longer waiting" in said
    assert not list((cache_dir / "locks").iterdir())


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_builder_that_runs_is_waited_for_beyond_the_limit(
    copier, cache_dir, tmp_path, monkeypatch, caplog, is_stopped
):
    """One that is stopped is not: it may stay so for ever."""
    other = rmsnorm_spec(512, torch.float32, torch.float32, Target("cpu"))
    started, go = tmp_path / "started", tmp_path / "go"
    copier.then(f"touch {started}; for _ in $(seq 6000); do [ -e {go} ] && break; sleep 0.01; done")
    script = """
        import torch
        from jitnorm.jit.build import build
        from jitnorm.jit.spec import Target
        from jitnorm.rmsnorm import rmsnorm_spec

        build(rmsnorm_spec(512, torch.float32, torch.float32, Target("cpu")))
    """
    first = start(script)
    while not started.exists():
        time.sleep(0.01)
    if is_stopped:
        first.send_signal(signal.SIGSTOP)
        copier.then(":")
    tries = 0
    build_lock = Cache.build_lock

    def count(*arguments):
        nonlocal tries
        tries += 1
        if tries == 10:
            go.touch()
        return build_lock(*arguments)

    monkeypatch.setattr(Cache, "build_lock", count)
    monkeypatch.setattr(builder, "_FIRST_MESSAGE_S", 0.0)
    monkeypatch.setattr(builder, "_LOCK_LIMIT_S", 0.0)
    build(other).verify()
    assert ("no longer waiting" in caplog.text) is is_stopped
    assert copier.builds == (2 if is_stopped else 1) and (is_stopped or tries >= 10)
    go.touch()
    if is_stopped:  # the other may have ended
        first.send_signal(signal.SIGCONT)
    assert first.wait() == 0


def test_a_bad_manifest_is_said(tmp_path):
    tmp_path = tmp_path / "kernels" / "home" / "toolchain"
    tmp_path.mkdir(mode=0o700, parents=True)
    entry = Entry(tmp_path)
    with pytest.raises(BadEntry, match="manifest"):
        entry.verify()
    for library in ("../../etc/passwd", None, "x-\0.so", "", ["x-.so"]):
        manifest = {"name": "x", "library": library, "sha256": "0" * 64, "size": 0}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BadEntry, match="its library cannot be named"):
            Entry(tmp_path).verify()
    for name in ("../x", None, 5):
        manifest = {"name": name, "library": f"{name}-.so", "sha256": "0" * 64, "size": 0}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BadEntry, match="manifest cannot be read"):
            Entry(tmp_path).verify()


def test_a_passing_trouble_is_no_damage(cache_dir, monkeypatch, caplog):
    """Too many open files, say: the entry stays where it is, and serves again."""
    entry = build(SPEC)
    place = Cache(cache_dir)
    monkeypatch.setattr(Entry, "verify", lambda *_, **__: (_ for _ in ()).throw(OSError(24, "Too many open files")))
    assert place.find(SPEC, entry.path.name) is None
    monkeypatch.undo()
    assert "is not used this time" in caplog.text
    assert place.find(SPEC, entry.path.name).path == entry.path


def test_an_entry_that_was_rebuilt_meanwhile_goes_back(cache_dir, caplog):
    entry = build(SPEC)
    Cache(cache_dir).quarantine(entry.path, "it was damaged a moment ago")
    entry.verify()
    assert not warnings(caplog)


def test_a_bad_entry_is_held_by_nobody(cache_dir):
    entry = build(SPEC)
    entry.library.write_bytes(b"")
    assert Cache(cache_dir).find(SPEC, entry.path.name) is None
    assert entry.path not in _entry._locked


def test_sources_that_change_under_a_process_are_not_published(cache_dir, tmp_path, monkeypatch):
    own = shutil.copytree(spec_module.CSRC, tmp_path / "csrc")
    for module in (spec_module, builder):
        monkeypatch.setattr(module, "CSRC", own)
    spec_module._read.cache_clear()
    spec = rmsnorm_spec(256, torch.float32, torch.float32, Target("cpu"))
    assert spec.key
    (own / "elementwise" / "rmsnorm_cpu.h").open("a").write("// upgraded\n")
    with pytest.raises(RuntimeError, match="sources changed"):
        build(spec)
    spec_module._read.cache_clear()
    assert not entries(cache_dir)


def test_a_staging_folder_that_another_thread_takes_for_abandoned(cache_dir, monkeypatch):
    """Until it is locked it looks like that of a dead process."""
    locations.create(cache_dir)
    real, removed = os.mkdir, []

    def mkdir(name, *arguments, dir_fd=None, **keywords):
        real(name, *arguments, dir_fd=dir_fd, **keywords)
        if not removed and str(name).startswith(SPEC.name):
            removed.append(name)
            os.rmdir(name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with Cache(cache_dir).staging(SPEC) as staging:
        assert removed and staging.path.is_dir()


def test_leftovers(cache_dir):
    home = build(SPEC).path.parent.name
    name = home.rpartition(".")[0]
    young, old = f"{name}.some.host.0a1b2c3d.12.abcd_123", f"{name}.other.0a1b2c3d.13.efgh5678"
    dead = f"{name}.this.host.{cache.host_id()}.14.01234567"
    quarantined = {f"{home}.0123abcd", f"failed.{name}.0123abcd"}
    ages = {f"staging/{young}": 60, f"staging/{old}": 2 * 86400, f"staging/{dead}": 0}
    for folder, age in (ages | {f"quarantine/{n}": 60 for n in quarantined}).items():
        (cache_dir / folder).mkdir(parents=True, mode=0o700)
        os.utime(cache_dir / folder, (time.time() - age,) * 2)
    (cache_dir / "quarantine").chmod(0o700)
    assert {p.name for p in cleanup.leftovers(Cache(cache_dir))} == {old, dead, *quarantined}
    with Cache(cache_dir).staging(SPEC) as staging:
        # A build under way is its process's, and one on another host may be under way. The dead one is removed.
        cleanup.remove_abandoned(Cache(cache_dir), 60)
        assert {p.name for p in cleanup.leftovers(Cache(cache_dir))} == {old, *quarantined}
        assert {p.name for p in (cache_dir / "staging").iterdir()} == {young, old, staging.path.name}


def test_what_is_not_ours_is_left_alone(cache_dir):
    for name in (
        "kernels/cuda/softmax",
        "kernels/cuda.sm_90a.tuned/best",
        "staging/dataset",
        "quarantine/notes",
    ):
        (cache_dir / name).mkdir(parents=True)
        (cache_dir / name).parent.chmod(0o700)
        os.utime(cache_dir / name, (0, 0))
    entry = build(SPEC)
    assert not (cache_dir / "CACHEDIR.TAG").exists()  # with which backups would leave it out
    assert list(Cache(cache_dir).entries()) == [entry] and not cleanup.leftovers(Cache(cache_dir))


def test_an_entry_that_another_process_removed(cache_dir):
    entry = build(SPEC)
    entry.release()
    assert Cache(cache_dir).remove(entry) and Cache(cache_dir).remove(entry)


def test_nowhere_to_keep_a_kernel(cache_dir, monkeypatch):
    def fail(**_):
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(locations.tempfile, "mkdtemp", fail)
    cache_dir.write_text("")
    words = r"is not a folder\) nor create a temporary folder \(.*No usable temporary directory"
    with pytest.raises(RuntimeError, match=words):
        build(SPEC)


def test_a_folder_from_which_nothing_can_be_loaded(cache_dir, monkeypatch):
    cache_dir.mkdir()
    assert locations.reason_not_writable(cache_dir) is None
    monkeypatch.setattr(locations.os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC | os.ST_NOSUID))
    assert "mounted noexec" in locations.reason_not_writable(cache_dir)


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (
            "ninja: Entering directory `x'\n[1/2] nvcc ...\nFAILED: kernel.cubin\nnvcc -I/error: ...\n"
            'a.cuh(12): error: identifier "foo" is undefined\n\n1 error detected\nninja: build stopped\n',
            'a.cuh(12): error: identifier "foo" is undefined',
        ),
        (
            "warning: x\nmodule.cc:3:10: fatal error: a.h: No such file\n",
            "module.cc:3:10: fatal error: a.h: No such file",
        ),
        (
            "nvcc fatal   : Unsupported gpu architecture 'compute_999'\n",
            "nvcc fatal   : Unsupported gpu architecture 'compute_999'",
        ),
        ("ld: cannot find -ltvm_ffi\nninja: build stopped\n", "ld: cannot find -ltvm_ffi"),
        ("Killed\n", "Killed"),
        ("FAILED: x\nKilled\nninja: build stopped: subcommand failed.\n", "Killed"),
        (
            "x.cc: In function f:\nx.cc:3:5: internal compiler error: Segmentation fault\nninja: build stopped\n",
            "x.cc:3:5: internal compiler error: Segmentation fault",
        ),
        (
            "c++: internal compiler error: File size limit exceeded signal terminated program cc1plus\nninja: y\n",
            "c++: internal compiler error: File size limit exceeded signal terminated program cc1plus",
        ),
        (
            "nvcc error   : 'cicc' died due to signal 9 (Kill signal)\nninja: build stopped\n",
            "nvcc error   : 'cicc' died due to signal 9 (Kill signal)",
        ),
        (
            "ptxas error   : Entry function uses too much shared data\n",
            "ptxas error   : Entry function uses too much shared data",
        ),
        ("", "the compiler printed nothing"),
    ],
)
def test_the_first_real_error(log, expected):
    assert first_error(log) == expected
