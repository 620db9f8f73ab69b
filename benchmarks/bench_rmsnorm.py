"""Measure RMSNorm, its Gemma variant, their peers and a copy of the same bytes."""

from __future__ import annotations

import torch
from peers import IMPLS, find, rmsnorm_reference

from jitnorm.benchmark import marker

# (hidden size, rows): decode batches, prefill, q/k heads, over 100 MB each way where it fits, and odd row counts.
SHAPES = [
    *((64, n) for n in (64, 1048576)),
    *((128, n) for n in (64, 4096, 1048576)),
    (256, 262144),
    (512, 131072),
    *((1024, n) for n in (64, 131072)),
    *((2048, n) for n in (64, 65536)),
    *((4096, n) for n in (1, 64, 256, 1024, 4096, 32768)),
    *((5120, n) for n in (64, 32768)),
    *((7168, n) for n in (64, 16384)),
    *((8192, n) for n in (1, 64, 1024, 16384)),
    *((size, 3001) for size in (768, 3584)),
]


@marker.parametrize("op", ["rmsnorm", "gemma_rmsnorm"], ["rmsnorm"])
@marker.parametrize("hidden_size,num_tokens", SHAPES, [(128, 64), (4096, 64)])
@marker.benchmark("impl", IMPLS)
def bench(op: str, hidden_size: int, num_tokens: int, impl: str) -> marker.BenchResult:
    """Measure RMSNorm, its Gemma variant, their peers and a copy of the same bytes."""
    x, weight = marker.create_random(num_tokens, hidden_size), marker.create_random(hidden_size)
    out = marker.create_empty(num_tokens, hidden_size)

    def reference(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return rmsnorm_reference(x, 1 + w.float() if op == "gemma_rmsnorm" else w)

    return marker.do_bench(
        find(op, impl),
        input_args=(x, weight, out),
        memory_args=(x, weight),
        memory_output=(out,),
        metrics=(0.5,),
        check=reference,
    )


if __name__ == "__main__":
    bench.main(copy=True)
