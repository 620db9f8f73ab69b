"""The norms with float8_e4m3fn outputs: what they serve and refuse, and their place in torch.ops.jitnorm.

Each has two forms, which are operators of their own there: with a given scale, and with one found for each token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from jitnorm.core import checks
from jitnorm.core.norms import Norm, check_input_and_weight, check_kinds, check_like_input, new_like
from jitnorm.core.torch_library import (
    build_while_tracing,
    count_version,
    is_traced,
    needs_grad,
    register,
)


@dataclass(frozen=True)
class QuantNorm(Norm):
    """A norm whose outputs are quantised."""

    adds: bool  # the input to a residual first
    finds_scales: bool  # one for each row; else one is given


def _make(entry: str, policy: str, adds: bool, finds_scales: bool) -> QuantNorm:
    op = f"{entry}_dynamic" if finds_scales else entry
    quantised = f"{'DynamicFp8' if finds_scales else 'StaticFp8'}<{policy}>"
    return QuantNorm(op, entry, quantised, adds, finds_scales)


RMSNORM_QUANT_FP8 = _make("rmsnorm_quant_fp8", "Plain", adds=False, finds_scales=False)
RMSNORM_QUANT_FP8_DYNAMIC = _make("rmsnorm_quant_fp8", "Plain", adds=False, finds_scales=True)
FUSED_ADD_RMSNORM_QUANT_FP8 = _make("fused_add_rmsnorm_quant_fp8", "FusedAdd", adds=True, finds_scales=False)
FUSED_ADD_RMSNORM_QUANT_FP8_DYNAMIC = _make("fused_add_rmsnorm_quant_fp8", "FusedAdd", adds=True, finds_scales=True)
QUANT_NORMS = (
    RMSNORM_QUANT_FP8,
    RMSNORM_QUANT_FP8_DYNAMIC,
    FUSED_ADD_RMSNORM_QUANT_FP8,
    FUSED_ADD_RMSNORM_QUANT_FP8_DYNAMIC,
)


def first_quant_norm(
    norm: QuantNorm,
    input: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    eps: float,
    out: torch.Tensor | None,
    enable_pdl: bool | None,
    scales: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The way of a call that finds no kernel or is refused by it: says what is wrong, or gets the right kernel."""
    if scale is not None and scales is not None:
        raise ValueError("scales must be None where scale is given, which is used for all rows, got both")
    given = scales if scale is None else scale
    traced = is_traced(input, residual, weight, given, out)
    if traced:
        _check_types(norm, input, residual, weight, out, given, eps, enable_pdl)
    else:
        check(norm, input, residual, weight, out, given, eps, enable_pdl)
    _refuse_gradients(norm, input, residual, weight, scale)
    to, by = new_outputs(input, out, given)
    tensors = (*((input, residual) if norm.adds else (input,)), weight, to, by)
    if traced:
        getattr(torch.ops.jitnorm, norm.op)(*tensors, float(eps), enable_pdl)
    else:
        norm.run(input, weight, *tensors, eps, enable_pdl)
    return to, by


def new_outputs(
    input: torch.Tensor, out: torch.Tensor | None, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is not given, to be written: the quantised rows, and a scale for each."""
    return (
        new_like(input, torch.float8_e4m3fn) if out is None else out,
        input.new_empty((*input.shape[:-1], 1), dtype=torch.float32) if scale is None else scale,
    )


def check(
    norm: QuantNorm, input: Any, residual: Any, weight: Any, out: Any, scale: Any, eps: Any, enable_pdl: Any
) -> None:
    """Raises for what the glue `quantised` in csrc/elementwise/rmsnorm.h refuses."""
    _check_types(norm, input, residual, weight, out, scale, eps, enable_pdl)
    check_input_and_weight(norm, input, weight, eps, enable_pdl)
    if norm.adds:
        check_like_input("residual", residual, input)
        checks.written_rows("residual", residual)
        checks.no_shared_memory("residual", residual, "weight", weight)
        checks.no_overlap("residual", residual, "input", input, even_exactly=True)
    read = {"input": input, "weight": weight} | ({"residual": residual} if norm.adds else {})
    if scale is not None:
        name = "scales" if norm.finds_scales else "scale"
        _check_scale_kinds(norm, input, scale)
        checks.elements(name, scale, *_scale_count(norm, input))
        for other in ("input", "weight", "residual") if norm.finds_scales else ("residual",):
            if other in read:
                checks.no_shared_memory(name, scale, other, read[other])
        read[name] = scale
    if out is not None:
        _check_out_kinds(input, out)
        checks.rows("out", out)
        checks.written_rows("out", out)
        for name, value in read.items():
            checks.no_shared_memory("out", out, name, value)


def _check_types(
    norm: QuantNorm, input: Any, residual: Any, weight: Any, out: Any, scale: Any, eps: Any, enable_pdl: Any
) -> None:
    """What torch's dispatcher would refuse in words of its own."""
    if not (norm.finds_scales or isinstance(scale, torch.Tensor)):
        raise TypeError(f"scale must be a float32 tensor of one element, got {type(scale).__name__}")
    tensors = {"input": input, "weight": weight} | ({"residual": residual} if norm.adds else {})
    given = {"out": out, "scales" if norm.finds_scales else "scale": scale}
    checks.types(eps, enable_pdl, **tensors, **{name: value for name, value in given.items() if value is not None})


def _scale_count(norm: QuantNorm, input: torch.Tensor) -> tuple[int, str]:
    if norm.finds_scales:
        return input.numel() // input.shape[-1], "one for each row of input"
    return 1, "one scale for all"


def _check_scale_kinds(norm: QuantNorm, input: torch.Tensor, scale: torch.Tensor) -> None:
    name = "scales" if norm.finds_scales else "scale"
    checks.dtype(name, scale, (torch.float32,))
    checks.device(name, scale, "input", input)


def _check_out_kinds(input: torch.Tensor, out: torch.Tensor) -> None:
    checks.dtype("out", out, (torch.float8_e4m3fn,))
    checks.shape("out", out, input.shape, "like input")
    checks.device("out", out, "input", input)


def _refuse_gradients(norm: QuantNorm, *tensors: object) -> None:
    if needs_grad(*tensors):
        raise RuntimeError(f"{norm.op} has no gradient: call it under torch.no_grad()")


def _register(norm: QuantNorm) -> None:
    adds, finds = norm.adds, norm.finds_scales

    def run(*arguments: Any) -> None:
        *tensors, eps, enable_pdl = arguments
        input, *residual, weight, out, scale = tensors
        if not norm.call_last((input.dtype, weight.nbytes), *arguments):
            check(norm, input, residual[0] if adds else None, weight, out, scale, eps, enable_pdl)
            norm.run(input, weight, *arguments)
        count_version(*residual, out, *([scale] if finds else []))

    def fake(*arguments: Any) -> None:
        input, *residual, weight, out, scale = arguments[:-2]
        check_kinds(norm, input, weight, **({"residual": residual[0]} if adds else {}))
        _check_out_kinds(input, out)
        _check_scale_kinds(norm, input, scale)
        build_while_tracing(norm, input, int(input.shape[-1]), input.dtype, weight.dtype)

    tensors = "Tensor input, Tensor(a!) residual, Tensor weight" if adds else "Tensor input, Tensor weight"
    scale = "Tensor(c!) scales" if finds else "Tensor scale"
    register(f"{norm.op}({tensors}, Tensor(b!) out, {scale}, float eps, bool? enable_pdl) -> ()", run, fake)


for _norm in QUANT_NORMS:
    _register(_norm)
