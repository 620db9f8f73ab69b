"""What this machine has and what it lacks. Compilers are asked for their versions, and no file is created."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from jitnorm._version import __version__
from jitnorm.cli.entries import places, rows_of
from jitnorm.jit import cache, toolchain
from jitnorm.targets import cuda_target

_PACKAGES = ("torch", "apache-tvm-ffi", "torch-c-dlpack-ext", "ninja", "cuda-pathfinder")
_VARIABLES = ("CXX", "CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def diagnose() -> dict[str, Any]:
    """All that `jitnorm doctor` says, as plain data."""
    compilers = _compilers()
    ready = compilers["c++"] is not None and compilers["ninja"] is not None
    facts: dict[str, Any] = {
        "versions": {"jitnorm": __version__, "python": platform.python_version(), **_packages()},
        "python": sys.executable,
        "devices": _devices(),
        "compilers": compilers,
        "can_build": {"cpu": ready, "cuda": ready and compilers["nvcc"] is not None},
        "caches": [_cache(place) for place in places()],
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("JITNORM_") or k in _VARIABLES},
    }
    facts["advice"] = _advice(facts)
    return facts


def _packages() -> dict[str, str]:
    """Those that are installed: torch-c-dlpack-ext need not be, and ninja may be the system's."""
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


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


def _compilers() -> dict[str, dict[str, str] | None]:
    # memory=None: what the compilers say is not remembered, so that nothing is written.
    host, both = toolchain.identify("cpu", memory=None), toolchain.identify("cuda", memory=None)
    ninja = toolchain.find_ninja()
    return {
        "c++": {"path": host.cxx.path, "version": host.cxx.version} if host else None,
        "nvcc": {"path": both.nvcc.path, "version": both.nvcc.version, "toolkit": both.nvcc.top}
        if both and both.nvcc
        else None,
        "ninja": {"path": ninja, "version": _ninja_version(ninja)} if ninja else None,
    }


def _ninja_version(path: str) -> str:
    try:
        return subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not start: {error}"


def _cache(place: cache.Cache) -> dict[str, Any]:
    rows = list(rows_of(place))
    return {
        "root": str(place.root),
        "prebuilt": place.prebuilt,
        "exists": place.root.is_dir(),
        "problem": _prebuilt_problem(place.root) if place.prebuilt else cache.unusable(place.root),
        "kernels": len(rows),
        "size": sum(row.size for row in rows),
    }


def _prebuilt_problem(root: Path) -> str | None:
    return None if root.is_dir() else "there is no such folder"


def _advice(facts: dict[str, Any]) -> list[str]:
    """One line for each thing that is missing: what, what it costs, and how to get it."""
    compilers, advice = facts["compilers"], []
    if not compilers["c++"]:
        asked = f" ($CXX is {os.environ['CXX']})" if os.environ.get("CXX") else ""
        advice.append(
            f"no C++ compiler{asked}, so nothing can be built: apt-get install g++, or conda install cxx-compiler"
        )
    if not compilers["ninja"]:
        advice.append("no ninja, so nothing can be built: pip install ninja")
    if compilers["c++"] and not compilers["nvcc"]:
        found = toolchain.find_nvcc()
        what = f"{found} does not work" if found else "no nvcc"
        advice.append(f"{what}, so no CUDA kernel can be built: pip install 'jitnorm[nvcc]'")
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
    if os.environ.get("JITNORM_DISABLE_JIT", "0") not in ("", "0"):
        advice.append(
            "JITNORM_DISABLE_JIT is set: a kernel that is not in the cache is an error; jitnorm warmup still builds"
        )
    return advice
