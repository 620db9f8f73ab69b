"""The grid that the decorators describe, and the part of it that was asked for."""

from __future__ import annotations

import inspect
import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@dataclass(frozen=True)
class Axis:
    """One axis or, for names such as "a,b", several that go together."""

    names: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]
    short: tuple[tuple[Any, ...], ...]  # what CI uses

    @classmethod
    def of(cls, names: str, values: Sequence[Any], short: Sequence[Any] | None) -> Axis:
        if not isinstance(names, str):
            raise TypeError(f'an axis is named by a string such as "head_dim" or "q_heads,kv_heads", got {names!r}')
        split = tuple(name.strip() for name in names.split(","))
        return cls(split, _tuples(split, values), _tuples(split, values if short is None else short))

    def points(self, full: bool) -> Iterator[dict[str, Any]]:
        for value in self.values if full else self.short:
            yield dict(zip(self.names, value, strict=True))


def _tuples(names: tuple[str, ...], values: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"the values of the axis {','.join(names)!r} must be a list, got {type(values).__name__}")
    tuples = tuple((value,) if len(names) == 1 else tuple(value) for value in values)
    for value in tuples:
        if len(value) != len(names):
            raise ValueError(f"the axis {','.join(names)!r} takes {len(names)} values together, got {value}")
    return tuples


def parameters(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(fn).parameters)


def check_taken(fn: Callable[..., Any], new: Sequence[str], already: Sequence[str]) -> None:
    """Raises for axes that the function does not take, or has already."""
    for name in new:
        if name not in parameters(fn):
            raise TypeError(f"{fn.__name__}() takes no {name!r}: it has {', '.join(parameters(fn)) or 'no parameters'}")
        if name in already:
            raise TypeError(f"{fn.__name__}() has the axis {name!r} twice")


def check_complete(fn: Callable[..., Any], axes: Sequence[str]) -> None:
    """Raises for parameters that no axis gives."""
    for name, parameter in parameters(fn).items():
        if name not in axes and parameter.default is inspect.Parameter.empty:
            raise TypeError(f"no axis gives {fn.__name__}() its {name!r}: the axes are {', '.join(axes)}")


def points(axes: Sequence[Axis], full: bool, filters: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Every combination of the axes' values that all filters accept."""
    names = [name for axis in axes for name in axis.names]
    conditions = [condition(text, names)[1] for text in filters]
    grid = itertools.product(*(list(axis.points(full)) for axis in axes))
    merged = ({name: value for part in parts for name, value in part.items()} for parts in grid)
    return [point for point in merged if all(holds(point) for holds in conditions)]


def condition(text: str, names: Sequence[str]) -> tuple[str, Callable[[dict[str, Any]], bool]]:
    """The axis and the test of "num_tokens>=64" or "op=rmsnorm,gemma_rmsnorm"; commas mean any of them."""
    match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|!=|==?|<|>)\s*(\S.*?)\s*", text)
    if not match or match[1] not in names:
        raise ValueError(f"{text!r} is not a filter such as 'num_tokens>=64': the axes are {', '.join(names)}")
    name, sign, value = match.groups()
    if sign in ("=", "==", "!="):
        wanted = {word.strip() for word in value.split(",")}
        return name, lambda point: (str(point[name]) in wanted) == (sign != "!=")
    try:
        bound = float(value)
    except ValueError as error:
        raise ValueError(f"{text!r}: {sign} needs a number") from error
    return name, lambda point: bool(_COMPARISONS[sign](point[name], bound))
