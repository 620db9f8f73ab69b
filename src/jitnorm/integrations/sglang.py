"""SGLang's operators between the QKV projection and attention, with its signatures.

The signatures are those of SGLang 0.5.16. SGLang itself is not imported. `fused_inplace_qknorm` and
`can_use_fused_inplace_qknorm` are jitnorm's own: they take what those in `sglang/jit_kernel/norm.py` take.
"""

from __future__ import annotations

import torch

from jitnorm.core import checks
from jitnorm.qknorm import can_use_fused_inplace_qknorm, fused_inplace_qknorm
from jitnorm.qknorm_rope_store import rope_and_store

__all__ = ["apply_rope_inplace_with_kvcache", "can_use_fused_inplace_qknorm", "fused_inplace_qknorm"]


def apply_rope_inplace_with_kvcache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    out_loc: torch.Tensor,
    *,
    is_neox: bool,
    rope_dim: int = 0,
) -> None:
    """Rotate the heads of q and k in place, and store k and v into the slots of a cache.

    The signature is that of `sglang/jit_kernel/rope.py` in SGLang 0.5.16. As there, the rotation is computed in float32
    and rounded once, and the cache holds the same k.

    Args:
        q: `[tokens, q_heads, head_dim]`, float16 or bfloat16; here float32 too. Written. The last stride is 1.
        k: `[tokens, kv_heads, head_dim]`, of q's dtype; written.
        v: `[tokens, kv_heads, head_dim]` or `[tokens, kv_heads * head_dim]`, of q's dtype.
        k_cache: `[slots, kv_heads * head_dim]`, written; of q's dtype. Here `[slots, kv_heads, head_dim]` too.
        v_cache: Likewise.
        cos_sin_cache: `[max_position, rope_dim]`, float32; here of q's dtype too.
        positions: `[tokens]`, int32 or int64.
        out_loc: `[tokens]`, of positions' dtype; here either of the two. The slot of each token. Here tokens with
            slot -1 are not stored, and there may be fewer slots than tokens.
        is_neox: Which elements form a pair, as in `jitnorm.qk_norm_rope_store`.
        rope_dim: How many elements of a head are rotated, or 0: the last dimension of cos_sin_cache. In SGLang that is
            head_dim; here it may be less.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, stride, device, alignment or overlap is not accepted, or rope_dim is not the last dimension
            of cos_sin_cache.
        RuntimeError: head_dim or rope_dim is not supported, or a tensor needs a gradient.
    """
    for name, value in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        checks.tensor(name, value)
        checks.dtype(name, value, (k.dtype,))
    checks.tensor("cos_sin_cache", cos_sin_cache)
    if cos_sin_cache.dim() and rope_dim not in (0, cos_sin_cache.shape[-1]):
        raise ValueError(
            f"rope_dim must be 0 or the last dimension of cos_sin_cache, {cos_sin_cache.shape[-1]}, got {rope_dim}"
        )
    heads = k.shape[1:]
    rope_and_store(
        *(q, k, _as_heads("v", v, heads), cos_sin_cache, positions),
        *(_as_heads("k_cache", k_cache, heads), _as_heads("v_cache", v_cache, heads), out_loc),
        is_neox=is_neox,
    )


def _as_heads(name: str, value: torch.Tensor, heads: torch.Size) -> torch.Tensor:
    """Return `value` as `[rows, heads, head_dim]`; other shapes are left to the operator, which refuses them."""
    if value.dim() != 2:
        return value
    if value.shape[1] != heads.numel() or value.stride(1) != 1:
        layout = f"shape {list(value.shape)} and strides {list(value.stride())}"
        raise ValueError(f"{name} must have rows of {heads.numel()} elements with a stride of 1, got {layout}")
    return value.view(value.shape[0], *heads)
