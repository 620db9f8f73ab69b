"""Patch RMSNorm modules of Hugging Face models: kernels compute the norm, and its sum with a residual."""

# No `from __future__ import annotations`: torch.fx writes the annotations of forward into its code, as types, not text.

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from jitnorm.core.eligibility import can_normalise, has_kernel_layout
from jitnorm.core.norm_modules import GEMMA_CLASSES, LLAMA_CLASSES
from jitnorm.core.norms import is_supported_hidden_size
from jitnorm.fused_add_rmsnorm import fused_add_rmsnorm, gemma_fused_add_rmsnorm
from jitnorm.integrations.transformers_state import current_state, is_plain
from jitnorm.nn import normalise
from jitnorm.rmsnorm import gemma_rmsnorm, rmsnorm

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


@dataclass(frozen=True, eq=False, repr=False)
class NormClass:
    """A class of RMSNorm modules in transformers.

    Attributes:
        norm: computes the same.
        fused_add: adds and normalises the sum as rounded, in place, as the addition and the norm in transformers do.
        eps_attribute: the name of the attribute that has its eps.
        weight_offset: added to the weight before it multiplies.
    """

    norm: Callable[..., torch.Tensor]
    fused_add: Callable[..., None]
    eps_attribute: str
    weight_offset: float


_LLAMA = NormClass(rmsnorm, partial(fused_add_rmsnorm, round_sum=True), "variance_epsilon", 0.0)
_GEMMA = NormClass(gemma_rmsnorm, partial(gemma_fused_add_rmsnorm, round_sum=True), "eps", 1.0)
NORM_CLASSES = {**dict.fromkeys(LLAMA_CLASSES, _LLAMA), **dict.fromkeys(GEMMA_CLASSES, _GEMMA)}


class PatchedNorm(torch.nn.Module):
    """The base class that a patched norm class has before the original one."""

    _jitnorm_class: NormClass
    weight: torch.nn.Parameter

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not _is_dynamo_compiling() and (state := current_state.get()) is not None:
            normalised = state.take(self, hidden_states)
            if normalised is not None:
                return normalised
        norm_class, weight = self._jitnorm_class, self.weight
        # With a weight of another dtype the original runs: Llama's class promotes the result to that dtype.
        if can_normalise(hidden_states, weight) and weight.dtype == hidden_states.dtype:
            return normalise(norm_class.norm, hidden_states, weight, eps_of_norm(self))
        return super().forward(hidden_states)  # type: ignore[no-any-return]


def eps_of_norm(norm: PatchedNorm) -> float:
    """Return the eps of a patched norm."""
    eps: float = getattr(norm, norm._jitnorm_class.eps_attribute)
    return eps


def offset_of_norm(norm: PatchedNorm) -> float:
    """Return what a patched norm adds to its weight before it multiplies."""
    return norm._jitnorm_class.weight_offset


def can_add_and_normalise(norm: object, x: torch.Tensor, residual: torch.Tensor) -> bool:
    """Return whether one kernel computes `residual + x` and `norm` of it, as `add_and_normalise` does."""
    if not isinstance(norm, PatchedNorm) or not is_plain(norm):
        return False
    weight = norm._parameters.get("weight")
    return (
        weight is not None
        and x.__class__ is residual.__class__ is torch.Tensor
        and x.dtype == residual.dtype == weight.dtype
        and x.device == residual.device == weight.device
        and x.shape == residual.shape
        and x.shape[-1] == weight.shape[0]
        and has_kernel_layout(weight)
        and has_kernel_layout(x)
        and has_kernel_layout(residual)
    )


def add_and_normalise(norm: PatchedNorm, x: torch.Tensor, residual: torch.Tensor) -> None:
    """Compute `residual += x; x = norm(residual)` in one launch."""
    norm._jitnorm_class.fused_add(x, residual, norm.weight, eps_of_norm(norm))


def reason_to_leave_norm(module: torch.nn.Module) -> str | None:
    """Return why a norm cannot be patched, or None if it can."""
    name = type(module).__name__
    if name not in NORM_CLASSES:
        return f"{name} is not a class that jitnorm supports"
    eps_attribute, weight = NORM_CLASSES[name].eps_attribute, getattr(module, "weight", None)
    if not isinstance(getattr(module, eps_attribute, None), float):
        return f"{name} is not the class of transformers: it has no float {eps_attribute}"
    if type(weight) is not torch.nn.Parameter or weight.dim() != 1:
        return f"{name} is not the class of transformers: it has no one-dimensional torch.nn.Parameter weight"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if not is_supported_hidden_size(weight.shape[0]):
        return f"no kernel supports hidden_size {weight.shape[0]}"
    return None
