"""RMSNorm with a float8 output, with and without a residual addition, and with a static or a dynamic scale.

`q = e4m3(rmsnorm(input) / scale)`. In torch.ops.jitnorm the static and the dynamic form are operators of their own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from jitnorm.core import checks, norms
from jitnorm.core.norms import Norm, new_like
from jitnorm.core.operators import EXAMPLES, Example, Shape
from jitnorm.core.torch_library import (
    build_while_tracing,
    increment_versions,
    needs_dispatcher,
    refuse_gradient,
    register,
)

_E4M3 = torch.float8_e4m3fn


@dataclass(eq=False, repr=False)
class QuantNorm(Norm):
    """A norm with a quantised output."""

    has_residual: bool  # whether the input is added to a residual first
    is_dynamic: bool  # whether a scale is computed for each row; otherwise one is given for all

    @property
    def scale_name(self) -> str:
        """Return the name of the argument that holds the scale, or the scales."""
        return "scales" if self.is_dynamic else "scale"


def _make(binding: str, norm_policy: str, has_residual: bool, is_dynamic: bool) -> QuantNorm:
    op = f"{binding}_dynamic" if is_dynamic else binding
    policy = f"{'DynamicFp8' if is_dynamic else 'StaticFp8'}<{norm_policy}>"
    return QuantNorm(op, binding, policy, has_residual, is_dynamic)


RMSNORM_QUANT_FP8 = _make("rmsnorm_quant_fp8", "Plain", has_residual=False, is_dynamic=False)
RMSNORM_QUANT_FP8_DYNAMIC = _make("rmsnorm_quant_fp8", "Plain", has_residual=False, is_dynamic=True)
FUSED_ADD_RMSNORM_QUANT_FP8 = _make("fused_add_rmsnorm_quant_fp8", "FusedAdd", has_residual=True, is_dynamic=False)
FUSED_ADD_RMSNORM_QUANT_FP8_DYNAMIC = _make(
    "fused_add_rmsnorm_quant_fp8", "FusedAdd", has_residual=True, is_dynamic=True
)

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


def rmsnorm_quant_fp8(
    input: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise the last dimension and quantise the result to float8_e4m3fn, in one pass.

    `out = e4m3(clip(y / scale, +-448))` with `y = input / sqrt(mean(input^2) + eps) * weight` in float32, not rounded
    to the input's dtype in between. The quotient is rounded to float32, and then to the nearest e4m3 number, ties to
    even. Infinities saturate if a scale is given, a NaN becomes a NaN. `out * scale` approximates `y`.

    With `scale`, one for the whole tensor, this is vLLM's rms_norm_static_fp8_quant and FlashInfer's rmsnorm_quant.
    Without it each row gets a scale of its own, `max(abs(y)) / 448` and at least `1 / (448 * 512)`, which is the scale
    of a row of zeros: vLLM's rms_norm_dynamic_per_token_quant. A row's result has the same bits alone and in any batch.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, on the CPU or a CUDA device. Sizes and strides as for
            `jitnorm.rmsnorm`.
        weight: `[hidden_size]`, of the input's dtype or float32, on the same device.
        scale: one float32 on the same device, finite and above zero. The division is exact from 2^-90 to 2^125. Zero
            saturates. If None, a scale is computed for each row.
        eps: added to the mean of the squares; zero or more.
        out: written; of the input's shape and device, float8_e4m3fn, sharing no memory with the other arguments. On
            CUDA every row is aligned to 16 bytes. Allocated if None.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        scales: written, if no `scale` is given: float32, contiguous, an element for each row. Allocated if None, as
            `[..., 1]`.

    Returns:
        `out`, and the given `scale` or the computed `scales`.

    Raises:
        TypeError, ValueError: as `jitnorm.rmsnorm`. ValueError also if both `scale` and `scales` are given.
        RuntimeError: as `jitnorm.rmsnorm`. Also if a gradient is needed: there is none.
    """
    norm, given = (RMSNORM_QUANT_FP8_DYNAMIC, scales) if scale is None else (RMSNORM_QUANT_FP8, scale)
    if not _is_dynamo_compiling():
        try:
            if (
                (scale is None or scales is None)
                and input.__class__ is _Tensor
                and (weight.__class__ is _Parameter or weight.__class__ is _Tensor)
            ):
                q, q_scale = _outputs(input, out, given)
                if (
                    q.__class__ is _Tensor
                    and (q_scale.__class__ is _Tensor or q_scale.__class__ is _Parameter)
                    and (
                        not (weight.requires_grad or input.requires_grad or q_scale.requires_grad)
                        or not torch.is_grad_enabled()
                    )
                    and not norm.fast_cache[input.dtype][weight.nbytes](input, weight, q, q_scale, eps, enable_pdl)
                ):
                    return q, q_scale
        except Exception:  # no kernel yet, or arguments without such attributes: the slow path raises for these
            pass
    return _quant_norm_slow_path(norm, input, None, weight, scale, eps, out, enable_pdl, scales)


def fused_add_rmsnorm_quant_fp8(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    scales: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the input to the residual, normalise the sum and quantise the result to float8_e4m3fn, in one pass.

    `residual += input` in place; the input is not written, because the result has another dtype. The sum is normalised
    from its float32 value, before it is rounded into the residual, and quantised as `jitnorm.rmsnorm_quant_fp8` does.
    With `scale` this is vLLM's fused_add_rms_norm_static_fp8_quant and FlashInfer's fused_add_rmsnorm_quant; without
    it, vLLM's rms_norm_dynamic_per_token_quant with a residual.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, on the CPU or a CUDA device. Sizes and strides as for
            `jitnorm.rmsnorm`.
        residual: of the input's shape, dtype and device, sharing no memory with the other arguments; written.
        weight: `[hidden_size]`, of the input's dtype or float32, on the same device.
        scale: one float32 on the same device, finite and above zero. If None, a scale is computed for each row.
        eps: added to the mean of the squares; zero or more.
        out: written; of the input's shape and device, float8_e4m3fn, sharing no memory with the other arguments. On
            CUDA every row is aligned to 16 bytes. Allocated if None.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        scales: written, if no `scale` is given: float32, contiguous, an element for each row. Allocated if None, as
            `[..., 1]`.

    Returns:
        `out`, and the given `scale` or the computed `scales`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.rmsnorm_quant_fp8`.
    """
    norm, given = (
        (FUSED_ADD_RMSNORM_QUANT_FP8_DYNAMIC, scales) if scale is None else (FUSED_ADD_RMSNORM_QUANT_FP8, scale)
    )
    if not _is_dynamo_compiling():
        try:
            if (
                (scale is None or scales is None)
                and input.__class__ is residual.__class__ is _Tensor
                and (weight.__class__ is _Parameter or weight.__class__ is _Tensor)
            ):
                q, q_scale = _outputs(input, out, given)
                if (
                    q.__class__ is _Tensor
                    and (q_scale.__class__ is _Tensor or q_scale.__class__ is _Parameter)
                    and (
                        not (
                            weight.requires_grad
                            or input.requires_grad
                            or residual.requires_grad
                            or q_scale.requires_grad
                        )
                        or not torch.is_grad_enabled()
                    )
                    and not norm.fast_cache[input.dtype][weight.nbytes](
                        input, residual, weight, q, q_scale, eps, enable_pdl
                    )
                ):
                    return q, q_scale
        except Exception:  # as in rmsnorm_quant_fp8
            pass
    return _quant_norm_slow_path(norm, input, residual, weight, scale, eps, out, enable_pdl, scales)


def _quant_norm_slow_path(
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
    """Check the arguments, then run the right kernel, which is built and cached if need be."""
    if scale is not None and scales is not None:
        raise ValueError("scales must be None where scale is given, which is used for all rows, got both")
    given = scales if scale is None else scale
    traced = needs_dispatcher(input, residual, weight, given, out)
    if traced:
        _check_types(norm, input, residual, weight, out, given, eps, enable_pdl)
    else:
        check(norm, input, residual, weight, out, given, eps, enable_pdl)
    refuse_gradient(norm.op, input, residual, weight, scale)
    q, q_scale = _outputs(input, out, given)
    tensors = (*((input, residual) if norm.has_residual else (input,)), weight, q, q_scale)
    if traced:
        getattr(torch.ops.jitnorm, norm.op)(*tensors, float(eps), enable_pdl)
    else:
        norm.run(input, weight, *tensors, eps, enable_pdl)
    return q, q_scale


def _outputs(
    input: torch.Tensor, out: torch.Tensor | None, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `out` and `scale`, each replaced by a new tensor if it is None."""
    return (
        new_like(input, torch.float8_e4m3fn) if out is None else out,
        input.new_empty((*input.shape[:-1], 1), dtype=torch.float32) if scale is None else scale,
    )


def check(
    norm: QuantNorm, input: Any, residual: Any, weight: Any, out: Any, scale: Any, eps: Any, enable_pdl: Any
) -> None:
    """Raise for arguments that the bindings function `norm_quant_fp8` in csrc/elementwise/rmsnorm.h refuses."""
    _check_types(norm, input, residual, weight, out, scale, eps, enable_pdl)
    norms.check_input_and_weight(norm, input, weight, eps, enable_pdl)
    if norm.has_residual:
        norms.check_like_input("residual", residual, input)
        checks.no_row_overlap("residual", residual)
        checks.no_shared_memory("residual", residual, "weight", weight)
        checks.no_overlap("residual", residual, "input", input, reject_identical=True)
    others = {"input": input, "weight": weight} | ({"residual": residual} if norm.has_residual else {})
    if scale is not None:
        name = norm.scale_name
        _check_scale_metadata(norm, input, scale)
        checks.elements(name, scale, *_scale_count(norm, input))
        for other in ("input", "weight", "residual") if norm.is_dynamic else ("residual",):
            if other in others:
                checks.no_shared_memory(name, scale, other, others[other])
        others[name] = scale
    if out is not None:
        _check_out_metadata(input, out)
        checks.rows("out", out)
        checks.no_row_overlap("out", out)
        for name, value in others.items():
            checks.no_shared_memory("out", out, name, value)


def _check_types(
    norm: QuantNorm, input: Any, residual: Any, weight: Any, out: Any, scale: Any, eps: Any, enable_pdl: Any
) -> None:
    """Raise for bad types. torch's dispatcher would raise for them too, with messages that name no argument."""
    if not (norm.is_dynamic or isinstance(scale, torch.Tensor)):
        raise TypeError(f"scale must be a float32 tensor of one element, got {type(scale).__name__}")
    tensors = {"input": input, "weight": weight} | ({"residual": residual} if norm.has_residual else {})
    given = {"out": out, norm.scale_name: scale}
    checks.types(eps, enable_pdl, **tensors, **{name: value for name, value in given.items() if value is not None})


def _scale_count(norm: QuantNorm, input: torch.Tensor) -> tuple[int, str]:
    if norm.is_dynamic:
        return input.numel() // input.shape[-1], "one for each row of input"
    return 1, "one scale for all"


def _check_scale_metadata(norm: QuantNorm, input: torch.Tensor, scale: torch.Tensor) -> None:
    checks.dtype(norm.scale_name, scale, (torch.float32,))
    checks.device(norm.scale_name, scale, "input", input)


def _check_out_metadata(input: torch.Tensor, out: torch.Tensor) -> None:
    checks.dtype("out", out, (_E4M3,))
    checks.shape("out", out, input.shape, "like input")
    checks.device("out", out, "input", input)


def _register(norm: QuantNorm) -> None:
    """Define the operator in torch.ops.jitnorm."""
    has_residual, is_dynamic = norm.has_residual, norm.is_dynamic

    def run(*arguments: Any) -> None:
        *tensors, eps, enable_pdl = arguments
        input, *residual, weight, out, scale = tensors
        if not norm.try_cached((input.dtype, weight.nbytes), *arguments):
            check(norm, input, residual[0] if has_residual else None, weight, out, scale, eps, enable_pdl)
            norm.run(input, weight, *arguments)
        increment_versions(*residual, out, *([scale] if is_dynamic else []))

    def fake(*arguments: Any) -> None:
        input, *residual, weight, out, scale = arguments[:-2]
        norms.check_metadata(norm, input, weight, **({"residual": residual[0]} if has_residual else {}))
        _check_out_metadata(input, out)
        _check_scale_metadata(norm, input, scale)
        build_while_tracing(norm, input, int(input.shape[-1]), input.dtype, weight.dtype)

    tensors = "Tensor input, Tensor(a!) residual, Tensor weight" if has_residual else "Tensor input, Tensor weight"
    scale = "Tensor(c!) scales" if is_dynamic else "Tensor scale"
    register(f"{norm.op}({tensors}, Tensor(b!) out, {scale}, float eps, bool? enable_pdl) -> ()", run, fake)


def _arguments(norm: QuantNorm, shape: Shape) -> dict[str, Any]:
    arguments = {"input": shape.randn()} | ({"residual": shape.randn()} if norm.has_residual else {})
    arguments["weight"] = shape.randn(shape.size)
    return arguments if norm.is_dynamic else arguments | {"scale": torch.full((1,), 0.25, device=shape.device)}


def _example_outputs(norm: QuantNorm, shape: Shape) -> dict[str, torch.Tensor]:
    out = {"out": shape.zeros(dtype=_E4M3)}
    return out | {"scales": shape.zeros(shape.rows, 1, dtype=torch.float32)} if norm.is_dynamic else out


for _norm in (
    RMSNORM_QUANT_FP8,
    RMSNORM_QUANT_FP8_DYNAMIC,
    FUSED_ADD_RMSNORM_QUANT_FP8,
    FUSED_ADD_RMSNORM_QUANT_FP8_DYNAMIC,
):
    _register(_norm)
    _written = ("residual",) if _norm.has_residual else ()
    EXAMPLES[_norm.op] = Example(
        fused_add_rmsnorm_quant_fp8 if _norm.has_residual else rmsnorm_quant_fp8,
        functools.partial(_arguments, _norm),
        written=_written,
        per_row=("input", *_written),
        make_outputs=functools.partial(_example_outputs, _norm),
    )
