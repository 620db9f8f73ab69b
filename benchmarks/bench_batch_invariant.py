"""The operators of batch-invariant mode beside torch's, and its products by either road.

size: NxK for a product, whose weight is that of a linear layer of Llama-8B or Qwen3-32B; else the length of a row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peers import EPS, exact_rmsnorm

from jitnorm.batch_invariant import cublaslt, cuda_matmul, log_softmax, matmul_persistent, mean_dim, softmax
from jitnorm.batch_invariant.rms_norm import rms_norm_batch_invariant
from jitnorm.benchmark import marker

LLAMA = ["6144x4096", "4096x4096", "28672x4096", "4096x14336"]  # qkv, o, gate and up, down
QWEN = ["10240x5120", "5120x8192", "51200x5120", "5120x25600"]
SIZES = [
    *(("mm", size) for size in (*LLAMA, *QWEN)),
    *(("rms_norm", size) for size in ("128", "4096", "8192")),
    *((op, size) for op in ("softmax", "log_softmax", "mean") for size in ("128", "4096", "128256")),
]
Call = Callable[..., torch.Tensor]

TORCH: dict[str, Call] = {
    "mm": torch.mm,
    "rms_norm": lambda x, w: F.rms_norm(x, x.shape[-1:], w, EPS),
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "mean": lambda x: x.mean(-1),
}
MODE: dict[str, Call] = {
    "mm": matmul_persistent,
    "rms_norm": lambda x, w: rms_norm_batch_invariant(x, w, EPS),
    "softmax": lambda x: softmax(x, -1),
    "log_softmax": lambda x: log_softmax(x, -1),
    "mean": lambda x: mean_dim(x, -1),
}


def compiled(op: str, *tensors: torch.Tensor) -> Call:
    torch._dynamo.reset()
    return torch.compile(TORCH[op], dynamic=False)


def by_road(name: str, op: str, *tensors: torch.Tensor) -> Call:
    if op != "mm" or not tensors[0].is_cuda:
        marker.skip("roads are those of products on CUDA")
    if name == "cublaslt" and not cublaslt.library_version():
        marker.skip("torch has loaded no cuBLASLt")
    x, w = tensors
    problem = cuda_matmul.Problem(x.device, w.shape[1], w.shape[0], x.dtype, x.dtype, True, w.shape[0], False, False)
    road = cublaslt.road(problem) if name == "cublaslt" else cuda_matmul.triton_road(problem)

    def call(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], w.shape[1])
        road(x, w, None, out)
        return out

    return call


IMPLS: dict[str, Callable[..., Call]] = {
    "mode": lambda op, *tensors: MODE[op],
    "cublaslt": lambda *given: by_road("cublaslt", *given),
    "triton": lambda *given: by_road("triton", *given),
    "compile": compiled,
    "torch": lambda op, *tensors: TORCH[op],
}


def operands(op: str, size: str, num_rows: int) -> tuple[torch.Tensor, ...]:
    if op == "mm":
        n, k = map(int, size.split("x"))
        return marker.create_random(num_rows, k), marker.create_random(n, k).t()
    x = marker.create_random(num_rows, int(size))
    return (x, marker.create_random(int(size))) if op == "rms_norm" else (x,)


@marker.parametrize("op,size", SIZES, [("mm", "4096x4096"), ("softmax", "4096")])
@marker.parametrize("num_rows", [1, 16, 128, 1024, 8192], [16])
@marker.benchmark("impl", list(IMPLS))
def bench(op: str, size: str, num_rows: int, impl: str) -> marker.BenchResult:
    """The operators of batch-invariant mode beside torch's, and its products by either road."""
    tensors = operands(op, size, num_rows)

    def exact(*given: torch.Tensor) -> torch.Tensor:
        return exact_rmsnorm(*given) if op == "rms_norm" else TORCH[op](*(t.double() for t in given))

    return marker.do_bench(IMPLS[impl](op, *tensors), input_args=tensors, metrics=(0.5,), check=exact)


if __name__ == "__main__":
    bench.main()
