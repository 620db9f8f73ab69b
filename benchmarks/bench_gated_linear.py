"""Measure the projection to gate and up of an MLP with its activation, for a few rows: in one launch and in two."""

from __future__ import annotations

import torch

from jitnorm.activation import SILU_AND_MUL, silu_and_mul
from jitnorm.benchmark import marker
from jitnorm.integrations.few_rows import REGISTERS, WGMMA

# (n, k) of the projections of Qwen3-0.6B, Llama-3.2-1B, Qwen3-8B and Llama-3.1-8B
SHAPES = [(6144, 1024), (16384, 2048), (24576, 4096), (28672, 4096)]
KERNELS = {"registers": REGISTERS, "wgmma": WGMMA}


@marker.parametrize("n,k", SHAPES, [(6144, 1024)])
@marker.parametrize("num_tokens", [1, 16, 64], [16])
@marker.benchmark("impl", [*KERNELS, "wgmma+silu_and_mul", "torch+silu_and_mul"])
def bench(n: int, k: int, num_tokens: int, impl: str) -> marker.BenchResult:
    """Measure the projection to gate and up with its activation: in one launch and in two."""
    x, weight = marker.create_random(num_tokens, k), marker.create_random(n, k)
    name, _, is_separate = impl.partition("+")
    gemm = None
    if name != "torch":
        if not weight.is_cuda:
            marker.skip("it needs CUDA")
        kernel, activation = KERNELS[name], None if is_separate else SILU_AND_MUL
        if num_tokens > kernel.max_rows or not kernel.is_supported(weight, activation):
            marker.skip("not supported")
        gemm = kernel.gemm(weight, activation)

    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if gemm is None:
            return silu_and_mul(torch.mm(x, weight.t()))
        out = x.new_empty(num_tokens, n if is_separate else n // 2)
        gemm(x, weight.t(), None, out)
        return silu_and_mul(out) if is_separate else out

    def check(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        gate, up = (x.double() @ weight.double().t()).to(x.dtype).double().chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    return marker.do_bench(call, input_args=(x, weight), check=check)


if __name__ == "__main__":
    bench.main()
