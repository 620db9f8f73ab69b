"""Random calls of every operator, good ones and bad ones, with guards around all memory and a float64 reference.

All tensors of a call lie in one arena of random bytes. Afterwards every byte of it is compared: a refused call has
changed none, and an accepted one those of the elements that it writes. Each call is made twice, with the operator's
kernels in its fast path and without, and must be decided alike.
"""

from __future__ import annotations

import contextlib
import decimal
import fractions
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

import jitnorm
from faults import references
from jitnorm.core.operators import OPERATORS

F32, F16, BF16, E4M3 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
SIZE = 1 << 17


@dataclass(frozen=True)
class Tensor:
    """A tensor that is to be: what it looks like, where it lies, what it holds."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    written: bool = False
    read: bool = True  # what is not read is filled with garbage
    scale: float = 1.0
    values: tuple[int, ...] | None = None  # of indices
    inside: tuple[str, int] | None = None  # lies in another argument's memory, so many elements from its start
    wrap: str = ""  # what is made of it in the end
    special: bool = False  # NaNs, infinities and zeros among the numbers


@dataclass
class Call:
    """A call of an operator, before its tensors exist."""

    operator: str
    arguments: dict[str, Any]
    keywords: tuple[str, ...] = ()
    expects: tuple[str, ...] | None = ()  # exceptions; () where it must be accepted, None where both are right
    changes: list[str] = field(default_factory=list)
    grad: str = "grad"  # or no_grad, inference

    def __str__(self) -> str:
        words = [f"{name}={_described(value)}" for name, value in self.arguments.items()]
        return f"{self.operator}({', '.join(words)}) under {self.grad}; {', '.join(self.changes) or 'unchanged'}"


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value!r}"[:60]
    more = f" in {value.inside}" if value.inside else ""
    more += f" as {value.wrap}" if value.wrap else ""
    more += f" {value.values}" if value.values is not None else ""
    more += " special" if value.special else ""
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}:{list(value.strides)}{more}"


class Draw:
    """Random arguments of good calls."""

    def __init__(self, rng: random.Random, few: bool) -> None:
        self.rng, self.few = rng, few

    def leading(self) -> tuple[int, ...]:
        return self.rng.choice(((), (1,), (2,), (5,), (2, 3), (1, 4), (4, 1), (0,), (2, 0), (2, 1, 2), (33,)))

    def rows(self, dtype: torch.dtype, leading: tuple[int, ...], width: int, **more: Any) -> Tensor:
        stride = width + self.rng.choice((0, 0, 0, 16, *((width, 3 * width) if width <= 128 else ())))
        if not more.get("written") and self.rng.random() < 0.05:
            stride = self.rng.choice((0, 16, max(width - 16, 1)))  # rows that overlap may be read
        strides: list[int] = [1]
        for size in reversed(leading):
            strides.insert(0, stride)
            stride *= max(size, 1)
        return Tensor(dtype, (*leading, width), tuple(strides), **more)

    def vector(self, dtype: torch.dtype, size: int, **more: Any) -> Tensor:
        return Tensor(dtype, (size,), (1,), **more)

    def contiguous(self, dtype: torch.dtype, shape: tuple[int, ...], **more: Any) -> Tensor:
        strides: list[int] = []
        step = 1
        for size in reversed(shape):
            strides.insert(0, step)
            step *= max(size, 1)
        return Tensor(dtype, shape, tuple(strides), **more)

    def kinds(self, *more: tuple[torch.dtype, torch.dtype, int]) -> tuple[torch.dtype, torch.dtype, int]:
        """The dtypes of input and weight, and the hidden size, of one of the few kernels that are built."""
        return (F32, F32, 64) if self.few else self.rng.choice(((F32, F32, 64), *more))

    def eps(self) -> Any:
        return self.rng.choice((1e-6, 1e-6, 1e-5, 0.0, 0, 1, 3.5, np.float64(1e-6), np.float32(1e-5)))

    def pdl(self) -> Any:
        return self.rng.choice((None, None, None, True, False))


def norm(draw: Draw, operator: str) -> Call:
    dtype, weight_dtype, hidden = draw.kinds(*(((BF16, F32, 64), (F16, F16, 512)) if operator == "rmsnorm" else ()))
    leading = draw.leading()
    x = draw.rows(dtype, leading, hidden, special=draw.rng.random() < 0.05, scale=draw.rng.choice((1, 1e-3, 100.0)))
    out: Any = draw.rng.choice((None, draw.rows(dtype, leading, hidden, written=True, read=False)))
    if draw.rng.random() < 0.15:
        x = draw.rows(dtype, leading, hidden, written=True)
        out = replace(x, inside=("input", 0))
    return Call(
        operator,
        {
            "input": x,
            "weight": draw.vector(weight_dtype, hidden),
            "eps": draw.eps(),
            "out": out,
            "enable_pdl": draw.pdl(),
        },
    )


def fused_add(draw: Draw, operator: str) -> Call:
    dtype, weight_dtype, hidden = draw.kinds(*(((BF16, BF16, 64),) if operator == "fused_add_rmsnorm" else ()))
    leading = draw.leading()
    residual_dtype = draw.rng.choice((dtype, F32))
    return Call(
        operator,
        {
            "input": draw.rows(dtype, leading, hidden, written=True),
            "residual": draw.rows(residual_dtype, leading, hidden, written=True, scale=draw.rng.choice((1, 30.0))),
            "weight": draw.vector(weight_dtype, hidden),
            "eps": draw.eps(),
            "enable_pdl": draw.pdl(),
            "round_sum": not draw.few and draw.rng.random() < 0.4,
        },
        ("round_sum",),
    )


def quant_norm(draw: Draw, operator: str) -> Call:
    leading, dtype, hidden = draw.leading(), F32, 64
    static = draw.rng.random() < 0.5
    count = int(np.prod(leading))
    out = draw.rng.choice((None, draw.rows(E4M3, leading, hidden, written=True, read=False)))
    scales = draw.contiguous(F32, draw.rng.choice(((*leading, 1), (count,))), written=True, read=False)
    arguments: dict[str, Any] = {"input": draw.rows(dtype, leading, hidden)}
    if "fused" in operator:
        arguments["residual"] = draw.rows(dtype, leading, hidden, written=True)
    arguments |= {
        "weight": draw.vector(dtype, hidden),
        "scale": draw.contiguous(F32, draw.rng.choice(((), (1,), (1, 1))), values=(1,)) if static else None,
        "eps": draw.eps(),
        "out": out,
        "enable_pdl": draw.pdl(),
        "scales": None if static else draw.rng.choice((None, scales)),
    }
    return Call(operator, arguments, ("scales",))


def qknorm(draw: Draw, operator: str) -> Call:
    dtype, _, hidden = draw.kinds((BF16, BF16, 64))
    tokens, heads, kv_heads = draw.rng.choice((0, 1, 2, 5)), draw.rng.choice((0, 1, 2, 4)), draw.rng.choice((0, 1, 2))
    whole = (heads + kv_heads) * hidden

    def heads_of(count: int) -> Tensor:
        step = hidden + draw.rng.choice((0, 0, 16))
        stride = draw.rng.choice((count * step, whole + 64, count * step + 32))
        return Tensor(dtype, (tokens, count, hidden), (max(stride, count * step), step, 1), written=True)

    q, k = heads_of(heads), heads_of(kv_heads)
    if draw.rng.random() < 0.3 and tokens and heads and kv_heads:  # slices of one projection
        q = replace(q, strides=(whole, hidden, 1))
        k = replace(k, strides=(whole, hidden, 1), inside=("q", heads * hidden))
    return Call(
        operator,
        {
            "q": q,
            "k": k,
            "q_weight": draw.vector(dtype, hidden),
            "k_weight": draw.vector(dtype, hidden),
            "eps": draw.eps(),
            "head_dim": draw.rng.choice((0, hidden)),
            "enable_pdl": draw.pdl(),
        },
        ("head_dim", "enable_pdl"),
    )


def activation(draw: Draw, operator: str) -> Call:
    dtype = F32 if draw.few or operator != "silu_and_mul" else draw.rng.choice((F32, BF16))
    d = draw.rng.choice((4, 16, 64, 100) if dtype == F32 else (8, 64, 104))
    if dtype == F32 and operator == "silu_and_mul" and not draw.few and draw.rng.random() < 0.2:
        d = draw.rng.choice((2, 6, 1, 3))
    leading = draw.leading()
    count = int(np.prod(leading))
    step = draw.rng.choice((1, 1, 2, 3, 2**62))
    needed = -(-count // step)
    ids = None
    if draw.rng.random() < 0.4:
        n = needed + draw.rng.choice((0, 0, 1, 3))
        values = tuple(draw.rng.choice((-1, 0, 1, 7)) for _ in range(n))
        ids = Tensor(draw.rng.choice((torch.int32, torch.int64)), (n,), (1,), values=values)
    out = draw.rng.choice((None, draw.rows(dtype, leading, d, written=True, read=False)))
    return Call(
        operator,
        {
            "input": draw.rows(dtype, leading, 2 * d, scale=draw.rng.choice((1, 5.0))),
            "out": out,
            "enable_pdl": draw.pdl(),
            "expert_ids": ids,
            "expert_step": draw.rng.choice((step, step, np.int64(step))),
        },
        ("expert_ids", "expert_step"),
    )


STORED = (torch.uint8, torch.bool, torch.float16, torch.bfloat16, F32, torch.float64, torch.complex64, E4M3)


def store_cache(draw: Draw, operator: str) -> Call:
    dtype = draw.rng.choice(STORED)
    tokens, slots = draw.rng.choice((0, 1, 2, 7)), draw.rng.choice((7, 9, 20))
    widths = draw.rng.choice(((64, 64), (128, 64), (64, 192)))
    if not draw.few and draw.rng.random() < 0.2:
        widths = draw.rng.choice(((8, 24), (12, 4), (4, 4)))
    sizes = [width // dtype.itemsize if width % dtype.itemsize == 0 else 64 for width in widths]

    def rows(count: int, size: int, **more: Any) -> Tensor:
        stride = size + draw.rng.choice((0, 0, 64, 192))
        shape = draw.rng.choice(
            ((count, size), (count, 1, size), (count, size // 2, 2) if size % 2 == 0 else (count, size))
        )
        inner = {2: (1,), 3: (shape[-1], 1)}[len(shape)]
        return Tensor(dtype, shape, (stride, *inner), **more)

    skip = draw.rng.choice((None, None, -1, 3))
    values = draw.rng.sample(range(slots), tokens)
    if skip == -1:
        values = [-1 if draw.rng.random() < 0.3 else v for v in values]
    return Call(
        operator,
        {
            "k": rows(tokens, sizes[0]),
            "v": rows(tokens, sizes[1]),
            "k_cache": rows(slots, sizes[0], written=True),
            "v_cache": rows(slots, sizes[1], written=True),
            "indices": Tensor(draw.rng.choice((torch.int32, torch.int64)), (tokens,), (1,), values=tuple(values)),
            "row_bytes": draw.rng.choice((0, sizes[0] * dtype.itemsize)),
            "num_split": draw.rng.choice((0, 0, 1, 2, 4)),
            "skip_index": skip,
        },
        ("row_bytes", "num_split", "skip_index"),
    )


def per_tensor(draw: Draw, operator: str) -> Call:
    dtype = F32
    shape = (*draw.leading(), draw.rng.choice((16, 64, 7)))
    static = draw.rng.random() < 0.5
    one = draw.contiguous(F32, draw.rng.choice(((), (1,))), written=not static, read=static)
    return Call(
        operator,
        {
            "input": draw.contiguous(dtype, shape, scale=draw.rng.choice((1.0, 1000.0))),
            "output_q": draw.contiguous(E4M3, shape, written=True, read=False),
            "output_s": replace(one, values=(1,)) if static else one,
            "is_static": static,
        },
    )


def per_token(draw: Draw, operator: str) -> Call:
    leading, hidden = draw.leading(), draw.rng.choice((16, 64, 112))
    dtype, count = F32 if draw.few else draw.rng.choice((F32, BF16)), int(np.prod(leading))
    return Call(
        operator,
        {
            "input": draw.rows(dtype, leading, hidden, scale=draw.rng.choice((1.0, 1000.0, 0.0))),
            "output_q": draw.rows(E4M3, leading, hidden, written=True, read=False),
            "output_s": draw.contiguous(F32, draw.rng.choice(((*leading, 1), (count,))), written=True, read=False),
        },
    )


def heads_and_caches(draw: Draw, operator: str) -> Call:
    """A call of qk_norm_rope_store or rope_and_store, of one of the few kernels that are built."""
    rng = draw.rng
    # dtype, rotary_dim, is_neox, sections of positions, dtype of the caches
    kernels = ((F32, 64, True, None, F32), (F32, 32, False, None, E4M3), (BF16, 64, True, [16, 8, 8], BF16))
    dtype, rotary_dim, is_neox, sections, cache_dtype = kernels[0] if draw.few else rng.choice(kernels)
    tokens, q_heads, kv_heads, hidden = rng.choice((0, 1, 2, 5)), rng.choice((0, 1, 2, 4)), rng.choice((1, 1, 2)), 64
    whole, has_sections = (q_heads + 2 * kv_heads) * hidden, sections is not None and rng.random() < 0.8

    def heads_of(count: int, **more: Any) -> Tensor:
        step = hidden + rng.choice((0, 0, 64))  # gates between heads
        stride = max(rng.choice((count * step, whole + 64)), count * step)
        return Tensor(more.pop("dtype", dtype), (tokens, count, hidden), (stride, step, 1), **more)

    q, k, v = heads_of(q_heads, written=True), heads_of(kv_heads, written=True), heads_of(kv_heads)
    if rng.random() < 0.3 and tokens and q_heads:  # slices of one projection
        strides = (whole, hidden, 1)
        q, k, v = (replace(x, strides=strides) for x in (q, k, v))
        k = replace(k, inside=("q", q_heads * hidden))
        v = replace(v, inside=("q", (q_heads + kv_heads) * hidden))
    q = replace(q, special=rng.random() < 0.05)
    block_size, blocks = rng.choice(((1, 9), (4, 3), (16, 1)))
    slots = block_size * blocks

    def cache() -> Tensor:
        step = hidden + rng.choice((0, 0, 64))
        if block_size == 1 or rng.random() < 0.3:
            return Tensor(cache_dtype, (slots, kv_heads, hidden), (kv_heads * step, step, 1), written=True)
        token, head = rng.choice(((kv_heads * step, step), (step, block_size * step)))  # NHD and HND
        block = block_size * kv_heads * step + rng.choice((0, 64))
        return Tensor(cache_dtype, (blocks, block_size, kv_heads, hidden), (block, token, head, 1), written=True)

    k_cache = cache()
    v_cache = replace(k_cache)
    skip = rng.choice((-1, -1, 3))
    stored = rng.choice((tokens, tokens, max(tokens - 1, 0)))
    targets = [skip if rng.random() < 0.2 else slot for slot in rng.sample(range(slots), stored)]
    count = 3 * tokens if has_sections else tokens
    positions = tuple(rng.randrange(20) for _ in range(count))
    integers = (torch.int32, torch.int64)

    def scale(output: Any, heads: int) -> Any:
        size = rng.choice((1, heads))
        is_quantised = output is not None and output.dtype == E4M3 and size
        return Tensor(F32, (size,), (1,), values=(1,)) if is_quantised and rng.random() < 0.7 else None

    q_out = rng.choice((None, None, heads_of(q_heads, written=True, read=False)))
    if cache_dtype == E4M3:  # that kernel writes float8 results for q too
        q_out = heads_of(q_heads, written=True, read=False, dtype=E4M3)
    arguments: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "cos_sin_cache": draw.contiguous(dtype, (20, rotary_dim)),
        "positions": draw.contiguous(
            rng.choice(integers), (3, tokens) if has_sections else (tokens,), values=positions
        ),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "slot_mapping": Tensor(rng.choice(integers), (stored,), (1,), values=tuple(targets)),
    }
    keywords: dict[str, Any] = {}
    if operator == "qk_norm_rope_store":
        weights = [draw.vector(dtype, hidden), draw.vector(dtype, hidden)]
        if rng.random() < 0.2:
            weights[rng.randrange(2)] = None
        keywords = {"q_weight": weights[0], "k_weight": weights[1], "eps": draw.eps()}
        keywords["weight_offset"] = rng.choice((0.0, 0.0, 1.0, 1))
    keywords |= {
        "is_neox": is_neox,
        "mrope_section": sections if has_sections else rng.choice((None, sections)),
        "mrope_interleaved": rng.random() < 0.5,
        "q_out": q_out,
        "k_out": rng.choice((None, heads_of(kv_heads, written=True, read=False))),
        "q_scale": scale(q_out, q_heads),
        "k_scale": scale(k_cache, kv_heads),
        "v_scale": scale(v_cache, kv_heads),
        "skip_index": skip,
        "rounding": "once",
        "enable_pdl": draw.pdl(),
    }
    return Call(operator, arguments | keywords, tuple(keywords))


FAMILIES: dict[str, Callable[[Draw, str], Call]] = {
    "rmsnorm": norm,
    "gemma_rmsnorm": norm,
    "fused_add_rmsnorm": fused_add,
    "gemma_fused_add_rmsnorm": fused_add,
    "rmsnorm_quant_fp8": quant_norm,
    "fused_add_rmsnorm_quant_fp8": quant_norm,
    "fused_inplace_qknorm": qknorm,
    "silu_and_mul": activation,
    "gelu_and_mul": activation,
    "gelu_tanh_and_mul": activation,
    "store_cache": store_cache,
    "qk_norm_rope_store": heads_and_caches,
    "rope_and_store": heads_and_caches,
    "per_tensor_quant_fp8": per_tensor,
    "per_token_quant_fp8": per_token,
}
# Of these the other tests of a session build the kernels anyway.
FEW = tuple(n for n in FAMILIES if not n.startswith(("gemma", "gelu")))


# Changes: each takes a call and the name of an argument, and says which exceptions are right then.

WRAPS: dict[str, tuple[str, ...] | None] = {
    "None": ("TypeError",),
    "number": ("TypeError",),
    "list": ("TypeError",),
    "numpy": ("TypeError",),
    "dlpack": ("TypeError",),
    "class": ("TypeError",),
    "sparse": ("TypeError",),
    "quantised": ("TypeError",),
    "meta": None,
    "neg": None,
    "conj": None,
    "subclass": None,
    "parameter": None,
    "leaf": None,
    "view of a leaf": None,
    "split of a leaf": None,
    "result": None,
    "no storage": None,
}
_NO_TENSORS = ("number", "list", "numpy", "dlpack", "class")
WRONG_DTYPES = (torch.int8, torch.int16, torch.float64, torch.bool, torch.complex64, E4M3, torch.float8_e5m2)
OPTIONAL = (
    *("out", "scale", "scales", "expert_ids"),
    *("q_weight", "k_weight", "q_out", "k_out", "q_scale", "k_scale", "v_scale"),
)
HEADS = ("qk_norm_rope_store", "rope_and_store")


def change(call: Call, rng: random.Random) -> None:
    """Changes one argument of a call, and what may come of it."""
    name = rng.choice(list(call.arguments))
    value = call.arguments[name]
    if not isinstance(value, Tensor):
        new, expects = _changed_number(name, value, rng)
        call.arguments[name] = new
        call.changes.append(f"{name} is {type(new).__name__} {str(new)[:40]}")
        _expect(call, expects)
        return
    how = rng.choice(("wrap", "wrap", "wrap", "dtype", "shape", "strides", "inside", "empty", "special"))
    expects: tuple[str, ...] | None = None
    if how == "wrap":
        wrap = rng.choice(list(WRAPS))
        if wrap == "neg" and value.values is None and rng.random() < 0.5:
            wrap = "conj"
        value, expects = replace(value, wrap=wrap), WRAPS[wrap]
        if wrap == "None" and (call.operator in HEADS or name in OPTIONAL):  # of heads some go together
            expects = ("TypeError", "ValueError") if name in ("q", "k", "cos_sin_cache", "positions") else None
        if wrap == "quantised" and call.operator == "store_cache" and name != "indices":
            expects = ("TypeError", "RuntimeError")
        how = wrap
    elif how == "dtype":
        value = replace(value, dtype=rng.choice([d for d in WRONG_DTYPES if d != value.dtype]))
        # What store_cache stores may have any dtype, and its tensors need not all have been there.
        is_taken = call.operator == "store_cache" and name != "indices"
        expects = None if is_taken or name == "q_out" else ("TypeError",)
    elif how == "shape" and value.shape:
        dim = rng.randrange(len(value.shape))
        shape = list(value.shape)
        shape[dim] = max(0, shape[dim] + rng.choice((-1, 1, 1, 64)))
        value = replace(value, shape=tuple(shape), values=_as_many(value.values, shape, rng))
        if rng.random() < 0.3:
            value = replace(value, shape=(*value.shape, 1), strides=(*value.strides, 1))
    elif how == "strides" and value.shape:
        dim = rng.randrange(len(value.shape))
        strides = list(value.strides)
        strides[dim] = rng.choice((0, 1, 2, strides[dim] + 1, max(strides[dim] - 1, 0), 64, 48))
        value = replace(value, strides=tuple(strides))
    elif how == "inside":
        others = [n for n, v in call.arguments.items() if n != name and isinstance(v, Tensor)]
        if not others:
            return
        value = replace(
            value, inside=(rng.choice(others), rng.choice((0, 0, 1, 16, 64, -16, 128, rng.randrange(-300, 300))))
        )
    elif how == "empty":
        value = replace(value, shape=tuple(0 for _ in value.shape), values=() if value.values is not None else None)
    elif how == "special":
        value = replace(value, scale=rng.choice((0.0, 1e-9, 1e10)))
    call.arguments[name] = value
    call.changes.append(f"{how} of {name}")
    _expect(call, expects)


def _as_many(values: tuple[int, ...] | None, shape: list[int], rng: random.Random) -> tuple[int, ...] | None:
    if values is None:
        return None
    count = int(np.prod(shape))
    return tuple(values[i] if i < len(values) else max(values, default=-1) + 1 for i in range(count))


def _expect(call: Call, expects: tuple[str, ...] | None) -> None:
    """Several changes have several faults, of which any may be named."""
    call.expects = expects if len(call.changes) == 1 else None


# What stands for a number: of other types, of the right one with a wrong value, and what may be taken or refused.
_OTHER_TYPES: tuple[Any, ...] = ("x", 1j, [], {}, object, b"1", decimal.Decimal(1))
_BAD_EPS: tuple[Any, ...] = (-1.0, float("nan"), -1, -0.5, np.float64(-1))
_HUGE = fractions.Fraction(10**400)
_NUMBERS: dict[str, tuple[Any, ...]] = {
    "eps": (
        *(True, None, np.uint8(2), np.float16(1), np.longdouble(1), np.int64(1), np.bool_(True), 5e-324, float("inf")),
        *(fractions.Fraction(1, 3), _HUGE, 10**400, 2**63, 2**64, -(2**70), torch.tensor(1e-6), np.array(1e-6)),
    ),
    "int": (
        *(True, None, 1.0, 1.5, np.uint8(2), np.int64(1), 2**63, 2**64, -(2**63), 10**400, -1, 0, 3, float("nan")),
        *(torch.tensor(1), np.array(1), fractions.Fraction(1), _HUGE),
    ),
    "bool": (1, 0, np.bool_(True), torch.tensor(True), 2, -1.0),
}

_FLAGS = ("enable_pdl", "is_static", "round_sum", "is_neox", "mrope_interleaved")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "rounding": ("x", None, 1, b"once", "each_step", "ONCE", [], object),
    "mrope_section": (
        None,
        "x",
        1,
        [],
        [1, 2],
        (16, 8, 8),
        [8, 4, 4],
        [32, 0, 0],
        [-1, 1, 32],
        [1.0, 2, 3],
        {},
        object,
    ),
}


def _changed_number(name: str, value: Any, rng: random.Random) -> tuple[Any, tuple[str, ...] | None]:
    if name in OPTIONAL:  # which was None
        return rng.choice((1, "x", [], np.zeros(3, np.float32), np.zeros(3, np.int32), object())), (
            "TypeError",
            "ValueError",
        )
    if name in _CHOICES:
        return rng.choice(_CHOICES[name]), None
    kind = "eps" if name in ("eps", "weight_offset") else "bool" if name in _FLAGS else "int"
    if rng.random() < 0.3:
        return rng.choice(_OTHER_TYPES), None if name == "round_sum" else ("TypeError",)
    if name == "eps" and rng.random() < 0.4:
        return rng.choice(_BAD_EPS), ("ValueError",)
    return rng.choice(_NUMBERS[kind]), None


# Making it


class Arena:
    """The memory of a call. Guards are all that no tensor covers."""

    def __init__(self, inference: bool) -> None:
        self._mode = torch.inference_mode if inference else contextlib.nullcontext
        with self._mode():
            generator = torch.Generator().manual_seed(5)
            self.pattern = torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=generator)
            self.memory = self.pattern.clone()

    def lay(self, call: Call, rng: random.Random) -> dict[str, Any]:
        """Places all tensors of a call, and fills them. Returns its arguments but for `wrap`."""
        with self._mode():
            self.memory.copy_(self.pattern)
            cursor = 256
            places: dict[str, int] = {}
            views: dict[str, Any] = {}
            for name, value in call.arguments.items():
                if not isinstance(value, Tensor):
                    views[name] = value
                    continue
                size = value.dtype.itemsize
                span = (sum((n - 1) * s for n, s in zip(value.shape, value.strides, strict=True) if n) + 1) * size
                is_inside = value.inside is not None and value.inside[0] in places
                if span > SIZE // 2:
                    raise Undefined("it has no room in the arena")
                if value.inside and is_inside:
                    place = places[value.inside[0]] + value.inside[1] * size
                else:
                    place = cursor + rng.choice((0, 16, 64, 8 * size, size, 3 * size))
                place = max(0, min(place, SIZE - span)) // size * size
                places[name] = place
                cursor = max(cursor, (place + span + 31) // 16 * 16)
                views[name] = self.memory.view(value.dtype).as_strided(value.shape, value.strides, place // size)
                if not (is_inside and value.inside and value.inside[1] == 0):
                    try:
                        _fill(views[name], value, rng)
                    except RuntimeError:  # it overlaps itself
                        flat = self.memory.view(value.dtype)[place // size : (place + span) // size]
                        _fill(flat, replace(value, values=None), rng)
            return views


def _fill(view: torch.Tensor, value: Tensor, rng: random.Random) -> None:
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    if value.values is not None and not value.dtype.is_floating_point and not value.dtype.is_complex:
        if view.numel():
            numbers = torch.tensor(value.values, dtype=torch.int64)
            view.copy_(numbers.reshape(view.shape).to(value.dtype))
        return
    if value.values is not None:
        view.fill_(rng.choice((0.01, 0.1, 1.0)))
        return
    if value.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        view.copy_(torch.randint(0, 100, view.shape, generator=generator))
        return
    if value.dtype == torch.bool:
        view.copy_(torch.randint(0, 2, view.shape, generator=generator))
        return
    if not value.read:
        if view.dtype != E4M3:
            view.fill_(float("nan"))
        return
    numbers = torch.randn(view.shape, generator=generator) * value.scale
    if value.special and numbers.numel():
        flat = numbers.view(-1)
        flat[rng.randrange(len(flat))] = rng.choice((float("nan"), float("inf"), float("-inf"), 0.0))
    view.copy_(numbers.to(value.dtype))


class _Subclass(torch.Tensor):
    pass


class _DLPack:
    """An object that hands out a tensor, as arrays of other libraries do."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **more: Any) -> Any:
        return self._tensor.__dlpack__(**more)

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()


def wrapped(view: torch.Tensor, how: str) -> Any:
    """Return what is made of a tensor."""
    if how == "None":
        return None
    if how == "number":
        return 1.0
    if how == "list":
        return [1.0, 2.0]
    if how == "class":
        return torch.Tensor
    if how == "numpy":
        plain = (
            view
            if view.dtype in (F32, F16, torch.int32, torch.int64, torch.float64, torch.uint8)
            else view.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        )
        return plain.numpy() if not view.is_inference() else np.zeros(view.shape, np.float32)
    if how == "dlpack":
        return _DLPack(view)
    if how == "sparse":
        return torch.zeros(view.shape or (1,)).to_sparse()
    if how == "quantised":
        return torch.quantize_per_tensor(torch.zeros(view.shape or (1,)), 0.1, 0, torch.qint8)
    if how == "meta":
        return torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device="meta")
    if how == "neg":
        return torch._neg_view(view) if view.dtype in (F32, F16, BF16, torch.float64) else view
    if how == "conj":
        if view.dtype.is_complex:
            return view.conj()
        return torch._neg_view(view) if view.dtype in (F32, F16, BF16) else view
    if how == "subclass":
        return view.as_subclass(_Subclass)
    if how == "no storage":
        held = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype)
        held.untyped_storage().resize_(0)
        return held
    if not view.dtype.is_floating_point or view.dtype == E4M3 or view.is_inference():
        return view
    with torch.enable_grad():
        leaf = view.detach().requires_grad_()
        if how == "parameter":
            return torch.nn.Parameter(view.detach())
        if how == "view of a leaf":
            return leaf[:] if leaf.dim() else leaf
        if how == "split of a leaf" and leaf.dim():
            return leaf.split(max(1, leaf.shape[0]))[0]
        if how == "result" and not any(
            step == 0 < size - 1 for size, step in zip(view.shape, view.stride(), strict=True)
        ):
            return view.detach().copy_(view.detach().clone().requires_grad_())
        return leaf


# Judging it

DOCUMENTED = (TypeError, ValueError, RuntimeError)


@dataclass
class Outcome:
    """What came of a call: the exception, or what it returned, and the arena's bytes."""

    error: BaseException | None
    result: Any
    memory: torch.Tensor
    arguments: dict[str, Any]
    before: dict[str, Any]

    @property
    def kind(self) -> str:
        return type(self.error).__name__ if self.error else "accepted"


def forget() -> None:
    """Empties the tables of every operator, so that the next call takes the slow path."""
    for operator in OPERATORS.values():
        for table in operator.tables:
            table.clear()


_GRAD: dict[str, Callable[[], Any]] = {
    "grad": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


class Undefined(Exception):
    """What the call does is not defined, as its indices are out of range or come twice, or it has no room."""


def _is_undefined(views: dict[str, Any]) -> bool:
    indices, skip = views["indices"], views["skip_index"]
    if not isinstance(indices, torch.Tensor) or indices.dtype not in (torch.int32, torch.int64):
        return False  # it is refused
    slots = min(v.shape[0] if v.dim() else 0 for v in (views["k_cache"], views["v_cache"]))
    is_skipped = isinstance(skip, (int, np.integer)) and not isinstance(skip, bool)
    kept = [i for i in indices.flatten().tolist() if not (is_skipped and i == skip)]
    return len(set(kept)) != len(kept) or any(not 0 <= i < slots for i in kept)


def _reads_beyond_caches(views: dict[str, Any]) -> bool:
    """Whether positions or slots of a call on heads are out of range, or a slot comes twice."""
    integers = (torch.int32, torch.int64)
    positions, slots, skip = (views[name] for name in ("positions", "slot_mapping", "skip_index"))
    rows = views["cos_sin_cache"].shape[0] if views["cos_sin_cache"].dim() else 0
    if positions.dtype in integers and any(not 0 <= p < rows for p in positions.flatten().tolist()):
        return True
    if slots.dtype not in integers:
        return False  # it is refused
    is_number = isinstance(skip, (int, np.integer)) and not isinstance(skip, bool)
    kept = [slot for slot in slots.flatten().tolist() if not (is_number and slot == skip)]
    count = min(int(np.prod(views[name].shape[:-2])) for name in ("k_cache", "v_cache"))
    return len(set(kept)) != len(kept) or any(not 0 <= slot < count for slot in kept)


def make(call: Call, arena: Arena, seed: str) -> Outcome:
    """Make the call once."""
    rng = random.Random(seed)
    views = arena.lay(call, rng)
    before = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in views.items()}
    arguments = dict(views)
    for name, value in call.arguments.items():
        if isinstance(value, Tensor) and value.wrap:
            arguments[name] = wrapped(views[name], value.wrap)
            if arguments[name] is None:
                before[name] = None
            elif value.wrap in ("neg", "conj") and isinstance(arguments[name], torch.Tensor):
                before[name] = arguments[name].resolve_neg().resolve_conj().clone()
    if call.operator == "store_cache" and _is_undefined(views):
        raise Undefined
    if call.operator in HEADS and _reads_beyond_caches(views):
        raise Undefined
    laid = arena.memory.clone()
    keywords = {n: arguments[n] for n in call.keywords}
    positional = [v for n, v in arguments.items() if n not in call.keywords]
    error = result = None
    try:
        with _GRAD[call.grad]():
            result = getattr(jitnorm, call.operator)(*positional, **keywords)
    except Exception as raised:
        error = raised.with_traceback(None)
    after = arena.memory.clone()
    arguments["_laid"] = laid
    return Outcome(error, result, after, arguments, before)


def problems_of(call: Call, outcome: Outcome, arena: Arena) -> list[str]:
    """Return what is wrong with the end of a call."""
    try:
        return list(_problems_of(call, outcome, arena))
    except Exception:
        return [f"the campaign itself failed: {traceback.format_exc()}"]


def _problems_of(call: Call, outcome: Outcome, arena: Arena) -> Iterator[str]:
    if outcome.error is not None:
        kind = type(outcome.error)
        text = str(outcome.error)
        if kind not in DOCUMENTED and not (kind.__module__ or "").startswith("jitnorm"):
            yield f"raises {kind.__name__}: {text[:200]}"
        elif call.expects == ():
            yield f"refused: {kind.__name__}: {text[:200]}"
        elif call.expects and kind.__name__ not in call.expects:
            yield f"raises {kind.__name__}, not {' or '.join(call.expects)}: {text[:200]}"
        # Of meta tensors torch's dispatcher decides, in its own words.
        is_meta = any(isinstance(v, Tensor) and v.wrap == "meta" for v in call.arguments.values())
        if "please report" in text or not text or (text.count("\n") > 0 and not is_meta):
            yield f"unclear message: {text[:200]!r}"
        if not torch.equal(outcome.memory, outcome.arguments["_laid"]):
            at = (outcome.memory != outcome.arguments["_laid"]).nonzero().flatten()
            yield f"refused ({text[:80]}), and {len(at)} bytes were changed"
        return
    if call.expects:
        yield f"accepted, where {' or '.join(call.expects)} is right"
        return
    strangers = [n for n, v in call.arguments.items() if isinstance(v, Tensor) and v.wrap in _NO_TENSORS]
    if strangers:
        yield f"accepted {strangers[0]}, which is no tensor"
        return
    if any(
        isinstance(v, Tensor) and v.wrap in ("meta", "no storage", "sparse", "quantised")
        for v in call.arguments.values()
    ):
        if not torch.equal(outcome.memory, outcome.arguments["_laid"]) and "meta" in str(call):
            yield "accepted with a meta tensor, and memory was written"
        return
    allowed = torch.zeros(SIZE, dtype=torch.bool)
    base = arena.memory.data_ptr()
    for name, value in call.arguments.items():
        if isinstance(value, Tensor) and value.written and isinstance(outcome.arguments[name], torch.Tensor):
            view = outcome.arguments[name]
            size = view.element_size()
            start = view.data_ptr() - base if view.numel() else 0
            mask = allowed.as_strided((*view.shape, size), (*(s * size for s in view.stride()), 1), start)
            mask.fill_(True)
    changed = outcome.memory != outcome.arguments["_laid"]
    if bool((changed & ~allowed).any()):
        at = (changed & ~allowed).nonzero().flatten()
        yield f"{len(at)} bytes beside the outputs were written, at {at[:4].tolist()}"
    if any(isinstance(v, torch.Tensor) and v.is_neg() for v in outcome.arguments.values()):
        return  # a limit that is documented: the negative bit is not looked at
    yield from references.compare(call.operator, outcome.before, outcome.arguments, outcome.result)


def random_call(seed: int, index: int, few: bool) -> Call:
    """Return the call of this number."""
    rng = random.Random(f"call:{seed}:{index}")
    operator = rng.choice(FEW if few else list(FAMILIES))
    call = FAMILIES[operator](Draw(rng, few), operator)
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        change(call, rng)
    call.grad = rng.choice(("grad", "grad", "grad", "no_grad", "inference"))
    if call.grad == "inference" and rng.random() < 0.5:
        call.grad = "grad in inference memory"
    return call


@dataclass
class Judged:
    """A call that was made, cold and warm."""

    call: Call
    outcome: str
    problems: list[str]


_ARENAS: dict[bool, Arena] = {}


def judge(seed: int, index: int, few: bool) -> Judged:
    """Make the call of this number, cold and warm, and judge it."""
    call = random_call(seed, index, few)
    inference = call.grad.endswith("memory")
    if inference:
        call.grad = "grad"
    if inference not in _ARENAS:
        _ARENAS[inference] = Arena(inference)
    arena = _ARENAS[inference]
    rng = random.Random(f"call:{seed}:{index}")
    operator = rng.choice(FEW if few else list(FAMILIES))
    plain = FAMILIES[operator](Draw(rng, few), operator)
    plain.grad = "no_grad"
    words = f"{seed}:{index}"
    problems: list[str] = []
    forget()
    try:
        cold = make(call, arena, words)
        problems += [f"cold: {p}" for p in problems_of(call, cold, arena)]
        # A good call of the same operator brings its kernels into the fast path.
        good = make(plain, arena, words)
        problems += [f"unchanged: {p}" for p in problems_of(plain, good, arena)]
        warm = make(call, arena, words)
    except Undefined:
        return Judged(call, "undefined", problems)
    problems += [f"warm: {p}" for p in problems_of(call, warm, arena) if f"cold: {p}" not in problems]
    if cold.kind != warm.kind:
        problems.append(f"cold {cold.kind} ({cold.error}), warm {warm.kind} ({warm.error})"[:400])
    elif cold.error is None and not torch.equal(cold.memory, warm.memory):
        problems.append("cold and warm wrote different bytes")
    where = " in inference memory" if inference else ""
    call.grad += where
    return Judged(call, cold.kind, problems)


def run_range(seed: int, start: int, stop: int, step: int, few: bool, write: Callable[[dict[str, Any]], None]) -> None:
    """Judge the calls of these numbers, and write an answer for each."""
    import jitnorm.store_cache  # noqa: F401

    assert sys.platform == "linux"
    for index in range(start, stop, step):
        judged = judge(seed, index, few)
        write(
            {
                "index": index,
                "kind": judged.call.operator,
                "met": judged.outcome,
                "fault": str(judged.call) if judged.problems else "",
                "problems": judged.problems,
            }
        )


if __name__ == "__main__":
    import json

    numbers = [int(word) for word in sys.argv[1:5]]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def write(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    torch.set_num_threads(1)
    run_range(*numbers, sys.argv[5] == "few", write)
