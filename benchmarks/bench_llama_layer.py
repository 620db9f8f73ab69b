"""A decoder layer of Llama-8B's size, in batch-invariant mode and out of it."""

from __future__ import annotations

import contextlib

import torch.nn.functional as F

from jitnorm.batch_invariant import set_batch_invariant_mode
from jitnorm.benchmark import marker

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 4096, 32, 8, 128, 14336
WIDTHS = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
SIZES = [(sum(WIDTHS), HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]


def layer(x, cache, qkv, o, gate_up, down, norm1, norm2):
    """On `[batch, length, HIDDEN]`. `cache` is `[2, batch, KV_HEADS, keys, HEAD_DIM]`, whose last key is this token's;
    without keys the sequence is a new one, and causal."""
    batch, length, _ = x.shape
    heads = F.linear(F.rms_norm(x, (HIDDEN,), norm1, 1e-5), qkv).split(WIDTHS, -1)
    q, k, v = (t.view(batch, length, -1, HEAD_DIM).transpose(1, 2) for t in heads)
    if decoding := cache.shape[3] > 0:
        cache[0, :, :, -1:], cache[1, :, :, -1:] = k, v
        k, v = cache
    h = F.scaled_dot_product_attention(q, k, v, is_causal=not decoding, enable_gqa=True)
    x = x + F.linear(h.transpose(1, 2).reshape(x.shape), o)
    gate, up = F.linear(F.rms_norm(x, (HIDDEN,), norm2, 1e-5), gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down)


def exact(*tensors):
    return layer(*(t.double() for t in tensors))


@marker.parametrize(
    "batch,length,cached",
    [(1, 1, 1024), (16, 1, 1024), (64, 1, 1024), (16, 1, 8192), (1, 1, 32768), (1, 2048, 0), (4, 2048, 0)],
    [(1, 1, 1024)],
)
@marker.benchmark("impl", ["jitnorm", "torch"])
def bench(batch: int, length: int, cached: int, impl: str) -> marker.BenchResult:
    """A decoder layer of Llama-8B's size, in batch-invariant mode and out of it: decode with a cache, and prefill."""
    x, cache = marker.create_random(batch, length, HIDDEN), marker.create_random(2, batch, KV_HEADS, cached, HEAD_DIM)
    weights = [marker.create_random(*size) * 0.02 for size in SIZES]
    norms = [1 + 0.1 * marker.create_random(HIDDEN) for _ in range(2)]
    # The graph is captured here, with the operators as they are now.
    with set_batch_invariant_mode() if impl == "jitnorm" else contextlib.nullcontext():
        return marker.do_bench(
            layer,
            input_args=(x, cache, *weights, *norms),
            check=exact if length == 1 else None,  # of long sequences float64 scores would fill the memory
            tolerance=0.02,  # intermediate results are rounded
        )


if __name__ == "__main__":
    bench.main()
