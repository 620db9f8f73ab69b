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
    why: str = ""  # it is ambiguous


def compare(a: Report, b: Report, threshold: float = THRESHOLD) -> list[Comparison]:
    """Every cell of `b` that has a figure in `a`. ValueError for a threshold that is none."""
    if not 0 <= threshold < math.inf:
        raise ValueError(f"threshold must be a finite number and 0 or more, got {threshold:g}")
    before = {str(row): row for row in a.rows}
    found = []
    for row, line, now in b.cells():
        then = before[str(row)].cells.get(line) if str(row) in before else None
        if isinstance(then, BenchResult):
            if isinstance(now, BenchResult):
                decided, why = judge(then, now, threshold)
                found.append(Comparison(row, line, then, now, decided, *interval(then, now), why))
            elif isinstance(now, Failed):
                found.append(Comparison(row, line, then, now, Verdict.FAILED, math.nan, math.nan))
    return found


def verdict(before: BenchResult, after: BenchResult, threshold: float = THRESHOLD) -> Verdict:
    """See the top of this file."""
    return judge(before, after, threshold)[0]


def judge(before: BenchResult, after: BenchResult, threshold: float = THRESHOLD) -> tuple[Verdict, str]:
    """The verdict and, where it is AMBIGUOUS, why."""
    for name, result in (("A", before), ("B", after)):
        if len(result.rounds) < _MIN_ROUNDS:
            return Verdict.AMBIGUOUS, f"{name} has {len(result.rounds)} of the {_MIN_ROUNDS} rounds that are needed"
        if throttled := next((note for note in result.notes if "throttled" in note), None):
            return Verdict.AMBIGUOUS, f"{name}: {throttled}"
    difference, noise = interval(before, after)
    if difference - noise > threshold:
        return Verdict.SLOWER, ""
    if difference + noise < -threshold:
        return Verdict.FASTER, ""
    if abs(difference) + noise <= threshold:
        return Verdict.SAME, ""
    crossed = threshold if difference + noise > threshold else -threshold
    return Verdict.AMBIGUOUS, f"{difference - noise:+.1%} to {difference + noise:+.1%} reaches across {crossed:+.1%}"


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
    """For a table: row, implementation, both figures, difference with noise, verdict, why it is ambiguous."""
    rows = []
    for c in comparisons:
        figures = [
            f"{r.seconds / UNITS[unit]:.4g}" if isinstance(r, BenchResult) else "error" for r in (c.before, c.after)
        ]
        difference = "" if math.isnan(c.difference) else f"{c.difference:+.1%} +-{c.noise:.1%}"
        rows.append([str(c.row), c.line, *figures, difference, c.verdict.value, c.why])
    return rows
