"""Describe the machine that results were measured on: versions, processor, GPU and its clocks.

Clocks come from NVML, the library behind nvidia-smi. They are unknown without nvidia-ml-py or the driver.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from jitnorm._version import __version__
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
# NVML's bits for clocks that cooling or power supply limit, so that a time is not the kernel's alone.
_THROTTLE_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "temperature",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}


def describe_machine(device: torch.device, source: Path) -> dict[str, Any]:
    """Return plain data about this machine, and the commit of the checkout that contains the file `source`."""
    description: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "jitnorm": __version__,
        "commit": _find_commit(source),
        "packages": installed_versions(_PACKAGES),
        "processor": _processor_name(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        description |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "driver": driver_version(),
            "clocks": clock_rates(device),
        }
    return description


def throttle_reasons(device: torch.device) -> str | None:
    """Return why the GPU's clocks are limited at the moment; None if they are not or NVML is not available."""
    found = _find_handle(device)
    if not found:
        return None
    nvml, handle = found
    try:
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    except nvml.NVMLError:
        return None
    names = [name for bit, name in _THROTTLE_REASONS.items() if reasons & bit]
    return f"clocks throttled: {', '.join(names)}" if names else None


def clock_rates(device: torch.device) -> dict[str, int] | None:
    """Return MHz of the SMs and the memory, current and maximum; None if NVML is not available."""
    found = _find_handle(device)
    if not found:
        return None
    nvml, handle = found
    kinds = {"sm": nvml.NVML_CLOCK_SM, "memory": nvml.NVML_CLOCK_MEM}
    try:
        now = {f"{name}_mhz": nvml.nvmlDeviceGetClockInfo(handle, kind) for name, kind in kinds.items()}
        return now | {f"{name}_max_mhz": nvml.nvmlDeviceGetMaxClockInfo(handle, kind) for name, kind in kinds.items()}
    except nvml.NVMLError:
        return None


def driver_version() -> str | None:
    """Return the version of the GPU driver; None if NVML is not available."""
    nvml = _load_nvml()
    return str(nvml.nvmlSystemGetDriverVersion()) if nvml else None


@functools.cache
def _load_nvml() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


@functools.cache
def _find_handle(device: torch.device) -> tuple[Any, Any] | None:
    """Return NVML and its handle of a GPU, found by UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices only."""
    nvml = _load_nvml() if device.type == "cuda" else None
    if not nvml:
        return None
    try:
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except (nvml.NVMLError, AttributeError):
        return None


def _processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _find_commit(source: Path) -> str | None:
    """Return the commit, with a plus sign if tracked files were changed; None outside of a checkout."""
    try:
        head = _run_git(source.parent, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _run_git(source.parent, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _run_git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
