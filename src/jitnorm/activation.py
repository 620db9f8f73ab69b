"""Gated activations of feed-forward layers: `out = activation(gate) * up`, where input is gate and up side by side."""

from __future__ import annotations

import torch

from jitnorm.activation_ops import (
    GELU_AND_MUL,
    GELU_TANH_AND_MUL,
    SILU_AND_MUL,
    Activation,
    dispatch_activation,
    first_activation,
    new_out,
)

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_Tensor = torch.Tensor


def silu_and_mul(
    input: torch.Tensor,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,
) -> torch.Tensor:
    """SwiGLU's product: `out = silu(input[..., :d]) * input[..., d:]`, computed in float32 and rounded once.

    `silu(x) = x / (1 + exp(-x))`, as `torch.nn.functional.silu` (Shazeer, 2020, https://arxiv.org/abs/2002.05202). A
    row's result has the same bits alone and in any batch. One kernel serves every d: the first call of a dtype compiles
    it.

    Args:
        input: `[..., 2 * d]`, float16, bfloat16 or float32, on the CPU or a CUDA device. The last stride is 1 and the
            leading dimensions collapse to one row stride. d is any number, zero included, in half precision an even
            one; on CUDA rows are aligned to 16 bytes where d is a multiple of 16 bytes, and else to 8 or 4, as d is.
        out: `[..., d]`, written; of the input's dtype and device, sharing no memory with it. Allocated where None. A
            call with it has no gradient; whether it requires one itself is not asked: it is data, as under no_grad.
        enable_pdl: programmatic dependent launch; None means on where the GPU has it. The bits are the same.
        expert_ids: for mixture-of-experts, int32 or int64, `[n]`, contiguous, on the input's device: row i belongs to
            expert `expert_ids[i // expert_step]`, and rows of expert -1 are not computed. They are left as they are in
            `out`, and are zero where it is None. There may be more elements than rows need.
        expert_step: how many adjacent rows share an element of expert_ids; 1 or more.

    Returns:
        `out`.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: a shape, stride, device, alignment or overlap that is not accepted, or a bad expert_step.
        RuntimeError: d is not supported (nothing is built then), or the kernel cannot be built or launched.
    """
    return _gated(SILU_AND_MUL, input, out, enable_pdl, expert_ids, expert_step)


def gelu_and_mul(
    input: torch.Tensor,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,
) -> torch.Tensor:
    """GEGLU's product: `out = gelu(input[..., :d]) * input[..., d:]`, computed in float32 and rounded once.

    `gelu(x) = x * (1 + erf(x / sqrt(2))) / 2`, as `torch.nn.functional.gelu` (Hendrycks and Gimpel, 2016,
    https://arxiv.org/abs/1606.08415), without that sum's loss of digits where x is far below zero.

    Args:
        input: `[..., 2 * d]`; dtypes, sizes and strides as for `jitnorm.silu_and_mul`, like all that follows.
        out: `[..., d]`, written. Allocated where None.
        enable_pdl: programmatic dependent launch; None means on where the GPU has it.
        expert_ids: one for every `expert_step` rows, which are not computed where it is -1.
        expert_step: how many adjacent rows share an element of expert_ids; 1 or more.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.silu_and_mul`.
    """
    return _gated(GELU_AND_MUL, input, out, enable_pdl, expert_ids, expert_step)


def gelu_tanh_and_mul(
    input: torch.Tensor,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,
) -> torch.Tensor:
    """GEGLU's product by the approximation of GELU that Gemma uses: `out = gelu(input[..., :d]) * input[..., d:]`.

    `gelu(x) = x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2`, as `torch.nn.functional.gelu` with
    `approximate="tanh"`; computed in float32 and rounded once.

    Args:
        input: `[..., 2 * d]`; dtypes, sizes and strides as for `jitnorm.silu_and_mul`, like all that follows.
        out: `[..., d]`, written. Allocated where None.
        enable_pdl: programmatic dependent launch; None means on where the GPU has it.
        expert_ids: one for every `expert_step` rows, which are not computed where it is -1.
        expert_step: how many adjacent rows share an element of expert_ids; 1 or more.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.silu_and_mul`.
    """
    return _gated(GELU_TANH_AND_MUL, input, out, enable_pdl, expert_ids, expert_step)


def _gated(
    activation: Activation,
    input: torch.Tensor,
    out: torch.Tensor | None,
    enable_pdl: bool | None,
    expert_ids: torch.Tensor | None,
    expert_step: int,
) -> torch.Tensor:
    if _is_dynamo_compiling():
        return dispatch_activation(activation, input, out, expert_ids, expert_step, enable_pdl)
    try:
        if (
            input.__class__ is _Tensor
            and (out is None or out.__class__ is _Tensor)
            and (expert_ids is None or expert_ids.__class__ is _Tensor)
            and (not input.requires_grad or not torch.is_grad_enabled())
        ):
            to = new_out(input, expert_ids) if out is None else out
            if not activation.kernels[input.dtype](input, to, expert_ids, expert_step, enable_pdl):
                return to
    except Exception:  # no kernel yet, or arguments that have no such attributes: the way below says what it was
        pass
    return first_activation(activation, input, out, expert_ids, expert_step, enable_pdl)
