"""What holds for a whole run: device, dtype, cold or warm, and how long to go on. Bench files and do_bench read it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Settings:
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    cold: bool = True  # the arguments of a call are in no cache
    seconds: float = 1.0  # at most, for each implementation, to wait for quiet figures
    rounds_by_runner: bool = False  # do_bench measures once, as a run takes its implementations in turns


_current: Settings | None = None


def current() -> Settings:
    """Of the run that is going on, or those of a plain call."""
    return _current or Settings(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextlib.contextmanager
def using(**changes: Any) -> Iterator[Settings]:
    """Other settings for a while; None leaves one as it is."""
    global _current
    before = _current
    _current = replace(current(), **{name: value for name, value in changes.items() if value is not None})
    try:
        yield _current
    finally:
        _current = before


def create_empty(
    *shape: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> torch.Tensor:
    """A tensor that a call will fill, of the run's dtype on the run's device."""
    run = current()
    return torch.empty(*shape, dtype=_checked(dtype or run.dtype), device=device or run.device)


def create_random(
    *shape: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> torch.Tensor:
    """Standard normal values: never zeros, which hide errors and may run faster."""
    run = current()
    return torch.randn(*shape, device=device or run.device).to(_checked(dtype or run.dtype))


def _checked(dtype: object) -> torch.dtype:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    return dtype


def is_ci() -> bool:
    """Whether the short lists are asked for: CI=true, as most services set it, or JITNORM_BENCH_CI=1."""
    return os.environ.get("CI", "").lower() in ("true", "1") or os.environ.get("JITNORM_BENCH_CI") == "1"


def shows_bandwidth() -> bool:
    return os.environ.get("JITNORM_BENCH_BANDWIDTH") != "0"
