"""Triton attention for few queries, as in decoding, with an order of additions that follows from the number of keys.

The keys are the leaves of a binary tree: the keys of a leaf are added from the first to the last, then the sums of
neighbouring leaves, then their sums, and so on. A program computes the sum of a subtree, its split of the keys, for all
queries of the heads that share the keys; a second kernel adds up the splits. So how many programs there are, and how
many leaves each has, may follow from what fills the GPU, the number of sequences included.

Triton compiles another kernel for an argument that is 1 or a multiple of 16, so no number is specialised, and strides
are passed in units of 16 bytes, which tells the compiler as much about addresses. Both kernels add two sums with the
same instructions, because `_add_sums` names every multiplication and addition that the compiler could fuse.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from jitnorm.batch_invariant.attention.schedule import Schedule, block_rows, choose_schedule, tree_levels
from jitnorm.batch_invariant.triton_support import pdl_options, sm_count


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
    """Write `softmax(query @ key.mT * scale + bias) @ value`, of `[batch, heads, length, head_dim]`, into `out`.

    Args:
        query, key, value, out: the last stride is 1; if head_dim is a multiple of 8, the other strides are too.
        bias: broadcast to `[batch, heads, queries, keys]`, in any strides.
        is_causal: a query sees the keys up to its own position, counted from the first key.
        logsumexp: `[batch, heads, queries]`, contiguous float32; written: the log-sum-exp of each query's scores.
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
    num_sms = sm_count(query.device) if query.is_cuda else 1
    schedule = schedule or choose_schedule(rows, keys, head_dim, batch * kv_heads, num_sms)
    splits = triton.cdiv(keys, schedule.split_keys)
    block_m = block_rows(rows, head_dim)
    stride_unit = 1 if dim % 8 or value_dim % 8 else 8
    partial_out = partial_stats = logsumexp  # not used if there is one split
    if splits > 1:
        partial_out = torch.empty(batch * heads * queries, splits, value_dim, dtype=torch.float32, device=out.device)
        partial_stats = torch.empty(batch * heads * queries, splits, 2, dtype=torch.float32, device=out.device)
    out_strides = _strides(out, stride_unit)
    _split_kernel[(batch * kv_heads * splits * triton.cdiv(rows, block_m),)](
        query,
        key,
        value,
        bias,
        out,
        logsumexp,
        partial_out,
        partial_stats,
        queries,
        keys,
        kv_heads,
        splits,
        schedule.leaf_keys,
        schedule.split_keys,
        scale * math.log2(math.e),
        *_strides(query, stride_unit),
        *_strides(key, stride_unit),
        *_strides(value, stride_unit),
        *out_strides,
        *((0, 0, 0, 0) if bias is None else bias.expand(batch, heads, queries, key.shape[2]).stride()),
        CAUSAL=is_causal,
        HAS_BIAS=bias is not None,
        TREE_LEVELS=tree_levels(rows, head_dim),
        GROUP=group,
        DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_M=block_m,
        BLOCK_KEYS=schedule.block_keys,
        BLOCK_DIM=max(16, triton.next_power_of_2(dim)),
        BLOCK_VALUE_DIM=max(16, triton.next_power_of_2(value_dim)),
        STRIDE_UNIT=stride_unit,
        num_warps=schedule.num_warps,
        num_stages=schedule.num_stages,
        **pdl_options(out.device),
    )
    if splits > 1:
        _add_splits_kernel[(batch * heads * queries,)](
            partial_out,
            partial_stats,
            out,
            logsumexp,
            heads,
            queries,
            splits,
            *out_strides,
            TREE_LEVELS=(splits - 1).bit_length(),
            VALUE_DIM=value_dim,
            BLOCK_VALUE_DIM=triton.next_power_of_2(value_dim),
            STRIDE_UNIT=stride_unit,
            num_warps=4,
            **pdl_options(out.device),
        )


def _strides(tensor: torch.Tensor, unit: int) -> list[int]:
    """Return the strides of all dimensions but the last, in units; 0 for size 1, whose stride may be any number."""
    sizes, strides = tensor.shape[:3], tensor.stride()[:3]
    return [stride // unit if size > 1 else 0 for size, stride in zip(sizes, strides, strict=True)]


_NUMBERS = ["queries", "keys", "kv_heads", "splits", "leaf_keys", "split_keys"]
_NUMBERS += [f"{name}_{dim}_stride" for name in ("q", "k", "v", "out", "bias") for dim in ("batch", "head", "row")]


@triton.jit
def _add_sums(max_a, total_a, result_a, max_b, total_b, result_b):
    """Add two sums of exponentials, each relative to its maximum. Adding nothing leaves a sum as it is."""
    new_max = tl.maximum(max_a, max_b)
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale_a, rescale_b = tl.exp2(max_a - base), tl.exp2(max_b - base)
    total = tl.fma(total_a, rescale_a, total_b * rescale_b)
    return new_max, total, tl.fma(result_a, rescale_a[:, None], result_b * rescale_b[:, None])


@triton.jit(do_not_specialize=[*_NUMBERS, "bias", "bias_key_stride"])
def _split_kernel(
    q,
    k,
    v,
    bias,
    out,
    logsumexp,
    partial_out,
    partial_stats,
    queries,
    keys,
    kv_heads,
    splits,
    leaf_keys,
    split_keys,
    scale,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    k_batch_stride,
    k_head_stride,
    k_row_stride,
    v_batch_stride,
    v_head_stride,
    v_row_stride,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    bias_batch_stride,
    bias_head_stride,
    bias_row_stride,
    bias_key_stride,
    CAUSAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TREE_LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Compute the sums over one split of the keys; if it is the only one, the result. Softmax is in base 2, because
    `scale` contains log2(e)."""
    rows = queries * GROUP
    row_blocks = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0) // row_blocks
    split, program = program % splits, program // splits
    kv_head = (program % kv_heads).to(tl.int64)
    batch = (program // kv_heads).to(tl.int64)
    row = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < rows
    head, query = kv_head * GROUP + row % GROUP, (row // GROUP).to(tl.int64)
    lane, value_lane = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE_DIM)

    q_offset = (batch * q_batch_stride + head * q_head_stride + query * q_row_stride) * STRIDE_UNIT
    if PDL:
        gdc_wait()
    q_block = tl.load(q + q_offset[:, None] + lane[None, :], mask=row_mask[:, None] & (lane < DIM)[None, :], other=0.0)
    k += (batch * k_batch_stride + kv_head * k_head_stride) * STRIDE_UNIT
    v += (batch * v_batch_stride + kv_head * v_head_stride) * STRIDE_UNIT
    if HAS_BIAS:
        bias += batch * bias_batch_stride + head * bias_head_stride + query * bias_row_stride

    leaf_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    result = tl.zeros((BLOCK_M, BLOCK_VALUE_DIM), tl.float32)
    # Sums of 1, 2 and 4 leaves that wait for the sum of as many more. The bits of `leaves` say which of them wait.
    max_1, max_2, max_4 = leaf_max, leaf_max, leaf_max
    total_1, total_2, total_4 = total, total, total
    result_1, result_2, result_4 = result, result, result
    leaves = 0
    first = split * split_keys
    last = min(first + split_keys, keys)
    for start in range(first, last, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS).to(tl.int64)
        key_mask = key < keys
        k_mask = key_mask[None, :] & (lane < DIM)[:, None]
        v_mask = key_mask[:, None] & (value_lane < VALUE_DIM)[None, :]
        k_block = tl.load(k + (key * k_row_stride * STRIDE_UNIT)[None, :] + lane[:, None], mask=k_mask, other=0.0)
        v_block = tl.load(v + (key * v_row_stride * STRIDE_UNIT)[:, None] + value_lane[None, :], mask=v_mask, other=0.0)
        score = tl.dot(q_block, k_block, input_precision="ieee") * scale
        visible = row_mask[:, None] & key_mask[None, :]
        if HAS_BIAS:
            addend = tl.load(bias[:, None] + (key * bias_key_stride)[None, :], mask=visible, other=0.0)
            score += addend.to(tl.float32) * 1.4426950408889634
        if CAUSAL:
            visible &= key[None, :] <= query[:, None]
        score = tl.where(visible, score, float("-inf"))
        new_max = tl.maximum(leaf_max, tl.max(score, axis=1))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.exp2(score - base[:, None])
        rescale = tl.exp2(leaf_max - base)
        total = total * rescale + tl.sum(weight, axis=1)
        result = tl.dot(weight.to(v_block.dtype), v_block, result * rescale[:, None], input_precision="ieee")
        leaf_max = new_max
        if TREE_LEVELS > 0:  # a condition of its own, because the compiler knows this one  # noqa: SIM102
            if (start + BLOCK_KEYS - first) % leaf_keys == 0 and start + BLOCK_KEYS < last:
                if leaves & 1 == 0:
                    max_1, total_1, result_1 = leaf_max, total, result
                else:
                    leaf_max, total, result = _add_sums(max_1, total_1, result_1, leaf_max, total, result)
                    if leaves & 2 == 0:
                        max_2, total_2, result_2 = leaf_max, total, result
                    elif TREE_LEVELS > 2:
                        max_4, total_4, result_4 = _add_sums(max_2, total_2, result_2, leaf_max, total, result)
                leaves += 1
                leaf_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
                total = tl.zeros((BLOCK_M,), tl.float32)
                result = tl.zeros((BLOCK_M, BLOCK_VALUE_DIM), tl.float32)

    if PDL:
        gdc_launch_dependents()
    if TREE_LEVELS > 0:
        if leaves & 1 != 0:
            leaf_max, total, result = _add_sums(max_1, total_1, result_1, leaf_max, total, result)
        if leaves & 2 != 0:
            leaf_max, total, result = _add_sums(max_2, total_2, result_2, leaf_max, total, result)
    if TREE_LEVELS > 2:  # noqa: SIM102
        if leaves & 4 != 0:
            leaf_max, total, result = _add_sums(max_4, total_4, result_4, leaf_max, total, result)

    out_mask = row_mask[:, None] & (value_lane < VALUE_DIM)[None, :]
    index = (batch * kv_heads * GROUP + head) * queries + query
    if splits > 1:
        index = index * splits + split
        tl.store(partial_out + index[:, None] * VALUE_DIM + value_lane[None, :], result, mask=out_mask)
        tl.store(partial_stats + index * 2, leaf_max, mask=row_mask)
        tl.store(partial_stats + index * 2 + 1, total, mask=row_mask)
    else:
        tl.store(logsumexp + index, _logsumexp(leaf_max, total), mask=row_mask)
        offset = (batch * out_batch_stride + head * out_head_stride + query * out_row_stride) * STRIDE_UNIT
        quotient = _divide(result, total[:, None])
        tl.store(out + offset[:, None] + value_lane[None, :], quotient.to(out.dtype.element_ty), mask=out_mask)


@triton.jit
def _logsumexp(max_score, total):
    """Return the natural logarithm of a sum of exponentials in base 2."""
    return (max_score + tl.log2(total)) * 0.6931471805599453


@triton.jit
def _divide(result, total):
    """Return the quotient, and zeros if no key is visible. Adding 0 turns -0 into 0, as adding an empty split does."""
    return result / tl.where(total == 0.0, 1.0, total) + 0.0


@triton.jit(do_not_specialize=["heads", "queries", "splits", "out_batch_stride", "out_head_stride", "out_row_stride"])
def _add_splits_kernel(
    partial_out,
    partial_stats,
    out,
    logsumexp,
    heads,
    queries,
    splits,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    TREE_LEVELS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_VALUE_DIM: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add up the splits for one query of one head. A NaN in a split makes the total NaN."""
    row = tl.program_id(0).to(tl.int64)
    lane, split = tl.arange(0, BLOCK_VALUE_DIM), tl.arange(0, 1 << TREE_LEVELS)
    split_mask = split < splits
    index = row * splits + split
    if PDL:
        gdc_wait()
    split_max = tl.load(partial_stats + index * 2, mask=split_mask, other=float("-inf"))
    total = tl.load(partial_stats + index * 2 + 1, mask=split_mask, other=0.0)
    mask = split_mask[:, None] & (lane < VALUE_DIM)[None, :]
    result = tl.load(partial_out + index[:, None] * VALUE_DIM + lane[None, :], mask=mask, other=0.0)
    for _ in tl.static_range(TREE_LEVELS):
        max_a, max_b = tl.split(tl.reshape(split_max, [split_max.shape[0] // 2, 2]))
        total_a, total_b = tl.split(tl.reshape(total, [total.shape[0] // 2, 2]))
        pairs = tl.permute(tl.reshape(result, [max_a.shape[0], 2, BLOCK_VALUE_DIM]), [0, 2, 1])
        result_a, result_b = tl.split(pairs)
        split_max, total, result = _add_sums(max_a, total_a, result_a, max_b, total_b, result_b)
    only = tl.arange(0, 1)
    tl.store(logsumexp + row + only, _logsumexp(split_max, total))
    head, query = row // queries % heads, row % queries
    batch = row // queries // heads
    offset = (batch * out_batch_stride + head * out_head_stride + query * out_row_stride) * STRIDE_UNIT
    quotient = _divide(result, total[:, None])
    tl.store(out + offset + lane[None, :], quotient.to(out.dtype.element_ty), mask=(lane < VALUE_DIM)[None, :])
