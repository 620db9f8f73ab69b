"""Which backend the user asked for: `JITNORM_BACKEND`, and `jitnorm.dispatch.backend(...)` over it."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar

from jitnorm.core.torch_library import mark_constant

BACKENDS = ("auto", "auto-fast", "jit", "flashinfer", "torch")
VARIABLE = "JITNORM_BACKEND"

_override: ContextVar[str | None] = ContextVar("jitnorm_dispatch_backend", default=None)


def backend(name: str) -> AbstractContextManager[None]:
    """In a `with` block: `name` serves this thread's (or asyncio task's) calls, whatever JITNORM_BACKEND says.

    Blocks nest, and the one outside is back after an exception too. Threads that are started inside have their own
    choice. Enter it around a compiled function, not in one: a compiled graph keeps the backend that it was traced with.

    Args:
        name: "auto", "auto-fast", "jit", "flashinfer" or "torch", as in `jitnorm.dispatch`.

    Raises:
        ValueError: there is no such backend.
    """
    return _overridden(_known(name, "backend"))


@contextlib.contextmanager
def _overridden(name: str) -> Iterator[None]:
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def wanted() -> str:
    """The name that applies to a call made here and now. ValueError where JITNORM_BACKEND is none."""
    return _override.get() or _from_environment()


mark_constant(wanted)


@functools.cache  # reading the environment costs more than all the rest of a choice
def _from_environment() -> str:
    return _known(os.environ.get(VARIABLE) or "auto", VARIABLE)


def _known(name: str, what: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{what} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name
