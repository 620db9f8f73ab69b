"""The public names of Thinking Machines' package `batch_invariant_ops`, computed by `jitnorm.batch_invariant`.

torchtitan and other trainers import that package by its name. `install` lets such an import find this module.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from jitnorm.batch_invariant import (
    bmm_batch_invariant,
    disable_batch_invariant_mode,
    enable_batch_invariant_mode,
    is_batch_invariant_mode_enabled,
    log_softmax,
    matmul_persistent,
    mean_dim,
    set_batch_invariant_mode,
    softmax,
)

__all__ = [
    "AttentionBlockSize",
    "addmm_batch_invariant",
    "bmm_batch_invariant",
    "disable_batch_invariant_mode",
    "enable_batch_invariant_mode",
    "get_batch_invariant_attention_block_size",
    "is_batch_invariant_mode_enabled",
    "log_softmax",
    "matmul_persistent",
    "mean_batch_invariant",
    "mean_dim",
    "mm_batch_invariant",
    "set_batch_invariant_mode",
    "softmax",
]

_NAME = "batch_invariant_ops"
_SUBMODULE = f"{_NAME}.{_NAME}"  # the file of that package that defines the functions


class AttentionBlockSize(NamedTuple):
    """The sizes of an attention kernel's blocks.

    Attributes:
        block_m: queries.
        block_n: keys.
    """

    block_m: int
    block_n: int


def get_batch_invariant_attention_block_size() -> AttentionBlockSize:
    """Return the sizes that `batch_invariant_ops` names for attention with fixed blocks, such as FlexAttention's."""
    return AttentionBlockSize(block_m=16, block_n=16)


def mm_batch_invariant(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return `a @ b`.

    Args:
        a: `[m, k]`.
        b: `[k, n]`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.batch_invariant.matmul_persistent`.
    """
    return matmul_persistent(a, b)


def addmm_batch_invariant(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return `a @ b + bias`.

    Args:
        bias: `[n]`.
        a: `[m, k]`.
        b: `[k, n]`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.batch_invariant.matmul_persistent`.
    """
    return matmul_persistent(a, b, bias=bias)


def mean_batch_invariant(
    input: torch.Tensor, dim: Sequence[int], keepdim: bool = False, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return the mean over several dimensions.

    Args:
        input: any shape and strides, of a floating-point dtype.
        dim: the dimensions; an empty sequence for all.
        keepdim: keep these dimensions, with size 1.
        dtype: the dtype of the result; None for the input's.

    Raises:
        TypeError, IndexError: as `jitnorm.batch_invariant.mean_dim`.
    """
    return mean_dim(input, dim, keepdim=keepdim, dtype=dtype)


def install() -> None:
    """Let `import batch_invariant_ops` find this module, in this process.

    Call it before the code that imports that name. A second call changes nothing.

    Raises:
        RuntimeError: another package of that name has been imported already.
    """
    found = sys.modules.get(_NAME)
    if found is not None and not _is_ours(found):
        raise RuntimeError(
            f"{_NAME} is imported already, from {getattr(found, '__file__', None)}: call install() before that import"
        )
    package, submodule = ModuleType(_NAME, __doc__), ModuleType(_SUBMODULE, __doc__)
    for module in (package, submodule):
        module.__dict__.update({name: globals()[name] for name in __all__}, __all__=list(__all__), _is_jitnorm=True)
    package.__dict__.update({"__path__": [], _NAME: submodule})
    sys.modules.update({_NAME: package, _SUBMODULE: submodule})


def uninstall() -> None:
    """Undo `install`: a later import finds the package of that name again, if there is one."""
    for name in (_NAME, _SUBMODULE):
        if name in sys.modules and _is_ours(sys.modules[name]):
            del sys.modules[name]


def _is_ours(module: ModuleType) -> bool:
    return getattr(module, "_is_jitnorm", False) is True
