"""Measure products of a few rows and the weights of linear layers: by jitnorm, torch, and cuBLASLt without split k."""

from __future__ import annotations

from collections.abc import Callable

import torch

from jitnorm.batch_invariant.matmul import cublaslt
from jitnorm.batch_invariant.matmul.problem import Gemm, Problem
from jitnorm.benchmark import marker
from jitnorm.integrations import few_rows

# (n, k) of those layers that are small enough for the kernel: qkv, o, gate_up and down
QWEN3_06B = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]
LLAMA_1B = [(3072, 2048), (2048, 2048), (2048, 8192)]
QWEN3_8B = [(4096, 4096)]


def by_cublaslt(weight: torch.Tensor) -> Gemm:
    (n, k), dtype = weight.shape, weight.dtype
    return cublaslt.gemm(Problem(weight.device, n, k, dtype, dtype, True, k, False, False))


GEMMS: dict[str, Callable[[torch.Tensor], Gemm]] = {"jitnorm": few_rows.gemm, "cublaslt": by_cublaslt}


@marker.parametrize("n,k", QWEN3_06B + LLAMA_1B + QWEN3_8B, [(1024, 2048)])
@marker.parametrize("num_tokens", [1, 4, 16], [16])
@marker.benchmark("impl", ["jitnorm", "torch", "cublaslt"])
def bench(n: int, k: int, num_tokens: int, impl: str) -> marker.BenchResult:
    """Measure products of a few rows and the weights of linear layers: by jitnorm, torch, and cuBLASLt."""
    x, weight = marker.create_random(num_tokens, k), marker.create_random(n, k)
    if impl in GEMMS and not weight.is_cuda:
        marker.skip("it needs CUDA")
    gemm = GEMMS[impl](weight) if impl in GEMMS else None

    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if gemm is None:
            return torch.mm(x, weight.t())
        out = x.new_empty(num_tokens, n)
        gemm(x, weight.t(), None, out)
        return out

    return marker.do_bench(call, input_args=(x, weight), check=lambda x, weight: x.double() @ weight.double().t())


if __name__ == "__main__":
    bench.main()
