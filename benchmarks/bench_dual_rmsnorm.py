"""Measure two RMSNorms of slices of one projection in one launch, two launches of peers, and a copy."""

from __future__ import annotations

from peers import EPS, IMPLS, Call, find, rmsnorm_reference
from torch import Tensor

import jitnorm
from jitnorm.benchmark import marker

# Columns of the projection of latent attention: those of queries, of keys and values, and of the rotated part.
# DeepSeek V2 and V3 and Kimi K2; MiniCPM3; and the queries and keys of OLMo 2 7B, whose third part is the values.
SLICES = [(1536, 512, 64), (768, 256, 32), (4096, 4096, 4096)]


def in_two_launches(norm: Call) -> Call:
    """Return two calls of a norm, with its results whether it returns them or writes them."""

    def call(a: Tensor, b: Tensor, weight1: Tensor, weight2: Tensor, out1: Tensor, out2: Tensor) -> tuple[object, ...]:
        first, second = norm(a, weight1, out1), norm(b, weight2, out2)
        return out1 if first is None else first, out2 if second is None else second

    return call


def find_norms(impl: str) -> Call:
    if impl == "separate":
        return in_two_launches(lambda x, weight, out: jitnorm.general_rmsnorm(x, weight, EPS, out))
    if impl in ("jitnorm", "compile"):
        return find("dual_rmsnorm", impl)
    return in_two_launches(find("rmsnorm", impl))


@marker.parametrize("size1,size2,rest", SLICES, SLICES[:1])
@marker.parametrize("num_tokens", [1, 4, 16, 64, 256, 1024, 4096, 16384], [64])
@marker.benchmark("impl", ["jitnorm", "separate", *IMPLS[1:]])
def bench(size1: int, size2: int, rest: int, num_tokens: int, impl: str) -> marker.BenchResult:
    """Measure two RMSNorms of slices of one projection in one launch, two launches of peers, and a copy.

    `separate` is two launches of jitnorm's own norms, and `compile` one function of both.
    """
    projection = marker.create_random(num_tokens, size1 + size2 + rest)
    inputs = projection.split([size1, size2, rest], 1)[:2]
    weights = marker.create_random(size1), marker.create_random(size2)
    outs = marker.create_empty(num_tokens, size1), marker.create_empty(num_tokens, size2)

    def reference(a: Tensor, b: Tensor, weight1: Tensor, weight2: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        return rmsnorm_reference(a, weight1), rmsnorm_reference(b, weight2)

    call = find_norms(impl)
    if impl not in ("jitnorm", "separate"):
        try:
            call(*inputs, *weights, *outs)
        except Exception as error:
            marker.skip(f"{impl} does not serve slices of a projection: {type(error).__name__}")
    return marker.do_bench(
        call,
        input_args=(*inputs, *weights, *outs),
        memory_args=(*inputs, *weights),
        memory_output=outs,
        check=reference,
    )


if __name__ == "__main__":
    bench.main(copy=True)
