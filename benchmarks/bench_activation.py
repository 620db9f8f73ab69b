"""Measure gated activations, their peers and a copy of the same bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peers import find

from jitnorm.benchmark import marker

ACTIVATIONS = {
    "silu_and_mul": F.silu,
    "gelu_and_mul": F.gelu,
    "gelu_tanh_and_mul": lambda x: F.gelu(x, approximate="tanh"),
}


@marker.parametrize("op", list(ACTIVATIONS), ["silu_and_mul"])
@marker.parametrize("size", [4096, 14336, 25600], [4096])
@marker.parametrize("num_tokens", [1, 64, 1024, 4096], [64])
@marker.benchmark("impl", ["jitnorm", "sglang", "fi_cuda", "liger", "compile", "torch"])
def bench(op: str, size: int, num_tokens: int, impl: str) -> marker.BenchResult:
    """Measure gated activations, [num_tokens, 2 * size] to [num_tokens, size]."""
    x, out = marker.create_random(num_tokens, 2 * size), marker.create_empty(num_tokens, size)

    def reference(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        gate, up = x.double().chunk(2, -1)
        return ACTIVATIONS[op](gate) * up

    return marker.do_bench(find(op, impl), input_args=(x, out), memory_args=(x,), memory_output=(out,), check=reference)


if __name__ == "__main__":
    bench.main(copy=True)
