"""The checks in Python and the bindings in csrc refuse the same calls: drawn at random, and at every limit.

The other tests name each refusal; these find the ones that nobody has thought of. On the CPU, which accepts every
alignment.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from jitnorm.activation import MAX_WIDTH, RELU2, SILU_AND_MUL, SWIGLUOAI_AND_MUL
from jitnorm.activation import check as check_activation
from jitnorm.core.checks import power_of_two, vector_bytes
from jitnorm.core.operators import OPERATORS
from jitnorm.dual_rmsnorm import DUAL_RMSNORM
from jitnorm.dual_rmsnorm import check as check_dual
from jitnorm.fused_add_rmsnorm import FUSED_ADD_RMSNORM, FUSED_ADD_RMSNORM_FP32_RESIDUAL
from jitnorm.fused_add_rmsnorm import check as check_fused_add_rmsnorm
from jitnorm.general_rmsnorm import Form
from jitnorm.jit.load import load
from jitnorm.jit.spec import Target
from jitnorm.layernorm import LAYERNORM, LAYERNORM_QUANT_FP8
from jitnorm.layernorm import check as check_layernorm
from jitnorm.layernorm import check_quant as check_layernorm_quant
from jitnorm.qknorm import QKNORM
from jitnorm.qknorm import check as check_qknorm
from jitnorm.qknorm_rope_store import QK_NORM_ROPE_STORE, ROPE, Arguments, Variant
from jitnorm.qknorm_rope_store import check as check_qk_norm_rope_store
from jitnorm.quant_fp8 import PARTIAL_AMAX, PER_TENSOR, PER_TOKEN, check_per_tensor, check_per_token
from jitnorm.rmsnorm import RMSNORM
from jitnorm.rmsnorm import check as check_rmsnorm
from jitnorm.rmsnorm_quant_fp8 import QuantNorm
from jitnorm.rmsnorm_quant_fp8 import check as check_quant_norm
from jitnorm.store_cache import MAX_ROW_BYTES, STORE_CACHE
from jitnorm.store_cache import check as check_store_cache

CPU, F32, E4M3 = Target("cpu"), torch.float32, torch.float8_e4m3fn
H = 64
QUANT_NORMS = [operator for operator in OPERATORS.values() if isinstance(operator, QuantNorm)]
DRAWS = 1500


def kernel(operator, *key):
    return getattr(load(operator.spec(*key, CPU)), operator.binding)


class Draw:
    """Tensors that overlap or not, by chance: all lie in two buffers."""

    def __init__(self) -> None:
        source = random.Random(0)
        self.pick, self.shuffle = source.choice, source.shuffle
        self.buffers = [torch.zeros(1 << 17, dtype=torch.uint8) for _ in range(2)]

    def view(self, dtype, shape, strides, step=16):
        offset = self.pick((0, 0, H, 2 * H, 3 * H, 5 * H, 4000, self.pick(range(100)) * step))
        offset = max(0, offset + self.pick((0, 0, 0, 0, 1, -1)))  # what just touches another
        return self.pick(self.buffers).view(dtype).as_strided(shape, strides, offset)

    def leading(self):
        return self.pick(((), (1,), (2,), (3,), (2, 3), (1, 3), (3, 1), (0,), (2, 1, 2), (2, 0)))

    def rows(self, dtype, leading, width=H, strides=None):
        choices = strides or (width, 3 * H, 3 * H, 3 * H, width - 16, 0)
        strides, stride = [self.pick((1,) * 9 + (2, 0))], self.pick(choices)
        for size in reversed(leading):
            strides.insert(0, stride)
            stride *= self.pick((size, size, size, size + 1))
        return self.view(dtype, (*leading, width), strides)

    def vector(self, dtype, size):
        return self.view(dtype, (self.pick((*[size] * 6, size + 1)),), (self.pick((1, 1, 1, 1, 1, 2)),), step=1)

    def heads(self, tokens, heads):
        width = max(heads, 1) * H
        stride = self.pick((width, 6 * H, 6 * H, 5 * H, 2 * width, H, 0, width - 16))
        return self.view(F32, (tokens, heads, H), (stride, self.pick((H, H, H, 2 * H, H - 16, 0, 3 * H)), 1))

    def slots(self, count, width):
        stride = self.pick((width, width, 128, 192, width - 16, 0))
        return self.view(torch.uint8, (count, width), (stride, 1))

    def flags(self):
        return self.pick((1e-6, 1e-6, 1e-6, 0, 1, -1.0)), self.pick((None, None, True, False, 1))


def norm_calls(draw):
    shape = draw.leading()
    x, other = draw.rows(F32, shape), draw.rows(F32, draw.pick((shape, shape, shape, draw.leading())))
    w, (eps, pdl) = draw.vector(F32, H), draw.flags()
    out = draw.pick((other, other, x))
    yield RMSNORM, (H, F32, F32), (x, w, out, eps, pdl), lambda: check_rmsnorm(RMSNORM, x, w, eps, out, pdl)
    yield (
        FUSED_ADD_RMSNORM,
        (H, F32, F32),
        (x, other, w, eps, pdl),
        lambda: check_fused_add_rmsnorm(FUSED_ADD_RMSNORM, x, other, w, eps, pdl),
    )


def fp32_residual_calls(draw):
    """Rows of two element sizes: those of one buffer may alternate where their strides have as many bytes."""
    shape, norm = draw.leading(), FUSED_ADD_RMSNORM_FP32_RESIDUAL
    x = draw.rows(torch.bfloat16, shape, strides=(H, 6 * H, 6 * H, 6 * H, H - 16, 0))
    residual = draw.rows(draw.pick((F32,) * 9 + (torch.bfloat16,)), draw.pick((shape, shape, shape, draw.leading())))
    w = draw.pick((torch.ones(H), torch.ones(H), draw.vector(F32, H)))
    eps, pdl = draw.pick(((1e-6, None), (0, True), draw.flags()))
    yield (
        norm,
        (H, torch.bfloat16, F32),
        (x, residual, w, eps, pdl),
        lambda: check_fused_add_rmsnorm(norm, x, residual, w, eps, pdl),
    )


def quant_norm_calls(draw):
    for norm in QUANT_NORMS:
        shape = draw.leading()
        x, residual = draw.rows(F32, shape), draw.rows(F32, shape) if norm.has_residual else None
        w, q, (eps, pdl) = draw.vector(F32, H), draw.rows(E4M3, shape), draw.flags()
        scale = draw.vector(F32, x.numel() // H if norm.is_dynamic else 1)
        tensors = [t for t in (x, residual, w, q, scale) if t is not None]
        check = check_quant_norm, (norm, x, residual, w, q, scale, eps, pdl)
        yield norm, (H, F32, F32), (*tensors, eps, pdl), lambda check=check: check[0](*check[1])


def layernorm_calls(draw):
    operator = draw.pick((LAYERNORM, LAYERNORM_QUANT_FP8))
    is_quantised, shape = operator is LAYERNORM_QUANT_FP8, draw.leading()
    x = draw.rows(F32, shape)
    out = draw.rows(E4M3 if is_quantised else F32, draw.pick((shape, shape, shape, draw.leading())))
    out = out if is_quantised else draw.pick((out, out, x))
    w, b = (draw.pick((None, draw.vector(F32, H))) for _ in range(2))
    eps, pdl = draw.flags()
    form = Form("strided", w is not None, b is not None, True)
    if is_quantised:
        scale = draw.vector(F32, 1)
        arguments = x, None, w, b, out, None, eps, pdl, None, scale
        check = partial(check_layernorm_quant, x, w, b, out, scale, eps, pdl)
    else:
        mean, rstd = draw.pick((None, draw.vector(F32, x.numel() // H))), draw.pick((None, torch.empty(x.numel() // H)))
        arguments = x, None, w, b, out, rstd, eps, pdl, mean, None
        check = partial(check_layernorm, x, w, b, out, mean, rstd, eps, pdl)
    yield operator, (H, F32, F32, form), arguments, check


def quant_calls(draw):
    shape = draw.leading()
    x, q = draw.rows(F32, shape), draw.rows(E4M3, draw.pick((shape, shape, shape, draw.leading())))
    one, each, partial_amax = draw.vector(F32, 1), draw.vector(F32, x.numel() // H), torch.empty(512)
    yield PER_TENSOR, (F32,), (x, q, one, None), lambda: check_per_tensor(x, q, one, True)
    yield PARTIAL_AMAX, (F32,), (x, q, one, partial_amax), lambda: check_per_tensor(x, q, one, False)
    yield PER_TOKEN, (F32,), (x, q, each), lambda: check_per_token(x, q, each)


def activation_calls(draw):
    shape, (_, pdl) = draw.leading(), draw.flags()
    x, out = draw.rows(F32, shape, 2 * H), draw.rows(F32, draw.pick((shape, shape, shape, draw.leading())))
    ids = draw.pick((None, *(draw.vector(dtype, draw.pick(range(5))) for dtype in (torch.int32, torch.int64))))
    arguments = x, out, ids, draw.pick((1, 2, 3, 2**63 - 1, 0)), pdl
    yield SILU_AND_MUL, (F32, 16), arguments, lambda: check_activation(SILU_AND_MUL, *arguments)


def masked_activation_calls(draw):
    """The same with counts; and of an activation without a product, and of one with parameters."""
    operator = draw.pick((SILU_AND_MUL, RELU2, SWIGLUOAI_AND_MUL))
    shape, (number, pdl) = (draw.pick((1, 2, 2, 3, 0)), draw.pick((1, 2, 2, 0))), draw.flags()
    shape = draw.pick((*[shape] * 7, (*shape, 1), shape[:1]))
    x, out = draw.rows(F32, shape, operator.operands * H), draw.rows(F32, draw.pick((shape, shape, shape, (2, 2))))
    counts = draw.vector(draw.pick((torch.int32, torch.int64)), draw.pick((*[shape[0]] * 5, 2)))
    ids = draw.pick((*[None] * 9, counts))
    parameters = draw.pick((7.0, 7.0, 7.0, 0, math.inf, -1.0, math.nan, True)), 1.702, number
    arguments = x, out, ids, 1, pdl, draw.pick((counts, counts, None)), *parameters[: len(operator.parameters)]
    yield operator, (F32, 16), arguments, lambda: check_activation(operator, *arguments)


def qknorm_calls(draw):
    tokens, (eps, pdl) = draw.pick(range(4)), draw.flags()
    q, k = draw.heads(tokens, draw.pick((0, 1, 2, 4))), draw.heads(tokens, draw.pick((0, 1, 2)))
    arguments = q, k, draw.vector(F32, H), draw.vector(F32, H), eps, draw.pick((0, 0, H, 32)), pdl
    yield QKNORM, (H, F32, F32), arguments, lambda: check_qknorm(*arguments)


def dual_calls(draw):
    shape, (eps, pdl) = draw.leading(), draw.flags()
    a, b = draw.rows(F32, shape), draw.rows(F32, draw.pick((*[shape] * 9, draw.leading())), H // 2, (H, 3 * H, 3 * H))
    outs = draw.pick((a, a, draw.rows(F32, shape))), draw.pick((b, b, draw.rows(F32, shape, H // 2, (3 * H, H // 2))))
    tensors = a, b, draw.vector(F32, H), draw.vector(F32, H // 2)
    eps2 = draw.pick((*[1e-6] * 9, -1.0))
    arguments = *tensors, *outs, eps, eps2, pdl
    yield DUAL_RMSNORM, (H, H // 2, F32, F32), arguments, lambda: check_dual(*tensors, eps, *outs, eps2, pdl)


def store_cache_calls(draw):
    for buffer in draw.buffers:
        buffer.zero_()  # so that every index, wherever it lies, is a slot
    tokens, slots, widths = draw.pick(range(4)), draw.pick((0, 1, 3, 4)), draw.pick(((64, 64), (64, 128), (32, 64)))
    rows = [draw.slots(n, width) for n in (tokens, slots) for width in widths]
    indices = draw.vector(torch.int64, tokens)
    numbers = draw.pick((0, 0, 64, 128)), draw.pick((0, 1, 2, 3, 4)), draw.pick((None, -1, 0, True))
    arguments = *rows, indices, *numbers
    yield STORE_CACHE, (16,), arguments, lambda: check_store_cache(*arguments)


def rope_heads(draw, dtype, *leading):
    """Heads under one or two leading dimensions: slices of a projection or of a cache, or of nothing in particular."""
    *outer, heads = leading
    head = draw.pick((H, H, H, H, 2 * H, 5 * H, 0, H - 16))
    strides, stride = [head], draw.pick((max(heads, 1) * H, 6 * H, 6 * H, 6 * H, 2 * H, H))
    for size in reversed(outer):
        strides.insert(0, stride)
        stride *= draw.pick((size, size, size + 1, 1))
    if draw.pick(range(4)) == 0:
        draw.shuffle(strides)  # as of caches with heads before tokens
    return draw.view(dtype, (*leading, H), (*strides, draw.pick((1,) * 15 + (2,))))


def rope_calls(draw):
    for buffer in draw.buffers:
        buffer.zero_()  # so that every position and slot, wherever it lies, is in range
    tokens, heads, kv_heads = draw.pick((1, 2, 2, 3, 3, 0)), draw.pick((2, 1, 4, 0)), draw.pick((1, 2, 0))
    # One kernel with all that may differ, one with nothing, and what lies between: each takes a build.
    weighted, sections, cache_dtype, q_dtype, rounding = draw.pick(
        (
            (True, False, F32, F32, "once"),
            (True, True, E4M3, E4M3, "each_step"),
            (False, False, E4M3, F32, "once"),
            (False, True, F32, F32, "once"),
        )
    )
    q, k, v = (rope_heads(draw, F32, tokens, n) for n in (heads, kv_heads, draw.pick((*[kv_heads] * 9, 1))))
    positions = draw.view(torch.int32, (tokens,), (draw.pick((1,) * 19 + (2,)),), step=1)
    if sections:
        positions = draw.view(torch.int32, (3, tokens), (draw.pick((tokens, 0, 5)), 1), step=1)
    cos_sin = draw.view(F32, (draw.pick((1, 2, 3, 3, 3, 3, 0)), 32), (draw.pick((32, 48, 32, 32, 32, 16)), 1))
    caches = [None] * 3
    if stored := draw.pick((True, True, False)):
        shape = draw.pick(((3,), (2, 2), (1, 3), (1, 1)) + ((0,),) * draw.pick((0, 0, 1)))
        caches = [rope_heads(draw, cache_dtype, *shape, kv_heads) for _ in range(2)]
        caches.append(draw.vector(torch.int64, draw.pick((tokens, max(tokens - 1, 0)))))
    weights = [draw.vector(F32, H) if weighted and draw.pick((True, True, False)) else None for _ in range(2)]
    if weighted and weights == [None, None]:
        weights[0] = draw.vector(F32, H)
    q_out = draw.pick((q, None, rope_heads(draw, F32, tokens, heads))) if q_dtype == F32 else None
    if q_dtype == E4M3:
        q_out = rope_heads(draw, E4M3, tokens, heads)
    k_out = draw.pick((k, None, None, rope_heads(draw, F32, tokens, kv_heads)))

    def scale(count, is_quantised):
        if not is_quantised and draw.pick(range(20)):
            return None
        count = draw.pick((1, count, count))
        shape = draw.pick(((count,), (count,), (1, count), (count, 1, 1)))
        strides = {1: (1,), 2: (count, 1), 3: (1, 1, 1)}[len(shape)]
        return draw.pick((None, draw.view(F32, shape, strides, step=1)))

    eps, pdl = draw.pick(((1e-6, None), (0, True), draw.flags()))
    a = Arguments(
        *(q, k, draw.pick((v, v, v, v if stored else None)), cos_sin, positions, *caches, *weights, eps),
        *(draw.pick((0.0, 1, float("nan"))), True),
        draw.pick(((8, 4, 4), [6, 5, 5], (16, 0, 0)) * 3 + ((4, 4, 4), None))
        if sections
        else draw.pick((None, (8, 4, 4))),
        *(draw.pick((True, False)), q_out, k_out),
        *(scale(heads, q_dtype == E4M3), *(scale(kv_heads, stored and cache_dtype == E4M3) for _ in range(2))),
        *(draw.pick((-1, 0, 2**63 - 1)), rounding, pdl),
    )
    variant = Variant(
        *(H, 32, F32, F32 if weighted else None, F32, cache_dtype, q_dtype, True, sections, rounding == "each_step")
    )
    operator = QK_NORM_ROPE_STORE if weighted else ROPE
    yield operator, (variant,), a.of_bindings(), lambda: check_qk_norm_rope_store(a)


FAMILIES = (
    *(norm_calls, fp32_residual_calls, quant_norm_calls, quant_calls, activation_calls, masked_activation_calls),
    *(layernorm_calls, qknorm_calls, dual_calls, store_cache_calls, rope_calls),
)


# At every limit and on both sides of it. Rows as wide as 2^30 need no memory where there are none of them.

INTEGERS = (0, 1, -1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1)
WIDE = tuple(2**30 + step for step in (-8, -4, -3, -2, -1, 0, 1, 2, 3, 4, 8))


def access(row_bytes: int) -> int:
    """Return the key of the kernel for such rows; any key where there is no such kernel."""
    return vector_bytes(row_bytes) if row_bytes % 4 == 0 else 4


def eps_limits():
    x, w, out = torch.ones(2, H), torch.ones(H), torch.empty(2, H)
    smallest, largest = 5e-324, sys.float_info.max
    for eps in (*INTEGERS, 0.0, -0.0, smallest, -smallest, largest, -largest, math.inf, -math.inf, math.nan):
        yield RMSNORM, (H, F32, F32), (x, w, out, eps, None), partial(check_rmsnorm, RMSNORM, x, w, eps, out, None)


def activation_limits():
    for dtype, width in itertools.product((torch.float16, F32), (*range(1, 18), *WIDE)):
        arguments = torch.empty(0, 2 * width, dtype=dtype), torch.empty(0, width, dtype=dtype), None, 1, None
        key = dtype, access(width * dtype.itemsize)
        yield SILU_AND_MUL, key, arguments, partial(check_activation, SILU_AND_MUL, *arguments)
    x, out = torch.ones(5, 2 * H), torch.empty(5, H)
    for step in (*INTEGERS, 2, 3, 4, 5, 6):
        needed = -(-5 // step) if step > 0 else 1
        for count in (needed - 1, needed, needed + 1):
            arguments = x, out, torch.zeros(count, dtype=torch.int64), step, None
            yield SILU_AND_MUL, (F32, 16), arguments, partial(check_activation, SILU_AND_MUL, *arguments)


def qknorm_limits():
    q, k, w = torch.ones(2, 2, H), torch.ones(2, 1, H), torch.ones(H)
    for head_dim in (*INTEGERS, H - 1, H, H + 1):
        arguments = q, k, w, w, 1e-6, head_dim, None
        yield QKNORM, (H, F32, F32), arguments, partial(check_qknorm, *arguments)


def store_cache_limits():
    indices = torch.empty(0, dtype=torch.int64)
    for k_bytes, v_bytes in itertools.product((*range(1, 18), *WIDE), (4, 8, 16, 2**30, 2**30 + 16)):
        k, v = torch.empty(0, k_bytes, dtype=torch.uint8), torch.empty(0, v_bytes, dtype=torch.uint8)
        arguments = k, v, k, v, indices, 0, 0, None
        yield STORE_CACHE, (access(math.gcd(k_bytes, v_bytes)),), arguments, partial(check_store_cache, *arguments)
    k = torch.empty(0, H, dtype=torch.uint8)
    for numbers in (
        *((row_bytes, 0, None) for row_bytes in (*INTEGERS, H - 1, H, H + 1)),
        *((0, num_split, None) for num_split in (*INTEGERS, 2, 3, 4, 5)),
        *((0, 0, skip_index) for skip_index in INTEGERS),
    ):
        arguments = k, k, k, k, indices, *numbers
        yield STORE_CACHE, (16,), arguments, partial(check_store_cache, *arguments)


def quant_limits():
    for rows, width in itertools.product((0, 2), (1, 8, 15, 16, 17, 32, 48)):
        x, q = torch.ones(rows, width), torch.empty(rows, width, dtype=E4M3)
        for count in (rows - 1, rows, rows + 1):
            scales = torch.empty(max(count, 0))
            yield PER_TOKEN, (F32,), (x, q, scales), partial(check_per_token, x, q, scales)
    x, q = torch.ones(2, 8), torch.empty(2, 8, dtype=E4M3)
    for count in (0, 1, 2):
        scale = torch.ones(count)
        yield PER_TENSOR, (F32,), (x, q, scale, None), partial(check_per_tensor, x, q, scale, True)


LIMITS = (eps_limits, activation_limits, qknorm_limits, store_cache_limits, quant_limits)


def described(arguments) -> list[object]:
    return [(a.dtype, a.shape, a.stride(), a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments]


def compare(calls) -> Iterator[tuple[str, bool]]:
    """Yield the operator of each call and whether it is refused: by the check and by the bindings, or by neither."""
    for operator, key, arguments, check in calls:
        try:
            check()
            error = None
        except (TypeError, ValueError, RuntimeError) as raised:
            error = raised
        try:
            refused = bool(kernel(operator, *key)(*arguments))
        except OverflowError:  # tvm-ffi cannot convert an argument
            refused = True
        assert refused == (error is not None), (operator.op, error, described(arguments))
        yield operator.op, refused


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=pytest.mark.slow if f in (layernorm_calls, dual_calls) else ()) for f in FAMILIES],
    ids=lambda family: family.__name__,
)
def test_checks_and_bindings_agree(family):
    draw, decisions = Draw(), Counter()
    for _ in range(DRAWS):
        decisions.update(compare(family(draw)))
    for op, _ in [*decisions]:  # each operator met many of both kinds
        assert min(decisions[op, True], decisions[op, False]) > DRAWS // 30, decisions


@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: limits.__name__)
def test_checks_and_bindings_agree_at_every_limit(limits):
    decisions = Counter(compare(limits()))
    for op, _ in [*decisions]:
        assert decisions[op, True] and decisions[op, False], decisions


def test_the_limits_are_those_of_the_messages():
    """The widest row that is accepted is the one that the message names."""
    assert power_of_two(MAX_WIDTH) == power_of_two(MAX_ROW_BYTES) == "2^30"
    with pytest.raises(RuntimeError, match=r"d = 1073741825 in float32: supported are multiples of 1 up to 2\^30"):
        check_activation(SILU_AND_MUL, torch.empty(0, 2 * MAX_WIDTH + 2), None, None, 1, None)
    wide = torch.empty(0, MAX_ROW_BYTES + 4, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"rows of 1073741828 bytes, as of k: .* multiples of 4 up to 2\^30"):
        check_store_cache(wide, wide, wide, wide, torch.empty(0, dtype=torch.int64), 0, 0, None)
