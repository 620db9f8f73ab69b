"""RMSNorm with a float8 output: `q = e4m3(rmsnorm(input) / scale)`, with a given scale or one for each token."""

from __future__ import annotations

import torch

from jitnorm.quant_norms import RMSNORM_QUANT_FP8, RMSNORM_QUANT_FP8_DYNAMIC, first_quant_norm, new_outputs

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
    """RMSNorm over the last dimension, quantised to float8_e4m3fn in the same pass.

    `out = e4m3(clip(y / scale, +-448))` with `y = input / sqrt(mean(input^2) + eps) * weight` in float32, not rounded
    to the input's dtype in between. The quotient is rounded as float32's, and then to the nearest e4m3 number, ties to
    even. Infinities saturate where a scale is given, a NaN becomes a NaN. `out * scale` is about `y`.

    With `scale`, one for the whole tensor, this is vLLM's rms_norm_static_fp8_quant and FlashInfer's rmsnorm_quant.
    Without, each row gets its own, `max(abs(y)) / 448` and at least `1 / (448 * 512)`, which a row of zeros has: vLLM's
    rms_norm_dynamic_per_token_quant. A row's result has the same bits alone and in any batch.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, on the CPU or a CUDA device. Sizes and strides as for
            `jitnorm.rmsnorm`.
        weight: `[hidden_size]`, of the input's dtype or float32, on the same device.
        scale: one float32 on the same device, finite and above zero; from 2^-90 to 2^125 the division is exact. Zero
            saturates. None for a scale for each row.
        eps: added to the mean of the squares; zero or more.
        out: written; of the input's shape and device, float8_e4m3fn, sharing no memory with the other arguments. On
            CUDA every row is aligned to 16 bytes. Allocated where None.
        enable_pdl: programmatic dependent launch; None means on where the GPU has it.
        scales: written, where no `scale` is given: float32, contiguous, an element for each row. Allocated where None,
            as `[..., 1]`.

    Returns:
        `out`, and the `scale` that was given or the `scales` that were found.

    Raises:
        TypeError, ValueError: as `jitnorm.rmsnorm`; ValueError too where both `scale` and `scales` are given.
        RuntimeError: as `jitnorm.rmsnorm`; a gradient is needed, which this has none of.
    """
    norm, given = (RMSNORM_QUANT_FP8_DYNAMIC, scales) if scale is None else (RMSNORM_QUANT_FP8, scale)
    if not _is_dynamo_compiling():
        try:
            if (
                (scale is None or scales is None)
                and input.__class__ is _Tensor
                and (weight.__class__ is _Parameter or weight.__class__ is _Tensor)
            ):
                to, by = new_outputs(input, out, given)
                if (
                    to.__class__ is _Tensor
                    and (by.__class__ is _Tensor or by.__class__ is _Parameter)
                    and (
                        not (weight.requires_grad or input.requires_grad or by.requires_grad)
                        or not torch.is_grad_enabled()
                    )
                    and not norm.kernels[input.dtype][weight.nbytes](input, weight, to, by, eps, enable_pdl)
                ):
                    return to, by
        except Exception:  # no kernel yet, or arguments that have no such attributes: the way below says what it was
            pass
    return first_quant_norm(norm, input, None, weight, scale, eps, out, enable_pdl, scales)
