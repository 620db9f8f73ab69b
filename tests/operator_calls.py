"""A good call of every operator in each of its forms, for tests that hold all operators to the same rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import jitnorm
from jitnorm.core.operators import OPERATORS

TOKENS, HIDDEN = 4, 64


@dataclass(frozen=True)
class Form:
    """One form of an operator's call."""

    function: Callable[..., Any]
    make: Callable[[], dict[str, Any]]  # new arguments, by name
    written: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        given = [name for name in ("out", "scale", "scales", "expert_ids", "is_static") if name in self.make()]
        return "-".join((self.function.__name__, *given))

    def call(self, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Call the operator; return what it returned and what it was to write."""
        result = self.function(**arguments)
        returned = () if result is None else result if isinstance(result, tuple) else (result,)
        return (*returned, *(arguments[name] for name in self.written))


def rows(width: int = HIDDEN) -> torch.Tensor:
    return torch.randn(TOKENS, width)


def codes() -> torch.Tensor:
    return torch.zeros(TOKENS, HIDDEN).to(torch.float8_e4m3fn)


def _norm(**more: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    made: dict[str, Callable[[], Any]] = {"input": rows, **more}
    return lambda: {name: make() for name, make in made.items()}


def _weight() -> torch.Tensor:
    return torch.randn(HIDDEN)


def _scale() -> torch.Tensor:
    return torch.tensor([0.25])


def _scales() -> torch.Tensor:
    return torch.zeros(TOKENS, 1)


def _ids() -> torch.Tensor:
    return torch.tensor([0, -1, 3, 0])


def _heads(count: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(TOKENS, count, HIDDEN)


def _forms() -> list[Form]:
    forms = []
    for norm in (jitnorm.rmsnorm, jitnorm.gemma_rmsnorm):
        forms.append(Form(norm, _norm(weight=_weight)))
        forms.append(Form(norm, _norm(weight=_weight, out=rows), ("out",)))
    for fused in (jitnorm.fused_add_rmsnorm, jitnorm.gemma_fused_add_rmsnorm):
        forms.append(Form(fused, _norm(residual=rows, weight=_weight), ("input", "residual")))
    both = {"q": _heads(2), "k": _heads(1), "q_weight": _weight, "k_weight": _weight}
    forms.append(Form(jitnorm.fused_inplace_qknorm, lambda: {name: make() for name, make in both.items()}, ("q", "k")))
    wide = {"input": lambda: rows(2 * HIDDEN)}
    for activation in (jitnorm.silu_and_mul, jitnorm.gelu_and_mul, jitnorm.gelu_tanh_and_mul):
        forms.append(Form(activation, _norm(**wide)))
        forms.append(Form(activation, _norm(**wide, out=rows), ("out",)))
    forms.append(Form(jitnorm.silu_and_mul, _norm(**wide, out=rows, expert_ids=_ids), ("out",)))
    slots = {"k_cache": lambda: torch.zeros(9, HIDDEN), "v_cache": lambda: torch.zeros(9, HIDDEN)}
    stored = {"k": rows, "v": rows, **slots, "indices": lambda: torch.tensor([3, 8, 0, 1])}
    forms.append(
        Form(jitnorm.store_cache, lambda: {name: make() for name, make in stored.items()}, ("k_cache", "v_cache"))
    )
    for quantised, more in (
        (jitnorm.rmsnorm_quant_fp8, {}),
        (jitnorm.fused_add_rmsnorm_quant_fp8, {"residual": rows}),
    ):
        written = tuple(more)
        forms.append(Form(quantised, _norm(**more, weight=_weight), written))
        forms.append(Form(quantised, _norm(**more, weight=_weight, scale=_scale), written))
        forms.append(Form(quantised, _norm(**more, weight=_weight, out=codes, scale=_scale), (*written, "out")))
        outputs = {"out": codes, "scales": _scales}
        forms.append(Form(quantised, _norm(**more, weight=_weight, **outputs), (*written, *outputs)))
    forms.append(Form(jitnorm.per_token_quant_fp8, _norm(output_q=codes, output_s=_scales), ("output_q", "output_s")))
    tensor = {"output_q": codes, "output_s": _scale}
    forms.append(Form(jitnorm.per_tensor_quant_fp8, _norm(**tensor), tuple(tensor)))
    forms.append(Form(jitnorm.per_tensor_quant_fp8, _norm(**tensor, is_static=lambda: True), ("output_q",)))
    return forms


FORMS = _forms()


def forget_kernels() -> None:
    """Have every operator forget its kernels, so that its next call is a first one; what is built stays built."""
    for operator in OPERATORS:
        for table in (operator.kernels, operator.dispatched, operator.exact):
            table.clear()


def bits(tensor: torch.Tensor) -> bytes:
    if not tensor.numel():
        return b""
    return tensor.detach().flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
