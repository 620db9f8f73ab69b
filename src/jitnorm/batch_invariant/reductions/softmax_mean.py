"""Softmax, its logarithm and means. The order of a row's additions follows from its length alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from jitnorm.batch_invariant.operands import contiguous_aligned, require_eager
from jitnorm.batch_invariant.triton_support import TRITON_DTYPES, device_guard, triton_module
from jitnorm.core import checks


def log_softmax(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Return the logarithm of `softmax(input, dim)`, computed in float32 and rounded once.

    A row, which is what lies along `dim`, has the same bits alone and among any other rows.

    Args:
        input: any shape and strides, of a floating-point dtype.
        dim: the dimension along which the exponentials add up to 1.

    Returns:
        A tensor of the input's shape and dtype.

    Raises:
        TypeError: `input` is not a tensor of a floating-point dtype.
        IndexError: the input has no such dimension.
        RuntimeError: a gradient is needed; `torch.log_softmax` in the mode has one.
    """
    return _public_softmax("log_softmax", input, dim, log=True)


def softmax(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Return `exp(input) / sum(exp(input), dim)`, otherwise like `log_softmax`."""
    return _public_softmax("softmax", input, dim, log=False)


def mean_dim(
    input: torch.Tensor, dim: int | Sequence[int] | None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return the mean over some dimensions, accumulated in float32 (in float64 for float64) and rounded once.

    Each mean has the same bits whatever else is in `input`: it depends on its own elements and their number.

    Args:
        input: any shape and strides; of a floating-point or complex dtype unless `dtype` is given.
        dim: one dimension or several; None or an empty sequence for all.
        keepdim: keep these dimensions, with size 1.
        dtype: the dtype of the result; None for the input's.

    Raises:
        TypeError: `input` is not a tensor, or is one of integers and `dtype` is None.
        IndexError: the input has no such dimension.
        ValueError: a dimension is named twice.
        RuntimeError: a gradient is needed; `torch.mean` in the mode has one.
    """
    require_eager("mean_dim", "torch.mean", input)
    checks.tensor("input", input)
    return aten_mean(input, dim, keepdim, dtype)


def aten_mean(
    input: torch.Tensor, dim: int | Sequence[int] | None, keepdim: bool = False, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Compute aten::mean.dim."""
    dtype = dtype or input.dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        raise TypeError(f"input must be floating-point or complex if dtype is None, got {input.dtype}")
    dims = _nonnegative_dims(dim, input.dim())
    kept = [d for d in range(input.dim()) if d not in dims]
    count = math.prod(input.shape[d] for d in dims)
    rows = input.permute([*kept, *dims]).reshape(*(input.shape[d] for d in kept), count)
    result = _mean(rows, dtype).contiguous()  # ATen's result is, and compiled code relies on it
    return result.view([1 if d in dims else size for d, size in enumerate(input.shape)]) if keepdim else result


def aten_softmax(input: torch.Tensor, dim: int, half_to_float: bool, log: bool) -> torch.Tensor:
    """Compute aten::_softmax, or aten::_log_softmax if `log`. With `half_to_float` the result is float32."""
    if input.dim() == 0:
        return aten_softmax(input.view(1), 0, half_to_float, log).view(())
    rows = input.movedim(dim, -1)
    out = _softmax(rows, torch.float32 if half_to_float else input.dtype, log)
    return out.movedim(-1, dim).contiguous()  # ATen's result is, and compiled code relies on it


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Return the sum over the last dimension, by adding halves.

    Each step adds two tensors element by element, so that no kernel has an order of additions to choose.
    """
    width = 1 << max(x.shape[-1] - 1, 0).bit_length()
    x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x[..., 0]


def _public_softmax(name: str, input: torch.Tensor, dim: int, log: bool) -> torch.Tensor:
    require_eager(name, f"torch.{name}", input)
    checks.tensor("input", input)
    if not input.is_floating_point():
        raise TypeError(f"input must be of a floating-point dtype, got {input.dtype}")
    _nonnegative_dims(dim, input.dim())
    return aten_softmax(input, dim, False, log)


def _softmax(x: torch.Tensor, dtype: torch.dtype, log: bool) -> torch.Tensor:
    """Return the softmax over the last dimension, or its logarithm."""
    if x.is_cuda and x.dtype in TRITON_DTYPES:
        x = contiguous_aligned(x, 16)
        out = torch.empty_like(x, dtype=dtype)
        with device_guard(x):
            triton_module("reductions.triton_kernels").softmax(x, out, log)
        return out
    if x.is_cuda:
        shifted = x.double() - x.double().amax(-1, keepdim=True)
        total = tree_sum(shifted.exp()).unsqueeze(-1)
        return (shifted - total.log() if log else shifted.exp() / total).to(dtype)
    # torch's own kernel for rows gives a row to one thread. It is called with `out`, which the mode does not override.
    kernel = torch.ops.aten._log_softmax.out if log else torch.ops.aten._softmax.out
    x = contiguous_aligned(x)
    return kernel(x, -1, False, out=torch.empty_like(x)).to(dtype)  # type: ignore[no-any-return]


def _mean(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the mean over the last dimension."""
    if rows.is_cuda and rows.dtype in TRITON_DTYPES and dtype in TRITON_DTYPES:
        out = rows.new_empty(rows.shape[:-1], dtype=dtype)
        with device_guard(rows):
            triton_module("reductions.triton_kernels").mean(contiguous_aligned(rows, 16), out)
        return out
    accumulator_dtype = torch.promote_types(torch.promote_types(rows.dtype, dtype), torch.float32)
    return (tree_sum(rows.to(accumulator_dtype)) / rows.shape[-1]).to(dtype)


def _nonnegative_dims(dim: int | Sequence[int] | None, count: int) -> list[int]:
    """Return the dimensions that `dim` names, counted from 0. Raise IndexError or ValueError as `mean_dim` does."""
    given = [dim] if isinstance(dim, int) else list(dim or range(count))
    for d in given:
        if not -max(count, 1) <= d < max(count, 1):
            raise IndexError(f"dim must be from {-count} to {count - 1}, got {d}")
    dims = [d % count for d in given] if count else []
    if len(set(dims)) != len(dims):
        raise ValueError(f"dim must name each dimension once, got {given}")
    return dims
