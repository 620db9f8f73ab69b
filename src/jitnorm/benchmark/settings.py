"""The settings of a run, which `do_bench` reads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Settings:
    """The settings of a run."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    cold: bool = True  # the arguments of a call are in no cache
    seconds: float = 1.0  # the time limit for each implementation in a row
    rounds_by_runner: bool = False  # do_bench measures one round, because the runner lets implementations take turns


_current: Settings | None = None


def current_settings() -> Settings:
    """Return the settings of the current run, or the defaults outside of one."""
    return _current or Settings(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextlib.contextmanager
def override_settings(**changes: Any) -> Iterator[Settings]:
    """Change settings inside a `with` block; None leaves a setting unchanged."""
    global _current
    before = _current
    _current = replace(current_settings(), **{name: value for name, value in changes.items() if value is not None})
    try:
        yield _current
    finally:
        _current = before


def is_ci() -> bool:
    """Return whether to use the short lists of values: CI=true, as most services set it, or JITNORM_BENCH_CI=1."""
    return os.environ.get("CI", "").lower() in ("true", "1") or os.environ.get("JITNORM_BENCH_CI") == "1"
