"""RMSNorm: this package's kernels where they serve the size, and an invariant fallback elsewhere."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch

from jitnorm.batch_invariant.cpu_matmul import aligned
from jitnorm.batch_invariant.eager import eager_only
from jitnorm.batch_invariant.rows import tree_sum
from jitnorm.batch_invariant.triton_needed import on_device_of, triton_module
from jitnorm.core import checks
from jitnorm.core.norms import is_supported_hidden_size
from jitnorm.core.torch_library import is_traced, needs_grad
from jitnorm.rmsnorm import rmsnorm

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_ONES = 16
_ones: OrderedDict[tuple[tuple[int, ...], torch.device, torch.dtype, int | None], torch.Tensor] = OrderedDict()
_ones_lock = threading.Lock()


def rms_norm_batch_invariant(input: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`input / sqrt(mean(input^2) + eps) * weight` over the last dimension, computed in float32 and rounded once.

    A row has the same bits whatever the other rows are and however many.

    Args:
        input: `[..., hidden_size]`, any strides, of a floating-point dtype.
        weight: `[hidden_size]`, of a floating-point dtype, on the same device.
        eps: added to the mean of the squares; zero or more.

    Returns:
        Of the input's shape and dtype.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: a shape or device that does not fit, or a bad eps.
        RuntimeError: a gradient is asked for; `torch.rms_norm` in the mode has one.
    """
    eager_only("rms_norm_batch_invariant", "torch.rms_norm", input, weight)
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
    """aten::rms_norm, as in the mode. Autograd sees what it is made of."""
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
    if _kernel_serves(input, weight):
        return rmsnorm(aligned_unless_traced(input), aligned_unless_traced(weight), eps)
    if input.is_cuda and input.dtype in _KERNEL_DTYPES and not (is_traced(input) or needs_grad(input, weight)):
        x, out = aligned(input, 16), torch.empty_like(input, memory_format=torch.contiguous_format)
        with on_device_of(x):
            triton_module("triton_rows").rms_norm(x, aligned(weight, 16), eps, out)
        return out
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    mean = tree_sum(x * x).unsqueeze(-1) / x.shape[-1]
    return (x / torch.sqrt(mean + eps) * weight).to(input.dtype)


def aligned_unless_traced(value: torch.Tensor) -> torch.Tensor:
    """As the kernels take it; what has no address yet is contiguous at least."""
    return value.contiguous() if is_traced(value) or needs_grad(value) else aligned(value, checks.CUDA_ALIGNMENT)


def clear_ones() -> None:
    _ones.clear()


def _kernel_serves(input: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        is_supported_hidden_size(input.shape[-1])
        and input.dtype in _KERNEL_DTYPES
        and weight.dtype in (input.dtype, torch.float32)
        and input.device.type in ("cpu", "cuda")
    )


def _ones_like_row(input: torch.Tensor) -> torch.Tensor:
    """A weight of ones, kept for the next call; the one that was used longest ago makes room."""
    if is_traced(input):
        return input.new_ones(input.shape[-1:])
    stream = None
    if input.is_cuda:
        if torch.cuda.is_current_stream_capturing():  # a graph outlives the mode, and fills its own when it runs
            return input.new_ones(input.shape[-1:])
        stream = torch.cuda.current_stream(input.device).cuda_stream  # nobody else waits for their being written
    key = tuple(input.shape[-1:]), input.device, input.dtype, stream
    with _ones_lock:
        found = _ones.pop(key, None)
        if found is None:
            with torch.inference_mode(False):
                found = torch.ones(key[0], device=key[1], dtype=key[2])
        _ones[key] = found
        if len(_ones) > _MAX_ONES:
            _ones.popitem(last=False)
    return found
