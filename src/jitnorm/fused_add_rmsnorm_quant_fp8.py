"""Residual addition and RMSNorm with a float8 output: `residual += input`, then `e4m3(rmsnorm(residual) / scale)`."""

from __future__ import annotations

import torch

from jitnorm.quant_norms import (
    FUSED_ADD_RMSNORM_QUANT_FP8,
    FUSED_ADD_RMSNORM_QUANT_FP8_DYNAMIC,
    first_quant_norm,
    new_outputs,
)

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


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
    """Adds the input to the residual, and normalises the sum into float8_e4m3fn, in one pass.

    `residual += input` in place; the input stays as it is, as the result has another dtype. The sum is normalised from
    its float32 value, before it is rounded into the residual, and quantised as `jitnorm.rmsnorm_quant_fp8` does. As
    vLLM's fused_add_rms_norm_static_fp8_quant and FlashInfer's fused_add_rmsnorm_quant with `scale`, and as vLLM's
    rms_norm_dynamic_per_token_quant with a residual without.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, on the CPU or a CUDA device. Sizes and strides as for
            `jitnorm.rmsnorm`.
        residual: of the input's shape, dtype and device, sharing no memory with the other arguments; written.
        weight: `[hidden_size]`, of the input's dtype or float32, on the same device.
        scale: one float32 on the same device, finite and above zero; None for a scale for each row.
        eps: added to the mean of the squares; zero or more.
        out: written; of the input's shape and device, float8_e4m3fn, sharing no memory with the other arguments. On
            CUDA every row is aligned to 16 bytes. Allocated where None.
        enable_pdl: programmatic dependent launch; None means on where the GPU has it.
        scales: written, where no `scale` is given: float32, contiguous, an element for each row. Allocated where None,
            as `[..., 1]`.

    Returns:
        `out`, and the `scale` that was given or the `scales` that were found.

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
                to, by = new_outputs(input, out, given)
                if (
                    to.__class__ is _Tensor
                    and (by.__class__ is _Tensor or by.__class__ is _Parameter)
                    and (
                        not (weight.requires_grad or input.requires_grad or residual.requires_grad or by.requires_grad)
                        or not torch.is_grad_enabled()
                    )
                    and not norm.kernels[input.dtype][weight.nbytes](input, residual, weight, to, by, eps, enable_pdl)
                ):
                    return to, by
        except Exception:  # no kernel yet, or arguments that have no such attributes: the way below says what it was
            pass
    return first_quant_norm(norm, input, residual, weight, scale, eps, out, enable_pdl, scales)
