"""Whether the compilers work: a small kernel, built and loaded as a first call does it, but in a temporary folder."""

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

_SECONDS = 120.0  # a build takes one or two; a busy machine may take ten times as long
# A process of its own: a compiler that hangs can be ended, and a library that kills its process kills that one.
_FIRST_CALL = """
import sys; sys.path[:] = {path!r}
import time
from jitnorm.jit.load import load
from jitnorm.warmup import make_plan
(spec,) = make_plan("rmsnorm", 128, "bf16", device={device!r}, arch={arch!r}).specs
started = time.perf_counter()
try:
    load(spec)
except (RuntimeError, OSError) as error:
    sys.exit("failed: " + str(error))
print("seconds:", time.perf_counter() - started)
"""


@dataclass(frozen=True)
class Trial:
    """What came of building for one device."""

    works: bool | None  # None: not tried
    seconds: float | None = None  # of building and loading
    problem: str | None = None  # the first line of the error, or why it was not tried


def try_builds(archs: Mapping[str, str | None]) -> dict[str, Trial]:
    """Build and load a kernel for each device in `archs`, all at the same time, and leave nothing behind.

    Args:
        archs: the CUDA architecture, or None for the CPU, by device.
    """
    if not archs:
        return {}
    try:
        folder = Path(tempfile.mkdtemp(prefix="jitnorm-doctor-"))
    except OSError as error:
        return dict.fromkeys(archs, Trial(None, problem=f"not tried, as there is no temporary folder: {error}"))
    try:
        if os.statvfs(folder).f_flag & os.ST_NOEXEC:
            why = f"not tried, as {folder.parent} is mounted noexec: TMPDIR names another"
            return dict.fromkeys(archs, Trial(None, problem=why))
        return _run(archs, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(archs: Mapping[str, str | None], folder: Path) -> dict[str, Trial]:
    runs: dict[str, subprocess.Popen[bytes]] = {}
    trials: dict[str, Trial] = {}
    ends = time.monotonic() + _SECONDS
    try:
        for device, arch in archs.items():
            try:
                runs[device] = _start(device, arch, folder)
            except OSError as error:
                trials[device] = Trial(None, problem=f"not tried: {error}")
        while len(trials) < len(archs):
            for device in [name for name in runs if name not in trials]:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = runs[device].wait(timeout=0.05)
                    trials[device] = _outcome(status, folder / f"{device}.log")
            if time.monotonic() > ends:
                late = Trial(False, problem=f"not done after {_SECONDS:g} s, and ended")
                trials |= {device: late for device in runs if device not in trials}
    finally:
        for run in runs.values():
            _end(run)
    return {device: trials[device] for device in archs}


def _start(device: str, arch: str | None, folder: Path) -> subprocess.Popen[bytes]:
    code = _FIRST_CALL.format(path=sys.path, device=device, arch=arch)
    left_out = ("JITNORM_PREBUILT_DIR", "JITNORM_DISABLE_JIT")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"JITNORM_CACHE_DIR": str(folder / device), "TMPDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    with open(folder / f"{device}.log", "wb") as log:  # not a pipe, which what a compiler left behind would keep open
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one
        )


def _outcome(status: int, log: Path) -> Trial:
    if status < 0:
        return Trial(False, problem=f"the process that built and loaded a kernel was ended by signal {-status}")
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    start = "seconds: " if status == 0 else "failed: "
    said = next((line.removeprefix(start) for line in lines if line.startswith(start)), None)
    if status == 0 and said:
        return Trial(True, float(said))
    return Trial(False, problem=said or (lines[-1] if lines else f"it ended with status {status}"))


def _end(run: subprocess.Popen[bytes]) -> None:
    """End the process, if it goes on: its compilers end with it."""
    if run.poll() is None:
        run.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # what waits for a disk or a server cannot be ended
            run.wait(timeout=5)
