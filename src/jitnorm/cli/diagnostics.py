"""Collect what this machine has and lacks, for `jitnorm doctor`.

Compilers print their versions and build a kernel in a temporary folder, which is removed. FlashInfer is imported if
there is a GPU. Nothing is written to the cache.
"""

from __future__ import annotations

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
from jitnorm.cli.kernels import CachedKernel, caches, kernels_in
from jitnorm.cli.output import size
from jitnorm.cli.trial_build import TrialBuild, try_builds
from jitnorm.core.checks import DTYPE_NAMES
from jitnorm.core.targets import cuda_target
from jitnorm.dispatch import explain
from jitnorm.dispatch.selection import requested_backend
from jitnorm.jit import locations, toolchain
from jitnorm.jit.cache import Cache
from jitnorm.jit.environment import installed_versions, is_on, unknown_variables
from jitnorm.jit.spec import launcher_file

# torch-c-dlpack-ext is optional, and ninja may be the system's.
_PACKAGES = ("torch", "apache-tvm-ffi", "torch-c-dlpack-ext", "ninja", "cuda-pathfinder", "flashinfer-python")
_VARIABLES = ("CXX", "NVCC", "CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
# Calls for which jitnorm.dispatch may select different backends: (dtype, hidden size).
_CALLS = ((torch.bfloat16, 4096), (torch.float32, 4096), (torch.bfloat16, 16384), (torch.bfloat16, 111))
# For each tool: its name in messages, what cannot be built without it, how to install it, and the variable that selects
# another one.
_REMEDIES = {
    "c++": ("C++ compiler", "nothing", "apt-get install g++, or conda install cxx-compiler", "CXX"),
    "ninja": ("ninja", "nothing", "pip install ninja", None),
    "nvrtc": ("NVRTC", "no CUDA kernel", "pip install 'jitnorm[nvrtc]'", None),
    "nvcc": ("nvcc", "no CUDA kernel", "pip install 'jitnorm[nvcc]'", "NVCC"),
}
_HOST_TOOLS = ("c++", "ninja")
_DEFAULT_ARCH = "9.0a"  # compiled where there is no GPU
_MIN_FREE_BYTES = 64_000_000  # a kernel takes up to 2 MB, including the temporary files of its build


def collect_diagnostics() -> dict[str, Any]:
    """Return all that `jitnorm doctor` prints, as plain data."""
    compilers = _compilers()
    builds = _builds(compilers)
    facts: dict[str, Any] = {
        "versions": {"jitnorm": __version__, "python": platform.python_version(), **installed_versions(_PACKAGES)},
        "python": sys.executable,
        "devices": _devices(),
        "compilers": compilers,
        "builds": {device: asdict(build) for device, build in builds.items()},
        # Where no trial build was possible, compilers that print their versions are assumed to work.
        "can_build": {device: build.works is not False for device, build in builds.items()},
        "caches": [_cache(cache) for cache in caches()],
        "remote": _remote(),
        "temporary": _temporary(),
        "dispatch": _dispatch(),
        "batch_invariant": _invariance_checks(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("JITNORM_") or k in _VARIABLES},
    }
    if facts["remote"]:
        facts["environment"]["JITNORM_REMOTE_CACHE"] = facts["remote"]["url"]  # without a password
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
    """Return the path and version of each tool. One whose version is None was found, but does not work."""
    versions = toolchain.compiler_versions()
    cxx, nvrtc, nvcc, ninja = (
        toolchain.find_cxx(),
        toolchain.find_nvrtc(),
        toolchain.find_nvcc(),
        toolchain.find_ninja(),
    )
    return {
        "c++": {"path": cxx, "version": versions.get("c++")} if cxx else None,
        "nvrtc": {"path": nvrtc, "version": versions.get("nvrtc")} if nvrtc else None,
        "nvcc": {"path": nvcc, "version": versions.get("nvcc")} if nvcc else None,
        "ninja": {"path": ninja, "version": _ninja_version(ninja)} if ninja else None,
    }


def _builds(compilers: dict[str, dict[str, str | None] | None]) -> dict[str, TrialBuild]:
    """Build a kernel for each device for which all tools were found, and return the results."""
    builds: dict[str, TrialBuild] = {}
    for device in ("cpu", "cuda"):
        if missing := _missing(device, compilers):
            builds[device] = TrialBuild(False, problem=f"no {missing[0]} that works")
    archs = {"cpu": None, "cuda": cuda_target(None).arch if torch.cuda.is_available() else _DEFAULT_ARCH}
    builds |= try_builds({device: arch for device, arch in archs.items() if device not in builds})
    return {device: builds[device] for device in ("cpu", "cuda")}


def _ninja_version(path: str) -> str | None:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _cache(cache: Cache) -> dict[str, Any]:
    facts = {"root": str(cache.root), "prebuilt": cache.prebuilt, "exists": False, "problem": None}
    kernels: list[CachedKernel] = []
    try:
        facts["exists"] = cache.root.is_dir()
        facts["problem"] = (
            _prebuilt_problem(cache.root) if cache.prebuilt else locations.reason_not_writable(cache.root)
        )
        kernels = list(kernels_in(cache))
    except OSError as error:  # a name that is too long, a server that does not answer
        facts["problem"] = facts["problem"] or error.strerror or str(error)
    total = sum(kernel.size for kernel in kernels)
    return {**facts, "kernels": len(kernels), "size": total, "free": _free(cache.root)}


def _remote() -> dict[str, str | None] | None:
    """Return the remote cache, if one is set, and why it cannot be read with these settings. It is not asked."""
    url = os.environ.get("JITNORM_REMOTE_CACHE")
    if not url:
        return None
    from jitnorm.jit import remote  # here, as most processes have none

    return {"url": remote.shown_url(url), "problem": remote.problem(url)}


def _invariance_checks() -> list[dict[str, Any]]:
    """Return the recorded checks that can be read. A folder that cannot be read is reported with the cache."""
    try:
        return [vars(result) for result in cached_results()]
    except OSError:
        return []


def _temporary() -> dict[str, Any]:
    """Return the folder that compilers write to, and that replaces a cache that cannot be written."""
    try:
        root = tempfile.gettempdir()
    except OSError as error:
        return {"root": None, "free": None, "problem": str(error)}
    return {"root": root, "free": _free(Path(root)), "problem": None}


def _free(root: Path) -> int | None:
    """Return the bytes that can be written in the file system of `root`, or 0 if it has no more inodes.

    `root` need not exist: its file system is that of the first parent that does.
    """
    for folder in (root, *root.parents):
        try:
            room = os.statvfs(folder)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            break
        return 0 if room.f_files and not room.f_favail else room.f_bavail * room.f_frsize
    return None


def _prebuilt_problem(root: Path) -> str | None:
    return None if root.is_dir() else "there is no such folder"


def _dispatch() -> dict[str, Any]:
    """Return which backend is selected, and which one serves some calls, with real tensors of this machine."""
    try:
        name = requested_backend()
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
        with warnings.catch_warnings():  # about FlashInfer, which the table reports too
            warnings.simplefilter("ignore")
            backend, why = explain("rmsnorm", x, x[0])
    except RuntimeError as error:  # the selected backend cannot serve it
        return {"call": call, "backend": None, "why": str(error)}
    return {"call": call, "backend": backend, "why": why}


def _advice(facts: dict[str, Any]) -> list[str]:
    """Return a line for each thing that is missing: what, what does not work without it, and what to do."""
    needed: dict[str, list[str]] = {}  # the devices for which nothing can be built without a tool
    for device in facts["builds"]:
        for name in _missing(device, facts["compilers"]):
            needed.setdefault(name, []).append(device)
    advice = []
    for name, devices in needed.items():
        if line := _remedy(name, facts["compilers"], only_cpu=devices == ["cpu"] != list(facts["builds"])):
            advice.append(line)
    for device, build in facts["builds"].items():
        if not _missing(device, facts["compilers"]) and not build["works"]:
            advice.append(f"building for {device} {_failure(device, build)}")
    if not torch.cuda.is_available() and Path("/dev/nvidiactl").exists():
        why = (
            "this torch is built without CUDA"
            if not torch.version.cuda
            else "check the driver and CUDA_VISIBLE_DEVICES"
        )
        advice.append(f"this machine has an NVIDIA GPU that torch does not see: {why}")
    import tvm_ffi  # noqa: F401  which sets this attribute where torch-c-dlpack-ext is installed

    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        advice.append(
            "torch < 2.10 has no fast DLPack exchange, so every call is slower: pip install torch-c-dlpack-ext"
        )
    for cache in facts["caches"]:
        if cache["problem"] and cache["prebuilt"]:
            advice.append(f"JITNORM_PREBUILT_DIR is {cache['root']}: {cache['problem']}")
        elif cache["problem"]:
            advice.append(f"kernels cannot be kept in {cache['root']}: {cache['problem']}. Set JITNORM_CACHE_DIR")
    if facts["remote"] and facts["remote"]["problem"]:
        advice.append(f"nothing is read from the remote cache {facts['remote']['url']}: {facts['remote']['problem']}")
    advice += _full_file_systems(facts)
    if facts["dispatch"]["problem"]:
        advice.append(f"no call of jitnorm.dispatch is served: {facts['dispatch']['problem']}")
    if is_on("JITNORM_DISABLE_JIT"):
        advice.append(
            "JITNORM_DISABLE_JIT is set: a kernel that is not in the cache is an error; jitnorm warmup still builds"
        )
    for name, known in unknown_variables().items():
        advice.append(f"{name} is not a variable of jitnorm{f': did you mean {known}?' if known else ''}")
    return advice


def _failure(device: str, build: dict[str, Any]) -> str:
    """Return why a trial build failed, and which variables selected the compilers."""
    if build["works"] is None:
        return f"was {build['problem']}"
    tools = [*_HOST_TOOLS, "nvcc"] if device == "cuda" else _HOST_TOOLS
    own = [v for name in tools if (v := _REMEDIES[name][3]) and os.environ.get(v)]
    return f"fails: {build['problem']}" + "".join(f"; {v} is {os.environ[v]}: unset or correct {v}" for v in own)


def _full_file_systems(facts: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each folder whose file system is nearly full."""
    folders = [cache for cache in facts["caches"] if not cache["prebuilt"]] + [facts["temporary"]]
    for folder in folders:
        if folder["free"] is not None and folder["free"] < _MIN_FREE_BYTES:
            yield f"the file system of {folder['root']} is full, or nearly: {size(folder['free'])} can be written"
    if facts["temporary"]["problem"]:
        yield f"there is no temporary folder, which compilers need: {facts['temporary']['problem']}"


def _missing(device: str, compilers: dict[str, Any]) -> list[str]:
    """Return the tools without which nothing can be built for a device, of those that are not found or do not work."""
    host = [name for name in _HOST_TOOLS if not _has_version(compilers[name])]
    if device == "cpu":
        return host
    # The first CUDA kernel also needs the launcher, which a wheel has.
    launcher = [] if launcher_file().exists() else host
    chosen = os.environ.get("JITNORM_CUDA_COMPILER", "").lower()
    if chosen == "nvcc" or (os.environ.get("NVCC") and not _has_version(compilers["nvrtc"])):
        return host if host or _has_version(compilers["nvcc"]) else ["nvcc"]
    has_nvcc = chosen != "nvrtc" and not host and _has_version(compilers["nvcc"])
    return launcher if has_nvcc or _has_version(compilers["nvrtc"]) else [*launcher, "nvrtc"]


def _remedy(name: str, compilers: dict[str, Any], only_cpu: bool) -> str | None:
    what, unbuilt, remedy, variable = _REMEDIES[name]
    unbuilt = "nothing for the CPU" if only_cpu else unbuilt
    found = compilers[name]
    own = os.environ.get(variable) if variable else None
    if found and found["version"]:
        return None
    if own:
        state = f"({found['path']}) does not work" if found else "is not found"
        return f"{variable}={own} {state}, so {unbuilt} can be built: unset or correct {variable}"
    if not found:
        return f"no {what}, so {unbuilt} can be built: {remedy}"
    return f"{found['path']} does not work, so {unbuilt} can be built: {remedy}"


def _has_version(found: dict[str, str | None] | None) -> bool:
    return found is not None and found["version"] is not None
