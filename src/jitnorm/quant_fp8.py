"""Quantisation to float8_e4m3fn with one scale for a tensor, static or dynamic, or a dynamic one for each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from jitnorm.core import checks
from jitnorm.core.operators import CPP_TYPES, DTYPES, EXAMPLES, Example, Operator, Shape
from jitnorm.core.targets import target_of
from jitnorm.core.torch_library import (
    build_while_tracing,
    increment_versions,
    needs_dispatcher,
    refuse_gradient,
    register,
)
from jitnorm.jit.spec import KernelSpec, Target

_E4M3 = torch.float8_e4m3fn
_PARTIAL_AMAX_COUNT = 512  # kMaxPartialAmax in csrc/elementwise/quant_fp8.h
_HIDDEN_SIZE_MULTIPLE = 16  # required by float8 GEMMs; kHiddenSizeMultiple in csrc/elementwise/quant_fp8.h


@dataclass(eq=False, repr=False)
class QuantFp8(Operator):
    """One kernel of the family. It supports tensors of any size."""

    kernel_class: str  # in csrc/elementwise/quant_fp8.cuh and _cpu.h, with {} for the input's type

    size_name: ClassVar[str | None] = None
    needs_size: ClassVar[bool] = False

    def spec(self, dtype: torch.dtype, target: Target) -> KernelSpec:
        """Return what to build. TypeError for an unsupported dtype."""
        if dtype not in CPP_TYPES:
            raise TypeError(f"{self.op} takes {checks.enumeration(DTYPES)}, got {dtype}")
        name = checks.DTYPE_NAMES[dtype]
        return KernelSpec(
            op=self.op,
            family="quant_fp8",
            binding=self.binding,
            name=f"{self.op}_{name}",
            kernel=self.kernel_class.format(CPP_TYPES[dtype]),
            target=target,
            warmup=f"--op {self.op} --dtype {name}",
        )

    def warmup_spec(
        self, size: int | None, dtype: torch.dtype, weight_dtype: torch.dtype, target: Target
    ) -> KernelSpec:
        """Return what to build for a dtype: one kernel supports every size, and there is no weight."""
        return self.spec(dtype, target)

    def run(self, input: torch.Tensor, *arguments: Any) -> None:
        """Run the kernel for `input` on it and on `arguments`, which have been checked."""
        self.call((input.dtype,), (input.dtype, target_of(input)), input, *arguments)


_TENSOR, _TOKEN = "per_tensor_quant_fp8", "per_token_quant_fp8"
PER_TENSOR = QuantFp8(_TENSOR, _TENSOR, "PerTensorQuantFp8Kernel<{}, Pass::kStatic>")
PER_TENSOR_DYNAMIC = QuantFp8(f"{_TENSOR}_dynamic", _TENSOR, "PerTensorQuantFp8Kernel<{}, Pass::kDynamic>")
# The first of two passes for a dynamic scale. It writes the largest magnitude of each part of the tensor;
# PER_TENSOR_DYNAMIC takes the largest of these.
PARTIAL_AMAX = QuantFp8(f"{_TENSOR}_partial_amax", _TENSOR, "PartialAmaxKernel<{}>", part_of=PER_TENSOR_DYNAMIC)
PER_TOKEN = QuantFp8(_TOKEN, _TOKEN, "PerTokenQuantFp8Kernel<{}>")

_per_token_kernels = PER_TOKEN.fast_cache
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_Tensor = torch.Tensor


def per_tensor_quant_fp8(
    input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor, is_static: bool = False
) -> None:
    """Quantise a tensor to float8_e4m3fn with one scale: `output_q = e4m3(clip(input / output_s, +-448))`.

    The quotient is rounded to float32, and then to the nearest e4m3 number, ties to even. Infinities saturate, and a
    NaN becomes a NaN. Signature and meaning are those of SGLang's operator of this name, but `output_s` need not be
    zeroed.

    Args:
        input: float16, bfloat16 or float32, contiguous, of any shape, on the CPU or a CUDA device, where it is aligned
            to 16 bytes.
        output_q: written; of the input's shape and device, float8_e4m3fn, contiguous and aligned likewise, sharing no
            memory with the others.
        output_s: one float32 on the same device. Read if `is_static`: finite and above zero; the division is exact from
            2^-90 to 2^125. Otherwise written: the largest magnitude in `input` divided by 448, and at least 2^-90,
            which is also the scale of a tensor of zeros or without elements. NaNs are not counted. An infinity makes
            the scale infinite, and the quotients of finite numbers 0.
        is_static: whether the scale is given.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype.
        ValueError: a shape, stride, device, alignment or overlap is not accepted.
        RuntimeError: a kernel cannot be built or launched, or a gradient is needed, which this operator does not have.
    """
    if not _is_dynamo_compiling():
        try:
            if input.__class__ is output_q.__class__ is output_s.__class__ is _Tensor and (
                not input.requires_grad or not torch.is_grad_enabled()
            ):
                if is_static is True:
                    if not PER_TENSOR.fast_cache[input.dtype](input, output_q, output_s, None):
                        return
                elif is_static is False:
                    partial_amax = torch.empty(_PARTIAL_AMAX_COUNT, dtype=torch.float32, device=input.device)
                    arguments = input, output_q, output_s, partial_amax
                    if not PARTIAL_AMAX.fast_cache[input.dtype](*arguments) and not PER_TENSOR_DYNAMIC.fast_cache[
                        input.dtype
                    ](*arguments):
                        return
        except Exception:  # no kernel yet, or arguments without such attributes: the slow path raises for these
            pass
    _per_tensor_slow_path(input, output_q, output_s, is_static)


def per_token_quant_fp8(input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor) -> None:
    """Quantise each row to float8_e4m3fn with a scale of its own: `output_q = e4m3(clip(input / output_s, +-448))`.

    Rounded as by `jitnorm.per_tensor_quant_fp8`. A row's scale is its largest magnitude divided by 448, and at least
    `1 / (448 * 512)`, which is the scale of a row of zeros. NaNs are not counted. A row's result has the same bits
    alone and in any batch. Signature and meaning are those of SGLang's sgl_per_token_quant_fp8, with vLLM's minimum
    scale.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, on the CPU or a CUDA device; strides as for
            `jitnorm.rmsnorm`. hidden_size is any multiple of 16.
        output_q: written; of the input's shape and device, float8_e4m3fn, sharing no memory with the others. On CUDA
            every row is aligned to 16 bytes.
        output_s: written; float32 on the same device, contiguous, an element for each row, as in `[..., 1]`.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype.
        ValueError: a shape, stride, device, alignment or overlap is not accepted.
        RuntimeError: hidden_size is not supported, a kernel cannot be built or launched, or a gradient is needed: there
            is none.
    """
    if not _is_dynamo_compiling():
        try:
            if (
                input.__class__ is output_q.__class__ is output_s.__class__ is _Tensor
                and (not input.requires_grad or not torch.is_grad_enabled())
                and not _per_token_kernels[input.dtype](input, output_q, output_s)
            ):
                return
        except Exception:  # as in per_tensor_quant_fp8
            pass
    _per_token_slow_path(input, output_q, output_s)


def _per_tensor_slow_path(input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor, is_static: bool) -> None:
    """Check the arguments, then run the right kernels, which are built and cached if need be."""
    if not isinstance(is_static, bool):
        raise TypeError(f"is_static must be True or False, got {type(is_static).__name__}")
    if needs_dispatcher(input, output_q, output_s):
        _check_metadata(input, output_q, output_s)
        refuse_gradient(PER_TENSOR.op, input)
        operator = PER_TENSOR if is_static else PER_TENSOR_DYNAMIC
        getattr(torch.ops.jitnorm, operator.op)(input, output_q, output_s)
        return
    check_per_tensor(input, output_q, output_s, is_static)
    refuse_gradient(PER_TENSOR.op, input)
    _run_per_tensor(input, output_q, output_s, is_static)


def _per_token_slow_path(input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor) -> None:
    """Check the arguments, then run the right kernel, which is built and cached if need be."""
    if needs_dispatcher(input, output_q, output_s):
        _check_per_token_metadata(input, output_q, output_s)
        refuse_gradient(PER_TOKEN.op, input)
        torch.ops.jitnorm.per_token_quant_fp8(input, output_q, output_s)
        return
    check_per_token(input, output_q, output_s)
    refuse_gradient(PER_TOKEN.op, input)
    PER_TOKEN.run(input, output_q, output_s)


def _run_per_tensor(input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor, is_static: bool) -> None:
    if is_static:
        PER_TENSOR.run(input, output_q, output_s, None)
        return
    partial_amax = torch.empty(_PARTIAL_AMAX_COUNT, dtype=torch.float32, device=input.device)
    PARTIAL_AMAX.run(input, output_q, output_s, partial_amax)
    PER_TENSOR_DYNAMIC.run(input, output_q, output_s, partial_amax)


def _try_cached_per_tensor(
    input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor, is_static: bool
) -> bool:
    """Run the cached kernels on unchecked arguments. False if one is missing or refuses these arguments."""
    if is_static:
        return PER_TENSOR.try_cached((input.dtype,), input, output_q, output_s, None)
    partial_amax = torch.empty(_PARTIAL_AMAX_COUNT, dtype=torch.float32, device=input.device)
    arguments = input, output_q, output_s, partial_amax
    return all(kernel.try_cached((input.dtype,), *arguments) for kernel in (PARTIAL_AMAX, PER_TENSOR_DYNAMIC))


def check_per_tensor(input: Any, output_q: Any, output_s: Any, is_static: Any) -> None:
    """Raise for arguments that the bindings function `per_tensor_quant_fp8` in csrc/elementwise/quant_fp8.h refuses."""
    _check_metadata(input, output_q, output_s)
    checks.supported_device("input", input)
    for name, value in (("input", input), ("output_q", output_q)):
        checks.elements(name, value, input.numel(), "like input", checks.CUDA_ALIGNMENT)
    checks.elements("output_s", output_s, 1, "one scale for all")
    _check_overlap(input, output_q, output_s, writes_s=not is_static)


def check_per_token(input: Any, output_q: Any, output_s: Any) -> None:
    """Raise for arguments that the bindings function `per_token_quant_fp8` in csrc/elementwise/quant_fp8.h refuses."""
    _check_per_token_metadata(input, output_q, output_s)
    checks.supported_device("input", input)
    for name, value in (("input", input), ("output_q", output_q)):
        checks.rows(name, value)
    checks.no_row_overlap("output_q", output_q)
    checks.elements("output_s", output_s, input.numel() // input.shape[-1], "one for each row of input")
    _check_overlap(input, output_q, output_s, writes_s=True)


def _check_metadata(input: Any, output_q: Any, output_s: Any) -> None:
    """Raise for what is wrong with types, dtypes, shapes and devices; works on fake and meta tensors too."""
    for name, value in (("input", input), ("output_q", output_q), ("output_s", output_s)):
        checks.tensor(name, value)
    checks.dtype("input", input, DTYPES)
    checks.dtype("output_q", output_q, (_E4M3,))
    checks.shape("output_q", output_q, input.shape, "like input")
    checks.dtype("output_s", output_s, (torch.float32,))
    for name, value in (("output_q", output_q), ("output_s", output_s)):
        checks.device(name, value, "input", input)


def _check_per_token_metadata(input: Any, output_q: Any, output_s: Any) -> None:
    _check_metadata(input, output_q, output_s)
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a scalar")
    hidden_size = int(input.shape[-1])
    if hidden_size < 1 or hidden_size % _HIDDEN_SIZE_MULTIPLE:
        raise RuntimeError(
            f"{PER_TOKEN.op} does not support hidden_size {hidden_size}: "
            f"supported are multiples of {_HIDDEN_SIZE_MULTIPLE}"
        )


def _check_overlap(input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor, writes_s: bool) -> None:
    checks.no_shared_memory("output_q", output_q, "input", input)
    checks.no_shared_memory("output_q", output_q, "output_s", output_s)
    if writes_s:
        checks.no_shared_memory("output_s", output_s, "input", input)


def _register_per_tensor(is_static: bool) -> None:
    """Define the static or the dynamic form in torch.ops.jitnorm."""

    def run(input: Any, output_q: Any, output_s: Any) -> None:
        if not _try_cached_per_tensor(input, output_q, output_s, is_static):
            check_per_tensor(input, output_q, output_s, is_static)
            _run_per_tensor(input, output_q, output_s, is_static)
        increment_versions(output_q, *([] if is_static else [output_s]))

    def fake(input: Any, output_q: Any, output_s: Any) -> None:
        _check_metadata(input, output_q, output_s)
        for operator in (PER_TENSOR,) if is_static else (PARTIAL_AMAX, PER_TENSOR_DYNAMIC):
            build_while_tracing(operator, input, input.dtype)

    operator, scale = (PER_TENSOR, "Tensor output_s") if is_static else (PER_TENSOR_DYNAMIC, "Tensor(b!) output_s")
    register(f"{operator.op}(Tensor input, Tensor(a!) output_q, {scale}) -> ()", run, fake)


def _run_per_token(input: Any, output_q: Any, output_s: Any) -> None:
    if not PER_TOKEN.try_cached((input.dtype,), input, output_q, output_s):
        check_per_token(input, output_q, output_s)
        PER_TOKEN.run(input, output_q, output_s)
    increment_versions(output_q, output_s)


def _fake_per_token(input: Any, output_q: Any, output_s: Any) -> None:
    _check_per_token_metadata(input, output_q, output_s)
    build_while_tracing(PER_TOKEN, input, input.dtype)


_register_per_tensor(is_static=True)
_register_per_tensor(is_static=False)
register(f"{_TOKEN}(Tensor input, Tensor(a!) output_q, Tensor(b!) output_s) -> ()", _run_per_token, _fake_per_token)


def _arguments(shape: Shape, scales: torch.Tensor) -> dict[str, Any]:
    return {"input": shape.randn(), "output_q": shape.zeros(dtype=_E4M3), "output_s": scales}


EXAMPLES[PER_TENSOR.op] = Example(
    per_tensor_quant_fp8,
    lambda shape: _arguments(shape, torch.full((1,), 0.25, device=shape.device)) | {"is_static": True},
    written=("output_q",),
    per_row=("input", "output_q"),
    contiguous=("input", "output_q"),
)
EXAMPLES[PER_TENSOR_DYNAMIC.op] = Example(
    per_tensor_quant_fp8,
    lambda shape: _arguments(shape, shape.zeros(1, dtype=torch.float32)),
    written=("output_q", "output_s"),
    per_row=(),  # the scale depends on all rows
)
EXAMPLES[PER_TOKEN.op] = Example(
    per_token_quant_fp8,
    lambda shape: _arguments(shape, shape.zeros(shape.rows, 1, dtype=torch.float32)),
    written=("output_q", "output_s"),
    per_row=("input", "output_q", "output_s"),
    contiguous=("output_s",),
)
