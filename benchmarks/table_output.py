"""Share the command line and the tables of the scripts that are not benchmark files: `--format table|json`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from tabulate import tabulate


def create_parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser with `--format`, described by the first sentence of a script's docstring."""
    parser = argparse.ArgumentParser(description=doc.partition("\n\n")[0])
    parser.add_argument("--format", choices=["table", "json"], default="table", help="for people or for programs")
    return parser


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], output_format: str) -> None:
    """Print a table of text and numbers, or one line of JSON with `title`, `columns` and `rows`."""
    if output_format == "json":
        print(json.dumps({"title": title, "columns": columns, "rows": rows}), flush=True)
    else:
        text = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
        alignment = ["left", *["right"] * (len(columns) - 1)]
        table = tabulate(text, columns, tablefmt="simple", disable_numparse=True, colalign=alignment)
        print(f"\n{title}\n{table}", flush=True)
