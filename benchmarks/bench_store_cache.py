"""Rows of keys and values into their caches, beside the peers and a copy of the same bytes."""

from __future__ import annotations

import torch
from peers import find

from jitnorm.benchmark import marker

SIZES = [(row_size, num_tokens) for row_size in (128, 512, 1024, 4096) for num_tokens in (1, 64, 1024, 16384)]
# Random slots of a large cache cost the translation of their addresses too; those of a prefill, in order, do not.
SHAPES = [(*size, "random") for size in SIZES] + [(1024, 16384, "ordered"), (4096, 16384, "ordered")]


def exact(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, indices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return k_cache.index_copy(0, indices, k), v_cache.index_copy(0, indices, v)


@marker.parametrize("row_size,num_tokens,slots", SHAPES, [(1024, 64, "random")])
@marker.benchmark("impl", ["jitnorm", "sglang", "compile", "torch"])
def bench(row_size: int, num_tokens: int, slots: str, impl: str) -> marker.BenchResult:
    """`k_cache[slots] = k` and the same of v. row_size: elements of a token's keys, num_kv_heads * head_dim."""
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
        memory_output=None,  # not the whole caches, but as much of them as k and v have
        extra_memory_args=(k, v),
        check=exact,
        tolerance=0.0,
    )


if __name__ == "__main__":
    bench.main(copy=True)
