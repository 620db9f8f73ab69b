"""Attention of few queries in Triton, as in decoding: the keys are split, by how many there are and nothing else.

A program goes through a piece of one sequence's keys, for all queries of the heads that share them. A second kernel
adds up the pieces, in their order. The number of sequences shows in the number of programs only: Triton compiles
another kernel where an argument is 1 or a multiple of 16, so no number is specialised, and strides come in units of 16
bytes, which tells the compiler as much about addresses.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from jitnorm.batch_invariant.triton_pdl import pdl

_MOST = 32  # pieces of a sequence


class Schedule(NamedTuple):
    """What a program does; benchmarks/tune_attention.py tries others."""

    piece: int  # its keys
    block: int  # of them at a time
    warps: int
    stages: int


def choose_schedule(rows: int, keys: int, head_dim: int) -> Schedule:
    """By the queries of a group of heads, the keys, and the larger head_dim: never by the number of sequences."""
    # Small pieces fill the GPU with a single sequence. What a piece writes is as long as it has rows, so that many
    # rows want long pieces.
    piece = triton.next_power_of_2(max(128, triton.cdiv(keys, _MOST), 8 * rows))
    return Schedule(piece, 64 if head_dim <= 128 else 32, 4, 3)


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
    group = heads // kv_heads
    rows = group * queries
    piece, block, warps, stages = schedule or choose_schedule(rows, keys, max(dim, value_dim))
    pieces = triton.cdiv(keys, piece)
    height = min(64 if max(dim, value_dim) <= 128 else 32, max(16, triton.next_power_of_2(rows)))
    unit = 1 if dim % 8 or value_dim % 8 else 8
    parts = stats = None
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
        piece,
        scale * math.log2(math.e),
        *_strides(query, unit),
        *_strides(key, unit),
        *_strides(value, unit),
        *_strides(out, unit),
        *((0, 0, 0, 0) if bias is None else bias.expand(batch, heads, queries, key.shape[2]).stride()),
        CAUSAL=is_causal,
        HAS_BIAS=bias is not None,
        SPLIT=pieces > 1,
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
        _combine_pieces[(batch * heads * queries,)](
            parts,
            stats,
            out,
            logsumexp,
            heads,
            queries,
            pieces,
            *_strides(out, unit),
            VALUE_DIM=value_dim,
            VALUE_WIDTH=triton.next_power_of_2(value_dim),
            MOST=max(_MOST, triton.next_power_of_2(pieces)),
            AT_ONCE=16,
            UNIT=unit,
            num_warps=4,
            **pdl(out.device),
        )


def _strides(tensor: torch.Tensor, unit: int) -> list[int]:
    """Of all dimensions but the last. That of a lone sequence may be anything, and means nothing."""
    sizes, strides = tensor.shape[:3], tensor.stride()[:3]
    return [stride // unit if size > 1 else 0 for size, stride in zip(sizes, strides, strict=True)]


_NUMBERS = ["queries", "keys", "kv_heads", "pieces", "piece_keys"]
_NUMBERS += [f"{name}_{of}" for name in ("q", "k", "v", "out", "bias") for of in ("sequence", "head", "row")]


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
    piece_keys,
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
    SPLIT: tl.constexpr,
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
    first = piece * piece_keys
    for start in range(first, min(first + piece_keys, keys), BLOCK):
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

    if PDL:
        gdc_launch_dependents()
    in_out = inside[:, None] & (value_lane < VALUE_DIM)[None, :]
    at = (sequence * kv_heads * GROUP + head) * queries + query
    if SPLIT:
        at = at * pieces + piece
        tl.store(parts + at[:, None] * VALUE_DIM + value_lane[None, :], result, mask=in_out)
        tl.store(stats + at * 2, largest, mask=inside)
        tl.store(stats + at * 2 + 1, total, mask=inside)
    else:
        tl.store(logsumexp + at, (largest + tl.log2(total)) * 0.6931471805599453, mask=inside)
        result /= tl.where(total == 0.0, 1.0, total)[:, None]
        at = (sequence * out_sequence + head * out_head + query * out_row) * UNIT
        tl.store(out + at[:, None] + value_lane[None, :], result.to(out.dtype.element_ty), mask=in_out)


@triton.jit(do_not_specialize=["heads", "queries", "pieces", "out_sequence", "out_head", "out_row"])
def _combine_pieces(
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
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    MOST: tl.constexpr,
    AT_ONCE: tl.constexpr,
    UNIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """One query of one head. A NaN in a piece makes the total NaN."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, VALUE_WIDTH)
    parts += row * pieces * VALUE_DIM
    stats += row * pieces * 2
    every = tl.arange(0, MOST)
    if PDL:
        gdc_wait()
    largest = tl.load(stats + every * 2, mask=every < pieces, other=float("-inf"))
    total = tl.load(stats + every * 2 + 1, mask=every < pieces, other=0.0)
    base = tl.max(largest, axis=0)
    base = tl.where(base == float("-inf"), 0.0, base)
    total = tl.sum(total * tl.exp2(largest - base), axis=0)
    tl.store(logsumexp + row, (base + tl.log2(total)) * 0.6931471805599453)
    result = tl.zeros((AT_ONCE, VALUE_WIDTH), tl.float32)
    for first in range(0, pieces, AT_ONCE):
        piece = first + tl.arange(0, AT_ONCE)
        weight = tl.exp2(tl.load(stats + piece * 2, mask=piece < pieces, other=float("-inf")) - base)
        mask = (piece < pieces)[:, None] & (lane < VALUE_DIM)[None, :]
        result += tl.load(parts + piece[:, None] * VALUE_DIM + lane[None, :], mask=mask, other=0.0) * weight[:, None]
    y = tl.sum(result, axis=0) / tl.where(total == 0.0, 1.0, total)
    head, query = row // queries % heads, row % queries
    at = (row // queries // heads * out_sequence + head * out_head + query * out_row) * UNIT
    tl.store(out + at + lane, y.to(out.dtype.element_ty), mask=lane < VALUE_DIM)
