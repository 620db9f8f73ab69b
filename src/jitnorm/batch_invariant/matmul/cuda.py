"""GEMMs on CUDA, and the choice of a GEMM backend, which never depends on the number of rows."""

from __future__ import annotations

import threading
from typing import Any

import torch

from jitnorm.batch_invariant.matmul import cublaslt
from jitnorm.batch_invariant.matmul.invariance_check import passes
from jitnorm.batch_invariant.matmul.problem import Gemm, Problem
from jitnorm.batch_invariant.operands import contiguous_aligned
from jitnorm.batch_invariant.triton_support import device_guard, triton_module

_ALIGNMENT = 16  # bytes, of every operand: what tensor cores and TMA need

# The selected backends. The key is made of what a call reads fastest, as GEMMs in decoding take only 10 us.
_gemms: dict[tuple[Any, ...], Gemm] = {}
_lock = threading.Lock()


def cuda_mm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """Return `a @ b + bias` for `[m, k]` and `[k, n]`, which have been checked.

    Backends get `a`, `bias` and the result contiguous, `b` contiguous along rows or along columns, and all of them
    aligned to 16 bytes.
    """
    (m, k), n = a.shape, b.shape[1]
    out = a.new_empty((m, n), dtype=out_dtype)
    if not (m and n and k):
        return out.zero_() if bias is None else out.copy_(bias)
    # Another row stride or alignment of a could select another kernel, and strides may follow from the batch.
    a = contiguous_aligned(a, _ALIGNMENT)
    if bias is not None:
        bias = contiguous_aligned(bias, _ALIGNMENT)
    k_stride, n_stride = b.stride()
    if not ((k_stride == 1 and n_stride >= k) or (n_stride == 1 and k_stride >= n)) or b.data_ptr() % _ALIGNMENT:
        b = b.clone(memory_format=torch.contiguous_format)
        k_stride, n_stride = n, 1
    dtype, device = a.dtype, a.device
    tf32 = dtype == torch.float32 and tf32_allowed()
    key = (n, k, k_stride, n_stride, dtype, out_dtype, bias is None, tf32, device)
    gemm = _gemms.get(key)
    if device.index == torch.cuda.current_device():
        (gemm or _select_and_cache(key))(a, b, bias, out)
    else:
        with torch.cuda.device(device):
            (gemm or _select_and_cache(key))(a, b, bias, out)
    return out


def cuda_bmm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    """Return `a[i] @ b[i]` for `[batch, m, k]` and `[batch, k, n]`, which have been checked.

    The Triton backend computes all of them: attention makes such calls, in sizes that grow with every token, and
    they are too many for an invariance check of each.
    """
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2], dtype=out_dtype)
    if out.numel() == 0 or a.shape[2] == 0:
        return out.zero_()
    with device_guard(a):
        triton_module("matmul.triton_kernels").batched_gemm(a, b, out, tf32_allowed())
    return out


def tf32_allowed() -> bool:
    """Return whether the user allows torch to round float32 operands to TF32."""
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # torch 2.9 and later
    if precision is not None:
        return bool(precision == "tf32")
    return bool(torch.backends.cuda.matmul.allow_tf32)


def select_gemm(problem: Problem) -> Gemm:
    """Return cuBLASLt if it passes the invariance check for this problem, otherwise the Triton backend."""
    if cublaslt.library_version():
        gemm = cublaslt.gemm(problem)
        if passes("cublaslt", cublaslt.description(), cublaslt.SOURCES, gemm, problem):
            return gemm
    return _select_triton_gemm(problem)


def _select_triton_gemm(problem: Problem) -> Gemm:
    """Return the Triton backend, with tiles chosen by the number of rows if that passes the check, or else fixed."""
    kernels = triton_module("matmul.triton_kernels")
    gemm: Gemm = kernels.gemm(problem)
    if not passes("triton", kernels.VERSION, kernels.SOURCES, gemm, problem):
        gemm = kernels.gemm(problem, fixed_tile=True)
    kernels.compile_tiles(problem, gemm)
    return gemm


def _select_and_cache(key: tuple[Any, ...]) -> Gemm:
    problem = _problem(*key)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"batch-invariant mode met the GEMM {problem} for the first time while a CUDA graph was captured, and "
            "must first check which GEMM backend is batch-invariant for it: run the model once in the mode before "
            "capturing"
        )
    with _lock:
        if key not in _gemms:
            with torch.no_grad():
                _gemms[key] = select_gemm(problem)
        return _gemms[key]


def _problem(
    n: int,
    k: int,
    k_stride: int,
    n_stride: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    no_bias: bool,
    tf32: bool,
    device: torch.device,
) -> Problem:
    transposed = k_stride == 1 and n_stride >= k
    return Problem(device, n, k, dtype, out_dtype, transposed, n_stride if transposed else k_stride, not no_bias, tf32)
