"""Failures while a kernel is built, stored or loaded, and that the next call recovers from them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from processes import run, start

from jitnorm.cli import main
from jitnorm.jit import build as builder
from jitnorm.jit import cache, library, locations, toolchain
from jitnorm.jit import find as engine
from jitnorm.jit import load as loaded
from jitnorm.jit.build import BuildError, BuildInterrupted, build
from jitnorm.jit.cache import Cache
from jitnorm.jit.entry import Entry
from jitnorm.jit.folder import Folder
from jitnorm.jit.library import BadLibrary, Elf, check_library

from .conftest import entries
from .test_untrusted import SPEC, call, forget

PYTHON = shlex.quote(sys.executable)
EDIT = f'{PYTHON} -c \'import sys; p = sys.argv[1]; b = open(p, "rb").read(); open(p, "wb").write({{}})\' $out'
DAMAGE = {
    "truncated": EDIT.format("b[:5000]"),
    "its end truncated": EDIT.format("b[:-8]"),
    "zeroed": EDIT.format("bytes(len(b))"),
    "a hole in its code": EDIT.format("b[:4096] + bytes(4096) + b[8192:]"),
    "empty": ": > $out",
    "text": "echo not a library > $out",
    "no symbols": "echo | g++ -shared -x c++ - -o $out",
    "for another machine": EDIT.format('b[:18] + b"\\x28\\0" + b[20:]'),
    "no file": "rm $out",
    "a folder": "rm $out; mkdir $out",
    "a FIFO": "rm $out; mkfifo $out",
    "a constructor that crashes": "echo '__attribute__((constructor)) static void f() { *(volatile int*)8 = 0; }"
    ' extern "C" int __tvm_ffi_rmsnorm() { return 0; }\' | g++ -shared -fPIC -x c++ - -o $out',
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_output_is_not_published(copier, cache_dir, damage):
    """Once may be chance: it is built again. Twice is an error that says so."""
    once = copier.log.with_name("once")
    copier.then(f"[ -e {once} ] || {{ touch {once}; {DAMAGE[damage]}; }}")
    call()
    assert copier.builds == 2 and len(entries(cache_dir)) == 1
    shutil.rmtree(cache_dir)
    copier.then(DAMAGE[damage])
    forget()
    with pytest.raises(BuildError, match=r"the compiler .*g\+\+ wrote (no|a) library"):
        loaded.load(SPEC)
    assert not entries(cache_dir)


def test_a_whole_library_passes(built_library):
    content = built_library.read_bytes()
    assert "libc.so.6" in check_library(content, ["rmsnorm"]).needed()
    with pytest.raises(BadLibrary, match="does not define __tvm_ffi_softmax"):
        check_library(content, ["softmax"])


def test_any_damage_to_the_tables_is_found_without_a_crash(built_library):
    """Elf reads what a damaged file says of itself: no offset may lead out of it."""
    content = built_library.read_bytes()
    for seed in range(300):
        damaged = bytearray(content)
        for i in range(4):
            place = int.from_bytes(hashlib.sha256(f"{seed} {i}".encode()).digest()[:8], "little")
            damaged[place % (64 if seed % 2 else len(damaged))] = place >> 56
        with contextlib.suppress(BadLibrary):
            check_library(bytes(damaged), ["rmsnorm"]).needed()
    for length in range(0, len(content), 97):
        with pytest.raises(BadLibrary):
            Elf(content[:length])


def test_a_published_library_that_does_not_load_is_rebuilt_once(copier, cache_dir, caplog):
    """Its hash is right: it was built where other libraries are, or it is of an earlier release."""
    entry = build(SPEC)
    entry.release()
    publish_content(entry, b"\x7fELF, and no more")
    call()
    assert copier.builds == 2 and "it cannot be loaded" in caplog.text
    forget()
    copier.then("")
    monkey = pytest.MonkeyPatch()
    monkey.setattr(engine, "open_library", lambda *_: (_ for _ in ()).throw(BadLibrary("cannot be opened")))
    with monkey.context(), pytest.raises(RuntimeError, match=r"cannot load .*cannot be opened"):
        loaded.load(SPEC)
    monkey.undo()
    assert copier.builds == 3
    call()


def publish_content(entry: Entry, content: bytes) -> None:
    """Makes `content` the library of an entry, as if it had been built."""
    manifest = json.loads((entry.path / "manifest.json").read_text())
    digest = hashlib.sha256(content).hexdigest()
    entry.library.unlink()
    manifest |= {"sha256": digest, "size": len(content), "library": f"{manifest['name']}-{digest[:16]}.so"}
    (entry.path / "manifest.json").write_text(json.dumps(manifest))
    (entry.path / manifest["library"]).write_bytes(content)
    (entry.path / manifest["library"]).chmod(0o600)


@pytest.mark.parametrize("content", [b"", b"text", "hole"])
def test_verify_finds_a_library_that_cannot_be_loaded(copier, cache_dir, built_library, content):
    entry = build(SPEC)
    whole = built_library.read_bytes()
    publish_content(entry, whole[:4096] + bytes(4096) + whole[8192:] if content == "hole" else content)
    result = CliRunner().invoke(main, ["cache", "verify"])
    assert result.exit_code == 1 and "1 bad" in result.output


def test_a_prebuilt_library_that_does_not_load_is_built(copier, cache_dir, tmp_path, monkeypatch):
    entry = build(SPEC)
    entry.release()
    shutil.move(cache_dir, tmp_path / "prebuilt")
    monkeypatch.setenv("JITNORM_PREBUILT_DIR", str(tmp_path / "prebuilt"))
    moved = Entry(tmp_path / "prebuilt" / entry.path.relative_to(cache_dir))
    publish_content(moved, b"\x7fELF")
    call()
    assert copier.builds == 2 and moved.path.exists()


def host_folder(name: str) -> str:
    return f"{SPEC.name}.{SPEC.target.sm}.some.host.{cache.host_id()}.4711.{name}"


def test_a_build_removes_what_dead_processes_left(copier, cache_dir):
    (cache_dir / "staging" / host_folder("00000001") / "deep").mkdir(parents=True, mode=0o700)
    (cache_dir / "staging" / "removed.0123456789abcdef").mkdir()
    (cache_dir / "locks").mkdir(mode=0o700)
    (cache_dir / "locks" / f"{SPEC.name}.{SPEC.target.sm}.0123456789abcdef.0123456789ab").touch()
    (cache_dir / "toolchains").mkdir(mode=0o700)
    for i in range(100):
        (cache_dir / "toolchains" / f"cpu-{i:016x}.json").touch()
    (cache_dir / "toolchains" / "cpu-0123456789abcdef.json.01234567.tmp").touch()
    (cache_dir / "staging").chmod(0o700)
    cache_dir.chmod(0o700)
    (cache_dir / "staging" / host_folder("00000002")).mkdir()
    alive = os.open(cache_dir / "staging" / host_folder("00000002"), os.O_RDONLY)
    fcntl.flock(alive, fcntl.LOCK_EX)
    try:
        build(SPEC)
    finally:
        os.close(alive)
    assert [p.name for p in (cache_dir / "staging").iterdir()] == [host_folder("00000002")]
    assert not list((cache_dir / "locks").iterdir())
    toolchains = [p.name for p in (cache_dir / "toolchains").iterdir()]
    assert len(toolchains) <= 65 and not [name for name in toolchains if name.endswith(".tmp")]


def test_a_misspelt_variable_is_named_before_the_first_build(copier, cache_dir, monkeypatch, caplog):
    monkeypatch.setenv("JITNORM_DISABLEJIT", "1")
    monkeypatch.setenv("JITNORM_OF_AN_APPLICATION", "1")  # resembles none
    caplog.set_level("DEBUG", logger="jitnorm")
    for size in (64, 128):
        build(cpu_spec(size)).release()
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["JITNORM_DISABLEJIT is not a variable of jitnorm: did you mean JITNORM_DISABLE_JIT?"]
    assert all(f"built {cpu_spec(size)} in " in caplog.text for size in (64, 128))


def test_quarantine_keeps_the_newest_few(copier, cache_dir):
    for _ in range(20):
        entry = build(SPEC)
        entry.release()
        entry.library.write_bytes(b"damaged")
        assert Cache(cache_dir).find(SPEC, entry.path.name) is None
    assert len(list((cache_dir / "quarantine").iterdir())) == 16


def test_clear_removes_all_that_is_jitnorms(copier, cache_dir):
    build(SPEC).release()
    copier.then("exit 1")
    with pytest.raises(BuildError):
        build(cpu_spec(64))
    for part in ("invariance", "gemms"):
        Cache(cache_dir).write_record(part, "0123456789abcdef01234567.json", {})
    assert CliRunner().invoke(main, ["cache", "clear", "--yes"]).exit_code == 0
    assert [p.name for p in cache_dir.rglob("*") if not p.is_dir()] == ["CACHEDIR.TAG"]
    assert not list(cache_dir.glob("*/*"))


def cpu_spec(hidden_size: int):
    from jitnorm.jit.spec import Target
    from jitnorm.rmsnorm import rmsnorm_spec

    return rmsnorm_spec(hidden_size, torch.float32, torch.float32, Target("cpu"))


def test_an_entry_is_locked_until_it_is_gone(copier, cache_dir, monkeypatch):
    entry = build(SPEC)
    entry.release()
    locked = []
    move = Folder.move

    def watched(self, name, to, new_name):
        if to.path.name == "staging":
            with open(entry.path / "manifest.json") as manifest:
                try:
                    fcntl.flock(manifest, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    locked.append(name)
        move(self, name, to, new_name)

    monkeypatch.setattr(Folder, "move", watched)
    assert Cache(cache_dir).remove(entry)
    assert locked == [entry.path.name]


def test_an_entry_that_vanishes_before_it_is_loaded_is_built_again(copier, cache_dir, monkeypatch):
    real, vanished = engine.find, []

    def find(*arguments, **keywords):
        entry = real(*arguments, **keywords)
        if entry and not vanished:
            vanished.append(entry)
            shutil.rmtree(entry.path)
            return Entry(entry.path)  # which has read nothing yet
        return entry

    build(SPEC).release()
    monkeypatch.setattr(engine, "find", find)
    call()
    assert vanished and copier.builds == 2


def test_on_nfs_a_kernel_in_use_is_known_to_be(copier, cache_dir, monkeypatch):
    """There an exclusive lock needs a descriptor that can write, and EBADF is no word about others' locks."""
    entry = build(SPEC)
    real = fcntl.flock

    def nfs(fd, operation):
        writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        if operation & fcntl.LOCK_EX and not writable and not os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EBADF, "Bad file descriptor")
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", nfs)
    assert entry.in_use() and not Cache(cache_dir).remove(entry)
    entry.release()
    assert not entry.in_use() and Cache(cache_dir).remove(entry)


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("place", ["root", "staging", "kernels"])
def test_a_failing_file_system_gets_the_temporary_folder(copier, cache_dir, monkeypatch, caplog, place, code):
    build(cpu_spec(64)).release()
    root, failed = os.fspath(cache_dir), []

    def failing(real):
        def call(name, *arguments, dir_fd=None, **keywords):
            path = os.fspath(name) if dir_fd is None else f"{os.readlink(f'/proc/self/fd/{dir_fd}')}/{name}"
            if path == root if place == "root" else path.startswith(f"{root}/{place}/"):
                failed.append(path)
                raise OSError(code, os.strerror(code), path)
            return real(name, *arguments, **keywords, **({} if dir_fd is None else {"dir_fd": dir_fd}))

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(os.open))
        patch.setattr(os, "mkdir", failing(os.mkdir))
        call()
    assert failed and "This process keeps its own" in caplog.text


def test_sources_that_cannot_be_read_are_said(copier, monkeypatch):
    from jitnorm.jit import spec as spec_module

    def stale(self):
        raise OSError(errno.ESTALE, "Stale file handle")

    spec_module._read.cache_clear()
    monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(RuntimeError, match=r"cannot read its own source .*Stale file handle"):
        loaded.load(cpu_spec(1024))
    monkeypatch.undo()
    spec_module._read.cache_clear()


def test_a_deleted_working_directory(copier, tmp_path, monkeypatch, caplog):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("JITNORM_CACHE_DIR", "relative")
    call()
    assert "the working directory is gone" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes a user that no file knows")
def test_a_user_without_a_home_and_an_entry_in_passwd():
    script = """
        import os, torch, jitnorm.rmsnorm, jitnorm.jit.build, ninja
        from jitnorm.jit import locations
        os.setuid(54321)
        del os.environ["HOME"]
        place = locations.writable()
        print(place.root, locations.is_temporary())
    """
    # Not below pytest's folder, which every pytest that starts closes to other users again.
    with tempfile.TemporaryDirectory(prefix="jitnorm-nobody-") as folder:
        os.chmod(folder, 0o777)
        done = run(script, TMPDIR=folder, JITNORM_CACHE_DIR=None, XDG_CACHE_HOME=None)
    assert folder in done.stdout and "True" in done.stdout, done.stderr
    assert "there is no home folder" in done.stderr


def test_a_disk_that_is_full_for_the_compiler(copier, cache_dir, caplog):
    copier.then(f'case "$PWD" in {cache_dir}/*) echo "ld: final link failed: No space left on device"; exit 1;; esac')
    call()
    said = caplog.text
    assert "No space left on device" in said and "This process keeps its own" in said


def test_a_compiler_that_does_not_answer_costs_its_time_limit_once(copier, cache_dir, monkeypatch):
    asked = copier.log.with_name("asked")
    copier.path.write_text(f"#!/bin/sh\necho asked >> {asked}\nsleep 1000 & sleep 1000\n")
    monkeypatch.setattr(toolchain, "_ANSWER_LIMIT_S", 0.3)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="it did not answer within 0 s"):
            loaded.load(SPEC)
    assert asked.read_text().split() == ["asked"]
    copier.then("")  # another file: it is asked again
    call()


def test_a_compiler_that_talks_without_end_is_given_up(copier):
    copier.path.write_text("#!/bin/sh\nexec yes\n")
    with pytest.raises(RuntimeError, match="it printed more than 1048576 bytes"):
        loaded.load(SPEC)


def running(mark: str) -> bool:
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark.encode() in place.read_bytes():
                return True
    return False


def test_a_build_without_end_is_ended(copier, cache_dir, monkeypatch, caplog):
    seconds = f"1000.{os.getpid()}"
    copier.then(f"trap '' TERM; sleep {seconds}")  # and it does not listen
    monkeypatch.setattr(builder, "_FIRST_MESSAGE_S", 0.05)
    monkeypatch.setattr(builder, "_MESSAGE_INTERVAL_S", 0.2)
    monkeypatch.setattr(builder, "_BUILD_LIMIT_S", 0.4)
    with pytest.raises(BuildError, match="the compilers did not end within 0 s"):
        loaded.load(SPEC)
    said = caplog.text
    assert "building RMSNormKernel<512" in said and "still building" in said and "sleep" in said
    assert not running(seconds)


@pytest.mark.parametrize("signal_to_ninja", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_is_no_failure(copier, cache_dir, signal_to_ninja):
    """Whoever ends ninja: the next call builds."""
    go, seconds = copier.log.with_name("go"), f"1000.{os.getpid()}"
    copier.then(f"touch {go}; exec sleep {seconds}")

    def interrupt():
        while not go.exists():
            time.sleep(0.01)
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                inside = os.readlink(process / "cwd").startswith(os.fspath(cache_dir))
                if inside and (process / "comm").read_text().strip() == "ninja":
                    os.kill(int(process.name), signal_to_ninja)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(BuildInterrupted, match="was interrupted"):
        loaded.load(SPEC)
    thread.join()
    assert not running(seconds)
    copier.then("")
    call()


def test_a_compiler_that_is_killed_is_no_failure(copier, cache_dir):
    copier.then("kill -KILL $$")  # as the kernel does for want of memory
    with pytest.raises(BuildInterrupted, match=r"was interrupted: .*Killed"):
        loaded.load(SPEC)
    copier.then("")
    call()


def test_ctrl_c_on_the_terminal_does_not_reach_the_compiler(copier, cache_dir):
    """The program has a handler of its own, and goes on."""
    go = copier.log.with_name("go")
    copier.then(f"touch {go}; sleep 1")
    script = """
        import os, signal, torch, jitnorm.rmsnorm
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGUSR1, lambda *_: os.killpg(0, signal.SIGINT))  # as a terminal does it
        x = torch.randn(5, 512)
        jitnorm.rmsnorm(x, x[0])
        print("right")
    """
    process = start(script)
    while not go.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=100)
    assert out.strip() == "right", err
    assert copier.builds == 1


@pytest.mark.parametrize(
    "script",
    [
        "sleep {0}",
        "trap : TERM PIPE; sleep {0}; sleep {0}",  # it does not end when it is asked to
        "trap '' TERM; sleep {0} & trap - TERM; wait",  # it ends, and leaves a child that does not
    ],
    ids=["ends", "stays", "leaves a child"],
)
def test_compilers_end_with_the_process_that_started_them(copier, cache_dir, script):
    seconds = f"1000.{os.getpid()}"
    copier.then(script.format(seconds))
    process = start("import torch, jitnorm.rmsnorm\nx = torch.randn(5, 512)\njitnorm.rmsnorm(x, x[0])")
    while not running(f"sleep\0{seconds}"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while running(seconds) or running(str(copier.path)):  # it may be between two commands
        assert time.monotonic() < deadline
        time.sleep(0.01)
    copier.then("")
    call()
    assert not list((cache_dir / "staging").iterdir())


def test_a_library_without_memory_files_is_loaded_from_a_private_file(copier, cache_dir, tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    monkeypatch.setattr(library.tempfile, "tempdir", str(tmp_path / "own"))
    monkeypatch.setattr(library, "_can_load_from_memory", lambda: False)
    call()
    assert not list((tmp_path / "own").iterdir())


def test_what_this_process_lacks_is_no_fault_of_the_entry(copier, cache_dir, monkeypatch):
    """Descriptors, memory or room: the entry stays for others."""
    entry = build(SPEC)
    entry.release()

    def no_room(*_):
        raise OSError(errno.EFBIG, "File too large")

    with monkeypatch.context() as patch:
        patch.setattr(library, "write_all", no_room)
        with pytest.raises(RuntimeError, match=r"at this moment: .*File too large"):
            loaded.load(SPEC)
    entry.verify()
    call()
    assert copier.builds == 1


def test_where_the_loader_may_not_use_files_in_memory(copier, cache_dir, monkeypatch):
    """The rules of some systems forbid it. A private file serves, and the entry is not blamed."""
    real = library.ctypes.CDLL

    def forbidden(path, *arguments, **keywords):
        if str(path).startswith("/proc/self/fd"):
            raise OSError(f"{path}: failed to map segment from shared object")
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(library.ctypes, "CDLL", forbidden)
    call()
    assert copier.builds == 1 and not (cache_dir / "quarantine").exists()


def test_where_there_are_no_locks_nothing_looks_abandoned(copier, cache_dir, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    locations.create(cache_dir)
    with Cache(cache_dir).staging(SPEC) as staging:
        build(SPEC)
        assert staging.path.is_dir()
    assert not list((cache_dir / "staging").iterdir())


@pytest.mark.parametrize("status", [1, 139, 200, 255])
def test_a_compiler_that_crashes_is_not_started_again(copier, status):
    copier.then(f"exit {status}")
    with pytest.raises(BuildError):
        loaded.load(SPEC)
    with pytest.raises(RuntimeError, match="is not tried again"):
        loaded.load(SPEC)
    assert copier.builds == 1


def test_a_cache_with_a_newline_in_its_path(copier, cache_dir, monkeypatch):
    monkeypatch.setenv("JITNORM_CACHE_DIR", f"{cache_dir}\nx")
    call()
    call()
    assert copier.builds == 1


def test_an_entry_that_neither_loads_nor_moves(copier, cache_dir, monkeypatch, caplog):
    entry = build(SPEC)
    entry.release()
    publish_content(entry, b"\x7fELF")
    monkeypatch.setattr(Cache, "quarantine", lambda *_, **__: None)  # as in a read-only cache
    call()
    assert copier.builds == 2 and "This process keeps its own" in caplog.text


def test_show_of_an_entry_that_others_can_write(copier):
    entry = build(SPEC)
    entry.path.chmod(0o775)
    result = CliRunner().invoke(main, ["cache", "show", str(entry.path)])
    assert result.exit_code == 1 and "can be written by other users" in result.output, result.exception


def test_nobody_reads_what_is_said(copier, cache_dir, monkeypatch):
    entry = build(SPEC)
    entry.release()
    entry.library.write_bytes(b"damaged")
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's, with which nothing goes to stderr
    monkeypatch.setattr(sys, "stderr", os.fdopen(write, "w"))
    call()


def test_more_descriptors_than_select_takes(copier, cache_dir):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 1200:
        pytest.skip("the hard limit of descriptors is below 1200")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
    held = []
    try:
        while not held or held[-1] < 1100:
            held.append(os.open("/dev/null", os.O_RDONLY))
        call()
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_removing_stays_inside_though_folders_are_exchanged_for_links(tmp_path, monkeypatch):
    """Whoever has a folder of the tree open can exchange what lies in it while it is removed."""
    tree, victim = tmp_path / "cache" / "tree", tmp_path / "victim"
    (tree / "a" / "b").mkdir(parents=True)
    (victim / "b").mkdir(parents=True)
    (victim / "b" / "file").touch()
    (tmp_path / "cache").chmod(0o700)
    real, exchanged = os.rmdir, []

    def busy(name, *arguments, **keywords):
        if name == "b" and not exchanged:
            exchanged.append(name)
            (tree / "a").rename(tree / "moved")
            (tree / "a").symlink_to(victim)
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        real(name, *arguments, **keywords)

    monkeypatch.setattr(os, "rmdir", busy)
    with Folder.open_root(tmp_path / "cache") as folder, contextlib.suppress(OSError):
        folder.remove("tree")
    assert exchanged and (victim / "b" / "file").exists()


def test_a_new_folder_may_be_removed_before_it_is_locked(tmp_path, monkeypatch):
    """Another process takes a folder that nobody has locked yet for abandoned, and removes it."""
    tmp_path.chmod(0o700)
    mkdir, made = os.mkdir, []

    def remove_the_first(name, *arguments, **keywords):
        mkdir(name, *arguments, **keywords)
        made.append(name)
        if len(made) == 1:
            os.rmdir(name, dir_fd=keywords["dir_fd"])

    with Folder.open_root(tmp_path) as folder:
        monkeypatch.setattr(os, "mkdir", remove_the_first)
        with folder.temporary_folder("test"):
            assert os.listdir(tmp_path) == [made[1]]
    assert os.listdir(tmp_path) == []
