"""Patch RMSNorm modules of Hugging Face models: kernels compute the norm, and its sum with a residual."""

# No `from __future__ import annotations`: torch.fx writes the annotations of forward into its code, as types, not text.

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from jitnorm.core.eligibility import (
    can_normalise_any_size,
    can_normalise_without_weight,
    has_kernel_layout,
    is_plain_weight,
)
from jitnorm.core.norms import MAX_HIDDEN_SIZE
from jitnorm.fused_add_rmsnorm import fused_add_rmsnorm, gemma_fused_add_rmsnorm
from jitnorm.general_rmsnorm import general_fused_add_rmsnorm
from jitnorm.integrations.transformers_rules import RULES, NormRule, input_name, recognise, size_of, weight_of
from jitnorm.integrations.transformers_state import current_state, is_plain
from jitnorm.nn import normalise, resolve_eps
from jitnorm.rmsnorm import gemma_rmsnorm, rmsnorm

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


@dataclass(frozen=True, eq=False, repr=False)
class NormKernels:
    """The kernels that replace a norm, and what they need to know of it.

    Attributes:
        rule: by which the norm computes.
        eps_attribute: the name of the attribute that has its eps.
        rounding: "once", or "hf" to round the normalised value too, before the weight multiplies it.
        size_without_weight: of a norm without a weight, the elements of its rows, or 0 for any; None with a weight.
        norm: normalises, and rounds once, where kernels with less host time serve a call.
    """

    rule: NormRule
    eps_attribute: str
    rounding: str
    size_without_weight: int | None
    norm: Callable[..., torch.Tensor]

    @property
    def arguments(self) -> tuple[str | int | None, ...]:
        """Return those of `kernels_of`, for pickle."""
        return self.rule.name, self.eps_attribute, self.rounding, self.size_without_weight

    def fused_add(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        """Add and normalise the sum as rounded, in place, as the addition and the norm in transformers do."""
        offset = self.rule.weight_offset
        if self.rounding == "once" and is_plain_weight(x, weight):
            (gemma_fused_add_rmsnorm if offset else fused_add_rmsnorm)(x, residual, weight, eps, round_sum=True)
        else:
            options = {"weight_offset": offset, "rounding": self.rounding}
            general_fused_add_rmsnorm(x, residual, weight, eps, round_sum=True, **options)  # type: ignore[arg-type]


@functools.cache
def kernels_of(
    rule_name: str, eps_attribute: str, rounding: str = "once", size_without_weight: int | None = None
) -> NormKernels:
    """Return the kernels for a rule of `RULES`: the same object for the same positional arguments."""
    rule = RULES[rule_name]
    norm = gemma_rmsnorm if rule.weight_offset else rmsnorm
    return NormKernels(rule, eps_attribute, rounding, size_without_weight, norm)


class PatchedNorm(torch.nn.Module):
    """The base class that a patched norm class has before the original one."""

    _jitnorm_kernels: NormKernels

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not _is_dynamo_compiling() and (state := current_state.get()) is not None:
            normalised = state.take(self, hidden_states)
            if normalised is not None:
                return normalised
        kernels, weight = self._jitnorm_kernels, getattr(self, "weight", None)
        if weight is None:
            size = kernels.size_without_weight
            can_normalise = can_normalise_without_weight(hidden_states) and size in (0, hidden_states.shape[-1])
        else:  # With a weight of another dtype the original runs: Llama's class promotes the result to that dtype.
            can_normalise = can_normalise_any_size(hidden_states, weight) and weight.dtype == hidden_states.dtype
        if can_normalise:
            eps = eps_of_norm(self, hidden_states)
            return normalise(kernels.norm, hidden_states, weight, eps, kernels.rounding)
        return super().forward(hidden_states)  # type: ignore[no-any-return]


class _PatchedNormOfX(PatchedNorm):
    """The same for a class whose forward has another name for its input, which callers may write."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class _PatchedNormOfInput(PatchedNorm):
    """Likewise."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input)


def base_of(original: type[torch.nn.Module]) -> type[PatchedNorm]:
    """Return the base class for a norm class, whose forward has the same name for its input if that is a usual one."""
    return {"x": _PatchedNormOfX, "input": _PatchedNormOfInput}.get(input_name(original), PatchedNorm)


def eps_of_norm(norm: PatchedNorm, x: torch.Tensor) -> float:
    """Return the eps of a patched norm for an input `x`."""
    eps: float | None = getattr(norm, norm._jitnorm_kernels.eps_attribute)
    return resolve_eps(None, x) if eps is None else eps


def offset_of_norm(norm: PatchedNorm) -> float:
    """Return what a patched norm adds to its weight before it multiplies."""
    return norm._jitnorm_kernels.rule.weight_offset


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
    weight = norm._parameters["weight"]
    norm._jitnorm_kernels.fused_add(x, residual, weight, eps_of_norm(norm, x))  # type: ignore[arg-type]  # checked before


def find_kernels(module: torch.nn.Module, named: NormRule | None = None, rounding: str = "once") -> NormKernels | str:
    """Return the kernels that compute what a norm computes, or why it is left.

    Args:
        module: the norm.
        named: the rule that the user gives to its class.
        rounding: "once"; or "hf" to round where the rule rounds.

    Raises:
        ValueError: the norm computes other values than the named rule.
    """
    found = recognise(module, named)
    if found.rule is None:
        return found.reason or "its rule is not known"
    size, has_weight = size_of(module), weight_of(module) is not None
    if size > MAX_HIDDEN_SIZE:
        return f"no kernel supports hidden_size {size}"
    rounding = rounding if found.rule.rounds_twice else "once"
    return kernels_of(found.rule.name, found.eps_attribute, rounding, None if has_weight else size)
