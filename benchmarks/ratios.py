"""Compare the implementations of a result file with one of them, by its time over theirs.

    python benchmarks/ratios.py benchmarks/results/matmul_h200.json torch

A ratio of 1 is as fast, 0.5 takes twice the time. The reference "best" compares the first implementation with the
fastest of the others. Copies are left out.
"""

from __future__ import annotations

import math
from pathlib import Path

from table_output import create_parser, print_table

from jitnorm.benchmark.results import COPIES, Report

COLUMNS = ["implementation", "geometric mean", "rows", "worst", "worst row"]


def ratio_rows(report: Report, reference: str) -> list[list[object]]:
    """Return COLUMNS for each implementation that has rows in common with the reference."""
    lines = [line for line in report.lines if line not in (*COPIES, reference)]
    rows: list[list[object]] = []
    for line in lines if reference != "best" else lines[:1]:
        ratios = []
        for row in report.rows:
            times = {name: result.seconds for name, result in row.results().items() if name not in COPIES}
            own = times.get(line)
            others = [t for name, t in times.items() if name == reference or (reference == "best" and name != line)]
            if own and others:
                ratios.append((min(others) / own, row))
        if ratios:
            worst, worst_row = min(ratios, key=lambda pair: pair[0])
            mean = math.exp(sum(math.log(ratio) for ratio, _ in ratios) / len(ratios))
            rows.append([line, mean, len(ratios), worst, str(worst_row)])
    return rows


def main() -> None:
    parser = create_parser(__doc__)
    parser.add_argument("file", type=Path, help="written by --output of a benchmark")
    parser.add_argument("reference", help='an implementation, or "best"')
    options = parser.parse_args()
    try:
        report = Report.read(options.file)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.reference not in (*report.lines, "best"):
        parser.error(f"reference must be best or one of {', '.join(report.lines)}, got {options.reference!r}")
    rows = ratio_rows(report, options.reference)
    print_table(f"time of {options.reference} over the implementation's", COLUMNS, rows, options.format)


if __name__ == "__main__":
    main()
