"""What calls of Triton's kernels need: Triton itself, which is optional, and the tensor's own GPU."""

from __future__ import annotations

import contextlib
import functools
import importlib
from typing import Any

import torch


@functools.cache
def triton_module(name: str) -> Any:
    """jitnorm.batch_invariant.<name>, which imports Triton; RuntimeError where that is not there."""
    try:
        return importlib.import_module(f"jitnorm.batch_invariant.{name}")
    except ImportError as error:
        raise RuntimeError(
            f"batch-invariant mode needs Triton 3.4 here, which is torch 2.8's, and cannot import it ({error}): "
            "pip install 'jitnorm[triton]'"
        ) from error


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU current, which launches go to; costs one look where it is current already."""
    index = tensor.device.index
    return contextlib.nullcontext() if index == torch.cuda.current_device() else torch.cuda.device(index)
