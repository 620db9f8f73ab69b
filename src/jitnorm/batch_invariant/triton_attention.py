"""Attention of few queries in Triton, as in decoding, with a sum whose order follows from the number of keys alone.

The keys are leaves of a binary tree: each leaf is summed from its first key to its last, then neighbours are added up,
and their sums likewise. A program makes the sum of some leaves that have a place of their own in that tree, for all
queries of the heads that share the keys, and a second kernel makes the rest. So which programs there are, and how many
leaves each has, is chosen by what fills the GPU, the number of sequences included.

Triton compiles another kernel where an argument is 1 or a multiple of 16, so no number is specialised, and strides come
in units of 16 bytes, which tells the compiler as much about addresses. Additions of sums are the same instructions in
both kernels, as every multiplication and addition that could be fused there already is.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from jitnorm.batch_invariant.attention_schedule import Schedule, choose_schedule, rows_of, tree_levels
from jitnorm.batch_invariant.triton_pdl import pdl


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    schedule: Schedule | None = None,
) -> None:
    """`out = softmax(query @ key.mT * scale + bias) @ value`, of `[batch, heads, length, head_dim]`.

    Args:
        query, key, value, out: the last stride is 1; where head_dim is a multiple of 8, the other strides are too.
        bias: broadcast to `[batch, heads, queries, keys]`, in any strides.
        logsumexp: `[batch, heads, queries]`, contiguous float32; written: the logarithms of the sums of exponentials.
        is_causal: a query sees the keys up to its own place, counted from the first.
        schedule: None for the chosen one.
    """
    (batch, heads, queries, dim), (kv_heads, keys), value_dim = query.shape, key.shape[1:3], value.shape[3]
    if is_causal:
        keys = min(keys, queries)
    if not out.numel() or not keys:
        out.zero_()  # a query that sees no key
        logsumexp.fill_(float("-inf"))
        return
    group, head_dim = heads // kv_heads, max(dim, value_dim)
    rows = group * queries
    processors = _processors(query.device) if query.is_cuda else 1
    leaf, run, block, warps, stages = schedule or choose_schedule(rows, keys, head_dim, batch * kv_heads, processors)
    pieces = triton.cdiv(keys, run)
    height = rows_of(rows, head_dim)
    unit = 1 if dim % 8 or value_dim % 8 else 8
    parts = stats = logsumexp  # where there is one piece these are not used
    if pieces > 1:
        parts = torch.empty(batch * heads * queries, pieces, value_dim, dtype=torch.float32, device=out.device)
        stats = torch.empty(batch * heads * queries, pieces, 2, dtype=torch.float32, device=out.device)
    _attend_piece[(batch * kv_heads * pieces * triton.cdiv(rows, height),)](
        query,
        key,
        value,
        bias,
        out,
        logsumexp,
        parts,
        stats,
        queries,
        keys,
        kv_heads,
        pieces,
        leaf,
        run,
        scale * math.log2(math.e),
        *_strides(query, unit),
        *_strides(key, unit),
        *_strides(value, unit),
        *_strides(out, unit),
        *((0, 0, 0, 0) if bias is None else bias.expand(batch, heads, queries, key.shape[2]).stride()),
        CAUSAL=is_causal,
        HAS_BIAS=bias is not None,
        LEVELS=tree_levels(rows, head_dim),
        GROUP=group,
        DIM=dim,
        VALUE_DIM=value_dim,
        ROWS=height,
        BLOCK=block,
        WIDTH=max(16, triton.next_power_of_2(dim)),
        VALUE_WIDTH=max(16, triton.next_power_of_2(value_dim)),
        UNIT=unit,
        num_warps=warps,
        num_stages=stages,
        **pdl(out.device),
    )
    if pieces > 1:
        _add_pieces[(batch * heads * queries,)](
            parts,
            stats,
            out,
            logsumexp,
            heads,
            queries,
            pieces,
            *_strides(out, unit),
            LEVELS=(pieces - 1).bit_length(),
            VALUE_DIM=value_dim,
            VALUE_WIDTH=triton.next_power_of_2(value_dim),
            UNIT=unit,
            num_warps=4,
            **pdl(out.device),
        )


def _strides(tensor: torch.Tensor, unit: int) -> list[int]:
    """Of all dimensions but the last. That of a lone sequence may be anything, and means nothing."""
    sizes, strides = tensor.shape[:3], tensor.stride()[:3]
    return [stride // unit if size > 1 else 0 for size, stride in zip(sizes, strides, strict=True)]


_NUMBERS = ["queries", "keys", "kv_heads", "pieces", "leaf_keys", "run_keys"]
_NUMBERS += [f"{name}_{of}" for name in ("q", "k", "v", "out", "bias") for of in ("sequence", "head", "row")]


@triton.jit
def _add(most_a, total_a, result_a, most_b, total_b, result_b):
    """Two sums of exponentials, each relative to its largest score. Nothing added to a sum leaves it as it is."""
    most = tl.maximum(most_a, most_b)
    base = tl.where(most == float("-inf"), 0.0, most)
    fade_a, fade_b = tl.exp2(most_a - base), tl.exp2(most_b - base)
    total = tl.fma(total_a, fade_a, total_b * fade_b)
    return most, total, tl.fma(result_a, fade_a[:, None], result_b * fade_b[:, None])


@triton.jit(do_not_specialize=[*_NUMBERS, "bias", "bias_key"])
def _attend_piece(
    q,
    k,
    v,
    bias,
    out,
    logsumexp,
    parts,
    stats,
    queries,
    keys,
    kv_heads,
    pieces,
    leaf_keys,
    run_keys,
    scale,
    q_sequence,
    q_head,
    q_row,
    k_sequence,
    k_head,
    k_row,
    v_sequence,
    v_head,
    v_row,
    out_sequence,
    out_head,
    out_row,
    bias_sequence,
    bias_head,
    bias_row,
    bias_key,
    CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Softmax runs in base 2: `scale` has log2(e) in it."""
    rows = queries * GROUP
    row_blocks = tl.cdiv(rows, ROWS)
    program = tl.program_id(0) // row_blocks
    piece, program = program % pieces, program // pieces
    kv_head = (program % kv_heads).to(tl.int64)
    sequence = (program // kv_heads).to(tl.int64)
    row = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    head, query = kv_head * GROUP + row % GROUP, (row // GROUP).to(tl.int64)
    lane, value_lane = tl.arange(0, WIDTH), tl.arange(0, VALUE_WIDTH)

    at = (sequence * q_sequence + head * q_head + query * q_row) * UNIT
    if PDL:
        gdc_wait()
    x = tl.load(q + at[:, None] + lane[None, :], mask=inside[:, None] & (lane < DIM)[None, :], other=0.0)
    k += (sequence * k_sequence + kv_head * k_head) * UNIT
    v += (sequence * v_sequence + kv_head * v_head) * UNIT
    if HAS_BIAS:
        bias += sequence * bias_sequence + head * bias_head + query * bias_row

    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)
    # The sums of 1, 2 and 4 leaves that wait for as many more: as a binary number counts, so they are added.
    most_1, most_2, most_4 = largest, largest, largest
    total_1, total_2, total_4 = total, total, total
    result_1, result_2, result_4 = result, result, result
    leaves = 0
    first = piece * run_keys
    last = min(first + run_keys, keys)
    for start in range(first, last, BLOCK):
        index = start + tl.arange(0, BLOCK).to(tl.int64)
        there = index < keys
        in_k = there[None, :] & (lane < DIM)[:, None]
        in_v = there[:, None] & (value_lane < VALUE_DIM)[None, :]
        y = tl.load(k + (index * k_row * UNIT)[None, :] + lane[:, None], mask=in_k, other=0.0)
        z = tl.load(v + (index * v_row * UNIT)[:, None] + value_lane[None, :], mask=in_v, other=0.0)
        score = tl.dot(x, y, input_precision="ieee") * scale
        seen = inside[:, None] & there[None, :]
        if HAS_BIAS:
            addend = tl.load(bias[:, None] + (index * bias_key)[None, :], mask=seen, other=0.0)
            score += addend.to(tl.float32) * 1.4426950408889634
        if CAUSAL:
            seen &= index[None, :] <= query[:, None]
        score = tl.where(seen, score, float("-inf"))
        most = tl.maximum(largest, tl.max(score, axis=1))
        base = tl.where(most == float("-inf"), 0.0, most)
        weight = tl.exp2(score - base[:, None])
        fade = tl.exp2(largest - base)
        total = total * fade + tl.sum(weight, axis=1)
        result = tl.dot(weight.to(z.dtype), z, result * fade[:, None], input_precision="ieee")
        largest = most
        if LEVELS > 0:  # known to the compiler, unlike what follows  # noqa: SIM102
            if (start + BLOCK - first) % leaf_keys == 0 and start + BLOCK < last:
                if leaves & 1 == 0:
                    most_1, total_1, result_1 = largest, total, result
                else:
                    largest, total, result = _add(most_1, total_1, result_1, largest, total, result)
                    if leaves & 2 == 0:
                        most_2, total_2, result_2 = largest, total, result
                    elif LEVELS > 2:
                        most_4, total_4, result_4 = _add(most_2, total_2, result_2, largest, total, result)
                leaves += 1
                largest = tl.full((ROWS,), float("-inf"), tl.float32)
                total = tl.zeros((ROWS,), tl.float32)
                result = tl.zeros((ROWS, VALUE_WIDTH), tl.float32)

    if PDL:
        gdc_launch_dependents()
    if LEVELS > 0:
        if leaves & 1 != 0:
            largest, total, result = _add(most_1, total_1, result_1, largest, total, result)
        if leaves & 2 != 0:
            largest, total, result = _add(most_2, total_2, result_2, largest, total, result)
    if LEVELS > 2:  # noqa: SIM102
        if leaves & 4 != 0:
            largest, total, result = _add(most_4, total_4, result_4, largest, total, result)

    in_out = inside[:, None] & (value_lane < VALUE_DIM)[None, :]
    at = (sequence * kv_heads * GROUP + head) * queries + query
    if pieces > 1:
        at = at * pieces + piece
        tl.store(parts + at[:, None] * VALUE_DIM + value_lane[None, :], result, mask=in_out)
        tl.store(stats + at * 2, largest, mask=inside)
        tl.store(stats + at * 2 + 1, total, mask=inside)
    else:
        tl.store(logsumexp + at, _log(largest, total), mask=inside)
        at = (sequence * out_sequence + head * out_head + query * out_row) * UNIT
        y = _divide(result, total[:, None])
        tl.store(out + at[:, None] + value_lane[None, :], y.to(out.dtype.element_ty), mask=in_out)


@triton.jit
def _log(most, total):
    return (most + tl.log2(total)) * 0.6931471805599453


@triton.jit
def _divide(result, total):
    """Zeros where no key is seen. Adding nothing to a sum makes its -0 a 0, so there is only one of them."""
    return result / tl.where(total == 0.0, 1.0, total) + 0.0


@triton.jit(do_not_specialize=["heads", "queries", "pieces", "out_sequence", "out_head", "out_row"])
def _add_pieces(
    parts,
    stats,
    out,
    logsumexp,
    heads,
    queries,
    pieces,
    out_sequence,
    out_head,
    out_row,
    LEVELS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    UNIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One query of one head. A NaN in a piece makes the total NaN."""
    row = tl.program_id(0).to(tl.int64)
    lane, piece = tl.arange(0, VALUE_WIDTH), tl.arange(0, 1 << LEVELS)
    there = piece < pieces
    at = row * pieces + piece
    if PDL:
        gdc_wait()
    most = tl.load(stats + at * 2, mask=there, other=float("-inf"))
    total = tl.load(stats + at * 2 + 1, mask=there, other=0.0)
    mask = there[:, None] & (lane < VALUE_DIM)[None, :]
    result = tl.load(parts + at[:, None] * VALUE_DIM + lane[None, :], mask=mask, other=0.0)
    for _ in tl.static_range(LEVELS):
        most_a, most_b = tl.split(tl.reshape(most, [most.shape[0] // 2, 2]))
        total_a, total_b = tl.split(tl.reshape(total, [total.shape[0] // 2, 2]))
        result_a, result_b = tl.split(tl.permute(tl.reshape(result, [most_a.shape[0], 2, VALUE_WIDTH]), [0, 2, 1]))
        most, total, result = _add(most_a, total_a, result_a, most_b, total_b, result_b)
    only = tl.arange(0, 1)
    tl.store(logsumexp + row + only, _log(most, total))
    head, query = row // queries % heads, row % queries
    at = (row // queries // heads * out_sequence + head * out_head + query * out_row) * UNIT
    y = _divide(result, total[:, None])
    tl.store(out + at + lane[None, :], y.to(out.dtype.element_ty), mask=(lane < VALUE_DIM)[None, :])
