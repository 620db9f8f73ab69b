"""Which code a tensor, or a caller without a GPU, asks for."""

from __future__ import annotations

import functools

import torch

from jitnorm.jit.spec import Target

_CPU = Target("cpu")
_OLDEST = 7.5  # Turing: what tests/core/test_architectures.py compiles


def target_of(tensor: torch.Tensor) -> Target:
    """The tensor's own device: two GPUs of one machine may differ."""
    return _CPU if tensor.device.type == "cpu" else cuda_target(tensor.device.index)


@functools.cache
def cuda_target(index: int | None) -> Target:
    """What calls on this GPU are built for."""
    return _as_called("{}.{}".format(*torch.cuda.get_device_capability(index)))


def _as_called(arch: str) -> Target:
    """With the suffix that calls ask for: 9.0 and later are built as 9.0a."""
    target = Target.cuda(arch)
    if float(target.arch.rstrip("af")) >= 9 and target.arch[-1].isdigit():
        return Target.cuda(target.arch + "a")
    return target


def resolve_target(device: str | None = None, arch: str | None = None) -> Target:
    """From words: `device` "cpu" or "cuda" (None: CUDA where torch sees a GPU), `arch` such as "9.0a" for a GPU that
    is not here. ValueError for anything else, RuntimeError where the architecture cannot be known."""
    if device is None:
        device = "cuda" if arch is not None or torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if device == "cpu":
        if arch not in (None, "native"):
            raise ValueError(f"arch is for CUDA: the CPU's code is built for the machine it runs on, got {arch!r}")
        return _CPU
    if arch is not None:
        target = _as_called(arch)
        if float(target.arch.rstrip("af")) < _OLDEST:
            raise ValueError(f"arch (--arch) must be {_OLDEST} or later, got {arch!r}")
        return target
    if not torch.cuda.is_available():
        raise RuntimeError(
            "torch sees no GPU here, so its architecture must be given: arch='9.0a' (--arch 9.0a) for an H100 or H200"
        )
    return cuda_target(torch.cuda.current_device())
