"""The invariance cases: operators as functions of rows, with all other operands fixed.

The mode's ATen operators have cases, and so has every operator and variant in the package's registry, under its name
there. For another one of a family, name it in `_REGISTERED_OPERATORS`. A test fails for an operator of the registry
that is neither there nor in `EXEMPT`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from jitnorm import _operators  # noqa: F401
from jitnorm.batch_invariant.operands import cancelling_operands
from jitnorm.core.operators import EXAMPLES
from jitnorm.core.operators import OPERATORS as REGISTRY

Shape: TypeAlias = tuple[int, ...]
RowFunction: TypeAlias = Callable[[torch.Tensor], torch.Tensor]  # from [m, width] to [m, anything]
WeightedFunction: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of rows and a fixed operand


@dataclass(frozen=True)
class Case:
    """One operator in one shape and dtype."""

    row: torch.Tensor  # [1, width]: the row whose result is compared in all batches
    call: RowFunction


@dataclass(frozen=True)
class Operator:
    """How to make the cases of one operator."""

    make: Callable[[Shape, torch.dtype, torch.device], Case]
    sizes: str  # what the numbers of a shape mean
    shapes: dict[str, tuple[Shape, ...]]  # the default shapes, by device type
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)


# Projections of an 8B and a 32B model; sizes that are no multiple of a tile; fewer columns than a tile has.
_LAYERS: tuple[Shape, ...] = ((4096, 4096), (4096, 14336), (5120, 25600), (1000, 1001), (8, 4096))
_HEADS: tuple[Shape, ...] = ((128, 1000), (300, 128))


def _product(call: WeightedFunction, transposed: bool, shapes: tuple[Shape, ...] = _LAYERS) -> Operator:
    """Return the cases of a product of the rows and a fixed matrix, which is row-major or the transpose of such."""

    def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
        n, k = shape
        row, b = cancelling_operands(1, n, k, dtype, device)
        b = b.t().contiguous().t() if transposed else b
        return Case(row, lambda x: call(x, b))

    return Operator(make, "NxK", {"cuda": shapes, "cpu": ((128, 512), (33, 257), (5, 64))})


def _addmm(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.addmm(torch.ones_like(b[0]), x, b)


def _linear(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply the last token of each sequence: its strides fold into one row stride for one sequence only."""
    tokens = torch.stack((x.flip(-1), x), 1)
    return F.linear(tokens[:, -1:], b.t(), torch.ones_like(b[0])).flatten(1)


def _mm_dtype(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.mm.dtype(x, b, torch.float32)  # type: ignore[no-any-return]


def _bmm(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply the rows as the rows of each matrix of a batch."""
    return torch.bmm(torch.stack((x, x)), torch.stack((b, b))).transpose(0, 1).flatten(1)


def _bmm_batch(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply each row as a matrix of the batch."""
    return torch.bmm(x.unsqueeze(1), b.expand(x.shape[0], -1, -1).contiguous()).flatten(1)


def _attention(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """Make a case whose row is the queries, keys and values of a sequence.

    A single query sees all keys, as in decoding; several are causal, as in prefill. Two heads of queries share one of
    keys.
    """
    heads, queries, length, head_dim = shape
    sizes = [2 * heads * queries * head_dim, *[heads * length * head_dim] * 2]

    def call(x: torch.Tensor) -> torch.Tensor:
        q, k, v = x.split(sizes, 1)
        q = q.reshape(-1, queries, 2 * heads, head_dim).transpose(1, 2)  # in the strides of a projection's output
        k, v = (t.reshape(-1, length, heads, head_dim).transpose(1, 2) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=queries > 1, enable_gqa=True).flatten(1)

    return Case(torch.randn(1, sum(sizes), device=device).to(dtype), call)


def _rowwise(call: RowFunction, *sizes: int, cuda_sizes: tuple[int, ...] = ()) -> Operator:
    """Return the cases of a function of rows alone."""

    def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
        return Case(torch.randn(1, *shape, device=device).to(dtype), call)

    shapes: tuple[Shape, ...] = tuple((size,) for size in sizes)
    return Operator(make, "N", {"cuda": (*shapes, *((size,) for size in cuda_sizes)), "cpu": shapes})


def _reduction(call: RowFunction) -> Operator:
    """Return the cases of a reduction: ragged, whole, and on CUDA a vocabulary, which several programs share."""
    return _rowwise(call, 100, 4096, cuda_sizes=(128256,))


def _norm(call: WeightedFunction, *sizes: int) -> Operator:
    """Return the cases of a norm of the rows with a fixed weight. The default sizes are of a warp and of a block."""

    def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
        weight = torch.randn(shape, device=device).to(dtype)
        return Case(torch.randn(1, *shape, device=device).to(dtype), lambda x: call(x, weight))

    shapes: tuple[Shape, ...] = tuple((size,) for size in (128, 4096, *sizes))
    return Operator(make, "N", {"cuda": shapes, "cpu": shapes})


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def _bytes(*results: torch.Tensor) -> torch.Tensor:
    """Return the bytes of several results of the same rows in one tensor."""
    return torch.cat([result.flatten(1).view(torch.uint8) for result in results], -1)


def _function(name: str) -> Callable[..., Any]:
    """Return the public function of an operator of the registry, for each call, so that tests can replace it."""
    return EXAMPLES[name].function


def _registered_norm(name: str) -> Operator:
    return _norm(lambda x, weight: _function(name)(x, weight))


def _fused_add_norm(name: str, **options: Any) -> Operator:
    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        input, residual = x.clone(memory_format=torch.contiguous_format), x.flip(-1).contiguous()
        _function(name)(input, residual, weight, **options)
        return torch.cat((input, residual), -1)

    return _norm(call)


def _static_scale(x: torch.Tensor) -> torch.Tensor:
    return torch.full((1,), 0.25, dtype=torch.float32, device=x.device)


def _quant_norm(name: str, is_static: bool) -> Operator:
    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        q, scales = _function(name)(x, weight, _static_scale(x) if is_static else None)
        return _bytes(q) if is_static else _bytes(q, scales)

    return _norm(call)


def _fused_add_quant_norm(name: str, is_static: bool) -> Operator:
    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        residual = x.flip(-1).contiguous()
        q, scales = _function(name)(x, residual, weight, _static_scale(x) if is_static else None)
        return _bytes(q, residual) if is_static else _bytes(q, scales, residual)

    return _norm(call)


def _per_tensor_quant(x: torch.Tensor) -> torch.Tensor:
    input = x.contiguous()
    q = torch.empty_like(input, dtype=torch.float8_e4m3fn)
    _function("per_tensor_quant_fp8")(input, q, _static_scale(x), is_static=True)
    return _bytes(q)


def _per_token_quant(x: torch.Tensor) -> torch.Tensor:
    q, scales = torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty((x.shape[0], 1), dtype=torch.float32)
    _function("per_token_quant_fp8")(x, q, scales)
    return _bytes(q, scales)


def _qknorm(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """Make a case whose row is a token's three heads of q and one of k."""
    (head_dim,) = shape
    q_weight, k_weight = torch.randn(2, head_dim, device=device).to(dtype).unbind()

    def call(x: torch.Tensor) -> torch.Tensor:
        heads = x.clone(memory_format=torch.contiguous_format).view(-1, 4, head_dim)
        _function("fused_inplace_qknorm")(heads[:, :3], heads[:, 3:], q_weight, k_weight)
        return heads.flatten(1)

    return Case(torch.randn(1, 4 * head_dim, device=device).to(dtype), call)


def _store_cache(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """Make a case whose row is a token's key and value, and whose result is their slots and the slots behind these."""
    (width,) = shape

    def call(x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[0]
        k, v = x.split(width, 1)
        k_cache, v_cache = x.new_zeros(2 * tokens, width), x.new_zeros(2 * tokens, width)
        slots = 2 * torch.arange(tokens, device=x.device).flip(0)  # the last token's first; every second stays free
        _function("store_cache")(k, v, k_cache, v_cache, slots)
        return torch.cat([cache.view(tokens, 2 * width).flip(0) for cache in (k_cache, v_cache)], -1)

    return Case(torch.randn(1, 2 * width, device=device).to(dtype), call)


def _activation(name: str) -> Operator:
    return _rowwise(lambda x: _function(name)(x), 256, 8192)


def _by_size(make: Callable[[Shape, torch.dtype, torch.device], Case], name: str, *sizes: int) -> Operator:
    """Return the cases of an operator with one size, on either device."""
    shapes: tuple[Shape, ...] = tuple((size,) for size in sizes)
    return Operator(make, name, {"cuda": shapes, "cpu": shapes})


_ATEN_OPERATORS: dict[str, Operator] = {
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
    "softmax": _reduction(lambda x: torch.softmax(x, -1)),
    "log_softmax": _reduction(lambda x: torch.log_softmax(x, -1)),
    "mean": _reduction(lambda x: x.mean(-1, keepdim=True)),
    "rms_norm": _norm(_rms_norm, 1000),
}
_REGISTERED_OPERATORS: dict[str, Operator] = {
    **{name: _registered_norm(name) for name in ("rmsnorm", "gemma_rmsnorm")},
    **{name: _fused_add_norm(name) for name in ("fused_add_rmsnorm", "gemma_fused_add_rmsnorm")},
    **{
        name: _fused_add_norm(name, round_sum=True)
        for name in ("fused_add_rmsnorm_round_sum", "gemma_fused_add_rmsnorm_round_sum")
    },
    "rmsnorm_quant_fp8": _quant_norm("rmsnorm_quant_fp8", is_static=True),
    "rmsnorm_quant_fp8_dynamic": _quant_norm("rmsnorm_quant_fp8_dynamic", is_static=False),
    "fused_add_rmsnorm_quant_fp8": _fused_add_quant_norm("fused_add_rmsnorm_quant_fp8", is_static=True),
    "fused_add_rmsnorm_quant_fp8_dynamic": _fused_add_quant_norm(
        "fused_add_rmsnorm_quant_fp8_dynamic", is_static=False
    ),
    "per_tensor_quant_fp8": _rowwise(_per_tensor_quant, 128, 4096),
    "per_token_quant_fp8": _rowwise(_per_token_quant, 128, 4096),
    "fused_inplace_qknorm": _by_size(_qknorm, "HEAD_DIM", 64, 128),
    # Rows for accesses of 16 bytes, and of 8 or 4.
    "store_cache": _by_size(_store_cache, "WIDTH", 1024, 6),
    **{name: _activation(name) for name in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")},
}
OPERATORS = {**_ATEN_OPERATORS, **_REGISTERED_OPERATORS}


def _exemptions() -> dict[str, str]:
    reasons = {name: f"a kernel of {op.part_of.op}" for name, op in REGISTRY.items() if op.part_of}
    for name, example in EXAMPLES.items():
        if not example.per_row:  # such as one scale for the whole tensor
            reasons[name] = "by definition a row's result depends on all rows"
    return reasons


# Operators of the registry that have no case, and why.
EXEMPT = _exemptions()
