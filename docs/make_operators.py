"""Writes docs/operators.md: one table of every operator's signature, arguments and errors, from their docstrings.

    python docs/make_operators.py

An operator is a public function of the package that torch.ops.jitnorm has under the same name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path

import torch

import jitnorm

PAGE = Path(__file__).parent / "operators.md"

_HEAD = """\
# Operators

Every operator, for CUDA and the CPU: its signature, the shapes, dtypes, sizes and strides that its arguments may have,
and what is raised for others, before anything is built, written or launched. Made from the code by `python
docs/make_operators.py`.

| operator | arguments | raises |
|---|---|---|
"""


def operators() -> dict[str, Callable[..., object]]:
    """By name, in the order of the alphabet."""
    public = ((name, getattr(jitnorm, name)) for name in sorted(jitnorm.__all__))
    return {name: value for name, value in public if inspect.isfunction(value) and hasattr(torch.ops.jitnorm, name)}


def page() -> str:
    return _HEAD + "".join(f"| {' | '.join(_cells(name, each))} |\n" for name, each in operators().items())


def _cells(name: str, operator: Callable[..., object]) -> list[str]:
    """Signature and first line, arguments, errors."""
    sections = _sections(inspect.getdoc(operator) or "")
    arguments, errors = (_entries(sections.get(title, "")) for title in ("Args", "Raises"))
    if missing := set(inspect.signature(operator).parameters) ^ set(arguments):
        raise ValueError(f"the docstring of {name} and its signature differ in {', '.join(sorted(missing))}")
    if not errors:
        raise ValueError(f"the docstring of {name} does not say what is raised")
    signature = f"`{name}{inspect.signature(operator)}`".replace("'", "").replace("torch.", "")
    summary = " ".join(sections[""].partition("\n\n")[0].split())
    cells = [
        f"{signature}<br>{summary}",
        "<br>".join(f"`{argument}`: {text}" for argument, text in arguments.items()),
        "<br>".join(f"{error}: {text}" for error, text in errors.items()),
    ]
    return [cell.replace("|", "\\|") for cell in cells]


def _sections(docstring: str) -> dict[str, str]:
    """What comes under each heading; under "" what comes before them."""
    parts = re.split(r"^(\w+):\n(?=    )", docstring, flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))


def _entries(section: str) -> dict[str, str]:
    """`name: words`, which may go on in lines that are further in."""
    entries = re.split(r"^    (?! )", section, flags=re.MULTILINE)[1:]
    split = (" ".join(entry.split()).partition(": ") for entry in entries)
    return {name: text for name, _, text in split}


if __name__ == "__main__":
    PAGE.write_text(page())
