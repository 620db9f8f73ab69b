"""torch.compile inside the mode: Inductor calls the patched operators instead of generating code for them.

Inductor's own reductions and GEMMs choose a schedule by the shape of the batch. Entering or leaving the mode also
discards compiled code, so that code compiled outside the mode is not used inside, nor the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

FALLBACK_OPERATORS = ("mm", "mm.dtype", "addmm", "_softmax", "_log_softmax", "mean.dim")
BMM_FALLBACK_OPERATORS = ("bmm", "baddbmm")
# torch defines these by the operators above, but Inductor's tables decompose them in another way.
_COMPOSITE_OPERATORS = ("softmax.int", "log_softmax.int")


@contextmanager
def inductor_fallbacks(bmm: bool) -> Iterator[None]:
    """Make Inductor call the patched operators until the end of the `with` block.

    Args:
        bmm: include `bmm` and `baddbmm`.
    """
    import torch._inductor.config as config  # takes a second
    from torch._inductor import compile_fx, decomposition, lowering

    operators = _overloads((*FALLBACK_OPERATORS, *(BMM_FALLBACK_OPERATORS if bmm else ())))
    tables: tuple[tuple[Any, dict[Any, Any]], ...] = (
        (decomposition.decompositions, dict.fromkeys((*operators, *_overloads(_COMPOSITE_OPERATORS)))),
        (lowering.lowerings, {op: lowering.fallback_handler(op, add_to_fallback_set=False) for op in operators}),
    )
    # The keys of caches on disk do not contain the mode. Patterns pad GEMMs by the shape of the batch, and replace
    # math attention by flash attention.
    settings = {"force_disable_caches": True, "pattern_matcher": False}
    entries_before = [{op: table[op] for op in entries if op in table} for table, entries in tables]
    settings_before = {name: getattr(config, name) for name in settings}
    compile_before = compile_fx.compile_fx

    def compile_with_settings(*args: Any, **kwargs: Any) -> Any:
        with config.patch(settings):  # from torch 2.12 on, each thread has settings of its own
            return compile_before(*args, **kwargs)

    try:
        for table, entries in tables:
            _update(table, entries)
        _set(config, settings)
        compile_fx.compile_fx = compile_with_settings
        _discard_compiled_code()
        yield
    finally:
        compile_fx.compile_fx = compile_before
        for (table, entries), before in zip(tables, entries_before, strict=True):
            _update(table, {op: before.get(op) for op in entries})
        _set(config, settings_before)
        _discard_compiled_code()


def _overloads(names: Iterable[str]) -> list[Any]:
    """Return the ATen operators of these names, without those that an older torch lacks, such as mm.dtype."""
    parts = (name.partition(".") for name in names)
    overloads = (getattr(getattr(torch.ops.aten, op), overload or "default", None) for op, _, overload in parts)
    return [overload for overload in overloads if overload is not None]


def _update(table: Any, entries: dict[Any, Any]) -> None:
    """Set the entries of a table, and remove those that are None."""
    for op, entry in entries.items():
        if entry is None:
            table.pop(op, None)
        else:
            table[op] = entry


def _set(config: Any, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        setattr(config, name, value)


def _discard_compiled_code() -> None:
    from torch._inductor import decomposition

    decomposition.fast_random_decomps.cache_clear()  # it caches a copy of the table
    torch._dynamo.reset()
