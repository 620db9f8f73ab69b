"""What NVML, the library behind nvidia-smi, says of a GPU. Nothing, where nvidia-ml-py or the driver is not there."""

from __future__ import annotations

import functools
from typing import Any

import torch

# Reasons that make a figure the cooling's or the power supply's rather than the kernel's, by NVML's bits.
_THROTTLED = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "temperature",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}


def throttled(device: torch.device) -> str | None:
    """Why the clocks are lower than they could be, just now; None where they are not, or nobody knows."""
    found = _handle(device)
    if not found:
        return None
    nvml, handle = found
    try:
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    except nvml.NVMLError:
        return None
    names = [name for bit, name in _THROTTLED.items() if reasons & bit]
    return f"clocks throttled: {', '.join(names)}" if names else None


def clocks(device: torch.device) -> dict[str, int] | None:
    """MHz of the multiprocessors and the memory, now and at most; None where nobody knows."""
    found = _handle(device)
    if not found:
        return None
    nvml, handle = found
    kinds = {"sm": nvml.NVML_CLOCK_SM, "memory": nvml.NVML_CLOCK_MEM}
    try:
        now = {f"{name}_mhz": nvml.nvmlDeviceGetClockInfo(handle, kind) for name, kind in kinds.items()}
        return now | {f"{name}_max_mhz": nvml.nvmlDeviceGetMaxClockInfo(handle, kind) for name, kind in kinds.items()}
    except nvml.NVMLError:
        return None


def driver() -> str | None:
    nvml = _nvml()
    return str(nvml.nvmlSystemGetDriverVersion()) if nvml else None


@functools.cache
def _nvml() -> Any:
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
def _handle(device: torch.device) -> tuple[Any, Any] | None:
    """By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's."""
    nvml = _nvml() if device.type == "cuda" else None
    if not nvml:
        return None
    try:
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except (nvml.NVMLError, AttributeError):
        return None
