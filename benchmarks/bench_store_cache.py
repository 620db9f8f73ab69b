"""Measure storing rows of keys and values in a cache, the peers and a copy of the same bytes."""

from __future__ import annotations

import torch
from peers import find

from jitnorm.benchmark import marker

SIZES = [(row_size, num_tokens) for row_size in (128, 512, 1024, 4096) for num_tokens in (1, 64, 1024, 16384)]
# Random slots of a large cache cause TLB misses; those of a prefill, in order, do not.
SHAPES = [(*size, "random") for size in SIZES] + [(1024, 16384, "ordered"), (4096, 16384, "ordered")]


def reference(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return k_cache.index_copy(0, indices, k), v_cache.index_copy(0, indices, v)


@marker.parametrize("row_size,num_tokens,slots", SHAPES, [(1024, 64, "random")])
@marker.benchmark("impl", ["jitnorm", "sglang", "compile", "torch"])
def bench(row_size: int, num_tokens: int, slots: str, impl: str) -> marker.BenchResult:
    """Measure `k_cache[slots] = k` and the same for v. row_size is num_kv_heads * head_dim, the keys of a token."""
    k, v = (marker.create_random(num_tokens, row_size) for _ in range(2))
    k_cache, v_cache = (marker.create_random(4 * num_tokens, row_size) for _ in range(2))
    order = torch.randperm if slots == "random" else torch.arange
    indices = order(4 * num_tokens, device=k.device)[:num_tokens]
    store = find("store_cache", impl)

    def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        store(*tensors)
        return tensors[2:4]  # to be checked

    return marker.do_bench(
        call,
        input_args=(k, v, k_cache, v_cache, indices),
        memory_args=(k, v, indices),
        memory_output=None,  # only as much of the caches as k and v have
        extra_memory_args=(k, v),
        check=reference,
        tolerance=0.0,
    )


if __name__ == "__main__":
    bench.main(copy=True)
