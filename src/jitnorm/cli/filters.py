"""The options that select kernels: conditions such as `size>1MB` and `arch=sm_90a`, ages and sizes."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import click

from jitnorm.benchmark.options import split_filter

if TYPE_CHECKING:
    from jitnorm.cli.kernels import CachedKernel

Filter = Callable[["CachedKernel"], bool]

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_POWERS = "bkmgt"
_NUMBER = r"([0-9]{1,30}(?:\.[0-9]{1,30})?)"
_MAX_BYTES = 1 << 63
_MAX_DAYS = 36500
_WILDCARD = re.compile(r"[*?\[]")
# For each field: a pattern for values without wildcards, how a value with wildcards may begin, and what is accepted.
_TEXT_FIELDS = {
    "name": (r"\w+", (), "a kernel's name such as rmsnorm_4096_bf16, or a pattern such as rmsnorm_*"),
    "op": (r"\w+", (), "an operator"),
    "arch": (
        r"sm_\d{2,3}[af]?|cpu_\w+",
        ("sm_", "cpu_"),
        "such as sm_90a, sm_120 or cpu_x86_64, or a pattern such as sm_*",
    ),
    "device": (r"cuda|cpu", ("cuda", "cpu"), "cuda or cpu"),
}


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "500MB" (powers of 1000), "1.5GiB" (of 1024) or "300".

    Raises:
        ValueError: it is no such size.
    """
    match = re.fullmatch(_NUMBER + r"\s*([kmgt]?)(i?)b?", text.strip().lower())
    if not match or (match[3] and not match[2]):
        raise ValueError(f"{_shown(text)} is not a size such as 10KB, 500MB or 1GiB")
    count = Fraction(match[1]) * (1024 if match[3] else 1000) ** _POWERS.index(match[2] or "b")
    if count >= _MAX_BYTES:
        raise ValueError(f"{_shown(text)} is more than a file system can hold")
    return int(count)


def parse_age(text: str) -> float:
    """Return the seconds of an age such as "45m", "12h", "30d" or "2w".

    Raises:
        ValueError: it is no such age.
    """
    match = re.fullmatch(_NUMBER + r"\s*([smhdw])", text.strip().lower())
    if not match:
        raise ValueError(f"{_shown(text)} is not an age such as 45m, 12h, 30d or 2w")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds > _MAX_DAYS * _SECONDS["d"]:
        raise ValueError(f"{_shown(text)} is more than {_MAX_DAYS} days")
    return seconds


def parse_filter(text: str) -> Filter:
    """Return the condition of a text such as "size>1MB", "name=rmsnorm_*" or "device!=cpu".

    Raises:
        ValueError: it is no such condition, or no kernel can have the value.
    """
    if expression := split_filter(text):
        field, value = expression.name, expression.value
        if field == "size":
            bound = parse_size(value)
            return lambda kernel: expression.compare(kernel.size, bound)
        if field in _TEXT_FIELDS and expression.is_equality:
            _check_value(field, value)
            return lambda kernel: expression.compare(fnmatch.fnmatchcase(getattr(kernel, field), value), True)
    raise ValueError(
        f"{_shown(text)} is not a filter: use size with > < >= <= = !=, or {', '.join(_TEXT_FIELDS)} with = and !="
    )


def _check_value(field: str, value: str) -> None:
    """Raise ValueError for a value that no kernel's `field` can have: such a filter would select none, or all."""
    pattern, starts, accepted = _TEXT_FIELDS[field]
    start = _WILDCARD.split(value)[0]
    if start != value:
        if starts and not any(known.startswith(start) or start.startswith(known) for known in starts):
            raise ValueError(f"{field} must be {accepted}, got {_shown(value)}")
    elif not re.fullmatch(pattern, value):
        raise ValueError(f"{field} must be {accepted}, got {_shown(value)}")
    elif field == "op":
        from jitnorm.warmup import OPS  # here, as it imports torch

        if value not in OPS:
            close = difflib.get_close_matches(value, OPS, n=1)
            hint = f": did you mean {close[0]}?" if close else f": use one of {', '.join(OPS)}"
            raise ValueError(
                f"{_shown(value)} is not an operator with kernels{hint} (a pattern such as {value}* is not checked)"
            )


def _shown(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def _parsed(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Return an option's callback, which turns a ValueError of `parse` into a usage error."""

    def callback(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        try:
            if isinstance(value, tuple):
                return tuple(parse(v) for v in value)
            return None if value is None else parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error), ctx, param) from None

    return callback


filter_option = click.option(
    "--filter",
    "filters",
    metavar="CONDITION",
    multiple=True,
    callback=_parsed(parse_filter),
    help="Select kernels by size, name, op, arch or device: 'size>1MB', 'name=rmsnorm_*', 'arch=sm_90a'. "
    "Several of these options must all apply.",
)
older_than_option = click.option(
    "--older-than",
    metavar="AGE",
    callback=_parsed(parse_age),
    help="Select kernels that no process has loaded for this long: 12h, 30d, 2w.",
)
max_size_option = click.option(
    "--max-size",
    metavar="SIZE",
    callback=_parsed(parse_size),
    help="Remove the least recently used kernels until the rest takes no more than this: 500MB, 1GiB.",
)


def select(
    kernels: Sequence[CachedKernel], filters: Sequence[Filter], older_than: float | None, now: float
) -> list[CachedKernel]:
    """Return the kernels that meet every condition."""
    old = [kernel for kernel in kernels if older_than is None or now - kernel.last_used > older_than]
    return [kernel for kernel in old if all(condition(kernel) for condition in filters)]
