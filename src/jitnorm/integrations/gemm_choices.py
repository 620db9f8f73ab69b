"""Keep in the cache which GEMM was the fastest for each number of rows (engine_gemms.py).

Later starts then time nothing and choose the same: they take less time, and the results of a model have the same bits
in all of them. Processes that time at once, such as the ranks of a first start, may choose differently, and the last
choice is kept.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from jitnorm.jit import locations
from jitnorm.jit.cache import GEMMS, Cache
from jitnorm.jit.folder import UntrustedPath
from jitnorm.jit.log import warn_once


@dataclass(frozen=True)
class Choice:
    """The GEMMs that were chosen for weights of one shape, and what the times depend on.

    Attributes:
        weight: the shape and the dtype.
        weights: how many were multiplied in turns; few fit in the L2.
        place: between which kernels.
        gpu: its name, and the number of SMs.
        driver: the version of the GPU's driver.
        libraries: the versions of torch and cuBLASLt, which torch's GEMM calls.
        candidates: the other GEMMs by name, with the keys of kernels.
        code: a hash of the code that chooses, and that calls cuBLASLt.
        activation: the key of the kernel that follows torch's GEMM, or nothing.
        rows: for each candidate, the numbers of rows for which it is the fastest.
    """

    weight: str
    weights: int
    place: str
    gpu: str
    driver: str
    libraries: str
    candidates: dict[str, str]
    code: str
    activation: str
    rows: dict[str, list[int]] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """Return the name of its file in the cache, a hash of what the times depend on."""
        key = {name: value for name, value in vars(self).items() if name != "rows"}
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24] + ".json"


def read(choice: Choice) -> dict[str, list[int]] | None:
    """Return the `rows` that a cache has for what a choice depends on, or None."""
    for cache in locations.in_search_order():
        try:
            found = Choice(**cache.read_record(GEMMS, choice.file_name))
            if found.file_name == choice.file_name and _are_rows(found.rows, choice.candidates):
                return found.rows
        except TypeError:  # no such file, or one with other fields
            pass
    return None


def write(choice: Choice) -> None:
    """Write a choice to the cache, or log once why none can be written."""
    root = locations.default_root()
    if reason := locations.create(root):
        warn_once(f"cannot keep the choice of GEMMs in {root}: {reason}")
        return
    try:
        Cache(root).write_record(GEMMS, choice.file_name, vars(choice))
    except (OSError, UntrustedPath) as error:
        warn_once(f"cannot keep the choice of GEMMs in {root}: {error}")


def _are_rows(rows: Any, candidates: dict[str, str]) -> bool:
    return (
        isinstance(rows, dict)
        and rows.keys() == candidates.keys()
        and all(isinstance(counts, list) and all(type(count) is int for count in counts) for counts in rows.values())
    )
