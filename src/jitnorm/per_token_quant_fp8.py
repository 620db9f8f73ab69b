"""Quantisation of rows to float8, each with a scale that is found for it."""

from __future__ import annotations

from typing import Any

import torch

from jitnorm.core import checks
from jitnorm.core.torch_library import build_while_tracing, count_version, is_traced, register
from jitnorm.quant_fp8 import QuantFp8, check_kinds, check_memory, refuse_gradient

_NAME = "per_token_quant_fp8"
PER_TOKEN = QuantFp8(_NAME, _NAME, "PerTokenQuantFp8Kernel<{}>")
_kernels = PER_TOKEN.kernels
_MULTIPLE = 16  # what a product of such matrices asks for; as in csrc/elementwise/quant_fp8.*

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_Tensor = torch.Tensor


def per_token_quant_fp8(input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor) -> None:
    """Quantises each row to float8_e4m3fn with a scale of its own: `output_q = e4m3(clip(input / output_s, +-448))`.

    Rounded as by `jitnorm.per_tensor_quant_fp8`. A row's scale is its largest magnitude divided by 448, and at least
    `1 / (448 * 512)`, which a row of zeros has; NaNs are not counted. A row's result has the same bits alone and in any
    batch. Signature and meaning are those of SGLang's sgl_per_token_quant_fp8, with vLLM's least scale.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, on the CPU or a CUDA device; strides as for
            `jitnorm.rmsnorm`. hidden_size is any multiple of 16.
        output_q: written; of the input's shape and device, float8_e4m3fn, sharing no memory with the others. On CUDA
            every row is aligned to 16 bytes.
        output_s: written; float32 on the same device, contiguous, an element for each row, as in `[..., 1]`.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: a shape, stride, device, alignment or overlap that is not accepted.
        RuntimeError: hidden_size is not supported; a kernel cannot be built or launched; a gradient is needed, which
            this has none of.
    """
    if not _is_dynamo_compiling():
        try:
            if (
                input.__class__ is output_q.__class__ is output_s.__class__ is _Tensor
                and (not input.requires_grad or not torch.is_grad_enabled())
                and not _kernels[input.dtype](input, output_q, output_s)
            ):
                return
        except Exception:  # no kernel yet, or arguments that have no such attributes: the way below says what it was
            pass
    if is_traced(input, output_q, output_s):
        _check_kinds(input, output_q, output_s)
        refuse_gradient(PER_TOKEN, input)
        torch.ops.jitnorm.per_token_quant_fp8(input, output_q, output_s)
        return
    _check(input, output_q, output_s)
    refuse_gradient(PER_TOKEN, input)
    PER_TOKEN.run(input, output_q, output_s)


def _check(input: Any, output_q: Any, output_s: Any) -> None:
    """Raises for what the glue `per_token_quant_fp8` in csrc/elementwise/quant_fp8.h refuses."""
    _check_kinds(input, output_q, output_s)
    checks.supported_device("input", input)
    for name, value in (("input", input), ("output_q", output_q)):
        checks.rows(name, value)
    checks.written_rows("output_q", output_q)
    checks.elements("output_s", output_s, input.numel() // input.shape[-1], "one for each row of input")
    check_memory(input, output_q, output_s, writes_s=True)


def _check_kinds(input: Any, output_q: Any, output_s: Any) -> None:
    check_kinds(input, output_q, output_s)
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a scalar")
    hidden_size = int(input.shape[-1])
    if hidden_size < 1 or hidden_size % _MULTIPLE:
        raise RuntimeError(
            f"{_NAME} does not support hidden_size {hidden_size}: supported are multiples of {_MULTIPLE}"
        )


def _run(input: Any, output_q: Any, output_s: Any) -> None:
    if not PER_TOKEN.call_last((input.dtype,), input, output_q, output_s):
        _check(input, output_q, output_s)
        PER_TOKEN.run(input, output_q, output_s)
    count_version(output_q, output_s)


def _fake(input: Any, output_q: Any, output_s: Any) -> None:
    _check_kinds(input, output_q, output_s)
    build_while_tracing(PER_TOKEN, input, input.dtype)


register(f"{_NAME}(Tensor input, Tensor(a!) output_q, Tensor(b!) output_s) -> ()", _run, _fake)
