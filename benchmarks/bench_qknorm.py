"""RMSNorm of queries and keys, in place, beside its peers and a copy of the same bytes."""

from __future__ import annotations

import torch
from peers import exact_rmsnorm, find

from jitnorm.benchmark import marker

# (head_dim, query heads, key heads)
HEADS = [(64, 32, 8), (128, 32, 8), (128, 64, 8), (256, 16, 4), (512, 8, 1), (1024, 4, 1)]


def exact(q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return exact_rmsnorm(q, q_weight), exact_rmsnorm(k, k_weight)


@marker.parametrize("head_dim,num_q_heads,num_kv_heads", HEADS, [(128, 32, 8)])
@marker.parametrize("num_tokens", [1, 64, 1024, 16384], [64])
@marker.benchmark("impl", ["jitnorm", "sglang", "compile", "torch"])
def bench(head_dim: int, num_q_heads: int, num_kv_heads: int, num_tokens: int, impl: str) -> marker.BenchResult:
    """RMSNorm of queries and keys, in place, beside its peers and a copy of the same bytes."""
    q = marker.create_random(num_tokens, num_q_heads, head_dim)
    k = marker.create_random(num_tokens, num_kv_heads, head_dim)
    weights = marker.create_random(head_dim), marker.create_random(head_dim)
    return marker.do_bench(
        find("fused_inplace_qknorm", impl), input_args=(q, k, *weights), memory_output=(q, k), check=exact
    )


if __name__ == "__main__":
    bench.main(copy=True)
