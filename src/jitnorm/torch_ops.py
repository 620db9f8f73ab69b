"""The operators' second door: torch.ops.jitnorm.*, for torch.compile, export and fake tensors.

Eager calls do not pass here: `Library.define` and `impl` cost a call three times what the kernel's own entry does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("jitnorm", "DEF")


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines torch.ops.jitnorm.<name of schema> for the CPU and CUDA."""
    _library.define(schema)
    name = schema.partition("(")[0]
    for key in ("CPU", "CUDA"):
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"jitnorm::{name}", fake, lib=_library)


def is_traced(*tensors: object) -> bool:
    """Whether one of these has no storage of its own, so that only torch's dispatcher can tell what a call means."""
    return torch.compiler.is_compiling() or any(isinstance(t, torch.Tensor) and _is_stand_in(t) for t in tensors)


def _is_stand_in(tensor: torch.Tensor) -> bool:
    """A FakeTensor, a meta tensor, or another subclass that interprets operators itself."""
    return tensor.is_meta or type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
