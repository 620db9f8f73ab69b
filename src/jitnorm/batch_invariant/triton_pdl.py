"""Programmatic dependent launch for Triton kernels: one takes its place while the kernel before it still runs.

A kernel with `PDL: tl.constexpr` is launched with `**pdl(device)`. Where that is true it calls `gdc_wait()` before its
first access to memory, and may call `gdc_launch_dependents()` after its last load.
"""

from __future__ import annotations

import functools

import torch


@functools.cache
def pdl(device: torch.device) -> dict[str, bool]:
    """What to launch such a kernel with: from Hopper on, GPUs have it."""
    has = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return {"PDL": True, "launch_pdl": True} if has else {"PDL": False}
