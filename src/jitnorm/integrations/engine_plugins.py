"""What the plugins of vLLM and SGLang share: when one is active and what it skips, hashes of the engine's code, and
builds of kernels.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import time
from collections.abc import Sequence
from typing import Any

from jitnorm.jit.environment import is_on
from jitnorm.jit.load import load
from jitnorm.jit.log import logger
from jitnorm.jit.spec import KernelSpec
from jitnorm.warmup.run import build_all, find_cached, prepare

NAME = "jitnorm"  # of the entry points
SKIP = "JITNORM_PLUGIN_SKIP"
# The parts that SKIP can name.
PARTS = (
    "norms",
    "activations",
    "attention",
    "decode_attention",
    "decode_steps",
    "linear_layers",
    "batch_invariant",
)


class EngineKernelSpec(KernelSpec):
    """A kernel that has the sizes of a model's layers, for which `jitnorm warmup` has no arguments."""

    @property
    def warmup_command(self) -> str:
        """Return what builds it ahead of time."""
        return "load the model once where there is a compiler"


def is_requested(variable: str, selection: str) -> bool:
    """Return whether the environment asks for a plugin.

    Args:
        variable: jitnorm's variable for the engine, which decides if it is set.
        selection: The engine's variable with the names of its plugins, which decides otherwise.
    """
    if os.environ.get(variable):
        return is_on(variable)
    return NAME in (name.strip() for name in os.environ.get(selection, "").split(","))


def skipped_parts() -> set[str]:
    """Return the PARTS that the environment tells the plugins to leave to the engine.

    Raises:
        ValueError: JITNORM_PLUGIN_SKIP names anything else.
    """
    names = {name.strip() for name in os.environ.get(SKIP, "").split(",")} - {""}
    if unknown := names - {*PARTS}:
        raise ValueError(f"{SKIP} must be names of {', '.join(PARTS)} with commas between, got {sorted(unknown)[0]!r}")
    return names


def reason_to_skip(part: str) -> str | None:
    """Return why one of PARTS is left to the engine, or None."""
    return f"{SKIP} names {part}" if part in skipped_parts() else None


def source_hash(code: Any) -> str:
    """Return the first 16 digits of the SHA-256 of the source of a class, or of a function without its decorators."""
    function = getattr(code, "fn", code)  # of a Triton kernel
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]


def build_and_load(specs: Sequence[KernelSpec]) -> dict[KernelSpec, str]:
    """Build kernels, all at a time, and load them, so that no later call does. Return why each that failed did."""
    unique: list[KernelSpec] = list(dict.fromkeys(specs))
    failures: dict[KernelSpec, str] = {}
    started = time.monotonic()
    try:
        _, missing = find_cached(unique)
        if not is_on("JITNORM_DISABLE_JIT"):
            prepare(missing)
            for outcome in build_all(missing):  # one at a time: an exception leaves those before it
                if outcome.error is not None:
                    failures[outcome.spec] = outcome.error
    except (RuntimeError, OSError) as error:  # no compiler, or no cache to write to
        logger.debug("the plugin builds one kernel after another: %s", error)
    for spec in unique:
        try:
            if spec not in failures:
                load(spec)
        except (RuntimeError, OSError) as error:
            failures[spec] = str(error)
    logger.debug("the plugin has %d kernels after %.1f s", len(unique), time.monotonic() - started)
    return {spec: f"its kernel cannot be built: {_first_line(error)}" for spec, error in failures.items()}


def _first_line(error: str) -> str:
    return (error.strip().splitlines() or ["unknown error"])[0]
