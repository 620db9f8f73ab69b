"""Patch the gated norms of Hugging Face models, which are recognised by what their forward computes.

As transformers_rules.py and transformers_norms.py do for norms without a gate.
"""

# No `from __future__ import annotations`: torch.fx writes the annotations of forward into its code, as types, not text.

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch

from jitnorm.core.norms import MAX_HIDDEN_SIZE
from jitnorm.gated_rmsnorm import gated_rmsnorm, grouped
from jitnorm.integrations.transformers_rules import (
    FACTORS,
    PROBE_EPS,
    Case,
    UnknownAttributeError,
    eps_names,
    isolated,
    plain_attributes,
    probe_key,
    reason_of_compiled,
    reason_of_structure,
    run_probe,
)
from jitnorm.nn import can_normalise_gated


@dataclass(frozen=True)
class GatedRule:
    """How a class of gated norms computes its result from the input, the gate, the weight w and the activation a.

    Attributes:
        name: in the report of `patch_transformers`.
        formula: for people. round() is to the dtype of the input, n the normalised value, and a the activated gate.
        norm_before_gate: whether the gate multiplies the result, or the input before it is normalised.
        activation: "silu" or "sigmoid".
        rounds_before_end: whether the normalised value is rounded, and its product with the weight.
    """

    name: str
    formula: str
    norm_before_gate: bool
    activation: str
    rounds_before_end: bool

    def bound(self, case: Case, eps: float, group_size: int, factor: float) -> torch.Tensor:
        """Return the result in float64, of n and a times `factor`, rounded as the rule rounds."""
        x, w = case.x.double(), case.weight.double()
        a = getattr(torch.nn.functional, self.activation)(case.gate.double())  # type: ignore[union-attr]
        rows = grouped(x if self.norm_before_gate else x * a, group_size)
        n = (rows * (rows.square().mean(-1, keepdim=True) + eps).rsqrt()).reshape(x.shape) * factor

        def to(value: torch.Tensor) -> torch.Tensor:
            return value.to(case.x.dtype).double()

        product = to(to(n) * w) if self.rounds_before_end else n * w
        return to(product * (a * factor)) if self.norm_before_gate else to(product)


def _rules() -> dict[str, GatedRule]:
    rules = {}
    for before, activation, rounds in itertools.product((True, False), ("silu", "sigmoid"), (False, True)):
        name = "_".join(
            ["gated" if before else "gate_first", *(["sigmoid"] if activation == "sigmoid" else []), *["hf"] * rounds]
        )
        product = "round(round(n) * w)" if rounds else "n * w"
        if before:
            formula = f"round({product} * {activation}(gate)), n = norm(input)"
        else:
            formula = f"{product if rounds else f'round({product})'}, n = norm(input * {activation}(gate))"
        rules[name] = GatedRule(name, formula, before, activation, rounds)
    return rules


GATED_RULES = _rules()


@dataclass(frozen=True, eq=False, repr=False)
class GatedKernels:
    """The kernels that replace a gated norm, and what they need to know of it.

    Attributes:
        rule: by which the norm computes.
        eps_attribute: the name of the attribute that has its eps.
        rounding: "once", or "hf" to round where the rule does.
        group_size: how many elements are normalised together.
    """

    rule: GatedRule
    eps_attribute: str
    rounding: str
    group_size: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Return those of `gated_kernels_of`, for pickle."""
        return self.rule.name, self.eps_attribute, self.rounding, self.group_size


@functools.cache
def gated_kernels_of(rule_name: str, eps_attribute: str, rounding: str, group_size: int) -> GatedKernels:
    """Return the kernels for a rule of `GATED_RULES`: the same object for the same arguments."""
    return GatedKernels(GATED_RULES[rule_name], eps_attribute, rounding, group_size)


class PatchedGatedNorm(torch.nn.Module):
    """The base class that a patched class of gated norms has before the original one."""

    _jitnorm_kernels: GatedKernels
    weight: torch.nn.Parameter

    def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        kernels, weight = self._jitnorm_kernels, self.weight
        size = kernels.group_size if kernels.group_size != weight.shape[0] else None
        # With a weight of another dtype the original runs: Mamba 2's class promotes the result to that dtype.
        if (
            gate is not None
            and hidden_states.dtype == gate.dtype == weight.dtype
            and can_normalise_gated(hidden_states, gate, weight, size)
        ):
            return gated_rmsnorm(
                *(hidden_states, gate, weight, getattr(self, kernels.eps_attribute)),
                group_size=size,
                norm_before_gate=kernels.rule.norm_before_gate,
                activation=kernels.rule.activation,
                rounding=kernels.rounding,
            )
        return super().forward(hidden_states, gate)  # type: ignore[no-any-return]


def find_gated_kernels(module: torch.nn.Module, rounding: str = "once") -> GatedKernels | str:
    """Return the kernels that compute what a gated norm computes, or why it is left.

    Args:
        module: the norm, of a class for which `takes_gate` is true. It is not called and does not change.
        rounding: "once"; or "hf" to round where the rule rounds.
    """
    if reason := reason_of_structure(module, has_gate=True) or reason_of_compiled(type(module)):
        return reason
    attributes = plain_attributes(module)
    size: int = module._parameters["weight"].shape[0]  # type: ignore[union-attr]
    key = probe_key(module, attributes, size)
    if key not in _recognised:
        _recognised[key] = _probe(module, attributes, size)
    found = _recognised[key]
    if isinstance(found, str):
        return found
    rule, eps_attribute, group_size = found
    if group_size > MAX_HIDDEN_SIZE:
        return f"no kernel supports group_size {group_size}"
    return gated_kernels_of(rule.name, eps_attribute, rounding if rule.rounds_before_end else "once", group_size)


# The rule, the name of the attribute for eps, and the group size; or why there is none.
_Found = tuple[GatedRule, str, int]
_recognised: dict[Any, _Found | str] = {}


def _probe(module: torch.nn.Module, attributes: dict[str, Any], size: int) -> _Found | str:
    name, eps = type(module).__name__, eps_names(module)
    candidates = list(itertools.product(GATED_RULES.values(), eps, _group_sizes(attributes, size)))
    known_eps = {key: PROBE_EPS * (i + 1) for i, key in enumerate(eps)}
    try:
        with isolated():
            # Each with the number of dimensions of the input, and what is set on the copy.
            for dtype, dimensions, changes, training in (
                (torch.float32, 3, known_eps, False),
                (torch.float32, 2, {}, True),
                (torch.bfloat16, 3, {}, False),
                (torch.float16, 3, {}, False),
            ):
                own = {**attributes, **changes}
                case = run_probe(module, own, training, size, eps[0], dtype, dimensions, has_gate=True)
                if isinstance(case, str):
                    return f"the forward of {name} {case}"
                candidates = [c for c in candidates if _agrees(case, *c)]
                if not candidates:
                    return f"{name} computes none of the rules of gated norms that jitnorm knows"
    except UnknownAttributeError:
        return f"the forward of {name} uses an attribute that is no plain value"
    except Exception as error:  # whatever the forward of another library raises
        return f"the forward of {name} raised {type(error).__name__} on random input"
    return candidates[0]


def _agrees(case: Case, rule: GatedRule, eps_attribute: str, group_size: int) -> bool:
    """Return whether the result is that of a rule; see `Case.agrees`."""
    eps = case.attributes[eps_attribute]
    low, high = (rule.bound(case, eps, group_size, factor) for factor in FACTORS)
    return case.is_within(low, high)


def _group_sizes(attributes: dict[str, Any], size: int) -> list[int]:
    """Return sizes of groups: the whole row, and those that an integer attribute is the size or the number of."""
    numbers = {value for value in attributes.values() if type(value) is int and value > 0 and size % value == 0}
    return list(dict.fromkeys((size, *sorted(numbers | {size // number for number in numbers}, reverse=True))))
