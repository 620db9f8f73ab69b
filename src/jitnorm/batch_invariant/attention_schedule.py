"""Which keys a program of triton_attention.py goes through."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

MOST_PIECES = 32  # of a sequence's keys


class Schedule(NamedTuple):
    """What a program does; benchmarks/tune_attention.py tries others. All but `run` shows in the bits."""

    leaf: int  # keys that are summed in their order
    run: int  # keys of a program: `leaf` times a power of two, up to 2**tree_levels; no more than MOST_PIECES of them
    block: int  # keys at a time
    warps: int
    stages: int


@functools.lru_cache(1024)
def choose_schedule(rows: int, keys: int, head_dim: int, groups: int, processors: int) -> Schedule:
    """By the queries of a group of heads, the keys, and the larger head_dim; the run by the GPU's multiprocessors and
    the groups of all sequences besides."""
    levels = tree_levels(rows, head_dim)
    # Short leaves let one sequence fill the GPU, but what ends a leaf takes as long as 32 keys. What a run leaves to
    # be added is as long as it has rows.
    least = max(128, 8 * rows, _ceil_div(keys, MOST_PIECES << levels))
    leaf = _power_of_2(max(least, min(512, _ceil_div(keys, 8))))
    groups *= _ceil_div(rows, rows_of(rows, head_dim))
    costs = {}
    for run in (leaf << level for level in range(levels + 1)):
        pieces = _ceil_div(keys, run)
        if pieces <= MOST_PIECES:
            costs[run] = _cost(leaf, run, pieces, groups * pieces / processors)
    return Schedule(leaf, min(costs, key=costs.__getitem__), 64 if head_dim <= 128 else 32, 4, 3)


def _cost(leaf: int, run: int, pieces: int, programs: float) -> float:
    """The time, in keys that a multiprocessor goes through in it, of so many programs each. Measured on an H200, whose
    multiprocessors hold two at a time; one alone waits for its additions more than for its keys."""
    time = math.ceil(programs / 2) * run * max(1.05 + 32 / leaf, min(programs, 2.0))
    return time + 45 * programs + (150 if pieces > 1 else 0)


def rows_of(rows: int, head_dim: int) -> int:
    """Rows of a program."""
    return min(64 if head_dim <= 128 else 32, max(16, _power_of_2(rows)))


def tree_levels(rows: int, head_dim: int) -> int:
    """Of the tree, at most, in a program: each takes as many registers as the result."""
    size = rows_of(rows, head_dim) * _power_of_2(head_dim)
    return 3 if size <= 2048 else 2 if size <= 4096 else 0


def _ceil_div(number: int, by: int) -> int:
    return -(-number // by)


def _power_of_2(number: int) -> int:
    """The next one."""
    return 1 << (number - 1).bit_length()
