"""Two runs of one benchmark: what became faster or slower, and what the samples cannot tell.

A verdict comes from an interval: the relative difference of the two figures, widened on both sides by their noises,
added in squares. A figure is the median of its rounds' medians; its noise is two standard errors of that, estimated
from how the rounds differ, since samples within a round share clocks and placement and agree too well. An interval
wholly beyond the threshold means SLOWER or FASTER, one wholly within it SAME. AMBIGUOUS is all else: an interval across
the threshold, fewer than three rounds, or clocks that were throttled. The threshold, 2%, stands for what two runs
differ by though each is quiet, such as where memory came to lie, which no number of rounds within one run can show.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from jitnorm.benchmark.report import UNITS, Cell, Failed, Report, Row
from jitnorm.benchmark.result import BenchResult

THRESHOLD = 0.02
_MIN_ROUNDS = 3
_ASIDE = ("commit", "clocks", "jitnorm")  # what may differ between two machines that compare


class Verdict(str, enum.Enum):
    SAME = "SAME"
    FASTER = "FASTER"
    SLOWER = "SLOWER"
    AMBIGUOUS = "AMBIGUOUS"
    FAILED = "FAILED"  # a figure before, an exception now


@dataclass(frozen=True)
class Comparison:
    row: Row
    line: str
    before: Cell
    after: Cell
    verdict: Verdict
    difference: float  # relative: 0.05 for 5% slower; NaN where there is no figure
    noise: float


def compare(a: Report, b: Report, threshold: float = THRESHOLD) -> list[Comparison]:
    """Every cell of `b` that has a figure in `a`."""
    before = {str(row): row for row in a.rows}
    found = []
    for row, line, now in b.cells():
        then = before[str(row)].cells.get(line) if str(row) in before else None
        if isinstance(then, BenchResult):
            if isinstance(now, BenchResult):
                found.append(Comparison(row, line, then, now, verdict(then, now, threshold), *interval(then, now)))
            elif isinstance(now, Failed):
                found.append(Comparison(row, line, then, now, Verdict.FAILED, math.nan, math.nan))
    return found


def verdict(before: BenchResult, after: BenchResult, threshold: float = THRESHOLD) -> Verdict:
    """See the top of this file."""
    difference, noise = interval(before, after)
    throttled = any("throttled" in note for note in (*before.notes, *after.notes))
    if throttled or min(len(before.rounds), len(after.rounds)) < _MIN_ROUNDS:
        return Verdict.AMBIGUOUS
    if difference - noise > threshold:
        return Verdict.SLOWER
    if difference + noise < -threshold:
        return Verdict.FASTER
    return Verdict.SAME if abs(difference) + noise <= threshold else Verdict.AMBIGUOUS


def interval(before: BenchResult, after: BenchResult) -> tuple[float, float]:
    """The relative difference of the figures, and how far it may be off."""
    ratio = after.seconds / before.seconds
    return ratio - 1, ratio * math.hypot(before.noise, after.noise)


def unlike(a: Report, b: Report) -> list[str]:
    """What makes the comparison less than fair: another machine, other versions, other settings."""
    texts = []
    for name in ("machine", "settings"):
        before, after = getattr(a, name), getattr(b, name)
        for key in dict.fromkeys([*before, *after]):
            if key not in _ASIDE and before.get(key) != after.get(key):
                texts.append(f"{key} differs: {before.get(key)} and {after.get(key)}")
    return texts


def rows_of(comparisons: list[Comparison], unit: str) -> list[list[str]]:
    """For a table: row, implementation, both figures, difference with noise, verdict."""
    rows = []
    for c in comparisons:
        figures = [
            f"{r.seconds / UNITS[unit]:.4g}" if isinstance(r, BenchResult) else "error" for r in (c.before, c.after)
        ]
        difference = "" if math.isnan(c.difference) else f"{c.difference:+.1%} +-{c.noise:.1%}"
        rows.append([str(c.row), c.line, *figures, difference, c.verdict.value])
    return rows
