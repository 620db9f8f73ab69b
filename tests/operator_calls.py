"""Every form of every operator's call, from the registry, for tests that check the same rule for all operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from jitnorm.core.operators import EXAMPLES, OPERATORS, Example

TOKENS, HIDDEN = 4, 64


@dataclass(frozen=True)
class Form:
    """One form of an operator's call: with its optional outputs or without, and with further arguments."""

    op: str
    with_outputs: bool = False
    more: dict[str, Callable[[], Any]] = field(default_factory=dict)

    @property
    def example(self) -> Example:
        return EXAMPLES[self.op]

    @property
    def dtype(self) -> torch.dtype:
        """Return float32, or the last that the operator supports."""
        return OPERATORS[self.op].dtypes[-1]

    @property
    def function(self) -> Callable[..., Any]:
        return self.example.function

    @property
    def written(self) -> tuple[str, ...]:
        return (*self.example.written, *self._outputs())

    @property
    def name(self) -> str:
        return "-".join((self.op, *self._outputs(), *self.more))

    def make(self) -> dict[str, Any]:
        """Return new arguments, by name."""
        more = {name: make() for name, make in self.more.items()}
        return self.example.arguments(TOKENS, HIDDEN, self.dtype) | self._outputs() | more

    def call(self, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Call the operator. Return its results, then the arguments that it has written."""
        outputs = self._outputs()
        return (*self.example.run(arguments), *(arguments[name] for name in outputs))

    def _outputs(self) -> dict[str, torch.Tensor]:
        return self.example.outputs(TOKENS, HIDDEN, self.dtype) if self.with_outputs else {}


# The operators whose tests are in `make test`, and not in `make test-slow` alone: the general norms have the kernels of
# the others, and the code of these two.
_QUICK_GENERAL = ("general_rmsnorm", "general_fused_add_rmsnorm")


def parameters(ops: Iterable[str]) -> list[Any]:
    """Return operators as parameters of a test that builds their kernels."""
    return [
        pytest.param(op, marks=pytest.mark.slow) if op.startswith("general_") and op not in _QUICK_GENERAL else op
        for op in ops
    ]


FORMS = [
    *(Form(op) for op in EXAMPLES),
    *(Form(op, with_outputs=True) for op, example in EXAMPLES.items() if example.make_outputs),
    # Of the activations alone: rows that are skipped, by an id or by a count.
    Form("silu_and_mul", with_outputs=True, more={"expert_ids": lambda: torch.tensor([0, -1, 3, 0])}),
    Form(
        "silu_and_mul",
        with_outputs=True,
        more={
            "input": lambda: torch.randn(2, 2, 2 * HIDDEN),
            "out": lambda: torch.zeros(2, 2, HIDDEN),
            "num_tokens_per_expert": lambda: torch.tensor([1, 2]),
        },
    ),
    Form("gated_rmsnorm_gate_first", with_outputs=True, more={"group_size": lambda: HIDDEN // 4}),
    # Results in tensors of their own and three positions for each token; float8 results.
    Form(
        "qk_norm_rope_store",
        more={
            "q_out": lambda: torch.zeros(TOKENS, 2, HIDDEN),
            "k_out": lambda: torch.zeros(TOKENS, 1, HIDDEN),
            "positions": lambda: torch.randint(4 * TOKENS, (3, TOKENS)),
            "mrope_section": lambda: [16, 8, 8],
        },
    ),
    Form(
        "store_cache_heads",
        more={
            **dict.fromkeys(("k_cache", "v_cache"), lambda: torch.zeros(3, 4, 1, HIDDEN).to(torch.float8_e4m3fn)),
            "indices": lambda: torch.randperm(12)[:TOKENS],
            **dict.fromkeys(("k_scale", "v_scale"), lambda: torch.full((1,), 0.5)),
        },
    ),
    Form(
        "rope",
        more={
            "q_out": lambda: torch.zeros(TOKENS, 2, HIDDEN).to(torch.float8_e4m3fn),
            "q_scale": lambda: torch.full((2,), 0.5),
            **dict.fromkeys(("k_cache", "v_cache"), lambda: torch.zeros(9, 1, HIDDEN).to(torch.float8_e4m3fn)),
            **dict.fromkeys(("k_scale", "v_scale"), lambda: torch.full((1,), 0.5)),
        },
    ),
]


def forget_kernels() -> None:
    """Clear every operator's tables, so that its next call takes the slow path. Built kernels remain loaded."""
    for operator in OPERATORS.values():
        for table in operator.tables:
            table.clear()


def bits(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor's elements."""
    if not tensor.numel():
        return b""
    return tensor.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
