"""Measure batch-invariant mm with the shapes of a model's layers, torch.mm, and each GEMM backend alone."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from jitnorm.batch_invariant import matmul_persistent
from jitnorm.batch_invariant.matmul import cublaslt
from jitnorm.batch_invariant.matmul.problem import Gemm, Problem
from jitnorm.batch_invariant.triton_support import triton_module
from jitnorm.benchmark import marker

# (n, k) of qkv, o, gate_up and down
LLAMA_8B = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]
QWEN3_32B = [(10240, 5120), (5120, 8192), (51200, 5120), (5120, 25600)]

# The GEMM backends for a problem, whether or not they pass the invariance check.
BACKENDS: dict[str, Callable[[Problem], Gemm]] = {
    "cublaslt": functools.partial(cublaslt.gemm, workspace_bytes=0),
    "cublaslt_1k": functools.partial(cublaslt.gemm, workspace_bytes=1024),
    "triton": lambda problem: triton_module("matmul.triton_kernels").gemm(problem),
    "triton_one_tile": lambda problem: triton_module("matmul.triton_kernels").gemm(problem, fixed_tile=True),
}
CALLS = {
    "jitnorm": lambda x, weight: matmul_persistent(x, weight.t()),
    "torch": lambda x, weight: torch.mm(x, weight.t()),
}


def call_backend(name: str, x: torch.Tensor, weight: torch.Tensor) -> Callable[..., torch.Tensor]:
    if not x.is_cuda:
        marker.skip("GEMM backends need CUDA")
    (n, k), dtype = weight.shape, weight.dtype
    gemm = BACKENDS[name](Problem(weight.device, n, k, dtype, dtype, True, k, False, False))

    def call(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], n)
        gemm(x, weight.t(), None, out)
        return out

    return call


@marker.parametrize("n,k", LLAMA_8B + QWEN3_32B, [(4096, 4096)])
@marker.parametrize("num_tokens", [1, 16, 128, 1024, 8192], [16])
@marker.benchmark("impl", [*CALLS, *BACKENDS])
def bench(n: int, k: int, num_tokens: int, impl: str) -> marker.BenchResult:
    """Measure batch-invariant mm with the shapes of a model's layers, torch.mm, and each GEMM backend alone."""
    x, weight = marker.create_random(num_tokens, k), marker.create_random(n, k)
    call = CALLS.get(impl) or call_backend(impl, x, weight)
    return marker.do_bench(call, input_args=(x, weight), check=lambda x, weight: x.double() @ weight.double().t())


if __name__ == "__main__":
    bench.main()
