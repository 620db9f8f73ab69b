"""Measure RMSNorm with a residual, its peers and a copy of the same bytes."""

from __future__ import annotations

import torch
from peers import FP32_RESIDUAL, IMPLS, ROUND_SUM, find, rmsnorm_reference

from jitnorm.benchmark import marker

OPS = [
    f"{op}{form}" for form in ("", ROUND_SUM, FP32_RESIDUAL) for op in ("fused_add_rmsnorm", "gemma_fused_add_rmsnorm")
]
SHAPES = [(1024, 64), (4096, 1), (4096, 64), (4096, 1024), (4096, 16384), (8192, 8192)]


@marker.parametrize("op", OPS, ["fused_add_rmsnorm"])
@marker.parametrize("hidden_size,num_tokens", SHAPES, [(4096, 64)])
@marker.benchmark("impl", IMPLS)
def bench(op: str, hidden_size: int, num_tokens: int, impl: str) -> marker.BenchResult:
    """Measure RMSNorm with a residual, its peers and a copy of the same bytes."""
    x, residual = (marker.create_random(num_tokens, hidden_size) for _ in range(2))
    if op.endswith(FP32_RESIDUAL):
        residual = residual.float()
    weight = marker.create_random(hidden_size)

    def reference(x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x.double() + residual.double()
        normalised = total.to(x.dtype) if op.endswith(ROUND_SUM) else total
        return rmsnorm_reference(normalised, 1 + w.float() if "gemma" in op else w), total

    return marker.do_bench(
        find(op, impl),
        input_args=(x, residual, weight),
        memory_output=(x, residual),  # updated in place: read and written
        metrics=(0.5,),
        check=reference,
    )


if __name__ == "__main__":
    bench.main(copy=True)
