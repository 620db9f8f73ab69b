"""torch.compile inside the mode: Inductor calls the overridden operators whole, instead of writing its own code.

Its own reductions and products choose a schedule by the shape of the batch. And code remembers how it was compiled, so
what was compiled outside the mode is not used inside, nor the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

WHOLE = ("mm", "mm.dtype", "addmm", "_softmax", "_log_softmax", "mean.dim")
WHOLE_BMM = ("bmm", "baddbmm")
# Made of the others by torch itself, which Inductor's tables would write out in another way.
_COMPOSITE = ("softmax.int", "log_softmax.int")


@contextmanager
def operators_kept_whole(bmm: bool) -> Iterator[None]:
    import torch._inductor.config as config
    from torch._inductor import compile_fx, decomposition, lowering

    whole = _operators((*WHOLE, *(WHOLE_BMM if bmm else ())))
    tables: tuple[tuple[Any, dict[Any, Any]], ...] = (
        (decomposition.decompositions, dict.fromkeys((*whole, *_operators(_COMPOSITE)))),
        (lowering.lowerings, {op: lowering.fallback_handler(op, add_to_fallback_set=False) for op in whole}),
    )
    # Caches on disk know nothing of the mode. Patterns pad products by the shape of the batch, and put flash attention
    # in the place of composed attention.
    settings = {"force_disable_caches": True, "pattern_matcher": False}
    before = [{op: table[op] for op in new if op in table} for table, new in tables]
    settings_before = {name: getattr(config, name) for name in settings}
    compile_before = compile_fx.compile_fx

    def compile_with_settings(*arguments: Any, **keywords: Any) -> Any:
        with config.patch(settings):  # from torch 2.12 on, a thread has settings of its own
            return compile_before(*arguments, **keywords)

    try:
        for table, new in tables:
            _put(table, new)
        _set(config, settings)
        compile_fx.compile_fx = compile_with_settings
        _forget_compiled_code()
        yield
    finally:
        compile_fx.compile_fx = compile_before
        for (table, new), old in zip(tables, before, strict=True):
            _put(table, {op: old.get(op) for op in new})
        _set(config, settings_before)
        _forget_compiled_code()


def _operators(names: Iterable[str]) -> list[Any]:
    """Those that this torch has: mm.dtype is younger than the oldest that the package takes."""
    parts = (name.partition(".") for name in names)
    found = (getattr(getattr(torch.ops.aten, op), overload or "default", None) for op, _, overload in parts)
    return [operator for operator in found if operator is not None]


def _put(table: Any, entries: dict[Any, Any]) -> None:
    for op, entry in entries.items():
        if entry is None:
            table.pop(op, None)
        else:
            table[op] = entry


def _set(config: Any, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(config, name, value)


def _forget_compiled_code() -> None:
    from torch._inductor import decomposition

    decomposition.fast_random_decomps.cache_clear()  # a copy of the table
    torch._dynamo.reset()
