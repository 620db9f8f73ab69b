"""Measure activations, with a product and without, their peers and a copy of the same bytes."""

from __future__ import annotations

import torch
from peers import ACTIVATIONS, find

from jitnorm.benchmark import marker


@marker.parametrize("op", list(ACTIVATIONS), ["silu_and_mul"])
@marker.parametrize("size", [4096, 14336, 25600], [4096])
@marker.parametrize("num_tokens", [1, 64, 1024, 4096], [64])
@marker.benchmark("impl", ["jitnorm", "sglang", "fi_cuda", "liger", "compile", "torch"])
def bench(op: str, size: int, num_tokens: int, impl: str) -> marker.BenchResult:
    """Measure activations, [num_tokens, 2 * size], or size without a product, to [num_tokens, size]."""
    columns = 2 * size if "_and_mul" in op or op == "mul_and_silu" else size
    x, out = marker.create_random(num_tokens, columns), marker.create_empty(num_tokens, size)

    def reference(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return ACTIVATIONS[op](x.double())

    return marker.do_bench(find(op, impl), input_args=(x, out), memory_args=(x,), memory_output=(out,), check=reference)


if __name__ == "__main__":
    bench.main(copy=True)
