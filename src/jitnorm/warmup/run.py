"""Building many kernels at a time: one thread each, which waits for its compiler."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

from jitnorm.jit.load import find
from jitnorm.jit.spec import KernelSpec


@dataclass(frozen=True)
class Outcome:
    """What came of one build."""

    spec: KernelSpec
    seconds: float
    error: str | None = None


@dataclass
class Result:
    """What came of a warm-up."""

    built: list[KernelSpec] = field(default_factory=list)
    cached: list[KernelSpec] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # why, a line for each size that is not supported
    failed: list[tuple[KernelSpec, str]] = field(default_factory=list)  # and why

    def add(self, outcome: Outcome) -> None:
        """Counts one build."""
        if outcome.error is None:
            self.built.append(outcome.spec)
        else:
            self.failed.append((outcome.spec, outcome.error))

    def __str__(self) -> str:
        return ", ".join(f"{len(listed)} {name}" for name, listed in vars(self).items())


def survey(specs: Sequence[KernelSpec]) -> tuple[list[KernelSpec], list[KernelSpec]]:
    """What the cache has, intact, and what is to be built."""
    cached: list[KernelSpec] = []
    missing: list[KernelSpec] = []
    for spec in specs:
        (cached if find(spec, mark_in_use=False) else missing).append(spec)
    return cached, missing


def prepare(specs: Sequence[KernelSpec]) -> None:
    """Creates the cache and identifies the compilers, once for all threads. RuntimeError where one is missing, or where
    kernels cannot be kept: a process may keep them for itself then, but a warm-up is for later ones."""
    from jitnorm.jit import locations, toolchain

    root = locations.default_root()
    if specs and (why := locations.create(root)):
        raise RuntimeError(f"cannot keep kernels in {root}: {why}. Set JITNORM_CACHE_DIR")
    for device in dict.fromkeys(spec.target.device for spec in specs):
        toolchain.require(device, locations.writable())


def build_all(specs: Sequence[KernelSpec], jobs: int | None = None) -> Iterator[Outcome]:
    """Builds `specs`, and yields each as it is done; one that fails does not stop the others."""
    if len(specs) < 2 or jobs == 1:
        yield from map(_build, specs)  # a thread that cannot start, for want of memory, would be waited for
        return
    with ThreadPoolExecutor(max_workers=jobs or default_jobs(), thread_name_prefix="jitnorm-warmup") as pool:
        pending = [pool.submit(_build, spec) for spec in specs]
        try:
            for done in as_completed(pending):
                yield done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nothing more is started


def default_jobs() -> int:
    """The CPUs that this process may use: in a container often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _build(spec: KernelSpec) -> Outcome:
    from jitnorm.jit.build import build

    started = time.monotonic()
    error = None
    try:
        build(spec, announce=False).release()  # nothing is loaded, so nothing is in use: a file less to hold open
        if not find(spec, mark_in_use=False):
            error = f"{spec} was built, but the cache does not give it back"
    except (RuntimeError, OSError) as problem:
        error = str(problem)
    return Outcome(spec, time.monotonic() - started, error)
