"""Measure RMSNorm of queries and keys in place, its peers and a copy of the same bytes."""

from __future__ import annotations

from peers import find, rmsnorm_reference
from torch import Tensor

from jitnorm.benchmark import marker

# (head_dim, query heads, key heads)
HEADS = [(64, 32, 8), (128, 32, 8), (128, 64, 8), (256, 16, 4), (512, 8, 1), (1024, 4, 1)]


def reference(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    return rmsnorm_reference(q, q_weight), rmsnorm_reference(k, k_weight)


@marker.parametrize("head_dim,num_q_heads,num_kv_heads", HEADS, [(128, 32, 8)])
@marker.parametrize("num_tokens", [1, 64, 1024, 16384], [64])
@marker.benchmark("impl", ["jitnorm", "sglang", "compile", "torch"])
def bench(head_dim: int, num_q_heads: int, num_kv_heads: int, num_tokens: int, impl: str) -> marker.BenchResult:
    """Measure RMSNorm of queries and keys in place, its peers and a copy of the same bytes."""
    q = marker.create_random(num_tokens, num_q_heads, head_dim)
    k = marker.create_random(num_tokens, num_kv_heads, head_dim)
    weights = marker.create_random(head_dim), marker.create_random(head_dim)
    return marker.do_bench(
        find("fused_inplace_qknorm", impl), input_args=(q, k, *weights), memory_output=(q, k), check=reference
    )


if __name__ == "__main__":
    bench.main(copy=True)
