"""What a run found, as data: rows of cells, to JSON and back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from jitnorm.benchmark.result import BenchResult

FORMAT = 1
COPY = "copy"  # the line that the framework adds
UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_DIGITS = 5  # of a sample in JSON: a tenth of what the quietest of them vary by


@dataclass(frozen=True)
class Skipped:
    """N/A, and why."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """The exception that a cell ended with."""

    message: str


Cell: TypeAlias = BenchResult | Skipped | Failed


@dataclass
class Row:
    point: dict[str, Any]
    cells: dict[str, Cell] = field(default_factory=dict)

    def results(self) -> dict[str, BenchResult]:
        return {line: cell for line, cell in self.cells.items() if isinstance(cell, BenchResult)}

    def __str__(self) -> str:
        return ", ".join(f"{axis}={value}" for axis, value in self.point.items()) or "the only row"


@dataclass
class Report:
    name: str
    unit: str
    axes: list[str]
    lines: list[str]  # the names that stand side by side, copy first where it was measured
    rows: list[Row] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return any(isinstance(cell, Failed) for _, _, cell in self.cells())

    def cells(self) -> Iterator[tuple[Row, str, Cell]]:
        return ((row, line, cell) for row in self.rows for line, cell in row.cells.items())

    def to_json(self) -> str:
        """With every sample, in seconds; a cell on a line."""
        head = {"format": FORMAT, **{name: value for name, value in vars(self).items() if name != "rows"}}
        rows = []
        for row in self.rows:
            cells = [f"    {json.dumps(line)}: {json.dumps(_to_data(cell))}" for line, cell in row.cells.items()]
            point = json.dumps(row.point, default=str)
            rows.append(f'  {{"point": {point}, "cells": {{\n' + ",\n".join(cells) + "\n  }}")
        start = json.dumps(head, indent=1, default=str).removesuffix("\n}")
        return f'{start},\n "rows": [\n' + ",\n".join(rows) + "\n ]\n}\n"

    @classmethod
    def read(cls, path: Path) -> Report:
        """From a file that `to_json` wrote. ValueError for any other."""
        try:
            data = json.loads(path.read_text())
            if data.pop("format") != FORMAT:
                raise ValueError("of another format")
            rows = [
                Row(dict(row["point"]), {line: _to_cell(cell) for line, cell in row["cells"].items()})
                for row in data.pop("rows")
            ]
            report = cls(**data, rows=rows)
            if not (isinstance(report.name, str) and report.unit in UNITS):
                raise ValueError("without a name and a unit")
            if not (isinstance(report.machine, dict) and isinstance(report.settings, dict)):
                raise ValueError("without the machine and the settings")
            return report
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} was not written by a benchmark's --json") from error


def _to_data(cell: Cell) -> dict[str, Any]:
    if not isinstance(cell, BenchResult):
        return {type(cell).__name__.lower(): asdict(cell).popitem()[1]}
    return {
        "metrics": cell.metrics,
        "times": cell.times,
        "memory_footprint": cell.memory_footprint,
        "rounds": [[float(f"{sample:.{_DIGITS}g}") for sample in samples] for samples in cell.rounds],
        "error": cell.error,
        "notes": cell.notes,
    }


def _to_cell(data: dict[str, Any]) -> Cell:
    if "skipped" in data:
        return Skipped(data["skipped"])
    if "failed" in data:
        return Failed(data["failed"])
    data = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    result = BenchResult(**data | {"rounds": tuple(map(tuple, data["rounds"]))})
    # What figures are made of: a division by zero, say, is met here rather than later.
    numbers = [*(sample for samples in result.rounds for sample in samples), *result.times]
    if not (all(result.rounds) and numbers and all(isinstance(n, (int, float)) and float(n) > 0 for n in numbers)):
        raise ValueError("times that are none")
    if not math.isfinite(sum(numbers)) or not result.seconds:
        raise ValueError("times without a figure")
    if not all(isinstance(note, str) for note in result.notes):
        raise ValueError("notes that are none")
    return result
