"""Build many kernels at a time, in threads, which wait for their compilers."""

from __future__ import annotations

import _thread
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import NamedTuple

from jitnorm.jit import locations
from jitnorm.jit.find import fetch, find
from jitnorm.jit.spec import LAUNCHER, KernelSpec, launcher_file


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
        received: The kernels that another rank of the process group built or had.
    """

    built: list[KernelSpec] = field(default_factory=list)
    cached: list[KernelSpec] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    failed: list[tuple[KernelSpec, str]] = field(default_factory=list)
    received: list[KernelSpec] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Add the result of one build."""
        if outcome.error is None:
            self.built.append(outcome.spec)
        else:
            self.failed.append((outcome.spec, outcome.error))

    def __str__(self) -> str:
        shown = {name: items for name, items in vars(self).items() if items or name != "received"}
        return ", ".join(f"{len(items)} {name}" for name, items in shown.items())


def find_cached(specs: Sequence[KernelSpec]) -> tuple[list[KernelSpec], list[KernelSpec]]:
    """Return those of `specs` that the cache has, verified, and those that are to be built.

    Kernels that the remote cache has are added to the cache, unless that cannot be written: see `prepare`.
    """
    cached: list[KernelSpec] = []
    missing: list[KernelSpec] = []
    for spec in specs:
        entry = find(spec, mark_in_use=False, may_build=True)
        if not entry and not locations.reason_not_writable(locations.default_root()):
            entry = fetch(spec, mark_in_use=False, may_build=True)
        (cached if entry else missing).append(spec)
    return cached, missing


def prepare(specs: Sequence[KernelSpec]) -> None:
    """Create the cache and identify the compilers, once for all threads.

    Raises:
        RuntimeError: A compiler is missing, or the cache cannot be written. A call would then build into a temporary
            folder, but a warm-up is for later processes.
    """
    from jitnorm.jit import toolchain

    if specs:
        prepare_cache()
    for target in dict.fromkeys(spec.target for spec in specs):
        toolchain.require(target, locations.writable())


def build_launcher(specs: Sequence[KernelSpec], result: Result) -> None:
    """Build the launcher, without which no CUDA kernel among `specs` can be called, unless it is there.

    A failure is added to `result`.
    """
    if any(spec.target.device == "cuda" for spec in specs) and not _has_launcher():
        outcome = _build(LAUNCHER)
        if outcome.error:
            result.add(outcome)


def _has_launcher() -> bool:
    if launcher_file().exists() or find(LAUNCHER, mark_in_use=False, may_build=True):
        return True
    return fetch(LAUNCHER, mark_in_use=False, may_build=True) is not None


def prepare_cache() -> None:
    """Create the cache. Raises RuntimeError if it cannot be written."""
    from jitnorm.jit import locations

    root = locations.default_root()
    if reason := locations.create(root):
        raise RuntimeError(f"cannot keep kernels in {root}: {reason}. Set JITNORM_CACHE_DIR")


def build_all(specs: Sequence[KernelSpec], jobs: int | None = None) -> Iterator[Outcome]:
    """Build `specs`, and yield each outcome as soon as there is one. A build that fails does not stop the others.

    Args:
        specs: The kernels.
        jobs: How many to build at a time; None for as many as there are CPUs.
    """
    waiting = deque(specs)
    outcomes: SimpleQueue[Outcome | BaseException] = SimpleQueue()
    # This thread builds too, and threads that do not start are not waited for: a process may have no memory for them.
    for _ in range(min(jobs or default_jobs(), len(specs)) - 1):
        try:
            # Thread.start would wait forever for a thread that runs out of memory before its first line.
            _thread.start_new_thread(_build_waiting, (waiting, outcomes))
        except (RuntimeError, MemoryError):
            break
    left = len(specs)
    try:
        while left:
            left -= 1
            spec = _take(waiting) if outcomes.empty() else None
            outcome = _build(spec) if spec else outcomes.get()  # of a thread, which is waited for at the end only
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
    finally:
        while _take(waiting):  # after Ctrl-C no more builds are started, and those that run are waited for
            left -= 1
        for _ in range(left):
            outcomes.get()


def _take(waiting: deque[KernelSpec]) -> KernelSpec | None:
    """Remove and return the next kernel; None if another thread has taken the last one."""
    try:
        return waiting.popleft()
    except IndexError:
        return None


def _build_waiting(waiting: deque[KernelSpec], outcomes: SimpleQueue[Outcome | BaseException]) -> None:
    """Build kernels until none waits."""
    while spec := _take(waiting):
        try:
            outcomes.put(_build(spec))
        except BaseException as error:
            outcomes.put(error)  # `build_all` raises it


def default_jobs() -> int:
    """Return how many CPUs this process may use: in a container often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _build(spec: KernelSpec) -> Outcome:
    from jitnorm.jit.build import build

    started = time.monotonic()
    error = None
    try:
        build(spec, one_of_many=True).release()  # it is not loaded, so it is not in use, and its descriptor is closed
        if not find(spec, mark_in_use=False):
            error = f"{spec} was built, but the cache does not return it"
    except (RuntimeError, OSError) as problem:
        error = str(problem)
    return Outcome(spec, time.monotonic() - started, error)
