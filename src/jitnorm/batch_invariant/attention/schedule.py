"""Choose how the Triton attention kernel splits the keys of a sequence over programs."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

MAX_SPLITS = 32  # of the keys of a sequence


class Schedule(NamedTuple):
    """The work of one program; benchmarks/tune_attention.py tries others. All but `split_keys` affect the bits."""

    leaf_keys: int  # keys that are added in sequence: a leaf of the binary tree
    split_keys: int  # keys of a program: `leaf_keys` times a power of two, up to 2**tree_levels
    block_keys: int  # keys that are loaded at a time
    num_warps: int
    num_stages: int


@functools.lru_cache(1024)
def choose_schedule(rows: int, keys: int, head_dim: int, num_kv_heads: int, num_sms: int) -> Schedule:
    """Return the schedule of a call.

    All but `split_keys` follow from what belongs to one sequence, so that its bits do not depend on the others.

    Args:
        rows: queries of a sequence times the query heads that share a head of keys.
        keys: keys of a sequence.
        head_dim: the larger one of keys and values.
        num_kv_heads: heads of keys in all sequences together; affects `split_keys` only.
        num_sms: SMs of the GPU; affects `split_keys` only.
    """
    levels = tree_levels(rows, head_dim)
    # Short leaves let one sequence fill the GPU, but the end of a leaf costs as much time as 32 keys, and the sums that
    # a split leaves for the second kernel have as many numbers as there are rows.
    min_leaf = max(128, 8 * rows, _ceil_div(keys, MAX_SPLITS << levels))
    leaf = _next_power_of_2(max(min_leaf, min(512, _ceil_div(keys, 8))))
    programs_per_split = num_kv_heads * _ceil_div(rows, block_rows(rows, head_dim))
    costs = {}
    for split in (leaf << level for level in range(levels + 1)):
        splits = _ceil_div(keys, split)
        if splits <= MAX_SPLITS:
            costs[split] = _estimate_cost(leaf, split, splits, programs_per_split * splits / num_sms)
    return Schedule(leaf, min(costs, key=costs.__getitem__), 64 if head_dim <= 128 else 32, 4, 3)


def _estimate_cost(leaf: int, split: int, splits: int, programs_per_sm: float) -> float:
    """Return the estimated time, in keys that an SM computes in that time.

    The constants were measured on an H200, whose SMs hold two programs at a time; one alone waits for its additions
    longer than for its keys.
    """
    time = math.ceil(programs_per_sm / 2) * split * max(1.05 + 32 / leaf, min(programs_per_sm, 2.0))
    return time + 45 * programs_per_sm + (150 if splits > 1 else 0)


def block_rows(rows: int, head_dim: int) -> int:
    """Return the number of rows that one program computes."""
    return min(64 if head_dim <= 128 else 32, max(16, _next_power_of_2(rows)))


def tree_levels(rows: int, head_dim: int) -> int:
    """Return how many levels of the tree one program may add up: each takes as many registers as the result."""
    size = block_rows(rows, head_dim) * _next_power_of_2(head_dim)
    return 3 if size <= 2048 else 2 if size <= 4096 else 0


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
