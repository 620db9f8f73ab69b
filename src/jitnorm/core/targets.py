"""Find the target to build kernels for: that of a tensor, or of a device and an architecture by name."""

from __future__ import annotations

import functools

import torch

from jitnorm.jit.spec import Target

_CPU = Target("cpu")
_MIN_ARCH = 7.5  # Turing, the oldest that tests/core/test_architectures.py compiles for


def target_of(tensor: torch.Tensor) -> Target:
    """Return the target for the tensor's device. GPUs of one machine may differ."""
    return _CPU if tensor.device.type == "cpu" else cuda_target(tensor.device.index)


@functools.cache
def cuda_target(index: int | None) -> Target:
    """Return the target for the GPU with this index; None for the current one."""
    return _with_suffix("{}.{}".format(*torch.cuda.get_device_capability(index)))


def _with_suffix(arch: str) -> Target:
    """Return the target of an architecture, with the suffix "a" from 9.0 on, which architecture-specific code needs."""
    target = Target.cuda(arch)
    if float(target.arch.rstrip("af")) >= 9 and target.arch[-1].isdigit():
        return Target.cuda(target.arch + "a")
    return target


def gpu_name(device: torch.device) -> str:
    """Return a GPU's name and the number of its SMs; a process that was given a part of a GPU (MIG) has fewer."""
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.multi_processor_count} SMs"


@functools.cache
def driver_version() -> str:
    """Return the version of the GPU's driver, or that of CUDA where the system does not tell."""
    try:
        with open("/sys/module/nvidia/version") as file:  # needs no process and no library
            return file.read().strip()
    except OSError:
        return f"cuda {torch.version.cuda}"


def resolve_target(device: str | None = None, arch: str | None = None) -> Target:
    """Return the target of a device and an architecture.

    Args:
        device: "cpu" or "cuda"; None for CUDA if torch sees a GPU or `arch` is given, else the CPU.
        arch: such as "9.0a", also for a GPU that this machine does not have; None for the current GPU's.

    Raises:
        ValueError: another device or architecture.
        RuntimeError: the architecture is not given, and torch sees no GPU.
    """
    if device is None:
        device = "cuda" if arch is not None or torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if device == "cpu":
        if arch not in (None, "native"):
            raise ValueError(f"arch is for CUDA: the CPU's code is built for the machine it runs on, got {arch!r}")
        return _CPU
    if arch is not None:
        target = _with_suffix(arch)
        if float(target.arch.rstrip("af")) < _MIN_ARCH:
            raise ValueError(f"arch (--arch) must be {_MIN_ARCH} or later, got {arch!r}")
        return target
    if not torch.cuda.is_available():
        raise RuntimeError(
            "torch sees no GPU here, so its architecture must be given: arch='9.0a' (--arch 9.0a) for an H100 or H200"
        )
    return cuda_target(torch.cuda.current_device())
