"""Measure the launches between the QKV projection and attention: norms of q and k, rotation, and the cache store."""

from __future__ import annotations

import functools
from typing import Any

import torch
from peers import find, rmsnorm_reference
from torch import Tensor

from jitnorm.benchmark import marker
from jitnorm.qknorm_rope_store import angles_of

# (head_dim, query heads, key heads, rotary_dim)
HEADS = [(128, 32, 8, 128), (128, 64, 8, 128), (128, 16, 8, 128), (256, 16, 2, 64), (64, 8, 1, 64)]
TOKENS = [1, 16, 64, 256, 1024, 4096, 16384]
MAX_POSITION = 4096
BLOCK_SIZE = 16


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x with its first elements rotated, by the definition."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def reference(
    q: Tensor, k: Tensor, v: Tensor, angles: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor,
    slots: Tensor, q_weight: Tensor, k_weight: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    cos, sin = (half[:, None] for half in angles.double()[positions].chunk(2, dim=-1))
    q, k = (rotate(rmsnorm_reference(x, w), cos, sin) for x, w in ((q, q_weight), (k, k_weight)))
    blocks, offsets = slots // BLOCK_SIZE, slots % BLOCK_SIZE
    k_cache, v_cache = k_cache.double(), v_cache.double()
    k_cache[blocks, offsets], v_cache[blocks, offsets] = k, v.double()
    return q, k, k_cache, v_cache


@marker.parametrize("head_dim,num_q_heads,num_kv_heads,rotary_dim", HEADS, [HEADS[0]])
@marker.parametrize("num_tokens", TOKENS, [64])
@marker.parametrize("cache", ["input", "fp8"], ["input"])
@marker.benchmark("impl", ["jitnorm", "separate", "sglang", "flashinfer", "vllm", "compile"])
def bench(
    head_dim: int, num_q_heads: int, num_kv_heads: int, rotary_dim: int, num_tokens: int, cache: str, impl: str
) -> marker.BenchResult:
    """Measure norms of q and k, rotation and store, on slices of a fused projection and pages of 16 tokens.

    `separate` is jitnorm's own chain of `fused_inplace_qknorm`, `rope` and `store_cache`.
    """
    heads = num_q_heads + 2 * num_kv_heads
    qkv = marker.create_random(num_tokens, heads, head_dim)
    q, k, v = qkv.split([num_q_heads, num_kv_heads, num_kv_heads], dim=1)
    weights = marker.create_random(head_dim), marker.create_random(head_dim)
    positions = torch.randint(MAX_POSITION, (num_tokens,), device=qkv.device)
    num_blocks = 2 * -(-num_tokens // BLOCK_SIZE)
    slots = torch.randperm(num_blocks, device=qkv.device).repeat_interleave(BLOCK_SIZE)[:num_tokens] * BLOCK_SIZE
    slots += torch.arange(num_tokens, device=qkv.device) % BLOCK_SIZE
    caches = [torch.zeros(num_blocks, BLOCK_SIZE, num_kv_heads, head_dim, device=qkv.device) for _ in range(2)]
    dtype = qkv.dtype if cache == "input" else torch.float8_e4m3fn
    k_cache, v_cache = (c.to(dtype) for c in caches)
    call: Any = find("qk_norm_rope_store", impl)

    @functools.wraps(call)
    def checked(*tensors: Tensor) -> tuple[Tensor, ...]:
        call(*tensors)
        return tensors[0], tensors[1], tensors[5], tensors[6]

    angles = angles_of(MAX_POSITION, rotary_dim).to(qkv.device, qkv.dtype)
    stored = [torch.empty_like(x, dtype=dtype) for x in (k, v)]  # as many bytes as the caches get
    return marker.do_bench(
        checked,
        input_args=(q, k, v, angles, positions, k_cache, v_cache, slots, *weights),
        memory_args=(q, k, v, positions, slots),
        memory_output=(q, k),
        extra_memory_args=tuple(stored),
        check=reference,
        tolerance=None if cache == "input" else 4e-2,
    )


if __name__ == "__main__":
    bench.main(copy=True)
