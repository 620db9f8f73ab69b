"""torch's fused attention, called so that the result for a sequence depends on that sequence alone.

On CUDA, flash attention splits the keys if sequences, heads and blocks of queries together are too few to fill the GPU,
and cuDNN chooses a plan by sizes and strides. Called with one sequence at a time, for cuDNN in one layout, they depend
on that sequence alone; all sequences are one call if the invariance check finds the same bits. The few queries of
decoding take too little time for so many calls: a Triton kernel computes them, which adds the keys up in a tree.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import Any

import torch

from jitnorm.batch_invariant.attention.invariance_check import FusedAttention, one_call_passes
from jitnorm.batch_invariant.triton_support import device_guard, triton_module
from jitnorm.core.torch_library import needs_grad

_MAX_TRITON_QUERIES = 64  # of a sequence: with more, torch's kernels are faster
_ALIGNMENT = 16  # bytes
_aten = torch.ops.aten


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[object, ...]:
    """Compute CUDA's aten::_scaled_dot_product_flash_attention, of `[batch, heads, length, head_dim]`.

    Key and value may have fewer heads, each of which serves a group of the query's.
    """
    lengths = query.shape[2], key.shape[2]
    # A compiled forward pass runs without gradients, but its backward pass needs the log-sum-exp.
    if lengths[0] <= _MAX_TRITON_QUERIES and not (dropout_p or return_debug_mask or needs_grad(query, key, value)):
        out, logsumexp = _triton_attention(query, key, value, None, is_causal, scale)
        random_state = out.new_empty(2, dtype=torch.uint64), out.new_empty((), dtype=torch.uint64)
        return out, logsumexp, None, None, *lengths, *random_state, out.new_empty(0)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Any, ...]:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out, *rest = _aten._flash_attention_forward(
            q, k, v, None, None, *lengths, dropout_p, is_causal, return_debug_mask, scale=scale
        )
        return out.transpose(1, 2), *rest

    name = "flash", is_causal, return_debug_mask, scale
    out, logsumexp, *rest = _attend_by_sequence(name, attend, attend, dropout_p, (query, key, value))
    return out, logsumexp, None, None, *lengths, *rest


def cudnn_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: torch.Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[object, ...]:
    """Compute aten::_scaled_dot_product_cudnn_attention. `attn_bias` is added to the scores."""
    lengths = query.shape[2], key.shape[2]
    has_backward = compute_log_sumexp or needs_grad(query, key, value, attn_bias)
    if lengths[0] <= _MAX_TRITON_QUERIES and not (dropout_p or return_debug_mask or has_backward):
        out, _ = _triton_attention(query, key, value, attn_bias, is_causal, scale)
        seed, offset = (out.new_empty((), dtype=torch.long) for _ in range(2))
        return out, out.new_empty(0, dtype=torch.float32), None, None, *lengths, seed, offset, None

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[Any, ...]:
        out, logsumexp, _, _, _, _, *rest = _aten._cudnn_attention_forward(
            q,
            k,
            v,
            bias,
            None,
            None,
            *lengths,
            compute_log_sumexp,
            dropout_p,
            is_causal,
            return_debug_mask,
            scale=scale,
        )
        return out, logsumexp, *rest

    def attend_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *bias: torch.Tensor) -> tuple[Any, ...]:
        return attend(*(_dense(t.transpose(1, 2)).transpose(1, 2) for t in (q, k, v)), *map(_dense, bias))

    biases = []
    if attn_bias is not None:  # a bias for all sequences becomes one for each
        biases = [attn_bias[(None,) * (4 - attn_bias.dim())].expand(query.shape[0], -1, -1, -1)]
    name = "cudnn", is_causal, return_debug_mask, scale, compute_log_sumexp
    out, logsumexp, *rest = _attend_by_sequence(name, attend, attend_dense, dropout_p, (query, key, value), biases)
    return out, logsumexp, None, None, *lengths, *rest


def has_cudnn_attention_forward() -> bool:
    """Return whether this torch has cuDNN's attention as an operator below the one that the mode overrides."""
    return hasattr(_aten, "_cudnn_attention_forward")


def math_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute aten::_scaled_dot_product_flash_attention_for_cpu, whose own kernel chooses a schedule by the batch.

    It is composed of operators that the mode overrides, in float32 or float64. Dropout is not supported, as in torch's
    own kernel.
    """
    if dropout_p:
        raise RuntimeError(f"attention on the CPU has no dropout in batch-invariant mode, got dropout_p = {dropout_p}")
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
    q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (query, key, value))
    scores = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores += scores.new_full(scores.shape[-2:], float("-inf")).triu(1)
    elif attn_mask is not None:
        scores += attn_mask
    out = torch.empty_like(query)  # in the strides on which compiled code relies
    logsumexp = scores.transpose(1, 2).logsumexp(-1).transpose(1, 2)  # in the strides of torch's own kernel
    return out.copy_(_aten._safe_softmax(scores, -1) @ v), logsumexp


def _triton_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the result, and the log-sum-exp of each query's scores."""
    out = _empty_result(query, value.shape[3])
    logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
    aligned_out = _with_aligned_rows(out)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    with device_guard(query):
        query, key, value = (_with_aligned_rows(t) for t in (query, key, value))
        attend = triton_module("attention.triton_kernels").attend
        attend(query, key, value, bias, is_causal, scale, aligned_out, logsumexp)
    return out if aligned_out is out else out.copy_(aligned_out), logsumexp


def _attend_by_sequence(
    name: Hashable,
    batched: FusedAttention,
    single: FusedAttention,
    dropout_p: float,
    tensors: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] = (),
) -> list[Any]:
    """Return what one call of `batched` returns, or calls of `single` with each sequence.

    One call is made if the invariance check passes. With dropout it is always made: the mode promises nothing for
    random results, and a backward pass has one state of the random numbers. Of several calls, the first two results
    are joined, and the others are those of the last call.
    """
    batch, operands = tensors[0].shape[0], (*tensors, *biases)
    is_one_call = dropout_p or batch == 0 or (batch == 1 and single is batched)
    if is_one_call or one_call_passes(name, batched, single, tensors, biases):
        return list(batched(*operands))
    results = [single(*sequence) for sequence in zip(*(tensor.split(1) for tensor in operands), strict=True)]
    outs, logsumexps = [result[0] for result in results], [result[1] for result in results]
    if len(results) == 1 and _memory_order(outs[0][0]) == _memory_order(tensors[0][0]):
        return list(results[0])
    out = _empty_result(tensors[0], outs[0].shape[3])
    order = _memory_order(out)  # so that whole blocks of memory are copied
    torch.cat([part.permute(order) for part in outs], order.index(0), out=out.permute(order))
    return [out, None if logsumexps[0] is None else torch.cat(logsumexps), *results[-1][2:]]


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor, with standard strides for dimensions of size 1 too: cuDNN's plan depends on them."""
    strides = [*accumulate(tensor.shape[:0:-1], operator.mul, initial=1)][::-1]
    return tensor.contiguous().as_strided(tensor.shape, strides)


def _memory_order(tensor: torch.Tensor) -> list[int]:
    """Return the dimensions from the largest stride to the smallest."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _with_aligned_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a copy, whose rows are contiguous and begin at multiples of 16 bytes.

    The rows of a copy do so only if their length is a multiple of 16 bytes.
    """
    multiple = _ALIGNMENT // tensor.element_size()
    strides = [stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    is_aligned = tensor.data_ptr() % _ALIGNMENT == 0 and not any(stride % multiple for stride in strides)
    if tensor.stride(3) == 1 and is_aligned:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _empty_result(query: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return an empty result in ATen's order of dimensions, on which compiled code relies."""
    if head_dim == query.shape[3]:
        return torch.empty_like(query)
    order = _memory_order(query)
    return torch.empty_permuted((*query.shape[:3], head_dim), order, dtype=query.dtype, device=query.device)
