"""Quantisation of a tensor to float8 with one scale, which is given or found."""

from __future__ import annotations

from typing import Any

import torch

from jitnorm.core import checks
from jitnorm.core.torch_library import build_while_tracing, count_version, is_traced, register
from jitnorm.quant_fp8 import QuantFp8, check_kinds, check_memory, refuse_gradient

_NAME = "per_tensor_quant_fp8"
STATIC = QuantFp8(_NAME, _NAME, "PerTensorQuantFp8Kernel<{}, Pass::kStatic>")
# A scale that is to be found takes two passes: the largest magnitudes of parts, and the largest of these.
MAXIMA = QuantFp8(f"{_NAME}_maxima", _NAME, "PartialAmaxKernel<{}>")
DYNAMIC = QuantFp8(f"{_NAME}_dynamic", _NAME, "PerTensorQuantFp8Kernel<{}, Pass::kDynamic>")
_MOST_MAXIMA = 512  # as in csrc/elementwise/quant_fp8.h

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_Tensor = torch.Tensor


def per_tensor_quant_fp8(
    input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor, is_static: bool = False
) -> None:
    """Quantises a tensor to float8_e4m3fn with one scale: `output_q = e4m3(clip(input / output_s, +-448))`.

    The division is rounded as float32's, and to e4m3 to the nearest, ties to even; infinities saturate, and a NaN
    becomes a NaN. Signature and meaning are those of SGLang's operator of this name, but `output_s` need not be zeroed.

    Args:
        input: float16, bfloat16 or float32, contiguous, of any shape, on the CPU or a CUDA device, where it is aligned
            to 16 bytes.
        output_q: written; of the input's shape and device, float8_e4m3fn, contiguous and aligned likewise, sharing no
            memory with the others.
        output_s: one float32 on the same device. Read if `is_static`: finite and above zero; from 2^-90 to 2^125 the
            division is exact. Otherwise written: the largest magnitude in `input` divided by 448, and at least 2^-90,
            which also stands for a tensor of zeros or of no elements. NaNs are not counted; an infinity makes it
            infinite, and numbers divided by it 0.
        is_static: whether the scale is given.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: a shape, stride, device, alignment or overlap that is not accepted.
        RuntimeError: a kernel cannot be built or launched; a gradient is needed, which this has none of.
    """
    if not _is_dynamo_compiling():
        try:
            if input.__class__ is output_q.__class__ is output_s.__class__ is _Tensor and (
                not input.requires_grad or not torch.is_grad_enabled()
            ):
                if is_static is True:
                    if not STATIC.kernels[input.dtype](input, output_q, output_s, None):
                        return
                elif is_static is False:
                    maxima = torch.empty(_MOST_MAXIMA, dtype=torch.float32, device=input.device)
                    arguments = input, output_q, output_s, maxima
                    if not MAXIMA.kernels[input.dtype](*arguments) and not DYNAMIC.kernels[input.dtype](*arguments):
                        return
        except Exception:  # no kernel yet, or arguments that have no such attributes: the way below says what it was
            pass
    _first(input, output_q, output_s, is_static)


def _first(input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor, is_static: bool) -> None:
    """The way of a call that finds no kernel or is refused by it: says what is wrong, or gets the right kernel."""
    if not isinstance(is_static, bool):
        raise TypeError(f"is_static must be True or False, got {type(is_static).__name__}")
    if is_traced(input, output_q, output_s):
        check_kinds(input, output_q, output_s)
        refuse_gradient(STATIC, input)
        operator = (
            torch.ops.jitnorm.per_tensor_quant_fp8 if is_static else torch.ops.jitnorm.per_tensor_quant_fp8_dynamic
        )
        operator(input, output_q, output_s)
        return
    _check(input, output_q, output_s, is_static)
    refuse_gradient(STATIC, input)
    _run(input, output_q, output_s, is_static)


def _check(input: Any, output_q: Any, output_s: Any, is_static: Any) -> None:
    """Raises for what the glue `per_tensor_quant_fp8` in csrc/elementwise/quant_fp8.h refuses."""
    check_kinds(input, output_q, output_s)
    checks.supported_device("input", input)
    for name, value in (("input", input), ("output_q", output_q)):
        checks.elements(name, value, input.numel(), "like input", checks.CUDA_ALIGNMENT)
    checks.elements("output_s", output_s, 1, "one scale for all")
    check_memory(input, output_q, output_s, writes_s=not is_static)


def _run(input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor, is_static: bool) -> None:
    if is_static:
        STATIC.run(input, output_q, output_s, None)
        return
    maxima = torch.empty(_MOST_MAXIMA, dtype=torch.float32, device=input.device)
    MAXIMA.run(input, output_q, output_s, maxima)
    DYNAMIC.run(input, output_q, output_s, maxima)


def _run_last(input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor, is_static: bool) -> bool:
    """By the kernels that served last; False if one is missing, or refuses these arguments."""
    if is_static:
        return STATIC.call_last((input.dtype,), input, output_q, output_s, None)
    arguments = input, output_q, output_s, torch.empty(_MOST_MAXIMA, dtype=torch.float32, device=input.device)
    return all(kernel.call_last((input.dtype,), *arguments) for kernel in (MAXIMA, DYNAMIC))


def _register(is_static: bool) -> None:
    def run(input: Any, output_q: Any, output_s: Any) -> None:
        if not _run_last(input, output_q, output_s, is_static):
            _check(input, output_q, output_s, is_static)
            _run(input, output_q, output_s, is_static)
        count_version(output_q, *([] if is_static else [output_s]))

    def fake(input: Any, output_q: Any, output_s: Any) -> None:
        check_kinds(input, output_q, output_s)
        for operator in (STATIC,) if is_static else (MAXIMA, DYNAMIC):
            build_while_tracing(operator, input, input.dtype)

    name, scale = (_NAME, "Tensor output_s") if is_static else (f"{_NAME}_dynamic", "Tensor(b!) output_s")
    register(f"{name}(Tensor input, Tensor(a!) output_q, {scale}) -> ()", run, fake)


_register(is_static=True)
_register(is_static=False)
