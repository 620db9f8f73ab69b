"""torch's fused attention, so called that what is computed for a sequence depends on that sequence alone.

On CUDA, flash attention splits the keys where sequences, heads and blocks of queries together are too few to fill the
GPU, and cuDNN chooses a plan by sizes and strides. Called with one sequence at a time, for cuDNN in one layout, they do
what this sequence asks for; all are one call where that is found to give the same bits. The few queries of decoding
have no work for that many calls: they go to a kernel of this package, which adds the keys up in a tree of its own.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from itertools import accumulate
from typing import Any

import torch

from jitnorm.batch_invariant.attention_proof import Call, one_call_keeps_the_bits
from jitnorm.batch_invariant.triton_needed import on_device_of, triton_module
from jitnorm.core.torch_library import needs_grad

_FEW = 64  # queries of a sequence, up to which all sequences share one launch
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
    """aten::_scaled_dot_product_flash_attention of CUDA, of `[batch, heads, length, head_dim]`. Key and value may have
    fewer heads, each for a group of the query's."""
    lengths = query.shape[2], key.shape[2]
    if lengths[0] <= _FEW and not (dropout_p or return_debug_mask or needs_grad(query, key, value)):
        # A compiled forward pass does not know of the gradients that are wanted of it, and its backward pass needs the
        # logarithms of sums.
        out, logsumexp = _of_few_queries(query, key, value, None, is_causal, scale)
        random_state = out.new_empty(2, dtype=torch.uint64), out.new_empty((), dtype=torch.uint64)
        return out, logsumexp, None, None, *lengths, *random_state, out.new_empty(0)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Any, ...]:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out, *rest = _aten._flash_attention_forward(
            q, k, v, None, None, *lengths, dropout_p, is_causal, return_debug_mask, scale=scale
        )
        return out.transpose(1, 2), *rest

    name = "flash", is_causal, return_debug_mask, scale
    out, logsumexp, *rest = _of_sequences(name, call, call, dropout_p, (query, key, value))
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
    """aten::_scaled_dot_product_cudnn_attention. `attn_bias` is added to the scores."""
    lengths = query.shape[2], key.shape[2]
    wants_grad = compute_log_sumexp or needs_grad(query, key, value, attn_bias)
    if lengths[0] <= _FEW and not (dropout_p or return_debug_mask or wants_grad):
        out, _ = _of_few_queries(query, key, value, attn_bias, is_causal, scale)
        seed, offset = (out.new_empty((), dtype=torch.long) for _ in range(2))
        return out, out.new_empty(0, dtype=torch.float32), None, None, *lengths, seed, offset, None

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[Any, ...]:
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

    def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *bias: torch.Tensor) -> tuple[Any, ...]:
        return call(*(_dense(t.transpose(1, 2)).transpose(1, 2) for t in (q, k, v)), *map(_dense, bias))

    biases = []
    if attn_bias is not None:  # one for all sequences becomes one for each
        biases = [attn_bias[(None,) * (4 - attn_bias.dim())].expand(query.shape[0], -1, -1, -1)]
    name = "cudnn", is_causal, return_debug_mask, scale, compute_log_sumexp
    out, logsumexp, *rest = _of_sequences(name, call, alone, dropout_p, (query, key, value), biases)
    return out, logsumexp, None, None, *lengths, *rest


def can_split_cudnn_attention() -> bool:
    """Whether this torch has cuDNN's attention below the operator that the mode overrides."""
    return hasattr(_aten, "_cudnn_attention_forward")


def _of_few_queries(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result, and the logarithm of the sum of each row's exponentials."""
    out = _empty_like(query, value.shape[3])
    logsumexp = query.new_empty(query.shape[:3], dtype=torch.float32)
    written = _aligned(out)
    scale = query.shape[3] ** -0.5 if scale is None else scale
    with on_device_of(query):
        query, key, value = (_aligned(t) for t in (query, key, value))
        triton_module("triton_attention").attend(query, key, value, bias, is_causal, scale, written, logsumexp)
    return out if written is out else out.copy_(written), logsumexp


def _of_sequences(
    name: Hashable,
    call: Call,
    alone: Call,
    dropout_p: float,
    tensors: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor] = (),
) -> list[Any]:
    """`alone` of each sequence: its first two results for all of them, the others as the last call returns them. Or one
    `call` for all, where that gives the same.

    With dropout it is one call: what is random is not promised to be the same, and a backward pass has one state of the
    random numbers.
    """
    batch, every = tensors[0].shape[0], (*tensors, *biases)
    one_call = dropout_p or batch == 0 or (batch == 1 and alone is call)
    if one_call or one_call_keeps_the_bits(name, call, alone, tensors, biases):
        return list(call(*every))
    results = [alone(*sequence) for sequence in zip(*(tensor.split(1) for tensor in every), strict=True)]
    outs, logsumexps = [result[0] for result in results], [result[1] for result in results]
    if len(results) == 1 and _order(outs[0][0]) == _order(tensors[0][0]):
        return list(results[0])
    out = _empty_like(tensors[0], outs[0].shape[3])
    order = _order(out)  # so that whole blocks are copied
    torch.cat([part.permute(order) for part in outs], order.index(0), out=out.permute(order))
    return [out, None if logsumexps[0] is None else torch.cat(logsumexps), *results[-1][2:]]


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous, with the strides of that where a size is 1 too: cuDNN chooses its plan by all of them."""
    strides = [*accumulate(tensor.shape[:0:-1], operator.mul, initial=1)][::-1]
    return tensor.contiguous().as_strided(tensor.shape, strides)


def _order(tensor: torch.Tensor) -> list[int]:
    """The dimensions as memory has them."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements, whose rows are contiguous and begin at multiples of 16 bytes, if their length is one."""
    step = 16 // tensor.element_size()
    strides = [stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    if tensor.stride(3) == 1 and tensor.data_ptr() % 16 == 0 and not any(stride % step for stride in strides):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _empty_like(query: torch.Tensor, head_dim: int) -> torch.Tensor:
    """A result, in the order of dimensions in which ATen has it, which compiled code counts on."""
    if head_dim == query.shape[3]:
        return torch.empty_like(query)
    return torch.empty_permuted((*query.shape[:3], head_dim), _order(query), dtype=query.dtype, device=query.device)


def composed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """aten::_scaled_dot_product_flash_attention_for_cpu, whose own kernel chooses a schedule by the batch; made of the
    operators that the mode overrides, in float32 or float64. Like that kernel, it knows no dropout."""
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
    out = torch.empty_like(query)  # in the strides that compiled code counts on
    logsumexp = scores.transpose(1, 2).logsumexp(-1).transpose(1, 2)  # as that kernel's are
    return out.copy_(_aten._safe_softmax(scores, -1) @ v), logsumexp
