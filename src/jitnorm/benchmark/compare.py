"""Compare results: two runs of one benchmark, and one implementation with the others of a run.

The verdict on two runs comes from an interval: the relative difference of the two estimates, widened on both sides by
their noises, added in squares. An interval wholly beyond the threshold means SLOWER or FASTER, one wholly within it
SAME. AMBIGUOUS is everything else: an interval across the threshold, fewer than three rounds, or throttled clocks. The
threshold, 2%, allows for what two stable runs differ by, such as the placement of memory, which no number of rounds
within one run can show.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from jitnorm.benchmark.results import COPIES, COPY, ROW_COPY, UNITS, BenchResult, Cell, Failed, Report, Row

THRESHOLD = 0.02
LARGE_TRAFFIC = 100e6  # bytes read and written: more than any cache holds
_MIN_ROUNDS = 3
_IGNORED_KEYS = ("commit", "clocks", "jitnorm")  # may differ between machines that are compared


class Verdict(str, enum.Enum):
    """The outcome of a comparison."""

    SAME = "SAME"
    FASTER = "FASTER"
    SLOWER = "SLOWER"
    AMBIGUOUS = "AMBIGUOUS"
    FAILED = "FAILED"  # a result before, an exception now


@dataclass(frozen=True)
class Comparison:
    """One cell in two runs.

    Attributes:
        difference: of the estimates, relative: 0.05 for 5% slower. NaN where there is no estimate.
        noise: how far `difference` may be off.
        why: why the verdict is AMBIGUOUS, else empty.
    """

    row: Row
    line: str
    before: Cell
    after: Cell
    verdict: Verdict
    difference: float
    noise: float
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data: times in seconds, None for what is unknown."""
        before, after = (r.seconds if isinstance(r, BenchResult) else None for r in (self.before, self.after))
        known = not math.isnan(self.difference)
        return {
            "row": self.row.point,
            "impl": self.line,
            "before": before,
            "after": after,
            "difference": self.difference if known else None,
            "noise": self.noise if known and math.isfinite(self.noise) else None,
            "verdict": self.verdict.value,
            "why": self.why,
        }


def compare(a: Report, b: Report, threshold: float = THRESHOLD) -> list[Comparison]:
    """Return a comparison for each cell of `b` that has a result in `a`.

    Raises:
        ValueError: the threshold is negative or not finite.
    """
    if not 0 <= threshold < math.inf:
        raise ValueError(f"threshold must be a finite number and 0 or more, got {threshold:g}")
    rows = {str(row): row for row in a.rows}
    comparisons = []
    for row, line, after in b.cells():
        before = rows[str(row)].cells.get(line) if str(row) in rows else None
        if isinstance(before, BenchResult):
            if isinstance(after, BenchResult):
                decided, why = judge(before, after, threshold)
                comparisons.append(Comparison(row, line, before, after, decided, *interval(before, after), why))
            elif isinstance(after, Failed):
                comparisons.append(Comparison(row, line, before, after, Verdict.FAILED, math.nan, math.nan))
    return comparisons


def judge(before: BenchResult, after: BenchResult, threshold: float = THRESHOLD) -> tuple[Verdict, str]:
    """Return the verdict and, where it is AMBIGUOUS, the reason."""
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
    """Return the relative difference of the estimates, and how far it may be off."""
    ratio = after.seconds / before.seconds
    return ratio - 1, ratio * math.hypot(before.noise, after.noise)


def differing_conditions(a: Report, b: Report) -> list[str]:
    """Return a warning for each condition that differs: the machine, versions, settings."""
    warnings = []
    for name in ("machine", "settings"):
        before, after = getattr(a, name), getattr(b, name)
        for key in dict.fromkeys([*before, *after]):
            if key not in _IGNORED_KEYS and before.get(key) != after.get(key):
                warnings.append(f"{key} differs: {before.get(key)} and {after.get(key)}")
    return warnings


def comparison_rows(comparisons: list[Comparison], unit: str) -> list[list[str]]:
    """Return table rows: row, implementation, both estimates, difference with noise, verdict, reason."""
    rows = []
    for c in comparisons:
        times = [
            f"{r.seconds / UNITS[unit]:.4g}" if isinstance(r, BenchResult) else "error" for r in (c.before, c.after)
        ]
        difference = "" if math.isnan(c.difference) else f"{c.difference:+.1%} +-{c.noise:.1%}"
        rows.append([str(c.row), c.line, *times, difference, c.verdict.value, c.why])
    return rows


@dataclass(frozen=True)
class PeerSummary:
    """The first implementation of a report, compared with the other implementations and with copies.

    Attributes:
        subject: the implementation.
        vs_best: its time over the best time of the others, for each row where there is one.
        vs_copy: its time over the copy's, for each row that moves more than LARGE_TRAFFIC.
        vs_row_copy: likewise over ROW_COPY's, where that was measured.
    """

    subject: str
    vs_best: list[tuple[float, Row]]
    vs_copy: list[tuple[float, Row]]
    vs_row_copy: list[tuple[float, Row]]

    def __str__(self) -> str:
        lines = []
        if self.vs_best:
            worst, row = max(self.vs_best, key=lambda pair: pair[0])
            won = sum(ratio < 1 for ratio, _ in self.vs_best)
            lines.append(
                f"{self.subject} is faster than every other on {won} of {len(self.vs_best)} rows; "
                f"at worst it takes {worst:.3f} of the best's time, at {row}"
            )
        if self.vs_copy:
            lines.append(f"above 100 MB of traffic it takes {format_range(self.vs_copy)} of the copy's time")
        if self.vs_row_copy:
            lines.append(
                f"there it takes {format_range(self.vs_row_copy)} of the time of a copy with as narrow accesses"
            )
        return "\n".join(lines)


def format_range(ratios: Iterable[tuple[float, Row]]) -> str:
    """Return "0.991 to 1.002", or the one ratio if there is only one."""
    ordered = sorted(ratio for ratio, _ in ratios)
    return " to ".join(dict.fromkeys(f"{ratio:.3f}" for ratio in (ordered[0], ordered[-1])))


def summarize_peers(report: Report) -> PeerSummary | None:
    """Return the summary of a report; None where there is nothing to compare with."""
    subject = next((line for line in report.lines if line not in COPIES), None)
    if subject is None:
        return None
    vs_copy, vs_row_copy = ([*_ratios_to_copy(report, subject, copy)] for copy in (COPY, ROW_COPY))
    summary = PeerSummary(subject, [*_ratios_to_best(report, subject)], vs_copy, vs_row_copy)
    return summary if summary.vs_best or summary.vs_copy else None


def _ratios_to_best(report: Report, subject: str) -> Iterator[tuple[float, Row]]:
    for row in report.rows:
        results = row.results()
        others = [result.seconds for line, result in results.items() if line not in (*COPIES, subject)]
        if subject in results and others:
            yield results[subject].seconds / min(others), row


def _ratios_to_copy(report: Report, subject: str, copy: str) -> Iterator[tuple[float, Row]]:
    for row in report.rows:
        results = row.results()
        if subject in results and copy in results and results[subject].memory_footprint > LARGE_TRAFFIC:
            yield results[subject].seconds / results[copy].seconds, row
