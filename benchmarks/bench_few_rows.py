"""Measure products of a few rows and the weights of linear layers.

By jitnorm's two kernels, torch, and cuBLASLt without split k.
"""

from __future__ import annotations

import torch

from jitnorm.batch_invariant.matmul import cublaslt
from jitnorm.batch_invariant.matmul.problem import Gemm, Problem
from jitnorm.benchmark import marker
from jitnorm.integrations.few_rows import REGISTERS, WGMMA

# (n, k) of qkv, o, gate_up and down
QWEN3_06B = [(4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)]
LLAMA_1B = [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)]
QWEN3_8B = [(6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)]
KERNELS = {"registers": REGISTERS, "wgmma": WGMMA}


def by_cublaslt(weight: torch.Tensor) -> Gemm:
    (n, k), dtype = weight.shape, weight.dtype
    return cublaslt.gemm(Problem(weight.device, n, k, dtype, dtype, True, k, False, False))


def gemm_of(impl: str, weight: torch.Tensor, num_tokens: int) -> Gemm | None:
    """Return the GEMM of an implementation; None is torch's."""
    if impl == "torch":
        return None
    if not weight.is_cuda:
        marker.skip("it needs CUDA")
    if impl == "cublaslt":
        return by_cublaslt(weight)
    kernel = KERNELS[impl]
    if num_tokens > kernel.max_rows or not kernel.is_supported(weight):
        marker.skip("not supported")
    return kernel.gemm(weight)


@marker.parametrize("n,k", QWEN3_06B + LLAMA_1B + QWEN3_8B, [(1024, 2048)])
@marker.parametrize("num_tokens", [1, 4, 16, 32, 64], [16])
@marker.benchmark("impl", [*KERNELS, "torch", "cublaslt"])
def bench(n: int, k: int, num_tokens: int, impl: str) -> marker.BenchResult:
    """Measure products of a few rows and the weights of linear layers: by jitnorm's two kernels, torch and cuBLASLt."""
    x, weight = marker.create_random(num_tokens, k), marker.create_random(n, k)
    gemm = gemm_of(impl, weight, num_tokens)

    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if gemm is None:
            return torch.mm(x, weight.t())
        out = x.new_empty(num_tokens, n)
        gemm(x, weight.t(), None, out)
        return out

    return marker.do_bench(call, input_args=(x, weight), check=lambda x, weight: x.double() @ weight.double().t())


if __name__ == "__main__":
    bench.main()
