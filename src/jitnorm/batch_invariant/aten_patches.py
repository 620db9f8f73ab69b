"""The ATen operators that the mode replaces, and the switch that puts them in place and removes them again.

The list is what models were found to reach: `matmul` becomes `mm`, `addmm` and `bmm`; `softmax` becomes `_softmax`; the
RMSNorm of transformers calls `mean.dim`; `out` overloads are called by code that writes into its own buffers.
tests/batch_invariant/test_model.py fails if models reach an operator of the kind that is missing here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from jitnorm.batch_invariant.attention.sdpa import (
    cudnn_attention,
    flash_attention,
    has_cudnn_attention_forward,
    math_attention,
)
from jitnorm.batch_invariant.inductor import inductor_fallbacks
from jitnorm.batch_invariant.matmul.gemm import addmm, bmm, mm
from jitnorm.batch_invariant.reductions.rms_norm import clear_ones, rms_norm
from jitnorm.batch_invariant.reductions.softmax_mean import aten_mean, aten_softmax


class AtenPatches:
    """All changes of the mode: to ATen's operators, to Inductor and, if need be, to torch's choice of attention.

    Either all of them are made or none is.
    """

    def __init__(self, bmm: bool) -> None:
        self.bmm = bmm
        with ExitStack() as stack:
            if not has_cudnn_attention_forward():
                stack.enter_context(_without_cudnn_attention())
            stack.enter_context(inductor_fallbacks(bmm))
            library = torch.library.Library("aten", "IMPL")
            stack.callback(library._destroy)
            stack.callback(clear_ones)
            with warnings.catch_warnings():  # torch warns that operators are overridden, which is intended here
                warnings.simplefilter("ignore", UserWarning)
                _patch(library, bmm)
            self._stack = stack.pop_all()

    def remove(self) -> None:
        """Undo all changes."""
        self._stack.close()


def _patch(library: torch.library.Library, bmm: bool) -> None:
    for name, function in {**PATCHES, **(BMM_PATCHES if bmm else {})}.items():
        for key in ("CPU", "CUDA"):
            library.impl(name, function, key)
    for key, functions in PATCHES_BY_KEY.items():
        for name, function in functions.items():
            library.impl(name, function, key)


@contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    """Disable cuDNN's attention, so that torch chooses flash, memory-efficient or math attention instead."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# The functions have the arguments of the ATen operators.


def _mm(self: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    return mm(self, mat2)


def _mm_out(self: torch.Tensor, mat2: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    return _into(out, mm(self, mat2))


def _mm_dtype(self: torch.Tensor, mat2: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return mm(self, mat2, out_dtype=out_dtype)


def _addmm(
    self: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return addmm(self, mat1, mat2, beta, alpha)


def _addmm_out(
    self: torch.Tensor,
    mat1: torch.Tensor,
    mat2: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: torch.Tensor,
) -> torch.Tensor:
    return _into(out, addmm(self, mat1, mat2, beta, alpha))


def _bmm(self: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    return bmm(self, mat2)


def _bmm_out(self: torch.Tensor, mat2: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    return _into(out, bmm(self, mat2))


def _baddbmm(
    self: torch.Tensor, batch1: torch.Tensor, batch2: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return addmm(self, batch1, batch2, beta, alpha)


def _softmax(self: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    return aten_softmax(self, dim, half_to_float, log=False)


def _log_softmax(self: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    return aten_softmax(self, dim, half_to_float, log=True)


def _mean_out(
    self: torch.Tensor,
    dim: Sequence[int] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: torch.Tensor,
) -> torch.Tensor:
    return _into(out, aten_mean(self, dim, keepdim, dtype))


def _mean_dim(
    self: torch.Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    return aten_mean(self, dim, keepdim, dtype)


def _into(out: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Copy a result into `out`, and resize that as ATen does."""
    if out.dtype != result.dtype:
        raise TypeError(f"out must be {result.dtype} like the result, got {out.dtype}")
    if out.shape != result.shape:
        out.resize_(result.shape)
    return out.copy_(result)


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Compute one GEMM, rounded once, with the bias included.

    torch adds the bias separately if the input's strides do not fold into one row stride, which for a single sequence
    they may do.
    """
    if weight.dim() != 2:
        out = input @ weight
        return out if bias is None else out + bias
    rows = input.flatten(0, -2) if input.dim() > 1 else input.unsqueeze(0)
    out = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return out.view(*input.shape[:-1], weight.shape[0])


PATCHES: dict[str, Callable[..., Any]] = {
    "mm": _mm,
    "mm.out": _mm_out,
    "mm.dtype": _mm_dtype,
    "addmm": _addmm,
    "addmm.out": _addmm_out,
    "_softmax": _softmax,
    "_log_softmax": _log_softmax,
    "mean.dim": _mean_dim,
    "mean.out": _mean_out,
}
BMM_PATCHES: dict[str, Callable[..., Any]] = {"bmm": _bmm, "bmm.out": _bmm_out, "baddbmm": _baddbmm}
# Operators that exist for one dispatch key only, by that key.
PATCHES_BY_KEY: dict[str, dict[str, Callable[..., Any]]] = {
    "CUDA": {
        "_scaled_dot_product_flash_attention": flash_attention,
        **({"_scaled_dot_product_cudnn_attention": cudnn_attention} if has_cudnn_attention_forward() else {}),
    },
    "CPU": {"_scaled_dot_product_flash_attention_for_cpu": math_attention},
    # torch defines these by other operators, for every device; autograd differentiates the operators that they call.
    "CompositeImplicitAutograd": {"rms_norm": rms_norm, "linear": _linear},
}
