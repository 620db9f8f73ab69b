"""What this machine has and what it lacks. Compilers are asked for their versions and tried, in a temporary folder that
is removed; FlashInfer is imported if a GPU is here; nothing is written to the cache."""

from __future__ import annotations

import difflib
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from jitnorm._version import __version__
from jitnorm.batch_invariant.matmul.invariance_check import cached_results
from jitnorm.cli.entries import Row, places, rows_of
from jitnorm.cli.output import size
from jitnorm.cli.trial import Trial, try_builds
from jitnorm.core.checks import DTYPE_NAMES
from jitnorm.core.targets import cuda_target
from jitnorm.dispatch import explain
from jitnorm.dispatch.wanted import wanted
from jitnorm.jit import locations, toolchain
from jitnorm.jit.cache import Cache
from jitnorm.jit.environment import installed_versions, is_on

# torch-c-dlpack-ext need not be there, and ninja may be the system's.
_PACKAGES = ("torch", "apache-tvm-ffi", "torch-c-dlpack-ext", "ninja", "cuda-pathfinder", "flashinfer-python")
_OWN_VARIABLES = (
    "JITNORM_CACHE_DIR",
    "JITNORM_PREBUILT_DIR",
    "JITNORM_DISABLE_JIT",
    "JITNORM_CHECK_INDICES",
    "JITNORM_BACKEND",
    "JITNORM_BENCH_CI",
    "JITNORM_BENCH_BANDWIDTH",
)
_VARIABLES = ("CXX", "NVCC", "CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
# Calls that jitnorm.dispatch may decide differently: (dtype, hidden size)
_CALLS = ((torch.bfloat16, 4096), (torch.float32, 4096), (torch.bfloat16, 16384), (torch.bfloat16, 111))
# What each tool is called, what cannot be built without it, how to get it, and the variable that names another.
_REMEDIES = {
    "c++": ("C++ compiler", "nothing", "apt-get install g++, or conda install cxx-compiler", "CXX"),
    "ninja": ("ninja", "nothing", "pip install ninja", None),
    "nvcc": ("nvcc", "no CUDA kernel", "pip install 'jitnorm[nvcc]'", "NVCC"),
}
_NEEDED = {"cpu": ("c++", "ninja"), "cuda": ("c++", "ninja", "nvcc")}
_ARCH = "9.0a"  # what is compiled where no GPU says another
_LITTLE_ROOM = 64_000_000  # bytes: a kernel takes up to 2 MB, with what its build leaves for a moment


def diagnose() -> dict[str, Any]:
    """All that `jitnorm doctor` says, as plain data."""
    compilers = _compilers()
    builds = _builds(compilers)
    facts: dict[str, Any] = {
        "versions": {"jitnorm": __version__, "python": platform.python_version(), **installed_versions(_PACKAGES)},
        "python": sys.executable,
        "devices": _devices(),
        "compilers": compilers,
        "builds": {device: asdict(trial) for device, trial in builds.items()},
        # Where a trial was not possible, what the compilers say of themselves has to do.
        "can_build": {device: trial.works is not False for device, trial in builds.items()},
        "caches": [_cache(place) for place in places()],
        "temporary": _temporary(),
        "dispatch": _dispatch(),
        "batch_invariant": _proofs(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("JITNORM_") or k in _VARIABLES},
    }
    facts["advice"] = _advice(facts)
    return facts


def _devices() -> list[dict[str, str]]:
    cpu = {"device": "cpu", "name": f"{torch.get_num_threads()} threads", "arch": platform.machine()}
    if not torch.cuda.is_available():
        return [cpu]
    count = torch.cuda.device_count()
    return [
        *(
            {"device": f"cuda:{i}", "name": torch.cuda.get_device_name(i), "arch": cuda_target(i).sm}
            for i in range(count)
        ),
        cpu,
    ]


def _compilers() -> dict[str, dict[str, str | None] | None]:
    """Where each was found, if anywhere, and its version: None for one that did not say it, and so cannot be used."""
    # cache=None: what the compilers say is not remembered, so that nothing is written.
    host, both = toolchain.identify("cpu", cache=None), toolchain.identify("cuda", cache=None)
    cxx, nvcc, ninja = toolchain.find_cxx(), toolchain.find_nvcc(), toolchain.find_ninja()
    return {
        "c++": {"path": cxx, "version": host.cxx.version if host else None} if cxx else None,
        "nvcc": {"path": nvcc, "version": both.nvcc.version if both and both.nvcc else None} if nvcc else None,
        "ninja": {"path": ninja, "version": _ninja_version(ninja)} if ninja else None,
    }


def _builds(compilers: dict[str, dict[str, str | None] | None]) -> dict[str, Trial]:
    """For each device what came of building a kernel for it; nothing is started where a tool is missing."""
    builds: dict[str, Trial] = {}
    for device, tools in _NEEDED.items():
        missing = [name for name in tools if not _says_version(compilers[name])]
        if missing:
            builds[device] = Trial(False, problem=f"no {missing[0]} that works")
    archs = {"cpu": None, "cuda": cuda_target(None).arch if torch.cuda.is_available() else _ARCH}
    builds |= try_builds({device: arch for device, arch in archs.items() if device not in builds})
    return {device: builds[device] for device in _NEEDED}


def _ninja_version(path: str) -> str | None:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _cache(place: Cache) -> dict[str, Any]:
    facts = {"root": str(place.root), "prebuilt": place.prebuilt, "exists": False, "problem": None}
    rows: list[Row] = []
    try:
        facts["exists"] = place.root.is_dir()
        facts["problem"] = (
            _prebuilt_problem(place.root) if place.prebuilt else locations.reason_not_writable(place.root)
        )
        rows = list(rows_of(place))
    except OSError as error:  # a name that is too long, a server that does not answer
        facts["problem"] = facts["problem"] or error.strerror or str(error)
    return {**facts, "kernels": len(rows), "size": sum(row.size for row in rows), "free": _free(place.root)}


def _proofs() -> list[dict[str, Any]]:
    """Those that can be read: what is wrong with the folder is said of the cache."""
    try:
        return [vars(result) for result in cached_results()]
    except OSError:
        return []


def _temporary() -> dict[str, Any]:
    """The folder that stands in for a cache that cannot be written, and that compilers write to."""
    try:
        root = tempfile.gettempdir()
    except OSError as error:
        return {"root": None, "free": None, "problem": str(error)}
    return {"root": root, "free": _free(Path(root)), "problem": None}


def _free(root: Path) -> int | None:
    """Bytes that can be written in the file system of `root`, which need not exist; 0 where it has no more inodes."""
    for place in (root, *root.parents):
        try:
            room = os.statvfs(place)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            break
        return 0 if room.f_files and not room.f_favail else room.f_bavail * room.f_frsize
    return None


def _prebuilt_problem(root: Path) -> str | None:
    return None if root.is_dir() else "there is no such folder"


def _dispatch() -> dict[str, Any]:
    """Which backend was asked for, and which one serves some calls, with real tensors of this machine."""
    try:
        name = wanted()
    except ValueError as error:
        return {"backend": None, "problem": str(error), "calls": []}
    devices = ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",)
    return {
        "backend": name,
        "problem": None,
        "calls": [_choice(dtype, size, device) for device in devices for dtype, size in _CALLS],
    }


def _choice(dtype: torch.dtype, hidden_size: int, device: str) -> dict[str, str | None]:
    call = f"rmsnorm {DTYPE_NAMES[dtype]} {hidden_size} {device}"
    try:
        x = torch.empty(1, hidden_size, dtype=dtype, device=device)
        with warnings.catch_warnings():  # that FlashInfer does not work: the table says so
            warnings.simplefilter("ignore")
            backend, why = explain("rmsnorm", x, x[0])
    except RuntimeError as error:  # a backend was asked for that cannot serve it
        return {"call": call, "backend": None, "why": str(error)}
    return {"call": call, "backend": backend, "why": why}


def _advice(facts: dict[str, Any]) -> list[str]:
    """One line for each thing that is missing: what, what it costs, and how to get it."""
    advice = [line for name in _REMEDIES if (line := _remedy(name, facts["compilers"]))]
    for device, trial in facts["builds"].items():
        if all(_says_version(facts["compilers"][name]) for name in _NEEDED[device]) and not trial["works"]:
            advice.append(f"building for {device} {_fails(device, trial)}")
    if not torch.cuda.is_available() and Path("/dev/nvidiactl").exists():
        why = (
            "this torch is built without CUDA"
            if not torch.version.cuda
            else "check the driver and CUDA_VISIBLE_DEVICES"
        )
        advice.append(f"this machine has an NVIDIA GPU that torch does not see: {why}")
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        advice.append(
            "torch < 2.10 has no fast DLPack exchange, so every call is slower: pip install torch-c-dlpack-ext"
        )
    for place in facts["caches"]:
        if place["problem"] and place["prebuilt"]:
            advice.append(f"JITNORM_PREBUILT_DIR is {place['root']}: {place['problem']}")
        elif place["problem"]:
            advice.append(f"kernels cannot be kept in {place['root']}: {place['problem']}. Set JITNORM_CACHE_DIR")
    advice += _room(facts)
    if facts["dispatch"]["problem"]:
        advice.append(f"no call of jitnorm.dispatch is served: {facts['dispatch']['problem']}")
    if is_on("JITNORM_DISABLE_JIT"):
        advice.append(
            "JITNORM_DISABLE_JIT is set: a kernel that is not in the cache is an error; jitnorm warmup still builds"
        )
    return [*advice, *(_misspelt(name) for name in facts["environment"] if _is_unknown(name))]


def _is_unknown(variable: str) -> bool:
    return variable.startswith("JITNORM_") and variable not in _OWN_VARIABLES


def _misspelt(variable: str) -> str:
    close = difflib.get_close_matches(variable, _OWN_VARIABLES, n=1)
    return f"{variable} is no variable of jitnorm's{f': is {close[0]} meant?' if close else ''}"


def _fails(device: str, trial: dict[str, Any]) -> str:
    """What came of a trial, and which variables chose the compilers, if any."""
    if trial["works"] is None:
        return f"was {trial['problem']}"
    own = [v for name in _NEEDED[device] if (v := _REMEDIES[name][3]) and os.environ.get(v)]
    return f"fails: {trial['problem']}" + "".join(f"; {v} is {os.environ[v]}: unset or mend {v}" for v in own)


def _room(facts: dict[str, Any]) -> Iterator[str]:
    """A line for each folder whose file system is nearly full."""
    folders = [place for place in facts["caches"] if not place["prebuilt"]] + [facts["temporary"]]
    for folder in folders:
        if folder["free"] is not None and folder["free"] < _LITTLE_ROOM:
            yield f"the file system of {folder['root']} is full, or nearly: {size(folder['free'])} can be written"
    if facts["temporary"]["problem"]:
        yield f"there is no temporary folder, which compilers need: {facts['temporary']['problem']}"


def _remedy(name: str, compilers: dict[str, Any]) -> str | None:
    what, unbuilt, remedy, variable = _REMEDIES[name]
    found = compilers[name]
    own = os.environ.get(variable) if variable else None
    if found and (found["version"] or (name == "nvcc" and not _says_version(compilers["c++"]))):
        return None  # nvcc is not asked without a C++ compiler
    if own:
        state = f"({found['path']}) does not work" if found else "is not found"
        return f"{variable}={own} {state}, so {unbuilt} can be built: unset or mend {variable}"
    if not found:
        return f"no {what}, so {unbuilt} can be built: {remedy}"
    return f"{found['path']} does not work, so {unbuilt} can be built: {remedy}"


def _says_version(found: dict[str, str | None] | None) -> bool:
    return found is not None and found["version"] is not None
