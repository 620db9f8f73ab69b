"""Measure RMSNorm on the CPU and PyTorch's, with `out` given and allocated, on the same tensors each time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peers import EPS, rmsnorm_reference

import jitnorm
from jitnorm.benchmark import marker

CALLS = {
    "jitnorm": lambda x, w, out: jitnorm.rmsnorm(x, w, EPS, out),
    "allocated": lambda x, w, out: jitnorm.rmsnorm(x, w, EPS),
    "torch": lambda x, w, out: F.rms_norm(x, x.shape[-1:], w, EPS),
}


@marker.parametrize("hidden_size", [64, 256, 1024, 4096, 8192], [64, 4096])
@marker.parametrize("dtype", ["float16", "bfloat16", "float32"], ["bfloat16"])
@marker.parametrize("num_tokens", [1, 64, 4096], [64])
@marker.benchmark("impl", list(CALLS))
def bench(hidden_size: int, dtype: str, num_tokens: int, impl: str) -> marker.BenchResult:
    """Measure RMSNorm on the CPU and PyTorch's, with `out` given and allocated, on the same tensors each time."""
    options = {"dtype": getattr(torch, dtype), "device": "cpu"}
    x, w = marker.create_random(num_tokens, hidden_size, **options), marker.create_random(hidden_size, **options)
    return marker.do_bench(
        CALLS[impl],
        input_args=(x, w, torch.empty_like(x)),
        disable_log_bandwidth=True,
        check=lambda x, w, out: rmsnorm_reference(x, w),
        cold=False,
    )


if __name__ == "__main__":
    bench.main()
