"""Build many kernels at a time: one thread for each, which waits for its compiler."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import NamedTuple

from jitnorm.jit.load import find
from jitnorm.jit.spec import KernelSpec


class Outcome(NamedTuple):
    """The result of one build: how long it took, and why it failed, if it did."""

    spec: KernelSpec
    seconds: float
    error: str | None = None


@dataclass
class Result:
    """The result of a warm-up.

    Attributes:
        built: The kernels that were built.
        cached: The kernels that the cache had.
        refused: The operator's message for each size that no kernel supports.
        failed: The kernels whose build failed, each with the error.
    """

    built: list[KernelSpec] = field(default_factory=list)
    cached: list[KernelSpec] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    failed: list[tuple[KernelSpec, str]] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Add the result of one build."""
        if outcome.error is None:
            self.built.append(outcome.spec)
        else:
            self.failed.append((outcome.spec, outcome.error))

    def __str__(self) -> str:
        return ", ".join(f"{len(items)} {name}" for name, items in vars(self).items())


def find_cached(specs: Sequence[KernelSpec]) -> tuple[list[KernelSpec], list[KernelSpec]]:
    """Return those of `specs` that the cache has, verified, and those that are to be built."""
    cached: list[KernelSpec] = []
    missing: list[KernelSpec] = []
    for spec in specs:
        (cached if find(spec, mark_in_use=False) else missing).append(spec)
    return cached, missing


def prepare(specs: Sequence[KernelSpec]) -> None:
    """Create the cache and identify the compilers, once for all threads.

    Raises:
        RuntimeError: A compiler is missing, or the cache cannot be written. A call would then build into a temporary
            folder, but a warm-up is for later processes.
    """
    from jitnorm.jit import locations, toolchain

    root = locations.default_root()
    if specs and (reason := locations.create(root)):
        raise RuntimeError(f"cannot keep kernels in {root}: {reason}. Set JITNORM_CACHE_DIR")
    for device in dict.fromkeys(spec.target.device for spec in specs):
        toolchain.require(device, locations.writable())


def build_all(specs: Sequence[KernelSpec], jobs: int | None = None) -> Iterator[Outcome]:
    """Build `specs`, and yield each outcome as soon as there is one. A build that fails does not stop the others.

    Args:
        specs: The kernels.
        jobs: How many to build at a time; None for as many as there are CPUs.
    """
    if len(specs) < 2 or jobs == 1:
        # Without a thread: starting one waits forever if it runs out of memory before its first line.
        yield from map(_build, specs)
        return
    with ThreadPoolExecutor(max_workers=jobs or default_jobs(), thread_name_prefix="jitnorm-warmup") as pool:
        pending = [pool.submit(_build, spec) for spec in specs]
        try:
            for done in as_completed(pending):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C no more builds are started


def default_jobs() -> int:
    """Return how many CPUs this process may use: in a container often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _build(spec: KernelSpec) -> Outcome:
    from jitnorm.jit.build import build

    started = time.monotonic()
    error = None
    try:
        build(spec, announce=False).release()  # it is not loaded, so it is not in use, and its descriptor is closed
        if not find(spec, mark_in_use=False):
            error = f"{spec} was built, but the cache does not return it"
    except (RuntimeError, OSError) as problem:
        error = str(problem)
    return Outcome(spec, time.monotonic() - started, error)
