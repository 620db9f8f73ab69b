"""Calls with a cold, warm, shared, damaged and forbidden cache, each in a process of its own."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import rmsnorm_reference
from processes import run, run_before_import, run_fresh, start

from jitnorm.jit import find as engine
from jitnorm.jit import load as loaded
from jitnorm.jit.build import build
from jitnorm.jit.environment import import_tvm_ffi
from jitnorm.jit.library import BadLibrary
from jitnorm.jit.spec import Target
from jitnorm.rmsnorm import _jit_rmsnorm_module, rmsnorm, rmsnorm_spec
from jitnorm.warmup.run import find_cached

from .conftest import entries

ONE_CALL = """
    import torch, jitnorm.rmsnorm
    x, w = torch.randn(5, 512), torch.randn(512)
    out = jitnorm.rmsnorm(x, w)
    reference = torch.nn.functional.rms_norm(x.double(), (512,), w.double(), 1e-6)
    assert (out.double() - reference).norm() <= 1e-6 * reference.norm(), "wrong result"
    print("right")
"""
# Reports each file that is opened to be written, each folder made and each process started from here on.
WATCH = """
    import os, sys
    seen = []
    def watch(event, arguments):
        if event in ("subprocess.Popen", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "os.mkdir"):
            seen.append((event, str(arguments[0])))
        if event == "open" and arguments[2] and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            seen.append((event, str(arguments[0])))
    sys.addaudithook(watch)
"""


def cpu_spec(hidden_size=512):
    return rmsnorm_spec(hidden_size, torch.float32, torch.float32, Target("cpu"))


def cuda_spec(hidden_size=512, arch="9.0a"):
    return rmsnorm_spec(hidden_size, torch.bfloat16, torch.bfloat16, Target.cuda(arch))


def test_import_does_nothing(tmp_path):
    script = """
        import jitnorm.rmsnorm
        assert not torch.cuda.is_initialized()
        print([what for what in seen if "__pycache__" not in what[1]])
    """
    home = tmp_path / "home"
    home.mkdir()
    done = run_before_import("import torch", WATCH, script, HOME=str(home), XDG_CACHE_HOME=None, JITNORM_CACHE_DIR=None)
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("[]", "", 0)
    assert not list(home.iterdir())


def test_a_hit_needs_no_process_no_compiler_and_no_path(cache_dir):
    build(cpu_spec())
    done = run_before_import("import torch, jitnorm.rmsnorm", WATCH, ONE_CALL, "print(seen)", PATH=None, CXX=None)
    assert (done.stdout.split("\n")[:2], done.stderr) == (["right", "[]"], "")


def test_a_hit_with_a_compiler_starts_no_process_either(cache_dir):
    assert run(ONE_CALL).returncode == 0
    done = run("import torch, jitnorm.rmsnorm", WATCH, ONE_CALL, "print(seen)")
    assert (done.stdout.split("\n")[:2], done.stderr) == (["right", "[]"], "")


@pytest.mark.nvcc
def test_a_cubin_loads_without_a_driver_or_a_compiler(cache_with_launcher):
    entry = build(cuda_spec())
    script = """
        from jitnorm.rmsnorm import _jit_rmsnorm_module
        module = _jit_rmsnorm_module(512, torch.bfloat16, device="cuda", arch="9.0a")
        x = torch.randn(2, 512).bfloat16()
        print(module.rmsnorm(x, x[0], x, 1e-6, None), seen)  # 1: refused, it is not on a GPU
    """
    done = run("import torch, jitnorm.rmsnorm", WATCH, script, PATH="")
    assert (done.stdout.strip(), done.stderr) == ("1 []", "")
    assert entry.library.exists()


@pytest.mark.parametrize("hidden_size", [0, 300, 16384])
def test_an_unsupported_size_starts_nothing(cache_dir, hidden_size):
    script = f"""
        try:
            jitnorm.rmsnorm(torch.randn(2, {hidden_size}), torch.randn({hidden_size}))
        except RuntimeError as error:
            print(error, seen)
    """
    done = run("import torch, jitnorm.rmsnorm", WATCH, script)
    assert f"hidden_size {hidden_size}: supported are" in done.stdout and done.stdout.strip().endswith("[]")
    assert not cache_dir.exists()


def start_together(folder, count, script, **environment):
    """Processes that have done their imports and wait for each other, then run `script` at once."""
    gate = f"""
import os, time, pathlib, torch, jitnorm.rmsnorm
from jitnorm.jit.build import build
from jitnorm.jit.spec import LAUNCHER, Target
from jitnorm.rmsnorm import rmsnorm_spec
pathlib.Path({str(folder)!r}, str(os.getpid())).touch()
while not os.path.exists({str(folder / "go")!r}):
    time.sleep(0.001)
"""
    folder.mkdir()
    processes = [start(gate + script, **environment) for _ in range(count)]
    deadline = time.monotonic() + 100
    while len(list(folder.iterdir())) < count:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.01)
    (folder / "go").touch()
    return processes


def finish(process):
    out, err = process.communicate(timeout=100)
    return process.returncode, out.strip(), err


CALL = """
x, w = torch.randn(5, 512), torch.randn(512)
out = jitnorm.rmsnorm(x, w)
reference = torch.nn.functional.rms_norm(x.double(), (512,), w.double(), 1e-6)
print("right" if (out.double() - reference).norm() <= 1e-6 * reference.norm() else "wrong")
"""
BUILD_CUDA = """
entry = build(rmsnorm_spec(512, torch.bfloat16, torch.bfloat16, Target.cuda("9.0a")))
entry.verify()
print("right")
"""


def test_eight_processes_build_once(cache_dir, tmp_path, watched_cxx):
    processes = start_together(tmp_path / "gate", 8, CALL, CXX=str(watched_cxx.path), SLOW="0.5")
    assert [finish(p)[:2] for p in processes] == [(0, "right")] * 8
    assert watched_cxx.compilations == 1
    assert len(entries(cache_dir)) == 1 and not list((cache_dir / "staging").iterdir())


@pytest.mark.slow
@pytest.mark.nvcc
def test_eight_processes_build_once_for_cuda(cache_dir, tmp_path, watched_nvcc):
    processes = start_together(tmp_path / "gate", 8, BUILD_CUDA, SLOW="0.5", NVCC=str(watched_nvcc.path))
    assert [finish(p)[:2] for p in processes] == [(0, "right")] * 8
    assert watched_nvcc.compilations == 1
    assert len(entries(cache_dir)) == 1


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.nvcc)])
def test_a_builder_killed_in_mid_build(cache_dir, tmp_path, device, watched_cxx, request):
    script, environment, watched = CALL, {"CXX": str(watched_cxx.path)}, watched_cxx
    if device == "cuda":
        watched = request.getfixturevalue("watched_nvcc")
        script = BUILD_CUDA
        environment = {"NVCC": str(watched.path)}
    processes = start_together(tmp_path / "gate", 4, script, SLOW="1", **environment)
    while watched.compilations == 0:
        time.sleep(0.01)
    staging = next((cache_dir / "staging").iterdir())
    victim = next(p for p in processes if str(p.pid) == staging.name.rsplit(".", 2)[1])
    victim.send_signal(signal.SIGKILL)
    survivors = [finish(p) for p in processes if p is not victim]
    assert [s[:2] for s in survivors] == [(0, "right")] * 3
    assert victim.wait() == -signal.SIGKILL
    assert watched.compilations == 2  # the victim's, and that of one survivor, which did not wait for a time limit
    assert len(entries(cache_dir)) == 1
    assert all("manifest.json" in os.listdir(entry) for entry in entries(cache_dir))


def truncate(library):
    library.write_bytes(library.read_bytes()[:5000])


def flip_a_bit(library):
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 16
    library.write_bytes(content)


def replace_by_text(library):
    library.write_text("not a library")


def remove(library):
    library.unlink()


def open_to_others(library):
    library.chmod(0o666)


def break_the_manifest(library):
    (library.parent / "manifest.json").write_text("{")


def replace_by_a_folder(library):
    library.unlink()
    library.mkdir()


def name_no_library(library):
    manifest = library.parent / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "library": None}))


def put_another_kernel_there(library):
    shutil.rmtree(library.parent)
    shutil.copytree(build(cpu_spec(768)).path, library.parent)


DAMAGE = [
    truncate,
    flip_a_bit,
    replace_by_text,
    remove,
    open_to_others,
    break_the_manifest,
    replace_by_a_folder,
    name_no_library,
    put_another_kernel_there,
]


# Whatever is found, the same code rebuilds it: one damage of each kind of check is not slow.
QUICK = (flip_a_bit, remove, put_another_kernel_there)


@pytest.mark.parametrize("damage", [pytest.param(d, marks=() if d in QUICK else pytest.mark.slow) for d in DAMAGE])
def test_a_damaged_entry_is_rebuilt_and_said_once(cache_dir, damage):
    damage(build(cpu_spec()).library)
    done = run(ONE_CALL)
    assert (done.returncode, done.stdout.strip()) == (0, "right")
    assert done.stderr.count("is not used") == 1
    again = run(ONE_CALL)
    assert (again.stdout.strip(), again.stderr) == ("right", "")
    assert len([entry for entry in entries(cache_dir) if "_512_" in entry.parent.name]) == 1


def test_a_damaged_entry_that_cannot_be_moved(cache_dir, tmp_path):
    """The process keeps a kernel of its own; a warm-up, which is for others, fails."""
    flip_a_bit(build(cpu_spec()).library)
    (tmp_path / "own").mkdir()
    cannot_move = """
        from jitnorm.jit.folder import Folder
        move = Folder.move
        def refuse(self, name, to, new_name):
            if to.path.name == "quarantine":
                raise PermissionError(13, "Permission denied")
            move(self, name, to, new_name)
        Folder.move = refuse
    """
    done = run(cannot_move, ONE_CALL, ONE_CALL, TMPDIR=str(tmp_path / "own"))
    assert done.stdout.split() == ["right", "right"], done.stderr
    assert done.stderr.count("cannot be moved") == 1 and done.stderr.count("This process keeps its own") == 1
    assert not list((tmp_path / "own").iterdir())
    warm_up = "import jitnorm; print(jitnorm.warmup(hidden_size=512, dtype='fp32', device='cpu').failed[0][1])"
    said = run(cannot_move, warm_up)
    assert "cannot be kept as" in said.stdout and "Directory not empty" in said.stdout


def test_ctrl_c_ends_the_compiler(cache_dir, watched_cxx):
    # A shell's background jobs ignore it, and so would this one's.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = start(listen, ONE_CALL, CXX=str(watched_cxx.path), SLOW="60")
    while watched_cxx.compilations == 0:
        time.sleep(0.01)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=60)[1]
    mark = f"JITNORM_CACHE_DIR={cache_dir}\0".encode()

    def still_running():
        for place in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if int(place.parent.name) != os.getpid() and mark in place.read_bytes():
                    return True
        return False

    while still_running():  # what was killed may take a moment
        assert time.monotonic() < started + 30
        time.sleep(0.05)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_another_users_entry_is_not_loaded(cache_dir):
    entry = build(cpu_spec())
    os.chown(entry.library, 12345, 12345)
    done = run(ONE_CALL)
    assert done.stdout.strip() == "right" and "belongs to user 12345" in done.stderr


def test_a_cache_that_others_can_write_is_not_used(cache_dir):
    build(cpu_spec())
    cache_dir.chmod(0o777)
    done = run(ONE_CALL)
    assert done.stdout.strip() == "right"
    assert "can be written by other users (mode 777)" in done.stderr and "set JITNORM_CACHE_DIR" in done.stderr


def test_no_home_folder(tmp_path):
    done = run(ONE_CALL, HOME="/dev/null", XDG_CACHE_HOME=None, JITNORM_CACHE_DIR=None, TMPDIR=str(tmp_path))
    assert done.stdout.strip() == "right"
    assert done.stderr.count("cannot keep kernels in /dev/null") == 1
    assert not list(tmp_path.iterdir())  # the folder of the process went with it


def test_workers_without_a_cache_leave_nothing(tmp_path):
    script = """
        import multiprocessing, torch
        def work():
            import jitnorm
            jitnorm.rmsnorm(torch.randn(5, 512), torch.randn(512))
        worker = multiprocessing.get_context("fork").Process(target=work)
        worker.start(), worker.join(), print(worker.exitcode)
    """
    done = run(script, HOME="/dev/null", XDG_CACHE_HOME=None, JITNORM_CACHE_DIR=None, TMPDIR=str(tmp_path))
    assert done.stdout.strip() == "0" and "This process keeps its own" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="drops root's rights")
def test_a_read_only_cache():
    """A hit works; a miss says where it builds instead."""
    script = """
        import os, shutil, torch, jitnorm.rmsnorm, jitnorm.jit.build, ninja
        x, w = torch.randn(5, 512), torch.randn(512)
        os.setuid(65534)
        expected = torch.nn.functional.rms_norm(x, (512,), w, 1e-6)
        assert torch.allclose(jitnorm.rmsnorm(x, w), expected, atol=1e-5)
        print("hit")
        try:
            jitnorm.rmsnorm(torch.randn(2, 64), torch.randn(64))
        except RuntimeError as error:
            print(error)  # this user may not be able to read the sources either
    """
    with tempfile.TemporaryDirectory(prefix="jitnorm-read-only-") as folder:
        assert run(ONE_CALL, JITNORM_CACHE_DIR=f"{folder}/cache").returncode == 0
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        done = run(script, JITNORM_CACHE_DIR=f"{folder}/cache", CXX=None)
    assert done.stdout.startswith("hit"), done.stderr
    assert f"cannot keep kernels in {folder}/cache: it is read-only" in done.stderr


def test_prebuilt_kernels_come_first_and_stay_untouched(cache_dir, tmp_path):
    build(cpu_spec())
    prebuilt = tmp_path / "prebuilt"
    shutil.move(cache_dir, prebuilt)
    before = sorted(prebuilt.rglob("*"))
    environment = {"JITNORM_PREBUILT_DIR": str(prebuilt), "JITNORM_DISABLE_JIT": "1", "PATH": "", "CXX": None}
    done = run(ONE_CALL, **environment)
    assert (done.stdout.strip(), done.stderr) == ("right", "")
    assert sorted(prebuilt.rglob("*")) == before and not cache_dir.exists()
    truncate(next(prebuilt.glob("kernels/*/*/*.so")))
    done = run(ONE_CALL, **environment)
    assert "is not used" in done.stderr and "JITNORM_DISABLE_JIT" in done.stderr and done.returncode != 0


def test_a_forbidden_build_names_the_warm_up(cache_dir, monkeypatch):
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    with pytest.raises(RuntimeError, match="jitnorm warmup --op rmsnorm --hidden-size 512 --dtype fp32 --device cpu"):
        rmsnorm(torch.randn(1, 512), torch.randn(512))
    assert not cache_dir.exists()


@pytest.mark.parametrize("is_prebuilt", [False, True])
def test_kernels_of_several_compilers_where_building_is_forbidden(is_prebuilt, cache_dir, tmp_path, monkeypatch):
    """That of this machine's compilers comes first. One that cannot be loaded stays, and the next is used."""
    spec = cpu_spec()
    own = build(spec)
    for name in ("0" * 12, "f" * 12):
        shutil.copytree(own.path, own.path.parent / name)
    if is_prebuilt:
        monkeypatch.setenv("JITNORM_PREBUILT_DIR", str(shutil.move(cache_dir, tmp_path / "prebuilt")))
    assert engine.find(spec, mark_in_use=False, may_build=True)
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    tried, open_entry = [], engine._open

    def open_some(spec, entry, load_launcher):
        tried.append(entry.path.name)
        if entry.path.name != "f" * 12:
            raise BadLibrary("libgomp.so.9 is missing")
        return open_entry(spec, entry, load_launcher)

    monkeypatch.setattr(engine, "_open", open_some)
    assert loaded.load(spec)
    names = {"0" * 12, "f" * 12, own.path.name}
    expected = sorted(names, key=lambda name: (not is_prebuilt and name != own.path.name, name))
    assert tried == expected[: expected.index("f" * 12) + 1]
    folder = next((tmp_path / "prebuilt" if is_prebuilt else cache_dir).glob("kernels/*"))
    left = {path.name for path in folder.iterdir()}
    assert left == (names if is_prebuilt else names - {own.path.name})


def test_a_warm_up_builds_what_only_other_compilers_have_built(cache_dir, monkeypatch):
    spec = cpu_spec()
    own = build(spec)
    own.path.rename(own.path.parent / ("0" * 12))
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    assert engine.find(spec, mark_in_use=False) and find_cached([spec]) == ([], [spec])


def test_no_build_while_a_graph_is_captured(cache_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"CUDA graph is being captured.*jitnorm warmup .* --arch 9.0a"):
        loaded.load(cuda_spec())
    assert not cache_dir.exists()


def test_no_compiler(cache_dir):
    done = run(ONE_CALL, PATH="/nonexistent", CXX=None)
    assert "needs a C++ compiler" in done.stderr and "PATH='/nonexistent'" in done.stderr
    assert "apt-get install g++" in done.stderr
    done = run(ONE_CALL, CXX="/opt/no-such-compiler")
    assert "looked for $CXX (/opt/no-such-compiler)" in done.stderr


def test_a_failed_build_is_distilled_and_not_tried_again(cache_dir, monkeypatch, watched_cxx):
    monkeypatch.setenv("CXX", str(watched_cxx.path))
    spec = replace(cpu_spec(), kernel="NoSuchKernel<512>")
    with pytest.raises(
        RuntimeError, match=r"cannot build NoSuchKernel<512> for cpu.*module\.cc:5:\d+: error:"
    ) as caught:
        loaded.load(spec)
    log = str(caught.value).rpartition("The whole log: ")[2]
    assert "NoSuchKernel" in Path(log).read_text()
    with pytest.raises(RuntimeError, match="is not tried again"):
        loaded.load(spec)
    assert watched_cxx.compilations == 1
    loaded.load(cpu_spec())  # another one is


@pytest.mark.nvcc
def test_an_architecture_that_nvcc_does_not_know(cache_dir, monkeypatch):
    monkeypatch.setenv("JITNORM_CUDA_COMPILER", "nvcc")
    with pytest.raises(RuntimeError, match=r"nvcc fatal.*sm_999|nvcc fatal.*Unsupported gpu arch"):
        build(cuda_spec(arch="99.9"))


def test_the_process_keeps_what_it_loaded_when_the_cache_is_deleted(cache_dir):
    x, w = torch.randn(3, 512), torch.randn(512)
    rmsnorm(x, w)
    shutil.rmtree(cache_dir)
    assert torch.allclose(rmsnorm(x, w).double(), rmsnorm_reference(x, w, 1e-6), rtol=1e-5, atol=1e-5)


def test_loaded_entries_are_in_use(cache_dir):
    from jitnorm.jit.cache import Cache
    from jitnorm.jit.entry import Entry

    process = start(ONE_CALL, "import sys; sys.stdout.flush(); sys.stdin.read()")
    assert process.stdout.readline() == "right\n"
    entry = Entry(entries(cache_dir)[0])
    assert entry.in_use() and not Cache(cache_dir).remove(entry) and entry.library.exists()
    process.communicate(timeout=60)
    assert not entry.in_use() and Cache(cache_dir).remove(entry) and not entries(cache_dir)


def test_threads_share_one_build(cache_dir, monkeypatch, watched_cxx):
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setenv("CXX", str(watched_cxx.path))
    x, w = torch.randn(3, 512), torch.randn(512)
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(lambda _: rmsnorm(x, w), range(8)))
    assert watched_cxx.compilations == 1
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.slow
def test_a_forked_child():
    """OpenMP's threads are missing in a fork: a parallel region in the child would wait for them forever."""
    script = """
        import ctypes, os, torch, jitnorm
        torch.set_num_threads(2)
        x, w = torch.randn(512, 1024), torch.randn(1024)
        def result():
            out = jitnorm.rmsnorm(x, w)
            return ctypes.string_at(out.data_ptr(), out.nbytes)  # torch's own operators may hang in a forked child
        def in_child():
            read, write = os.pipe()
            if os.fork() == 0:
                content = result()
                while content:
                    content = content[os.write(write, content):]
                os._exit(0)
            os.close(write)
            content = open(read, "rb").read()
            os.wait()
            return content
        jitnorm.rmsnorm(torch.randn(512, 2048), torch.randn(2048))  # starts the threads
        loaded_in_the_child = in_child()
        expected = result()
        print(loaded_in_the_child == expected, in_child() == expected)
    """
    assert run_fresh(script).stdout.strip() == "True True"


def test_the_manifest_tells_what_was_built(cache_dir):
    entry = build(cpu_spec())
    manifest = json.loads((entry.path / "manifest.json").read_text())
    assert manifest["kernel"] == "RMSNormKernel<512, float, float>"
    assert manifest["compilers"]["c++"] and manifest["size"] == entry.library.stat().st_size
    assert set(os.listdir(entry.path)) == {
        "manifest.json",
        "module.cc",
        "build.ninja",
        "paths.ninja",
        manifest["library"],
    }
    assert entry.path.stat().st_mode & 0o077 == 0


def test_jit_module_is_the_cached_loader(cache_dir):
    module = _jit_rmsnorm_module(512, torch.float32, device="cpu")
    assert module is _jit_rmsnorm_module(512, torch.float32, device="cpu")
    with pytest.raises(RuntimeError, match="hidden_size 96"):
        _jit_rmsnorm_module(96, torch.float32, device="cpu")
    with pytest.raises(ValueError, match="arch must be a CUDA architecture"):
        _jit_rmsnorm_module(512, torch.float32, device="cuda", arch="hopper")


@pytest.mark.parametrize("enabled", [True, False])
def test_importing_tvm_ffi_leaves_the_garbage_collector_as_it_was(enabled):
    was_enabled = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        import_tvm_ffi.__wrapped__()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()
