"""Hold the results of measurements: the samples of one call with their statistics, and the report of a run.

A round is a number of samples taken in sequence. The estimate of a measurement is the median of the medians of its
rounds; its noise is how far that may be off. Reports are written to JSON with every sample, and read back.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from jitnorm.jit.files import write_text

NOISE_TARGET = 0.005  # relative noise at which a measurement needs no more rounds
MIN_ROUNDS = 5
FORMAT = 1  # of JSON files
COPY = "copy"  # the implementation that the framework adds
# An implementation that a benchmark may have: a copy by rows, with accesses no wider than the rows' alignment.
ROW_COPY = "row_copy"
COPIES = (COPY, ROW_COPY)  # they compute nothing, and are not ranked
UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}

Metric = float | str  # a quantile between 0 and 1, or a key of _NAMED_METRICS

_NAMED_METRICS: dict[str, Callable[[Sequence[float]], float]] = {"avg": statistics.fmean, "min": min, "max": max}
_MAD_TO_STD = 1.4826  # standard deviation of normal values, relative to their median absolute deviation
_MEDIAN_TO_MEAN_ERROR = 1.2533  # standard error of a median, relative to that of a mean
_JSON_DIGITS = 5  # of a sample: a tenth of what the least noisy samples vary by


def quantile(samples: Sequence[float], q: float) -> float:
    """Return a quantile, interpolated between the two nearest samples."""
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def compute_metric(samples: Sequence[float], metric: Metric) -> float:
    """Return one metric of the samples; raise ValueError for a metric that does not exist."""
    if isinstance(metric, str):
        if metric not in _NAMED_METRICS:
            names = ", ".join(_NAMED_METRICS)
            raise ValueError(f"a metric is a quantile between 0 and 1, or one of {names}; got {metric!r}")
        return _NAMED_METRICS[metric](samples)
    if not 0 <= metric <= 1:
        raise ValueError(f"a metric that is a number is a quantile between 0 and 1, got {metric}")
    return quantile(samples, metric)


def metric_name(metric: Metric) -> str:
    """Return "p50" for 0.5, "avg" for "avg"."""
    return metric if isinstance(metric, str) else f"p{100 * metric:g}"


def estimate(rounds: Sequence[Sequence[float]]) -> float:
    """Return the median of the medians of the rounds, which one outlying round does not change."""
    return statistics.median(statistics.median(samples) for samples in rounds)


def estimate_noise(rounds: Sequence[Sequence[float]]) -> float:
    """Return two standard errors of `estimate`, relative to it: between rounds or within them, whichever is more.

    Samples within a round share clocks and placement, and agree too well. So the medians of the rounds count, by their
    median absolute deviation, which one outlying round does not change either. The samples count as well, by the 95%
    confidence interval of their median: with few or scattered samples the estimate is uncertain, too.
    """
    medians = [statistics.median(samples) for samples in rounds]
    center = statistics.median(medians)
    deviation = statistics.median(abs(median - center) for median in medians)
    between = 2 * _MEDIAN_TO_MEAN_ERROR * _MAD_TO_STD * deviation / math.sqrt(len(medians))
    ordered = sorted(sample for samples in rounds for sample in samples)
    half_width = 0.98 * math.sqrt(len(ordered))  # in ranks
    low = max(0, math.floor(len(ordered) / 2 - half_width))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + half_width) - 1)
    within = (ordered[high] - ordered[low]) / 2
    return max(between, within) / center if center else math.inf


@dataclass(frozen=True)
class BenchResult:
    """The times of one call, in seconds: `times[i]` is `metrics[i]` of all samples.

    Attributes:
        memory_footprint: bytes that a call reads and writes; 0 where no bandwidth is to be shown.
        rounds: every sample, by rounds.
        error: the relative error against `check`, where one was given.
        notes: what affected the measurement: throttled clocks, arguments that stayed in the cache.
        measure_round: takes the samples of one more round, and returns them with a note; None when finished.
    """

    metrics: tuple[Metric, ...]
    times: tuple[float, ...]
    memory_footprint: int
    rounds: tuple[tuple[float, ...], ...] = ()
    error: float | None = None
    notes: tuple[str, ...] = ()
    measure_round: Callable[[], tuple[list[float], str | None]] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(
        cls, rounds: Sequence[Sequence[float]], metrics: Sequence[Metric] = (0.5, "avg"), **fields: Any
    ) -> BenchResult:
        """Return the result of samples in seconds, by rounds, however they were taken."""
        samples = [sample for one in rounds for sample in one]
        if not samples:
            raise ValueError("a result needs at least one sample")
        times = tuple(compute_metric(samples, metric) for metric in metrics)
        kept = tuple(tuple(one) for one in rounds)
        return cls(tuple(metrics), times, fields.pop("memory_footprint", 0), kept, **fields)

    @property
    def seconds(self) -> float:
        """Return the estimate, by which results are compared."""
        return estimate(self.rounds or [self.times[:1]])

    @property
    def noise(self) -> float:
        """Return how far `seconds` may be off, relative to it."""
        return estimate_noise(self.rounds) if self.rounds else math.inf

    @property
    def bandwidth(self) -> float:
        """Return bytes per second."""
        return self.memory_footprint / self.seconds

    def with_another_round(self) -> BenchResult:
        """Return this result with the samples of one more round."""
        if not self.measure_round:
            return self
        samples, note = self.measure_round()
        notes = self.notes if note is None or note in self.notes else (*self.notes, note)
        result = BenchResult.of((*self.rounds, samples), self.metrics)
        return replace(self, times=result.times, rounds=result.rounds, notes=notes)

    def finished(self) -> BenchResult:
        """Return this result without `measure_round`, which holds copies of the arguments and graphs."""
        return replace(self, measure_round=None)


def run_until_stable(
    cells: dict[str, Any],
    seconds: float,
    attempt: Callable[[Callable[[], BenchResult]], Any] = lambda measure: measure(),
) -> None:
    """Measure further rounds of the results in `cells`, in turns so that a drift of the clocks affects all alike.

    There are at least MIN_ROUNDS. Then measurement ends when the noise of all results is within NOISE_TARGET, or after
    `seconds`.

    Args:
        cells: results by implementation, replaced in place. Values of other types are left as they are.
        seconds: the time limit.
        attempt: calls what measures a round. Where it returns no result, such as Failed, there are no more rounds.
    """
    end = time.monotonic() + seconds
    for rounds in itertools.count(1):
        running = {name: cell for name, cell in cells.items() if isinstance(cell, BenchResult) and cell.measure_round}
        stable = all(result.noise <= NOISE_TARGET for result in running.values())
        if not running or (rounds >= MIN_ROUNDS and (stable or time.monotonic() > end)):
            return
        for name, result in running.items():
            cells[name] = attempt(result.with_another_round)


@dataclass(frozen=True)
class Skipped:
    """A cell that is N/A, with the reason."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """A cell that ended with an exception."""

    message: str


Cell: TypeAlias = BenchResult | Skipped | Failed


@dataclass
class Row:
    """One point of the grid, with a cell for each implementation."""

    point: dict[str, Any]
    cells: dict[str, Cell] = field(default_factory=dict)

    def results(self) -> dict[str, BenchResult]:
        """Return the cells that were measured."""
        return {line: cell for line, cell in self.cells.items() if isinstance(cell, BenchResult)}

    def __str__(self) -> str:
        return ", ".join(f"{axis}={value}" for axis, value in self.point.items()) or "the only row"


@dataclass
class Report:
    """The results of a run of one benchmark."""

    name: str
    unit: str
    axes: list[str]
    lines: list[str]  # the implementations, copy first where it was measured
    rows: list[Row] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        """Return whether a cell ended with an exception."""
        return any(isinstance(cell, Failed) for _, _, cell in self.cells())

    def cells(self) -> Iterator[tuple[Row, str, Cell]]:
        """Iterate over all cells, as (row, implementation, cell)."""
        return ((row, line, cell) for row in self.rows for line, cell in row.cells.items())

    def results(self) -> list[BenchResult]:
        """Return the cells that were measured."""
        return [cell for _, _, cell in self.cells() if isinstance(cell, BenchResult)]

    def to_json(self) -> str:
        """Return JSON with every sample in seconds, one cell a line."""
        head = {"format": FORMAT, **{name: value for name, value in vars(self).items() if name != "rows"}}
        rows = []
        for row in self.rows:
            cells = [f"    {json.dumps(line)}: {json.dumps(_encode_cell(cell))}" for line, cell in row.cells.items()]
            point = json.dumps(row.point, default=str)
            rows.append(f'  {{"point": {point}, "cells": {{\n' + ",\n".join(cells) + "\n  }}")
        start = json.dumps(head, indent=1, default=str).removesuffix("\n}")
        return f'{start},\n "rows": [\n' + ",\n".join(rows) + "\n ]\n}\n"

    def write(self, path: Path) -> None:
        """Write the JSON to a file, whole or not at all."""
        write_text(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Report:
        """Return the report in a file of `to_json`; raise ValueError for any other file."""
        try:
            data = json.loads(path.read_text())
            if data.pop("format") != FORMAT:
                raise ValueError("another format")
            rows = [
                Row(dict(row["point"]), {line: _decode_cell(cell) for line, cell in row["cells"].items()})
                for row in data.pop("rows")
            ]
            report = cls(**data, rows=rows)
            if not (isinstance(report.name, str) and report.unit in UNITS):
                raise ValueError("no name or no unit")
            if not (isinstance(report.machine, dict) and isinstance(report.settings, dict)):
                raise ValueError("no machine or no settings")
            return report
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} is not a result file of a benchmark (written by --output)") from error


def _encode_cell(cell: Cell) -> dict[str, Any]:
    if not isinstance(cell, BenchResult):
        return {type(cell).__name__.lower(): asdict(cell).popitem()[1]}
    return {
        "metrics": cell.metrics,
        "times": cell.times,
        "memory_footprint": cell.memory_footprint,
        "rounds": [[float(f"{sample:.{_JSON_DIGITS}g}") for sample in samples] for samples in cell.rounds],
        "error": cell.error,
        "notes": cell.notes,
    }


def _decode_cell(data: dict[str, Any]) -> Cell:
    if "skipped" in data:
        return Skipped(data["skipped"])
    if "failed" in data:
        return Failed(data["failed"])
    data = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    result = BenchResult(**data | {"rounds": tuple(map(tuple, data["rounds"]))})
    # Everything that is computed from a result must succeed: a division by zero is found here rather than later.
    numbers = [*(sample for samples in result.rounds for sample in samples), *result.times]
    if not (all(result.rounds) and numbers and all(isinstance(n, (int, float)) and float(n) > 0 for n in numbers)):
        raise ValueError("a time is not a positive number")
    if not math.isfinite(sum(numbers)) or not result.seconds:
        raise ValueError("a time is not finite")
    if not all(isinstance(note, str) for note in result.notes):
        raise ValueError("a note is not text")
    return result
