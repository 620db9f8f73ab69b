"""What is verified: operators as functions of rows, with all other operands fixed.

To add one is to write a function that makes a `Case`, and to name it in `OPERATORS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F

import jitnorm
from jitnorm.batch_invariant.proof import cancelling_operands

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One operator at one size."""

    row: torch.Tensor  # [1, width]: the row that is followed through all batches
    call: Callable[[torch.Tensor], torch.Tensor]  # [m, width] to [m, anything]


@dataclass(frozen=True)
class Operator:
    make: Callable[[Shape, torch.dtype, torch.device], Case]
    sizes: str  # what the numbers of a shape are
    shapes: dict[str, tuple[Shape, ...]]  # by device type, where none are asked for
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)


_LAYERS: tuple[Shape, ...] = ((4096, 4096), (4096, 14336), (5120, 25600), (1000, 1001), (8, 4096))
_HEADS: tuple[Shape, ...] = ((128, 1000), (300, 128))


def _product(
    call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], transposed: bool, shapes: tuple[Shape, ...] = _LAYERS
) -> Operator:
    """Of the row and a fixed matrix, stored by rows or as its transpose."""

    def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
        n, k = shape
        row, b = cancelling_operands(1, n, k, dtype, device)
        b = b.t().contiguous().t() if transposed else b
        return Case(row, lambda x: call(x, b))

    return Operator(make, "NxK", {"cuda": shapes, "cpu": ((128, 512), (33, 257), (5, 64))})


def _addmm(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.addmm(torch.ones_like(b[0]), x, b)


def _linear(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of the last of each sequence's tokens: strides that fold for one sequence, and not for several."""
    tokens = torch.stack((x.flip(-1), x), 1)
    return F.linear(tokens[:, -1:], b.t(), torch.ones_like(b[0])).flatten(1)


def _mm_dtype(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.mm.dtype(x, b, torch.float32)  # type: ignore[no-any-return]


def _bmm(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The rows in each matrix of a batch."""
    return torch.bmm(torch.stack((x, x)), torch.stack((b, b))).transpose(0, 1).flatten(1)


def _bmm_batch(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Each row a matrix of the batch."""
    return torch.bmm(x.unsqueeze(1), b.expand(x.shape[0], -1, -1).contiguous()).flatten(1)


def _rowwise(call: Callable[[torch.Tensor], torch.Tensor], *sizes: int) -> Operator:
    def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
        return Case(torch.randn(1, *shape, device=device).to(dtype), call)

    shapes: tuple[Shape, ...] = tuple((size,) for size in sizes)
    return Operator(make, "N", {"cuda": (*shapes, (128256,)), "cpu": shapes})


def _norm(
    call: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *sizes: int, dtypes: tuple[torch.dtype, ...] = ()
) -> Operator:
    def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
        weight = torch.randn(shape, device=device).to(dtype)
        return Case(torch.randn(1, *shape, device=device).to(dtype), lambda x: call(x, weight))

    shapes: tuple[Shape, ...] = tuple((size,) for size in sizes)
    return Operator(make, "N", {"cuda": shapes, "cpu": shapes}, dtypes or Operator.dtypes)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def _fused_add(
    op: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None],
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Both of what an operator writes in place."""

    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        input, residual = x.clone(memory_format=torch.contiguous_format), x.flip(-1).contiguous()
        op(input, residual, weight)
        return torch.cat((input, residual), -1)

    return call


def _codes_and_scales(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.cat((q.view(torch.uint8), scales.view(torch.uint8)), -1)


def _rmsnorm_quant(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _codes_and_scales(*jitnorm.rmsnorm_quant_fp8(x, weight))


def _fused_add_quant(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _codes_and_scales(*jitnorm.fused_add_rmsnorm_quant_fp8(x, x.flip(-1).contiguous(), weight))


def _per_token_quant(x: torch.Tensor) -> torch.Tensor:
    q, scales = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty((x.shape[0], 1), dtype=torch.float32)
    jitnorm.per_token_quant_fp8(x, q, scales)
    return _codes_and_scales(q, scales)


def _qknorm(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """A row is a token's three heads of q and one of k."""
    (head_dim,) = shape
    q_weight, k_weight = torch.randn(2, head_dim, device=device).to(dtype).unbind()

    def call(x: torch.Tensor) -> torch.Tensor:
        heads = x.clone(memory_format=torch.contiguous_format).view(-1, 4, head_dim)
        jitnorm.fused_inplace_qknorm(heads[:, :3], heads[:, 3:], q_weight, k_weight)
        return heads.flatten(1)

    return Case(torch.randn(1, 4 * head_dim, device=device).to(dtype), call)


def _attention(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """A row is a sequence's queries, keys and values. A single query sees all keys, as in decoding; several are causal,
    as in prefill. Two heads of queries share one of keys."""
    heads, queries, length, head_dim = shape
    sizes = [2 * heads * queries * head_dim, *[heads * length * head_dim] * 2]

    def call(x: torch.Tensor) -> torch.Tensor:
        q, k, v = x.split(sizes, 1)
        q = q.reshape(-1, queries, 2 * heads, head_dim).transpose(1, 2)  # as a projection has them
        k, v = (t.reshape(-1, length, heads, head_dim).transpose(1, 2) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True).flatten(1)

    return Case(torch.randn(1, sum(sizes), device=device).to(dtype), call)


_SIZES = (128, 4096)
OPERATORS: dict[str, Operator] = {
    "mm": _product(torch.mm, transposed=False),
    "mm_transposed": _product(torch.mm, transposed=True),
    "addmm": _product(_addmm, transposed=True),
    "linear": _product(_linear, transposed=True),
    "mm.dtype": _product(_mm_dtype, transposed=True),
    "bmm": _product(_bmm, transposed=True, shapes=_HEADS),
    "bmm_batch": _product(_bmm_batch, transposed=False, shapes=_HEADS),
    "attention": Operator(
        _attention,
        "HEADSxQUERIESxKEYSxHEAD_DIM",
        {"cuda": ((4, 300, 300, 128), (4, 9, 9, 64), (4, 1, 1000, 128)), "cpu": ((2, 1, 9, 16), (2, 9, 9, 16))},
    ),
    "softmax": _rowwise(lambda x: torch.softmax(x, -1), 100, 4096),
    "log_softmax": _rowwise(lambda x: torch.log_softmax(x, -1), 100, 4096),
    "mean": _rowwise(lambda x: x.mean(-1, keepdim=True), 100, 4096),
    "rms_norm": _norm(_rms_norm, *_SIZES, 1000),
    "rmsnorm": _norm(jitnorm.rmsnorm, *_SIZES),
    "gemma_rmsnorm": _norm(jitnorm.gemma_rmsnorm, *_SIZES),
    "fused_add_rmsnorm": _norm(_fused_add(jitnorm.fused_add_rmsnorm), *_SIZES),
    "gemma_fused_add_rmsnorm": _norm(_fused_add(jitnorm.gemma_fused_add_rmsnorm), *_SIZES),
    "rmsnorm_quant_fp8": _norm(_rmsnorm_quant, *_SIZES),
    "fused_add_rmsnorm_quant_fp8": _norm(_fused_add_quant, *_SIZES),
    "per_token_quant_fp8": _rowwise(_per_token_quant, 128, 4096),
    "fused_inplace_qknorm": Operator(_qknorm, "HEAD_DIM", {"cuda": ((64,), (128,)), "cpu": ((64,), (128,))}),
    "silu_and_mul": _rowwise(jitnorm.silu_and_mul, 256, 8192),
    "gelu_and_mul": _rowwise(jitnorm.gelu_and_mul, 256, 8192),
    "gelu_tanh_and_mul": _rowwise(jitnorm.gelu_tanh_and_mul, 256, 8192),
}
