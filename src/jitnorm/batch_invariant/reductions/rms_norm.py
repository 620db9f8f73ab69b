"""RMSNorm, by this package's kernels for the sizes that they support, otherwise by a batch-invariant fallback."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch

from jitnorm.batch_invariant.operands import contiguous_aligned, require_eager
from jitnorm.batch_invariant.reductions.softmax_mean import tree_sum
from jitnorm.batch_invariant.triton_support import TRITON_DTYPES, device_guard, triton_module
from jitnorm.core import checks
from jitnorm.core.norms import is_supported_hidden_size
from jitnorm.core.operators import DTYPES
from jitnorm.core.torch_library import needs_dispatcher, needs_grad
from jitnorm.rmsnorm import rmsnorm

_MAX_ONES = 16
_ones: OrderedDict[tuple[tuple[int, ...], torch.device, torch.dtype, int | None], torch.Tensor] = OrderedDict()
_ones_lock = threading.Lock()


def rms_norm_batch_invariant(input: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Return `input / sqrt(mean(input^2) + eps) * weight`, computed in float32 and rounded once.

    The mean is over the last dimension. A row has the same bits alone and among any other rows.

    Args:
        input: `[..., hidden_size]`, any strides, of a floating-point dtype.
        weight: `[hidden_size]`, of a floating-point dtype, on the same device.
        eps: added to the mean of the squares; zero or more.

    Returns:
        A tensor of the input's shape and dtype.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype.
        ValueError: a shape or device does not fit, or eps is not accepted.
        RuntimeError: a gradient is needed; `torch.rms_norm` in the mode has one.
    """
    require_eager("rms_norm_batch_invariant", "torch.rms_norm", input, weight)
    checks.tensor("input", input)
    checks.tensor("weight", weight)
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a scalar")
    return rms_norm(input, [input.shape[-1]], weight, eps)


def rms_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    eps: float | None = None,
) -> torch.Tensor:
    """Compute aten::rms_norm, as the mode does. Autograd differentiates the operators that it calls."""
    if input.dim() == 0 or list(normalized_shape) != [input.shape[-1]]:
        raise ValueError(
            "in batch-invariant mode rms_norm normalises the last dimension only: "
            f"normalized_shape is {list(normalized_shape)} and the input's shape {list(input.shape)}"
        )
    if not input.is_floating_point():
        raise TypeError(f"input must be of a floating-point dtype, got {input.dtype}")
    if weight is None:
        weight = _ones_like_row(input)
    elif not weight.is_floating_point():
        raise TypeError(f"weight must be of a floating-point dtype, got {weight.dtype}")
    checks.shape("weight", weight, normalized_shape, "normalized_shape")
    checks.device("weight", weight, "input", input)
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    checks.eps(eps)
    if _is_kernel_supported(input, weight):
        return rmsnorm(_aligned_unless_traced(input), _aligned_unless_traced(weight), eps)
    if input.is_cuda and input.dtype in TRITON_DTYPES and not (needs_dispatcher(input) or needs_grad(input, weight)):
        x = contiguous_aligned(input, 16)
        out = torch.empty_like(input, memory_format=torch.contiguous_format)
        with device_guard(x):
            triton_module("reductions.triton_kernels").rms_norm(x, contiguous_aligned(weight, 16), eps, out)
        return out
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    mean = tree_sum(x * x).unsqueeze(-1) / x.shape[-1]
    return (x / torch.sqrt(mean + eps) * weight).to(input.dtype)


def _aligned_unless_traced(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor as the kernels need it. While it is traced it has no address, so it is only contiguous."""
    if needs_dispatcher(tensor) or needs_grad(tensor):
        return tensor.contiguous()
    return contiguous_aligned(tensor, checks.CUDA_ALIGNMENT)


def clear_ones() -> None:
    """Forget the cached weights of ones."""
    _ones.clear()


def _is_kernel_supported(input: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        is_supported_hidden_size(input.shape[-1])
        and input.dtype in DTYPES
        and weight.dtype in (input.dtype, torch.float32)
        and input.device.type in ("cpu", "cuda")
    )


def _ones_like_row(input: torch.Tensor) -> torch.Tensor:
    """Return a weight of ones for the rows of `input`, from a cache of the least recently used ones if possible."""
    if needs_dispatcher(input):
        return input.new_ones(input.shape[-1:])
    stream = None
    if input.is_cuda:
        if torch.cuda.is_current_stream_capturing():  # a graph outlives the mode, and fills its own ones when it runs
            return input.new_ones(input.shape[-1:])
        stream = torch.cuda.current_stream(input.device).cuda_stream  # other streams do not wait for the ones
    key = tuple(input.shape[-1:]), input.device, input.dtype, stream
    with _ones_lock:
        ones = _ones.pop(key, None)
        if ones is None:
            with torch.inference_mode(False):
                ones = torch.ones(key[0], device=key[1], dtype=key[2])
        _ones[key] = ones
        if len(_ones) > _MAX_ONES:
            _ones.popitem(last=False)
    return ones
