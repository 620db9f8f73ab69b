"""The machine beside the figures: what they would be different without."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from jitnorm._version import __version__
from jitnorm.benchmark import nvml
from jitnorm.jit.environment import installed_versions

_PACKAGES = (
    "apache-tvm-ffi",
    "triton",
    "flashinfer-python",
    "sglang",
    "quack-kernels",
    "nvidia-cutlass-dsl",
    "liger-kernel",
)


def describe(device: torch.device, source: Path) -> dict[str, Any]:
    """Plain data about this machine. The commit is that of the checkout which `source` is in, if any."""
    about: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "jitnorm": __version__,
        "commit": _commit(source),
        "packages": installed_versions(_PACKAGES),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        about |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "driver": nvml.driver(),
            "clocks": nvml.clocks(device),
        }
    return about


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _commit(source: Path) -> str | None:
    """With a plus sign where files that git knows were changed."""
    try:
        head = _git(source.parent, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(source.parent, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
