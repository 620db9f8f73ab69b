"""The functions and kernels of an engine's norm: those of `jitnorm.rmsnorm`, or where they refuse it, general ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from jitnorm.core.norms import MAX_HIDDEN_SIZE, is_supported_hidden_size
from jitnorm.core.operators import DTYPES, OPERATORS
from jitnorm.fused_add_rmsnorm import fused_add_rmsnorm, gemma_fused_add_rmsnorm
from jitnorm.general_rmsnorm import Form, general_fused_add_rmsnorm, general_rmsnorm
from jitnorm.jit.spec import KernelSpec, Target
from jitnorm.rmsnorm import gemma_rmsnorm, rmsnorm


class EngineNorm(NamedTuple):
    """What a norm of an engine computes.

    Attributes:
        hidden_size: The elements of a row.
        dtype: Of the input.
        weight_dtype: Of the weight.
        is_gemma: Whether 1 is added to the weight.
        has_weight: Whether there is one.
        rounding: "once" or "hf", as for `jitnorm.general_rmsnorm`.
    """

    hidden_size: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    is_gemma: bool = False
    has_weight: bool = True
    rounding: str = "once"

    @property
    def problem(self) -> str | None:
        """Return why no kernel computes it, or None."""
        if not 1 <= self.hidden_size <= MAX_HIDDEN_SIZE:
            return f"no kernel supports a hidden size of {self.hidden_size}"
        if self.dtype not in DTYPES or self.weight_dtype not in DTYPES:
            return f"no kernel supports {self.dtype} with weights of {self.weight_dtype}"
        return None

    @property
    def is_general(self) -> bool:
        """Return whether `jitnorm.rmsnorm` and the others refuse it."""
        return not (
            self.has_weight
            and self.rounding == "once"
            and is_supported_hidden_size(self.hidden_size)
            and self.weight_dtype in (self.dtype, torch.float32)
        )

    def spec(self, op: str, target: Target) -> KernelSpec:
        """Return the kernel of an operator, such as "rmsnorm" or "fused_add_rmsnorm_fp32_residual".

        It is that for rows in memory that are aligned to 16 bytes, as far as their size allows it.
        """
        form = Form(has_weight=self.has_weight, rounding=self.rounding)
        operator = OPERATORS[f"general_{'gemma_' if self.is_gemma else ''}{op}"]
        return operator.spec(self.hidden_size, self.dtype, self.weight_dtype, form, target)

    def functions(self) -> tuple[Callable[..., torch.Tensor], Callable[..., None]]:
        """Return `normalise(x, weight, eps)`, and `add_and_normalise(x, residual, weight, eps)`, which writes both."""
        if not self.is_general:
            return (gemma_rmsnorm, gemma_fused_add_rmsnorm) if self.is_gemma else (rmsnorm, fused_add_rmsnorm)
        offset, rounding = float(self.is_gemma), self.rounding

        def normalise(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
            return general_rmsnorm(x, weight, eps, weight_offset=offset, rounding=rounding)  # type: ignore[return-value]

        def add_and_normalise(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, eps: float) -> None:
            general_fused_add_rmsnorm(x, residual, weight, eps, weight_offset=offset, rounding=rounding)

        return normalise, add_and_normalise
