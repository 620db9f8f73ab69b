"""A worker of the campaign: a process that has imported torch and jitnorm, and makes one fault after another.

It reads numbers of faults from stdin, a line each, and writes a line of JSON for each to stdout.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import json
import multiprocessing.util
import os
import random
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from faults import kinds
from faults.inject import HERE
from faults.sandbox import KERNELS, Report, Sandbox, orphans, remove
from jitnorm.jit.load import load

_FOREIGN = """
#include <fcntl.h>
#include <stdlib.h>
__attribute__((constructor)) static void run(void) { creat(getenv("FAULT_MARKER"), 0600); }
"""


def _fnv(content: bytes) -> str:
    value = 14695981039346656037
    for byte in content:
        value = (value ^ byte) * 1099511628211 & (1 << 64) - 1
    return f"{value:016x}"


def make_store(folder: Path) -> None:
    """Build all kernels with the real compiler, and what the stand-in needs."""
    folder.mkdir(parents=True)
    subprocess.run(["cc", "-O1", "-o", folder / "compiler", HERE / "compiler.c"], check=True)
    for name, source in (("foreign", _FOREIGN), ("symbolless", "static int nothing;")):
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", folder / f"{name}.so"]
        subprocess.run(command, input=source.encode(), check=True)
    os.environ["JITNORM_CACHE_DIR"] = str(folder / "real")
    for kernel in KERNELS.values():
        load(kernel.spec)
    for source in (folder / "real").glob("kernels/*/*/module.cc"):
        shutil.copy(next(source.parent.glob("*.so")), folder / f"{_fnv(source.read_bytes())}.so")


def make_sandbox(folder: Path, store: Path, real_compiler: str) -> Sandbox:
    """Make a sandbox, and templates of caches that hold one kernel each."""
    sandbox = Sandbox(folder, store, real_compiler)
    for name in KERNELS:
        sandbox.reset()
        report = sandbox.judge(sandbox.run(f"load {name}"), must_succeed=True)
        if sandbox.problems or not report.compilations:
            raise RuntimeError(f"the healthy engine fails: {sandbox.problems} {report.output}")
        template = folder.with_name(f"{folder.name}-{name}")
        shutil.copytree(sandbox.cache, template)
        sandbox.templates[name] = template
    return sandbox


def make_fault(sandbox: Sandbox, seed: int, index: int) -> dict[str, object]:
    """Make one fault, and return its kind, what it was, how operations ended, and what was wrong."""
    started = time.monotonic()
    rng = random.Random(f"{seed}:{index}")
    kind = kinds.draw(rng)
    ends: list[str] = []
    judge = sandbox.judge

    def note(report: Report, **more: object) -> Report:
        ends.append(report.ended)
        return judge(report, **more)  # type: ignore[arg-type]

    sandbox.reset()
    sandbox.unprivileged = rng.random() < 0.8
    sandbox.judge = note  # type: ignore[method-assign]
    try:
        kind(sandbox, rng)
        met = ends[0] if ends else "right"
        sandbox.judge = judge  # type: ignore[method-assign]
        sandbox.compiler("ok")
        sandbox.environment.clear()
        sandbox.check_recovery()
    except Exception:
        sandbox.add_problem(f"the campaign itself failed: {traceback.format_exc()}")
        met = "failed"
    finally:
        sandbox.judge = judge  # type: ignore[method-assign]
    for pid in orphans():
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            sandbox.add_problem(f"still running after its parent's end: {words[:200]}")
    return {
        "index": index,
        "kind": kind.__name__,
        "met": met,
        "fault": "; ".join(sandbox.history),
        "problems": sandbox.problems,
        "seconds": time.monotonic() - started,
    }


def _own_mounts() -> None:
    """Takes a mount namespace of this process's own, where that is allowed, so that disks can be full."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) == 0:  # CLONE_NEWNS
        libc.mount(b"none", b"/", None, 1 << 14 | 1 << 18, None)  # MS_REC | MS_PRIVATE


def main() -> None:
    seed, folder, store, real_compiler = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans become this process's
    _own_mounts()
    for name in ("JITNORM_PREBUILT_DIR", "JITNORM_DISABLE_JIT", "XDG_CACHE_HOME", "CXX"):
        os.environ.pop(name, None)
    answers = os.dup(1)  # what is printed by others does not belong there
    os.dup2(2, 1)
    # What was imported has nothing to clean up in a child, where it costs 20 ms of page faults. What jitnorm registers
    # in a child, such as the removal of its temporary folder, is run.
    atexit._clear()
    atexit.register(multiprocessing.util._exit_function)
    sandbox = make_sandbox(folder, store, real_compiler)
    gc.collect()
    gc.freeze()
    os.write(answers, b'{"ready": true}\n')
    for line in sys.stdin:
        os.write(answers, json.dumps(make_fault(sandbox, seed, int(line))).encode() + b"\n")
    sandbox.reset()
    remove(folder)
    os._exit(0)  # without the exit handlers that were taken away


if __name__ == "__main__":
    if sys.argv[1] == "store":
        make_store(Path(sys.argv[2]))
    else:
        main()
