"""Torch's fused attention, so called that what is computed for a sequence depends on that sequence alone.

On CUDA, flash attention splits the keys where sequences, heads and blocks of queries together are too few to fill the
GPU. Called with one sequence at a time, it splits them by what this sequence is. The few queries of decoding have no
work for that many calls: they go to the memory-efficient kernel, which never splits keys. cuDNN's kernel is switched
off (installed.py), as nothing is known of its choices.
"""

from __future__ import annotations

import torch

from jitnorm.torch_library import needs_grad

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
    out = torch.empty_like(query)
    if lengths[0] <= _FEW and not (dropout_p or return_debug_mask or needs_grad(query, key, value)):
        out.copy_(_of_few_queries(query, key, value, is_causal, scale))
        none = out.new_empty(0, dtype=torch.float32)  # what a backward pass would need
        return out, none, None, None, *lengths, none, none, none
    results = [
        _aten._flash_attention_forward(
            q, k, v, None, None, *lengths, dropout_p, is_causal, return_debug_mask, scale=scale
        )
        for q, k, v in zip(*(t.transpose(1, 2).split(1) for t in (query, key, value)), strict=True)
    ]
    if len(results) == 1:
        out, logsumexp = results[0][0].transpose(1, 2), results[0][1]
    else:
        torch.cat([result[0] for result in results], out=out.transpose(1, 2))
        logsumexp = torch.cat([result[1] for result in results])
    return out, logsumexp, None, None, *lengths, *results[-1][2:]


def _of_few_queries(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float | None
) -> torch.Tensor:
    (batch, heads, length, head_dim), kv_heads = query.shape, key.shape[1]
    if heads == kv_heads or length == 1:  # a group's queries stand beside each other: one alone sees all keys anyhow
        rows = query.reshape(batch, kv_heads, -1, head_dim)
        causal = is_causal and length > 1
        return _efficient(rows, key, value, causal, scale).reshape(query.shape)
    key, value = (t.repeat_interleave(heads // kv_heads, 1) for t in (key, value))
    return _efficient(query, key, value, is_causal, scale)


def _efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float | None
) -> torch.Tensor:
    results = _aten._scaled_dot_product_efficient_attention(query, key, value, None, False, 0.0, is_causal, scale=scale)
    return results[0]  # type: ignore[no-any-return]


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
    operators that the mode overrides."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
    out = _aten._scaled_dot_product_attention_math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]
    logsumexp = query.new_empty(0, dtype=torch.float32)
    if needs_grad(query, key, value):
        scores = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            scores += scores.new_full(scores.shape[-2:], float("-inf")).triu(1)
        elif attn_mask is not None:
            scores += attn_mask
        logsumexp = scores.transpose(1, 2).logsumexp(-1).transpose(1, 2)
    return torch.empty_like(query).copy_(out), logsumexp  # in the strides that compiled code counts on
