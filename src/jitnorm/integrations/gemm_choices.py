"""Keep in the cache which GEMM was the fastest for each number of rows (engine_gemms.py).

A later start, or another process, then times nothing and chooses the same: it takes less time, and the results of a
model have the same bits from start to start.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from jitnorm.jit import locations
from jitnorm.jit.cache import GEMMS
from jitnorm.jit.folder import UntrustedPath
from jitnorm.jit.log import logger


@dataclass(frozen=True)
class Choice:
    """The GEMMs that were chosen for weights of one shape, and what the times depend on.

    Attributes:
        weight: the shape and the dtype.
        after_norm: whether a norm of this package is before the GEMM, or after it.
        gpu: its name, and the number of SMs.
        driver: the version of the GPU's driver.
        torch: the version of torch, whose GEMM is one of those that were timed.
        candidates: the other GEMMs by name: the key of a kernel, or the version of a library.
        code: a hash of the code that chooses.
        rows: by the name of a candidate, the numbers of rows for which it is the fastest.
    """

    weight: str
    after_norm: bool
    gpu: str
    driver: str
    torch: str
    candidates: dict[str, str]
    code: str
    rows: dict[str, list[int]] = field(default_factory=dict)

    @property
    def file_name(self) -> str:
        """Return the name of its file in the cache, a hash of what the times depend on."""
        key = {name: value for name, value in vars(self).items() if name != "rows"}
        return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24] + ".json"


def read(choice: Choice) -> dict[str, list[int]] | None:
    """Return the `rows` that the cache has for what a choice depends on, or None."""
    try:
        found = Choice(**locations.readable().read_record(GEMMS, choice.file_name))
        is_same = found.file_name == choice.file_name
    except TypeError:  # no such file, or one with other fields
        return None
    return found.rows if is_same and _are_rows(found.rows, choice.candidates) else None


def write(choice: Choice) -> None:
    """Write a choice to the cache, or log why it cannot be written."""
    try:
        locations.writable().write_record(GEMMS, choice.file_name, vars(choice))
    except (OSError, UntrustedPath) as error:
        logger.warning("cannot write the times of GEMMs for %s to the cache: %s", choice.weight, error)


def _are_rows(rows: Any, candidates: dict[str, str]) -> bool:
    return isinstance(rows, dict) and all(
        name in candidates and isinstance(counts, list) and all(type(count) is int for count in counts)
        for name, counts in rows.items()
    )
