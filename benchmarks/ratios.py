"""How each implementation of a result stands to one of them: geometric mean and worst of the other's time over its own.

    python benchmarks/ratios.py benchmarks/results/matmul_h200.json torch

1 is as fast, 0.5 takes twice the time. "best" stands for the fastest of all but the first and the copy.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from jitnorm.benchmark.results import COPY, Report


def ratios(report: Report, reference: str) -> None:
    lines = [line for line in report.lines if line not in (COPY, reference)]
    for line in lines if reference != "best" else lines[:1]:
        found = []
        for row in report.rows:
            times = {name: result.seconds for name, result in row.results().items() if name != COPY}
            own = times.get(line)
            others = [t for name, t in times.items() if name == reference or (reference == "best" and name != line)]
            if own and others:
                found.append((min(others) / own, row))
        if found:
            worst, row = min(found, key=lambda pair: pair[0])
            mean = math.exp(sum(math.log(ratio) for ratio, _ in found) / len(found))
            print(f"{line} to {reference}: {mean:.3f} on {len(found)} rows, at worst {worst:.3f}, at {row}")


if __name__ == "__main__":
    ratios(Report.read(Path(sys.argv[1])), sys.argv[2])
