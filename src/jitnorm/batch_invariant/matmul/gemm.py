"""The public GEMMs, and what the patched ATen operators call: argument checks and the choice by device."""

from __future__ import annotations

import torch

from jitnorm.batch_invariant.matmul import cpu
from jitnorm.batch_invariant.matmul.cuda import cuda_bmm, cuda_mm
from jitnorm.batch_invariant.operands import require_eager
from jitnorm.batch_invariant.triton_support import TRITON_DTYPES
from jitnorm.core import checks


def matmul_persistent(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `a @ b + bias`, accumulated in float32 and rounded once.

    A row of the result has the same bits alone and in any batch. On CUDA, float16, bfloat16 and float32 are supported
    (TF32 is used only if torch is allowed to use it); on the CPU, every dtype that torch multiplies. The function has
    no gradient; `torch.mm` in the mode has one.

    Args:
        a: `[m, k]`, any strides.
        b: `[k, n]`, any strides, of the same dtype and on the same device.
        bias: `[n]`, of the same dtype, or None.

    Returns:
        `[m, n]`, contiguous, of the same dtype.

    Raises:
        TypeError: an argument is not a tensor, or dtypes differ.
        ValueError: shapes do not fit, or tensors are on different devices.
        RuntimeError: a gradient is needed, or the first GEMM of its kind is computed while a CUDA graph is captured.
    """
    require_eager("matmul_persistent", "torch.mm or torch.addmm", a, b, bias)
    return mm(a, b, bias)


def bmm_batch_invariant(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return `a[i] @ b[i]` for each i, otherwise like `matmul_persistent`.

    Args:
        a: `[batch, m, k]`, any strides.
        b: `[batch, k, n]`, any strides.
        out: written; `[batch, m, n]`, of the same dtype and device, any strides. Allocated if it is None.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as `matmul_persistent`.
    """
    require_eager("bmm_batch_invariant", "torch.bmm", a, b, out)
    result = bmm(a, b)
    if out is None:
        return result
    checks.tensor("out", out)
    checks.dtype("out", out, (a.dtype,))
    checks.device("out", out, "a", a)
    checks.shape("out", out, result.shape, "batch, rows of a, columns of b")
    return out.copy_(result)


def mm(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return `a @ b + bias` for `[m, k]` and `[k, n]`, rounded to `out_dtype` once."""
    _check(a, b, 2)
    if bias is not None:
        checks.tensor("bias", bias)
        checks.dtype("bias", bias, (a.dtype,))
        checks.shape("bias", bias, [b.shape[1]], "one for each column of b")
        checks.device("bias", bias, "a", a)
    if a.is_cuda and a.dtype in TRITON_DTYPES:
        return cuda_mm(a, b, bias, out_dtype or a.dtype)
    if out_dtype not in (None, a.dtype):
        bias = None if bias is None else bias.float()
        return mm(a.float(), b.float(), bias).to(out_dtype)
    if a.is_cuda:  # float64 and the like: torch's own kernels, for which the mode promises nothing
        out = a.new_empty(a.shape[0], b.shape[1])
        return out.copy_(bias).addmm_(a, b) if bias is not None else out.addmm_(a, b, beta=0)
    return cpu.addmm(bias, a, b)


def addmm(addend: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    """Return `beta * addend + alpha * a @ b` for matrices, or for batches of them.

    Args:
        addend: broadcast to the shape of the result.
    """
    if a.dim() == 2 and addend.shape == b.shape[1:] and beta == alpha == 1:
        return mm(a, b, addend)
    _check(a, b, a.dim())
    checks.tensor("input", addend)
    checks.dtype("input", addend, (a.dtype,))
    addend = addend.expand(*a.shape[:-1], b.shape[-1])
    if a.device.type == "cpu" and a.dim() == 2:
        return cpu.addmm(addend, a, b, beta, alpha)
    accumulator_dtype = torch.promote_types(a.dtype, torch.float32) if a.is_floating_point() else a.dtype
    multiply = bmm if a.dim() == 3 else mm
    total = multiply(a, b, out_dtype=accumulator_dtype).mul_(alpha)
    return (total if beta == 0 else total.add_(addend, alpha=beta)).to(a.dtype)


def bmm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return `a[i] @ b[i]` for each i of `[batch, m, k]` and `[batch, k, n]`, rounded to `out_dtype` once."""
    _check(a, b, 3)
    batch, rows, depth = a.shape
    if batch and _is_shared(b):
        # torch.matmul has expanded a weight: compute the same GEMM, with the same bits, as if it had not.
        return mm(a.reshape(batch * rows, depth), b[0], out_dtype=out_dtype).view(batch, rows, b.shape[2])
    if a.is_cuda and a.dtype in TRITON_DTYPES:
        return cuda_bmm(a, b, out_dtype or a.dtype)
    out = a.new_empty(batch, rows, b.shape[2], dtype=out_dtype or a.dtype)
    for i in range(batch):
        out[i] = mm(a[i], b[i], out_dtype=out_dtype)
    return out


def _is_shared(b: torch.Tensor) -> bool:
    """Return whether all matrices of a batch are the same memory.

    For a batch of one, the stride from matrix to matrix decides: that of an expanded matrix is smaller than a matrix.
    """
    if b.shape[0] > 1:
        return b.stride(0) == 0
    return b.stride(0) < (b.shape[1] - 1) * b.stride(1) + (b.shape[2] - 1) * b.stride(2) + 1


def _check(a: torch.Tensor, b: torch.Tensor, dim: int) -> None:
    checks.tensor("a", a)
    checks.tensor("b", b)
    if a.dim() != dim or b.dim() != dim or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        shapes = "[m, k] and [k, n]" if dim == 2 else "[batch, m, k] and [batch, k, n]"
        raise ValueError(f"a and b must have shapes {shapes}, got {list(a.shape)} and {list(b.shape)}")
    checks.dtype("b", b, (a.dtype,))
    checks.device("b", b, "a", a)
