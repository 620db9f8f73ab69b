"""Measure RMSNorm of sizes that jitnorm.rmsnorm refuses, with and without a residual, its peers and copies."""

from __future__ import annotations

import torch
from peers import EPS, FP32_RESIDUAL, IMPLS, ROUND_SUM, Call, find, rmsnorm_reference
from row_copy import bench_row_copy

import jitnorm
from jitnorm.benchmark import marker
from jitnorm.benchmark.results import ROW_COPY

NORMS = ["rmsnorm", "gemma_rmsnorm"]
NORMS += [
    f"{op}{form}" for form in ("", ROUND_SUM, FP32_RESIDUAL) for op in ("fused_add_rmsnorm", "gemma_fused_add_rmsnorm")
]
# Of SmolLM2, Gemma 3, Qwen2.5, Nemotron, gpt-oss, InternViT, Mistral Large and Llama 405B; odd ones; and long rows.
SIZES = [576, 640, 896, 960, 1152, 2688, 2880, 3200, 4480, 12288, 16384]
SIZES += [300, 1000, 5000, 10240, 20480, 32768, 65536, 1001, 5001]
ELEMENTS = 1 << 26  # of the largest input, which has 128 MiB in half precision
# Those that tell most come first: a run may be cut short.
SHAPES = [(size, n or ELEMENTS // size) for n in (64, None, 1, 1024) for size in SIZES if n != ELEMENTS // size]


def find_norm(op: str, impl: str) -> Call:
    if impl != "jitnorm":
        return find(op, impl)
    offset, round_sum = float("gemma" in op), op.endswith(ROUND_SUM)
    if "fused_add" not in op:
        return lambda x, w, out: jitnorm.general_rmsnorm(x, w, EPS, out, weight_offset=offset)
    return lambda x, residual, w: jitnorm.general_fused_add_rmsnorm(
        x, residual, w, EPS, weight_offset=offset, round_sum=round_sum
    )


@marker.parametrize("op", NORMS, ["rmsnorm"])
@marker.parametrize("hidden_size,num_tokens", SHAPES, [(2880, 64)])
@marker.benchmark("impl", [*IMPLS, ROW_COPY])
def bench(op: str, hidden_size: int, num_tokens: int, impl: str) -> marker.BenchResult:
    """Measure RMSNorm of sizes that jitnorm.rmsnorm refuses, with and without a residual, its peers and copies."""
    is_fused = "fused_add" in op
    if impl == ROW_COPY and op.endswith(FP32_RESIDUAL):
        marker.skip("the rows of input and residual have accesses of different width")
    if impl == ROW_COPY:
        return bench_row_copy(num_tokens * (2 if is_fused else 1), hidden_size)
    x, weight = marker.create_random(num_tokens, hidden_size), marker.create_random(hidden_size)
    other = marker.create_random(num_tokens, hidden_size) if is_fused else marker.create_empty(num_tokens, hidden_size)
    if op.endswith(FP32_RESIDUAL):
        other = other.float()
    factor = 1 + weight.double() if "gemma" in op else weight.double()

    def reference(*tensors: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if not is_fused:
            return rmsnorm_reference(tensors[0], factor)
        total = tensors[0].double() + tensors[1].double()
        return rmsnorm_reference(total.to(x.dtype) if op.endswith(ROUND_SUM) else total, factor), total

    call = find_norm(op, impl)
    if impl != "jitnorm":
        try:
            call(*((x.clone(), other.clone(), weight) if is_fused else (x, weight, other)))
        except Exception as error:
            marker.skip(f"{impl} does not serve {hidden_size}: {type(error).__name__}")
    return marker.do_bench(
        call,
        input_args=(x, other, weight) if is_fused else (x, weight, other),
        memory_args="all" if is_fused else (x, weight),
        memory_output=(x, other) if is_fused else (other,),
        metrics=(0.5,),
        check=reference,
    )


if __name__ == "__main__":
    bench.main(copy=True)
