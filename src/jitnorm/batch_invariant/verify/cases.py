"""The invariance cases: operators as functions of rows, with all other operands fixed.

The mode's ATen operators have cases here. The cases of the package's own operators are made from their example calls in
the registry, under the same names.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F

from jitnorm import _operators  # noqa: F401
from jitnorm.batch_invariant.operands import cancelling_operands
from jitnorm.core.operators import EXAMPLES
from jitnorm.core.operators import OPERATORS as REGISTRY

_EXAMPLE_ROWS = 64  # of the example call from which a case is made
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

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
    dtypes: tuple[torch.dtype, ...] = _DTYPES  # those of the rows


# Projections of an 8B and a 32B model; sizes that are no multiple of a tile; fewer columns than a tile has.
_LAYERS: tuple[Shape, ...] = ((4096, 4096), (4096, 14336), (5120, 25600), (1000, 1001), (8, 4096))
_HEADS: tuple[Shape, ...] = ((128, 1000), (300, 128))


def _gemm(call: WeightedFunction, transposed: bool, shapes: tuple[Shape, ...] = _LAYERS) -> Operator:
    """Return the cases of a GEMM of the rows and a fixed matrix, which is row-major or the transpose of such."""

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


def _registered_operator(name: str) -> Operator:
    """Return the cases of an operator of the registry, which are made from its example call."""
    shapes: tuple[Shape, ...] = tuple((size,) for size in EXAMPLES[name].sizes)
    sizes = (REGISTRY[name].size_name or "n").replace(" ", "_").upper()
    dtypes = tuple(dtype for dtype in _DTYPES if dtype in REGISTRY[name].dtypes)
    return Operator(functools.partial(_registered_case, name), sizes, {"cuda": shapes, "cpu": shapes}, dtypes)


def _registered_case(name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """Make a case whose row consists of one row of each per-row argument of the example call.

    If the batch is contiguous, so is each argument; otherwise the rows of the arguments are apart as well. Rows are
    written to a cache from its last used slot to its first. Every second slot is unused, and must not change.
    """
    (size,) = shape
    example = EXAMPLES[name]
    arguments = example.arguments(_EXAMPLE_ROWS, size, dtype, device)
    per_row = [arg for arg in example.per_row if arg != example.slots]
    caches = [arg for arg in example.written if arg not in example.per_row] if example.slots else []
    # Each argument begins at a multiple of 64 elements, so that its rows are aligned as the kernels require.
    widths = [-(-arguments[arg][0].numel() // 64) * 64 for arg in per_row]
    results = example.run(arguments)
    # A function may also return what is the same for all rows, such as a given scale.
    is_per_row = [result.shape[0] == _EXAMPLE_ROWS for result in results[: len(results) - len(example.written)]]
    writes_rows = any(arg in example.written for arg in per_row)

    def call(x: torch.Tensor) -> torch.Tensor:
        count, is_contiguous = x.shape[0], x.is_contiguous()
        if writes_rows and not is_contiguous:
            x = x.new_empty_strided(x.shape, x.stride()).copy_(x)
        own = dict(arguments)
        for arg, columns in zip(per_row, x.split(widths, 1), strict=True):
            rows = _rows_like(arguments[arg], columns)
            if is_contiguous and arg in example.written:
                # Each is a copy of its own: if an operator writes to two views of one tensor, Inductor may be wrong.
                rows = rows.clone(memory_format=torch.contiguous_format)
            own[arg] = rows.contiguous() if is_contiguous or arg in example.contiguous else rows
        for arg in caches:
            own[arg] = _empty_cache(arguments[arg], 2 * count, example.slot_dims)
        if example.slots:
            own[example.slots] = 2 * torch.arange(count, device=x.device, dtype=arguments[example.slots].dtype).flip(0)
        result = EXAMPLES[name].function(**own)  # looked up for each call, so that tests can replace it
        returned = () if result is None else result if isinstance(result, tuple) else (result,)
        results = [result for result, keep in zip(returned, is_per_row, strict=True) if keep]
        for arg in example.written:
            value = own[arg]
            if arg in caches:
                value = value.flatten(0, example.slot_dims - 1)[: 2 * count].unflatten(0, (count, 2)).flip(0)
            results.append(value)
        return _join([result.flatten(1) for result in results])

    return Case(torch.randn(1, sum(widths), device=device).to(dtype), call)


def _empty_cache(example: torch.Tensor, slots: int, slot_dims: int) -> torch.Tensor:
    """Return zeros like the example's cache, with as many blocks as `slots` need."""
    block_size = math.prod(example.shape[1:slot_dims])
    return example.new_zeros(-(-slots // block_size), *example.shape[1:])


def _rows_like(example: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return rows of the shape and dtype of the example's, made of `columns`, which are `[rows, a multiple of 64]`.

    Integers, such as positions, must be valid: a number in `columns` selects one of the example's.
    """
    if example.dtype.is_floating_point:
        return columns[:, : example[0].numel()].reshape(-1, *example.shape[1:]).to(example.dtype)
    number = (16 * columns[:, 0].float()).abs().nan_to_num(0.0, 0.0, 0.0)
    return example[number.clamp(max=_EXAMPLE_ROWS - 1).long()]


def _join(results: list[torch.Tensor]) -> torch.Tensor:
    """Return several results of the same rows in one tensor; as bytes if they have several dtypes, or float8."""
    if len({result.dtype for result in results}) > 1 or results[0].element_size() == 1:
        results = [result.view(torch.uint8) for result in results]
    return torch.cat(results, -1)


_ATEN_OPERATORS: dict[str, Operator] = {
    "mm": _gemm(torch.mm, transposed=False),
    "mm_transposed": _gemm(torch.mm, transposed=True),
    "addmm": _gemm(_addmm, transposed=True),
    "linear": _gemm(_linear, transposed=True),
    "mm.dtype": _gemm(_mm_dtype, transposed=True),
    "bmm": _gemm(_bmm, transposed=True, shapes=_HEADS),
    "bmm_batch": _gemm(_bmm_batch, transposed=False, shapes=_HEADS),
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
_REGISTERED_OPERATORS = {name: _registered_operator(name) for name, example in EXAMPLES.items() if example.per_row}
OPERATORS = {**_ATEN_OPERATORS, **_REGISTERED_OPERATORS}


def _exemptions() -> dict[str, str]:
    reasons = {name: f"a kernel of {op.part_of.op}" for name, op in REGISTRY.items() if op.part_of}
    for name, example in EXAMPLES.items():
        if not example.per_row:  # such as one scale for the whole tensor
            reasons[name] = "by definition a row's result depends on all rows"
    return reasons


# Operators of the registry that have no case, and why.
EXEMPT = _exemptions()
