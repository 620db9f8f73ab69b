"""Prepare and install replacements of an engine's functions, and report what was replaced and what was not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from jitnorm.integrations.engine_plugins import build_and_load
from jitnorm.jit.log import logger
from jitnorm.jit.spec import KernelSpec, Target


@dataclass(frozen=True)
class Replacement:
    """A function of the engine that can be replaced.

    Attributes:
        what: What it computes, as the report names it: "RMSNorm of 1024".
        by: The operators that compute it instead.
        specs: Their kernels.
        first_call: Calls the operators with one token, so that the kernels are loaded before a CUDA graph is captured.
        install: Puts the replacement in place.
    """

    what: str
    by: str
    specs: tuple[KernelSpec, ...]
    first_call: Callable[[], object]
    install: Callable[[], object]


@dataclass(frozen=True)
class Left:
    """A function of the engine that is not replaced, and why."""

    what: str
    reason: str


@dataclass
class Report:
    """What was replaced for one model, and what was left to the engine.

    Attributes:
        title: The engine with its version, and the model.
        replaced: How many functions were replaced, by what they compute and by which operators.
        left: How many were not, by what they compute and by the reason.
        calls: The calls that a replacement passed on to the engine, by the message that says why.
    """

    title: str
    replaced: Counter[tuple[str, str]] = field(default_factory=Counter)
    left: Counter[tuple[str, str]] = field(default_factory=Counter)
    calls: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [self.title]
        lines += [f"  replaced: {n} x {what} by {by}" for (what, by), n in self.replaced.items()]
        lines += [f"  left: {n} x {what}: {reason}" for (what, reason), n in self.left.items()]
        lines += [f"  calls left: {what}: {reason}" for what, reason in self.calls.items()]
        return "\n".join(lines)

    def leave_call(self, what: str, error: Exception) -> None:
        """Record that a call was passed on to the engine. Only the first one of each kind is logged."""
        if what not in self.calls:
            self.calls[what] = str(error)
            logger.warning("a call of %s was left to the engine: %s", what, error)


@dataclass(frozen=True)
class LoadedModel:
    """A model that the engine has loaded.

    Attributes:
        module: The model.
        dtype: The dtype of its activations.
        device: The device that it runs on.
        target: The target of kernels for that device.
        report: Where it is recorded what was replaced.
    """

    module: torch.nn.Module
    dtype: torch.dtype
    device: torch.device
    target: Target
    report: Report


def install(candidates: Iterable[Replacement | Left], report: Report) -> None:
    """Build the kernels of all candidates, several at a time, and install those whose kernels work.

    A candidate is left to the engine if a kernel cannot be built, or if its first call fails.
    """
    replacements = []
    for candidate in candidates:
        if isinstance(candidate, Left):
            report.left[candidate.what, candidate.reason] += 1
        else:
            replacements.append(candidate)
    problems = build_and_load([spec for replacement in replacements for spec in replacement.specs])
    tried: dict[tuple[str, tuple[KernelSpec, ...]], str | None] = {}
    for replacement in replacements:
        key = replacement.what, replacement.specs
        if key not in tried:
            tried[key] = next((problems[spec] for spec in replacement.specs if spec in problems), None)
            tried[key] = tried[key] or _first_call(replacement)
        if reason := tried[key]:
            report.left[replacement.what, reason] += 1
        else:
            replacement.install()
            report.replaced[replacement.what, replacement.by] += 1


def _first_call(replacement: Replacement) -> str | None:
    """Return why the first call failed, or None."""
    try:
        replacement.first_call()
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)
    return None
