"""How one implementation stands among the others of a run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from jitnorm.benchmark.report import COPY, Report, Row

LARGE = 100e6  # bytes read and written: more than any cache holds


@dataclass(frozen=True)
class Standing:
    """Of the first implementation of a report."""

    subject: str
    to_best: list[tuple[float, Row]]  # its time over the best of the others', where there is one
    to_copy: list[tuple[float, Row]]  # its time over the copy's, where more than LARGE bytes are moved

    def __str__(self) -> str:
        lines = []
        if self.to_best:
            worst, row = max(self.to_best, key=lambda pair: pair[0])
            won = sum(ratio < 1 for ratio, _ in self.to_best)
            lines.append(
                f"{self.subject} is faster than every other on {won} of {len(self.to_best)} rows; "
                f"at worst it takes {worst:.3f} of the best's time, at {row}"
            )
        if self.to_copy:
            lines.append(f"above 100 MB of traffic it takes {span(self.to_copy)} of the copy's time")
        return "\n".join(lines)


def span(ratios: Iterable[tuple[float, Row]]) -> str:
    """ "0.991 to 1.002", or the one that there is."""
    ordered = sorted(ratio for ratio, _ in ratios)
    return " to ".join(dict.fromkeys(f"{ratio:.3f}" for ratio in (ordered[0], ordered[-1])))


def standing(report: Report) -> Standing | None:
    """None where there is nothing to compare."""
    subject = next((line for line in report.lines if line != COPY), None)
    if subject is None:
        return None
    found = Standing(subject, [*_to_best(report, subject)], [*_to_copy(report, subject)])
    return found if found.to_best or found.to_copy else None


def _to_best(report: Report, subject: str) -> Iterator[tuple[float, Row]]:
    for row in report.rows:
        results = row.results()
        others = [result.seconds for line, result in results.items() if line not in (COPY, subject)]
        if subject in results and others:
            yield results[subject].seconds / min(others), row


def _to_copy(report: Report, subject: str) -> Iterator[tuple[float, Row]]:
    for row in report.rows:
        results = row.results()
        if subject in results and COPY in results and results[subject].memory_footprint > LARGE:
            yield results[subject].seconds / results[COPY].seconds, row
