"""What every launch of a Triton kernel needs: Triton itself, which is optional, and facts about the tensor's GPU."""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def triton_module(name: str) -> Any:
    """Import `jitnorm.batch_invariant.<name>`, a module of Triton kernels, at its first use.

    Raises:
        RuntimeError: Triton cannot be imported.
    """
    try:
        return importlib.import_module(f"jitnorm.batch_invariant.{name}")
    except ImportError as error:
        raise RuntimeError(
            f"batch-invariant mode on CUDA needs Triton 3.4 or later (torch 2.8 comes with 3.4), which cannot be "
            f"imported: {error}. Install it with pip install 'jitnorm[triton]'"
        ) from error


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context in which the tensor's GPU is the current one, on which Triton launches.

    If it is current already, the context does nothing, which is much cheaper than torch's guard.
    """
    index = tensor.device.index
    return contextlib.nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index)


@functools.cache
def sm_count(device: torch.device) -> int:
    """Return the number of SMs of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def pdl_options(device: torch.device) -> dict[str, bool]:
    """Return the launch options for programmatic dependent launch, which GPUs have from Hopper on.

    A kernel that is launched with them has a parameter `PDL: tl.constexpr`. If it is true, the kernel calls
    `gdc_wait()` before its first access to memory, and may call `gdc_launch_dependents()` after its last load.
    """
    has_pdl = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return {"PDL": True, "launch_pdl": True} if has_pdl else {"PDL": False}
