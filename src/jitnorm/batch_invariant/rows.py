"""Softmax, its logarithm and means, row by row: the order of a row's additions depends on its length alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from jitnorm.batch_invariant.cpu_matmul import aligned
from jitnorm.batch_invariant.eager import eager_only
from jitnorm.batch_invariant.triton_needed import on_device_of, triton_module
from jitnorm.core import checks

_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def log_softmax(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """The logarithm of `softmax(input, dim)`, computed in float32 and rounded once.

    A row, which is what lies along `dim`, has the same bits whatever the other rows are and however many.

    Args:
        input: any shape and strides, of a floating-point dtype.
        dim: the dimension that is normalised.

    Returns:
        Of the input's shape and dtype.

    Raises:
        TypeError: `input` is no tensor of a floating-point dtype.
        IndexError: there is no such dimension.
        RuntimeError: a gradient is asked for; `torch.log_softmax` in the mode has one.
    """
    return _public_softmax("log_softmax", input, dim, log=True)


def softmax(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """`exp(input) / sum(exp(input), dim)`; all else as `log_softmax`."""
    return _public_softmax("softmax", input, dim, log=False)


def mean_dim(
    input: torch.Tensor, dim: int | Sequence[int] | None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The mean over some dimensions, accumulated in float32 (float64 for such) and rounded once.

    Each mean has the same bits whatever else is in `input`; it depends on its own elements and their number.

    Args:
        input: any shape and strides; of a floating-point or complex dtype unless `dtype` is given.
        dim: one dimension or several; None or none for all.
        keepdim: whether these dimensions stay, with size 1.
        dtype: the result's; None for the input's.

    Raises:
        TypeError: `input` is no tensor, or of integers without `dtype`.
        IndexError: there is no such dimension.
        ValueError: a dimension is named twice.
        RuntimeError: a gradient is asked for; `torch.mean` in the mode has one.
    """
    eager_only("mean_dim", "torch.mean", input)
    checks.tensor("input", input)
    return mean_override(input, dim, keepdim, dtype)


def mean_override(
    input: torch.Tensor, dim: int | Sequence[int] | None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """aten::mean.dim."""
    dtype = dtype or input.dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"input must be floating-point or complex where dtype is None, got {input.dtype}")
    dims = _dims(dim, input.dim())
    kept = [d for d in range(input.dim()) if d not in dims]
    count = math.prod(input.shape[d] for d in dims)
    rows = input.permute([*kept, *dims]).reshape(*(input.shape[d] for d in kept), count)
    result = _mean(rows, dtype).contiguous()  # as ATen has it, which compiled code counts on
    return result.view([1 if d in dims else size for d, size in enumerate(input.shape)]) if keepdim else result


def softmax_override(input: torch.Tensor, dim: int, half_to_float: bool, log: bool) -> torch.Tensor:
    """aten::_softmax and aten::_log_softmax; with `half_to_float`, the result is float32."""
    if input.dim() == 0:
        return softmax_override(input.view(1), 0, half_to_float, log).view(())
    x = input.movedim(dim, -1)
    out = _softmax(x, torch.float32 if half_to_float else input.dtype, log)
    return out.movedim(-1, dim).contiguous()  # as ATen has it, which compiled code counts on


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """The sum over the last dimension, by halves. Each step adds two tensors, element by element, so that no kernel
    has an order to choose."""
    width = 1 << max(x.shape[-1] - 1, 0).bit_length()
    x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x[..., 0]


def _public_softmax(name: str, input: torch.Tensor, dim: int, log: bool) -> torch.Tensor:
    eager_only(name, f"torch.{name}", input)
    checks.tensor("input", input)
    if not input.is_floating_point():
        raise TypeError(f"input must be of a floating-point dtype, got {input.dtype}")
    _dims(dim, input.dim())
    return softmax_override(input, dim, False, log)


def _softmax(x: torch.Tensor, dtype: torch.dtype, log: bool) -> torch.Tensor:
    if x.is_cuda and x.dtype in _TRITON_DTYPES:
        x = aligned(x, 16)
        out = torch.empty_like(x, dtype=dtype)
        with on_device_of(x):
            triton_module("triton_rows").softmax(x, out, log)
        return out
    if x.is_cuda:
        exact = x.double() - x.double().amax(-1, keepdim=True)
        total = tree_sum(exact.exp()).unsqueeze(-1)
        return (exact - total.log() if log else exact.exp() / total).to(dtype)
    # One thread computes a row from beginning to end, in torch's own kernel for rows; the mode overrides what is
    # called without `out` only.
    kernel = torch.ops.aten._log_softmax.out if log else torch.ops.aten._softmax.out
    x = aligned(x)
    return kernel(x, -1, False, out=torch.empty_like(x)).to(dtype)  # type: ignore[no-any-return]


def _mean(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Over the last dimension."""
    if rows.is_cuda and rows.dtype in _TRITON_DTYPES and dtype in _TRITON_DTYPES:
        out = rows.new_empty(rows.shape[:-1], dtype=dtype)
        with on_device_of(rows):
            triton_module("triton_rows").mean(aligned(rows, 16), out)
        return out
    exact = torch.promote_types(torch.promote_types(rows.dtype, dtype), torch.float32)
    return (tree_sum(rows.to(exact)) / rows.shape[-1]).to(dtype)


def _dims(dim: int | Sequence[int] | None, count: int) -> list[int]:
    """From 0 on."""
    wanted = [dim] if isinstance(dim, int) else list(dim or range(count))
    for d in wanted:
        if not -max(count, 1) <= d < max(count, 1):
            raise IndexError(f"dim must be from {-count} to {count - 1}, got {d}")
    dims = [d % count for d in wanted] if count else []
    if len(set(dims)) != len(dims):
        raise ValueError(f"dim must name each dimension once, got {wanted}")
    return dims
