"""Compare rows of logits bit for bit: those of a prompt that ran alone with those of the same prompt in a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FIRST = 64  # columns that are compared first, of every pair of rows
_NEAREST = 2048  # columns by which the nearest row is found: of all of them the differences would be too large


def as_bits(rows: Tensor) -> Tensor:
    """Return the bits of a floating-point tensor as integers, so that NaNs are equal and zeros of two signs are not."""
    return rows.contiguous().view(_INTEGERS[rows.element_size()])


@dataclass
class BitCheck:
    """How many rows of logits were compared, and how many of them differ.

    Attributes:
        batch: the number of prompts that ran together.
        repeats: how many times they ran.
        rows: rows compared, over all repeats.
        unequal: rows of which a bit differs.
        max_difference: the largest difference of a logit, in those rows.
    """

    batch: int
    repeats: int = 0
    rows: int = 0
    unequal: int = 0
    max_difference: float = 0.0

    def add(self, expected: Tensor, found: Tensor) -> None:
        """Compare two tensors `[rows, vocabulary]`, row by row."""
        if expected.shape != found.shape or expected.dtype != found.dtype:
            shapes = [f"{tuple(rows.shape)} {rows.dtype}" for rows in (expected, found)]
            raise ValueError(f"logits of {shapes[0]} were expected, got {shapes[1]}")
        differs = (as_bits(expected) != as_bits(found)).any(-1)
        self.rows += len(expected)
        self.unequal += int(differs.sum())
        if differs.any():
            self._add_difference(expected[differs], found[differs])

    def add_somewhere(self, expected: Tensor, found: Tensor) -> None:
        """Look for each row of `expected` among the rows of `found`, which are in any order.

        A row that occurs n times in `expected` must occur n times in `found`: n different prompts or positions do not
        have the same logits, so that what is found is the row of the same prompt. A row that is not found counts as
        unequal, and its difference is that to the nearest row.
        """
        pairs = _equal_pairs(expected, found)
        own = _equal_pairs(expected, expected)
        missing = pairs.sum(1) < own.sum(1)
        self.rows += len(expected)
        self.unequal += int(missing.sum())
        for row in expected[missing]:
            distances = (found[:, :_NEAREST].float() - row[:_NEAREST].float()).abs().mean(-1)
            self._add_difference(row[None], found[distances.argmin()][None])

    def _add_difference(self, expected: Tensor, found: Tensor) -> None:
        difference = (expected.double() - found.double()).abs().nan_to_num(torch.inf).max()
        self.max_difference = max(self.max_difference, float(difference))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _equal_pairs(expected: Tensor, found: Tensor) -> Tensor:
    """Return `[expected, found]`, whether the rows are equal bit for bit."""
    a, b = as_bits(expected), as_bits(found)
    equal = torch.zeros(len(a), len(b), dtype=torch.bool, device=a.device)
    for i, row in enumerate(a):
        candidates = (b[:, :_FIRST] == row[:_FIRST]).all(-1).nonzero()[:, 0]
        equal[i, candidates] = (b[candidates] == row).all(-1)
    return equal


def check_distinct(rows: Tensor) -> None:
    """Raise ValueError for logits by which rows cannot be told apart, such as those of weights that are all zero."""
    if not rows.isfinite().all():
        raise ValueError("the logits are not finite: the check would compare nothing")
    if not len(rows.unique(dim=0)) > len(rows) // 2 or bool((rows == rows[:, :1]).all()):
        raise ValueError("most rows of logits are the same: the check would compare nothing")


class LogitRecorder:
    """Keep what a model's `compute_logits` takes and returns while a `with` block runs, and return it as it is."""

    def __init__(self) -> None:
        self._rows: list[Tensor] | None = None
        self._hidden_states: list[Tensor] = []

    def wrap(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return a function that calls `function`, and keeps copies of the hidden states and of the logits."""

        def compute_logits(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            logits = function(hidden_states, *args, **kwargs)
            if self._rows is not None:
                self._hidden_states.append(hidden_states.flatten(0, -2).clone())
                self._rows.append(logits.flatten(0, -2).clone())
            return logits

        return compute_logits

    def __enter__(self) -> LogitRecorder:
        self._rows = []
        return self

    def __exit__(self, *exc: object) -> None:
        self._rows, self._hidden_states = None, []

    def take(self) -> Tensor:
        """Return all rows since the last call, `[rows, vocabulary]`, inside the `with` block."""
        if not self._rows:
            raise RuntimeError("the engine computed no logits through the model's compute_logits")
        rows, self._rows, self._hidden_states = torch.cat(self._rows), [], []
        return rows

    def take_hidden_states(self) -> Tensor:
        """Return those of all calls with several rows since the last call, `[rows, hidden_size]`, likewise.

        These are the tokens of one prompt, in chunks; a call with one row is that of the token to be generated.
        """
        if not self._hidden_states:
            raise RuntimeError("the engine computed no logits through the model's compute_logits")
        chunks, self._rows, self._hidden_states = [x for x in self._hidden_states if len(x) > 1], [], []
        return torch.cat(chunks)
