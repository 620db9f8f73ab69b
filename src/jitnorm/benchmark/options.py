"""What the command lines of benchmark files and `jitnorm` share: `--format` and expressions for `--filter`.

This module imports no torch, because `jitnorm cache ls` does without.
"""

from __future__ import annotations

import operator
import re
from typing import Any, NamedTuple

import click

_COMPARISONS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
}
_EXPRESSION = re.compile(r"\s*(\w+)\s*(<=|>=|!=|==?|<|>)\s*(\S.*?)\s*")

format_option = click.option(
    "--format",
    "output_format",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="Print a table for people, or JSON for programs.",
)


class FilterExpression(NamedTuple):
    """A filter such as `size>1MB` or `op=rmsnorm`, split into its parts."""

    name: str
    sign: str
    value: str

    @property
    def is_equality(self) -> bool:
        """Return whether it names values, rather than a bound."""
        return self.sign in ("=", "==", "!=")

    def compare(self, found: Any, expected: Any) -> bool:
        """Return whether the sign is true of `found` and `expected`."""
        return bool(_COMPARISONS[self.sign](found, expected))


def split_filter(text: str) -> FilterExpression | None:
    """Return the parts of a filter, or None if the text is not one."""
    match = _EXPRESSION.fullmatch(text)
    return FilterExpression(*match.groups()) if match else None
