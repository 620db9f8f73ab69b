"""The ATen operators of the mode, by the arguments that ATen gives them.

They are what models were found to reach: `matmul` becomes `mm`, `addmm` and `bmm`; `softmax` becomes
`_softmax`; the RMSNorm of transformers reaches `mean.dim`, and torch's own `rms_norm`; `out` overloads come from
callers that write into buffers of their own. tests/test_batch_invariant_model.py keeps the list true.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from jitnorm.batch_invariant.attention import (
    can_split_cudnn_attention,
    composed_attention,
    cudnn_attention,
    flash_attention,
)
from jitnorm.batch_invariant.matmul import add_product, batched_product, product
from jitnorm.batch_invariant.rms_norm import rms_norm
from jitnorm.batch_invariant.rows import mean_override, softmax_override


def _mm(self: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    return product(self, mat2)


def _mm_out(self: torch.Tensor, mat2: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    return _into(out, product(self, mat2))


def _mm_dtype(self: torch.Tensor, mat2: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return product(self, mat2, out_dtype=out_dtype)


def _addmm(
    self: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return add_product(self, mat1, mat2, beta, alpha)


def _addmm_out(
    self: torch.Tensor,
    mat1: torch.Tensor,
    mat2: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: torch.Tensor,
) -> torch.Tensor:
    return _into(out, add_product(self, mat1, mat2, beta, alpha))


def _bmm(self: torch.Tensor, mat2: torch.Tensor) -> torch.Tensor:
    return batched_product(self, mat2)


def _bmm_out(self: torch.Tensor, mat2: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    return _into(out, batched_product(self, mat2))


def _baddbmm(
    self: torch.Tensor, batch1: torch.Tensor, batch2: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    return add_product(self, batch1, batch2, beta, alpha)


def _softmax(self: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    return softmax_override(self, dim, half_to_float, log=False)


def _log_softmax(self: torch.Tensor, dim: int, half_to_float: bool) -> torch.Tensor:
    return softmax_override(self, dim, half_to_float, log=True)


def _mean_out(
    self: torch.Tensor,
    dim: Sequence[int] | None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    out: torch.Tensor,
) -> torch.Tensor:
    return _into(out, mean_override(self, dim, keepdim, dtype))


def _mean_dim(
    self: torch.Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    return mean_override(self, dim, keepdim, dtype)


def _into(out: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    if out.dtype != result.dtype:
        raise TypeError(f"out must be {result.dtype} like the result, got {out.dtype}")
    if out.shape != result.shape:
        out.resize_(result.shape)
    return out.copy_(result)


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """One product, rounded once. torch adds the bias afterwards where the input's strides do not fold, which for one
    sequence they may."""
    if weight.dim() != 2:
        out = input @ weight
        return out if bias is None else out + bias
    rows = input.flatten(0, -2) if input.dim() > 1 else input.unsqueeze(0)
    out = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return out.view(*input.shape[:-1], weight.shape[0])


BACKEND: dict[str, Callable[..., Any]] = {
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
BMM: dict[str, Callable[..., Any]] = {"bmm": _bmm, "bmm.out": _bmm_out, "baddbmm": _baddbmm}
# By the only dispatch key that they are for.
OF_ONE_KEY: dict[str, dict[str, Callable[..., Any]]] = {
    "CUDA": {
        "_scaled_dot_product_flash_attention": flash_attention,
        **({"_scaled_dot_product_cudnn_attention": cudnn_attention} if can_split_cudnn_attention() else {}),
    },
    "CPU": {"_scaled_dot_product_flash_attention_for_cpu": composed_attention},
    # Defined by torch in terms of other operators, for every device at once; autograd sees what it calls.
    "CompositeImplicitAutograd": {"rms_norm": rms_norm, "linear": _linear},
}
