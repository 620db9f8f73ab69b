"""vLLM's operators between the QKV projection and attention, with its signatures.

The signatures are those of vLLM 0.26.0. vLLM itself is not imported.
"""

from __future__ import annotations

import torch

from jitnorm.core import checks
from jitnorm.qknorm_rope_store import E4M3, qk_norm_rope_store
from jitnorm.store_cache import store_cache

__all__ = ["do_qk_norm_rope_kvcache_update", "fused_qk_norm_rope", "reshape_and_cache_flash"]

_SAME_DTYPES = ("auto", "float16", "bfloat16")  # caches of the keys' dtype
_FP8_DTYPES = ("fp8", "fp8_e4m3")


def fused_qk_norm_rope(
    qkv: torch.Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    position_ids: torch.Tensor,
    forced_token_heads_per_warp: int = -1,
) -> None:
    """Normalise and rotate the q and k heads of a fused projection, in place.

    The signature is that of `torch.ops._C.fused_qk_norm_rope` and of `vllm/_custom_ops.py` in vLLM 0.26.0. As there,
    all is computed in float32 and rounded once.

    Args:
        qkv: `[tokens, (num_heads_q + num_heads_k + num_heads_v) * head_dim]`, the heads of q, then of k, then of v; q
            and k are written. The last stride is 1.
        num_heads_q: The heads of q.
        num_heads_k: The heads of k.
        num_heads_v: The heads of v, which stay as they are.
        head_dim: The elements of a head.
        eps: Added to the mean of the squares.
        q_weight: `[head_dim]`, of qkv's dtype; here float32 too.
        k_weight: `[head_dim]`, of q_weight's dtype.
        cos_sin_cache: `[max_position, rotary_dim]`, of qkv's dtype or float32.
        is_neox: Which elements form a pair, as in `jitnorm.qk_norm_rope_store`.
        position_ids: `[tokens]`, int64; here int32 too.
        forced_token_heads_per_warp: Ignored. It tunes the launch of vLLM's kernel.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, stride, device or alignment is not accepted.
        RuntimeError: head_dim or rotary_dim is not supported, or a tensor needs a gradient.
    """
    q, k, _ = _split_heads(qkv, num_heads_q, num_heads_k, num_heads_v, head_dim)
    qk_norm_rope_store(
        *(q, k, None, cos_sin_cache, position_ids), q_weight=q_weight, k_weight=k_weight, eps=eps, is_neox=is_neox
    )


def do_qk_norm_rope_kvcache_update(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    num_heads_q: int,
    num_heads_k: int,
    head_dim: int,
    is_neox: bool,
    rms_norm_eps: float,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    kv_cache_dtype: str,
    use_shuffle_layout: bool,
) -> None:
    """Normalise and rotate q and k of a fused projection into `q_out` and `k_out`, and store k and v into the cache.

    The signature is that of `rocm_aiter_ops.do_qk_norm_rope_kvcache_update` in `vllm/_aiter_ops.py` of vLLM 0.26.0,
    which has no such operator for CUDA. As there, and as by vLLM's separate operators, the results of the norm and of
    the rotation are rounded to qkv's dtype, and float8 caches hold the rounded k, quantised.

    Args:
        qkv: `[tokens, (num_heads_q + 2 * num_heads_k) * head_dim]`, the heads of q, then of k, then of v; never
            written. The last stride is 1.
        q_weight: `[head_dim]`, of qkv's dtype or float32.
        k_weight: `[head_dim]`, of q_weight's dtype.
        cos_sin_cache: `[max_position, rotary_dim]`, of qkv's dtype or float32.
        positions: `[tokens]`, int32 or int64.
        num_heads_q: The heads of q.
        num_heads_k: The heads of k, and of v.
        head_dim: The elements of a head.
        is_neox: Which elements form a pair, as in `jitnorm.qk_norm_rope_store`.
        rms_norm_eps: Added to the mean of the squares.
        q_out: `[tokens, num_heads_q, head_dim]` or `[tokens, num_heads_q * head_dim]`, written; of qkv's dtype.
        k_out: `[tokens, num_heads_k, head_dim]` or `[tokens, num_heads_k * head_dim]`, written; of qkv's dtype.
        key_cache: As in `reshape_and_cache_flash`.
        value_cache: As in `reshape_and_cache_flash`.
        slot_mapping: As in `reshape_and_cache_flash`.
        k_scale: As in `reshape_and_cache_flash`.
        v_scale: As in `reshape_and_cache_flash`.
        kv_cache_dtype: As in `reshape_and_cache_flash`.
        use_shuffle_layout: False. AITER's interleaved layout of the caches is not supported.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, stride, device, alignment or overlap is not accepted, kv_cache_dtype is not supported, or
            use_shuffle_layout is true.
        RuntimeError: head_dim or rotary_dim is not supported, or a tensor needs a gradient.
    """
    if use_shuffle_layout:
        raise ValueError("use_shuffle_layout must be False: caches are [blocks, block_size, heads, head_dim], got True")
    q, k, v = _split_heads(qkv, num_heads_q, num_heads_k, num_heads_k, head_dim)
    key_cache, value_cache, scales = _caches(qkv, key_cache, value_cache, kv_cache_dtype, k_scale, v_scale)
    checks.tensor("q_out", q_out)
    checks.tensor("k_out", k_out)
    checks.dtype("q_out", q_out, (qkv.dtype,))
    q_out = q_out.view(q.shape) if q_out.shape == (len(q), num_heads_q * head_dim) else q_out
    k_out = k_out.view(k.shape) if k_out.shape == (len(k), num_heads_k * head_dim) else k_out
    qk_norm_rope_store(
        *(q, k, v, cos_sin_cache, positions, key_cache, value_cache, slot_mapping),
        q_weight=q_weight,
        k_weight=k_weight,
        eps=rms_norm_eps,
        is_neox=is_neox,
        q_out=q_out,
        k_out=k_out,
        k_scale=scales[0],
        v_scale=scales[1],
        rounding="each_step",
    )


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """Store k and v into a paged cache.

    The signature is that of `torch.ops._C_cache_ops.reshape_and_cache_flash` and of `vllm/_custom_ops.py` in
    vLLM 0.26.0.

    Args:
        key: `[tokens, heads, head_dim]`, float16, bfloat16 or float32. The last stride is 1.
        value: `[tokens, heads, head_dim]`, of key's dtype.
        key_cache: `[blocks, block_size, heads, head_dim]`, written; of key's dtype, or of uint8 or float8_e4m3fn for
            float8. The last stride is 1, the others are free: the halves of vLLM's `[blocks, block_size, heads,
            2 * head_dim]` serve as they are, with heads before tokens too.
        value_cache: Likewise, of key_cache's shape and dtype.
        slot_mapping: `[stored]`, int64, contiguous; here int32 too. The slots of the first tokens. Tokens with slot -1
            and tokens beyond its end are not stored.
        kv_cache_dtype: "auto", "float16" or "bfloat16" for caches of key's dtype; "fp8" or "fp8_e4m3" for float8.
        k_scale: float32, one element or `[heads]`, on key's device: a float8 key_cache is key divided by it. Ignored
            for other caches.
        v_scale: Likewise, for value.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, stride, device, alignment or overlap is not accepted, or kv_cache_dtype is not supported.
        RuntimeError: head_dim is not supported, or a tensor needs a gradient.
    """
    checks.tensor("key", key)
    key_cache, value_cache, scales = _caches(key, key_cache, value_cache, kv_cache_dtype, k_scale, v_scale)
    store_cache(
        *(key, value, key_cache, value_cache, slot_mapping), skip_index=-1, k_scale=scales[0], v_scale=scales[1]
    )


def _split_heads(
    qkv: torch.Tensor, num_heads_q: int, num_heads_k: int, num_heads_v: int, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the heads of q, k and v as views of a fused projection."""
    checks.tensor("qkv", qkv)
    sizes = {"num_heads_q": num_heads_q, "num_heads_k": num_heads_k, "num_heads_v": num_heads_v, "head_dim": head_dim}
    for name, size in sizes.items():
        if checks.integer(name, size) < 0:
            raise ValueError(f"{name} must be zero or more, got {size}")
    heads = num_heads_q + num_heads_k + num_heads_v
    if qkv.dim() != 2 or qkv.shape[1] != heads * head_dim:
        raise ValueError(
            f"qkv must have shape [tokens, {heads * head_dim}] for {heads} heads of {head_dim}, got {list(qkv.shape)}"
        )
    if qkv.stride(1) != 1:
        raise ValueError(f"qkv must have a last stride of 1, got strides {list(qkv.stride())}")
    # Not split, which costs the host more than twice as much.
    q, k, v = qkv.view(qkv.shape[0], heads, head_dim).split_with_sizes((num_heads_q, num_heads_k, num_heads_v), 1)
    return q, k, v


def _caches(
    key: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Return the caches and scales as jitnorm's operators take them. `key` has the dtype of unquantised caches."""
    is_fp8 = kv_cache_dtype in _FP8_DTYPES
    if not is_fp8 and kv_cache_dtype not in _SAME_DTYPES:
        supported = checks.enumeration(map(repr, (*_SAME_DTYPES, *_FP8_DTYPES)), "or")
        raise ValueError(f"kv_cache_dtype must be {supported}, got {kv_cache_dtype!r}")
    caches = {"key_cache": key_cache, "value_cache": value_cache}
    for name, cache in caches.items():
        checks.tensor(name, cache)
        checks.dtype(name, cache, (torch.uint8, E4M3) if is_fp8 else (key.dtype,))
        if cache.dim() != 4:
            raise ValueError(f"{name} must have shape [blocks, block_size, heads, head_dim], got {list(cache.shape)}")
    if is_fp8:
        return key_cache.view(E4M3), value_cache.view(E4M3), (k_scale, v_scale)
    return key_cache, value_cache, (None, None)
