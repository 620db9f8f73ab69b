"""FlashInfer's rotary embedding, with its signature.

The signature is that of FlashInfer 0.6.14. FlashInfer itself is not imported.
"""

from __future__ import annotations

import torch

from jitnorm.core import checks
from jitnorm.qknorm_rope_store import rope

__all__ = ["apply_rope_with_cos_sin_cache_inplace"]


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> None:
    """Rotate the heads of query and key in place.

    The signature is that of `flashinfer/rope.py` in FlashInfer 0.6.14. As there, the rotation is computed in float32
    and rounded once.

    Args:
        positions: `[tokens]`, int32 or int64.
        query: `[tokens, q_heads * head_size]`, float16 or bfloat16; here float32 too. Written. The last stride is 1.
        key: `[tokens, kv_heads * head_size]`, of query's dtype; written.
        head_size: The elements of a head.
        cos_sin_cache: `[max_position, rotary_dim]`, float32. rotary_dim may be less than head_size.
        is_neox: Which elements form a pair, as in `jitnorm.rope`.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, stride, device, alignment or overlap is not accepted, or cos_sin_cache is not float32.
        RuntimeError: head_size or rotary_dim is not supported, or a tensor needs a gradient.
    """
    checks.tensor("cos_sin_cache", cos_sin_cache)
    if cos_sin_cache.dtype != torch.float32:
        raise ValueError(f"cos_sin_cache must be float32, got {str(cos_sin_cache.dtype).removeprefix('torch.')}")
    q, k = _as_heads("query", query, head_size), _as_heads("key", key, head_size)
    rope(q, k, cos_sin_cache, positions, is_neox=is_neox)


def _as_heads(name: str, value: torch.Tensor, head_size: int) -> torch.Tensor:
    """Return `value`, `[tokens, heads * head_size]`, as `[tokens, heads, head_size]`."""
    checks.tensor(name, value)
    if checks.integer("head_size", head_size) <= 0 or value.dim() != 2 or value.shape[1] % head_size:
        raise ValueError(f"{name} must have shape [tokens, heads * {head_size}], got {list(value.shape)}")
    if value.stride(1) != 1:
        raise ValueError(f"{name} must have a last stride of 1, got strides {list(value.stride())}")
    return value.view(value.shape[0], value.shape[1] // head_size, head_size)
