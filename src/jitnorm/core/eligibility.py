"""Decide whether a module, layer or patched model may call this package's operators, or must call PyTorch's own."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from jitnorm.core import checks
from jitnorm.core.norms import MAX_HIDDEN_SIZE, MAX_LEADING_DIMS, is_supported_hidden_size
from jitnorm.core.operators import DTYPES
from jitnorm.core.torch_library import mark_constant

_DEFAULT_DISPATCH = torch.Tensor.__torch_dispatch__
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_jit_tracing_state = torch._C._get_tracing_state
_functorch_level = torch._C._functorch.peek_interpreter_stack


def can_call_operators(input: Any, weight: Any) -> bool:
    """Return whether a call on these tensors may use this package's operators, in the active mode or transform.

    It may in eager mode, and under torch.compile, torch.export, make_fx, FakeTensors and dispatch modes, which see
    operators of torch.ops. The following need PyTorch's own operators: torch.func and forward-mode derivatives, which
    have rules only for these; other tensor subclasses with a `__torch_dispatch__`, which may not handle other
    operators; torch.fx's proxies, which have no dtype; torch.jit.trace and the ONNX exporter, whose results run without
    this package.
    """
    if _is_dynamo_compiling():  # first: dynamo must not trace into the rest
        return not _requires_torch_operators()
    return (
        (getattr(type(input), "__torch_dispatch__", None) is _DEFAULT_DISPATCH or _is_fake(input))
        and (getattr(type(weight), "__torch_dispatch__", None) is _DEFAULT_DISPATCH or _is_fake(weight))
        and _jit_tracing_state() is None
        and _functorch_level() is None
        and forward_ad._current_level < 0
        and not input.is_nested
    )


def can_normalise(input: Any, weight: Any) -> bool:
    """Return whether jitnorm.rmsnorm can compute a call with these tensors; the strides of `input` do not matter."""
    return can_normalise_any_size(input, weight) and is_plain_weight(input, weight)


def can_normalise_any_size(input: Any, weight: Any) -> bool:
    """Return whether jitnorm.general_rmsnorm can compute a call with these tensors; the strides do not matter."""
    return (
        can_call_operators(input, weight)
        and weight.dim() == 1
        and input.dim() > 0
        and input.shape[-1] == weight.shape[0]
        and 1 <= weight.shape[0] <= MAX_HIDDEN_SIZE
        and input.dtype in DTYPES
        and weight.dtype in DTYPES
        and weight.device == input.device
        and input.device.type in ("cpu", "cuda")
        and weight.is_contiguous()
    )


def can_normalise_without_weight(input: Any) -> bool:
    """Return the same for a call without a weight."""
    return (
        can_call_operators(input, input)
        and input.dim() > 0
        and 1 <= input.shape[-1] <= MAX_HIDDEN_SIZE
        and input.dtype in DTYPES
        and input.device.type in ("cpu", "cuda")
    )


def can_call_layernorm(input: Any, weight: Any, bias: Any, hidden_size: int) -> bool:
    """Return whether jitnorm.layernorm can compute a call of `torch.nn.LayerNorm`; the strides do not matter.

    Args:
        input: a tensor.
        weight: a tensor or None.
        bias: a tensor or None.
        hidden_size: the size that the module normalises.
    """
    factors = [t for t in (weight, bias) if t is not None]
    if factors:
        return (
            all(can_normalise_any_size(input, t) and t.dtype == factors[0].dtype for t in factors)
            and factors[0].shape[0] == hidden_size
        )
    return can_normalise_without_weight(input) and input.shape[-1] == hidden_size


def is_plain_weight(input: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether jitnorm.rmsnorm accepts the size, the dtype and the alignment of a weight for `input`."""
    return (
        is_supported_hidden_size(weight.shape[0])
        and weight.dtype in (input.dtype, torch.float32)
        and has_kernel_layout(weight)
    )


def has_general_layout(tensor: torch.Tensor) -> bool:
    """Return whether jitnorm.general_rmsnorm accepts the strides of `tensor`, alone or with others like it."""
    if tensor.is_contiguous():
        return True
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        return False
    strides = [step for step, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if size > 1]
    return len(strides) <= MAX_LEADING_DIMS  # torch has no negative ones


def has_kernel_layout(tensor: torch.Tensor) -> bool:
    """Return whether the norm kernels accept the strides of `tensor` and, on CUDA, its alignment."""
    if tensor.is_cuda and _has_address(tensor) and tensor.data_ptr() % checks.CUDA_ALIGNMENT:
        return False
    if tensor.is_contiguous():
        return True
    stride = checks.row_stride(tensor) if tensor.stride(-1) == 1 else None
    return stride is not None and not (tensor.is_cuda and stride * tensor.element_size() % checks.CUDA_ALIGNMENT)


def _has_address(tensor: torch.Tensor) -> bool:
    """Return whether `tensor` has an address. A traced one has none; its address is checked when the graph runs."""
    return not _is_dynamo_compiling() and type(tensor).__torch_dispatch__ is _DEFAULT_DISPATCH


def _is_fake(tensor: Any) -> bool:
    """Return whether `tensor` represents an ordinary one while a graph that may contain our operators is traced."""
    return isinstance(tensor, (FakeTensor, FunctionalTensor)) and not _requires_torch_operators()


def _requires_torch_operators() -> bool:
    """Return whether torch.func, a forward-mode derivative or the ONNX exporter is active."""
    onnx = sys.modules.get("torch.onnx")  # not imported here, as that takes 0.1 s
    return (
        _functorch_level() is not None
        or forward_ad._current_level >= 0
        or (onnx is not None and onnx.is_in_onnx_export())
    )


mark_constant(_requires_torch_operators)
