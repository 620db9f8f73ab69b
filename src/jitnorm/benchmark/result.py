"""The result of a measurement, and `settle`: rounds in turns until the results are quiet."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jitnorm.benchmark import stats

QUIET = 0.005  # noise of a figure that needs no more rounds
MIN_ROUNDS = 5


@dataclass(frozen=True)
class BenchResult:
    """Times of one call, in seconds: `times[i]` is `metrics[i]` of all samples.

    memory_footprint: bytes that a call reads and writes; 0 where no bandwidth is to be shown.
    rounds: every sample, by rounds.
    error: the relative error against `check`, where one was given.
    notes: what a reader of the figure should know: clocks throttled, arguments that stayed in the cache.
    """

    metrics: tuple[stats.Metric, ...]
    times: tuple[float, ...]
    memory_footprint: int
    rounds: tuple[tuple[float, ...], ...] = ()
    error: float | None = None
    notes: tuple[str, ...] = ()
    more: Callable[[], tuple[list[float], str | None]] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(
        cls, rounds: Sequence[Sequence[float]], metrics: Sequence[stats.Metric] = (0.5, "avg"), **rest: Any
    ) -> BenchResult:
        """From samples in seconds, taken in any way, by rounds."""
        samples = [sample for one in rounds for sample in one]
        if not samples:
            raise ValueError("a result needs at least one sample")
        times = tuple(stats.measure(samples, metric) for metric in metrics)
        kept = tuple(tuple(one) for one in rounds)
        return cls(tuple(metrics), times, rest.pop("memory_footprint", 0), kept, **rest)

    @property
    def seconds(self) -> float:
        """The figure to compare by: the median of the rounds' medians."""
        return stats.figure(self.rounds or [self.times[:1]])

    @property
    def noise(self) -> float:
        """How far `seconds` may be off, relative to it."""
        return stats.noise(self.rounds) if self.rounds else math.inf

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.memory_footprint / self.seconds

    def another_round(self) -> BenchResult:
        """With the samples of one more round."""
        if not self.more:
            return self
        samples, note = self.more()
        notes = self.notes if note is None or note in self.notes else (*self.notes, note)
        return BenchResult.of(
            (*self.rounds, samples),
            self.metrics,
            memory_footprint=self.memory_footprint,
            error=self.error,
            notes=notes,
            more=self.more,
        )

    def finished(self) -> BenchResult:
        """Without what it takes to measure again: copies, graphs."""
        return replace(self, more=None)


def settle(cells: dict[str, Any], seconds: float, attempt: Callable[..., Any] = lambda measure: measure()) -> None:
    """Further rounds, in which the results among `cells` take turns, so that a drift of the clocks meets them alike.

    At least five in all; then until all are quiet or the time is over. `attempt` makes a round, and may give something
    else than a result, which takes part no longer.
    """
    until = time.monotonic() + seconds
    for rounds in itertools.count(1):
        live = {name: cell for name, cell in cells.items() if isinstance(cell, BenchResult) and cell.more}
        enough = time.monotonic() > until or all(result.noise <= QUIET for result in live.values())
        if not live or (rounds >= MIN_ROUNDS and enough):
            return
        for name, result in live.items():
            cells[name] = attempt(result.another_round)
