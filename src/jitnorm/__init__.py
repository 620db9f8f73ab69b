"""Just-in-time compiled CUDA and CPU kernels for the small, memory-bound operators of LLM inference."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from jitnorm._version import __version__
from jitnorm.fused_add_rmsnorm import fused_add_rmsnorm
from jitnorm.gemma_fused_add_rmsnorm import gemma_fused_add_rmsnorm
from jitnorm.gemma_rmsnorm import gemma_rmsnorm
from jitnorm.rmsnorm import rmsnorm
from jitnorm.warmup import warmup

if TYPE_CHECKING:
    from jitnorm import nn as nn
    from jitnorm.transformers_patch import patch_transformers

__all__ = [
    "__version__",
    "fused_add_rmsnorm",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "patch_transformers",
    "rmsnorm",
    "warmup",
]


def __getattr__(name: str) -> Any:
    """Modules that few callers need are imported when they are."""
    if name == "nn":
        return import_module("jitnorm.nn")
    if name == "patch_transformers":
        return import_module("jitnorm.transformers_patch").patch_transformers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
