"""The functions of this package are for eager calls; with a gradient or a compiler, torch's own names are the way."""

from __future__ import annotations

import torch

from jitnorm.core.torch_library import needs_grad


def eager_only(name: str, instead: str, *tensors: object) -> None:
    """RuntimeError where autograd or torch.compile would have to see through a call of `name`."""
    if needs_grad(*tensors):
        raise RuntimeError(f"{name} has no gradient: call {instead} in the mode, or this under torch.no_grad()")
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{name} cannot be compiled: call {instead} in the mode")
