"""Check whether the compilers work, by building and loading a small kernel in a temporary folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 120.0  # a build takes one or two seconds, on a busy machine ten times as long
# Run in a process of its own, which can be killed if a compiler hangs, and which may be killed by a bad library.
_FIRST_CALL = """
import sys; sys.path[:] = {path!r}
import time
from jitnorm.jit.build import build
from jitnorm.jit.load import load
from jitnorm.warmup import make_plan
(spec,) = make_plan("rmsnorm", 128, "bf16", device={device!r}, arch={arch!r}).specs
started = time.perf_counter()
try:
    build(spec)  # even if an installed package has this kernel
    load(spec)
except (RuntimeError, OSError) as error:
    sys.exit("failed: " + str(error))
print("seconds:", time.perf_counter() - started)
"""


@dataclass(frozen=True)
class TrialBuild:
    """The result of building for one device."""

    works: bool | None  # None: not tried
    seconds: float | None = None  # of building and loading
    problem: str | None = None  # the first line of the error, or why it was not tried


def try_builds(archs: Mapping[str, str | None]) -> dict[str, TrialBuild]:
    """Build and load a kernel for each device in `archs`, all at the same time, and remove all files afterwards.

    Args:
        archs: for each device the CUDA architecture, or None for the CPU.
    """
    if not archs:
        return {}
    try:
        folder = Path(tempfile.mkdtemp(prefix="jitnorm-doctor-"))
    except OSError as error:
        return dict.fromkeys(archs, TrialBuild(None, problem=f"not tried, as there is no temporary folder: {error}"))
    try:
        if os.statvfs(folder).f_flag & os.ST_NOEXEC:
            why = f"not tried, as {folder.parent} is mounted noexec: set TMPDIR to another folder"
            return dict.fromkeys(archs, TrialBuild(None, problem=why))
        return _run(archs, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(archs: Mapping[str, str | None], folder: Path) -> dict[str, TrialBuild]:
    runs: dict[str, subprocess.Popen[bytes]] = {}
    trials: dict[str, TrialBuild] = {}
    deadline = time.monotonic() + _TIMEOUT_S
    try:
        for device, arch in archs.items():
            try:
                runs[device] = _start(device, arch, folder)
            except OSError as error:
                trials[device] = TrialBuild(None, problem=f"not tried: {error}")
        while len(trials) < len(archs):
            for device in [name for name in runs if name not in trials]:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = runs[device].wait(timeout=0.05)
                    trials[device] = _result(status, folder / f"{device}.log")
            if time.monotonic() > deadline:
                timed_out = TrialBuild(False, problem=f"not done after {_TIMEOUT_S:g} s, and killed")
                trials |= {device: timed_out for device in runs if device not in trials}
    finally:
        for run in runs.values():
            _kill(run)
    return {device: trials[device] for device in archs}


def _start(device: str, arch: str | None, folder: Path) -> subprocess.Popen[bytes]:
    code = _FIRST_CALL.format(path=sys.path, device=device, arch=arch)
    removed = ("JITNORM_PREBUILT_DIR", "JITNORM_DISABLE_JIT")
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment |= {"JITNORM_CACHE_DIR": str(folder / device), "TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    with open(folder / f"{device}.log", "wb") as log:  # not a pipe, which a compiler's child may keep open
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C interrupts this process, which then kills that one
        )


def _result(status: int, log: Path) -> TrialBuild:
    if status < 0:
        return TrialBuild(False, problem=f"the process that built and loaded a kernel was killed by signal {-status}")
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    start = "seconds: " if status == 0 else "failed: "
    value = next((line.removeprefix(start) for line in lines if line.startswith(start)), None)
    if status == 0 and value:
        return TrialBuild(True, float(value))
    return TrialBuild(False, problem=value or (lines[-1] if lines else f"it ended with status {status}"))


def _kill(run: subprocess.Popen[bytes]) -> None:
    """Kill the process if it is running; its compilers end with it."""
    if run.poll() is None:
        run.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a process that waits for a disk cannot be killed
            run.wait(timeout=5)
