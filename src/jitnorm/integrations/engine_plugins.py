"""What the plugins of vLLM and SGLang share: whether the environment asks for one, and hashes of the engines' code."""

from __future__ import annotations

import hashlib
import inspect
import os
from typing import Any

from jitnorm.jit.environment import is_on

NAME = "jitnorm"  # of the entry points


def is_requested(variable: str, selection: str) -> bool:
    """Return whether the environment asks for a plugin.

    Args:
        variable: jitnorm's variable for the engine, which decides if it is set.
        selection: The engine's variable with the names of its plugins, which decides otherwise.
    """
    if os.environ.get(variable):
        return is_on(variable)
    return NAME in (name.strip() for name in os.environ.get(selection, "").split(","))


def source_hash(code: Any) -> str:
    """Return the first 16 digits of the SHA-256 of the source of a class, or of a function without its decorators."""
    return hashlib.sha256(inspect.getsource(code).encode()).hexdigest()[:16]
