"""Measure a decoder layer of the size of Llama 8B, with and without batch-invariant mode."""

from __future__ import annotations

import contextlib

import torch.nn.functional as F

from jitnorm.batch_invariant import set_batch_invariant_mode
from jitnorm.benchmark import marker

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 4096, 32, 8, 128, 14336
WIDTHS = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
SIZES = [(sum(WIDTHS), HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]


def layer(x, cache, qkv, o, gate_up, down, norm1, norm2):
    """Compute a layer on `[batch, length, HIDDEN]`.

    `cache` is `[2, batch, KV_HEADS, keys, HEAD_DIM]`; the last key is that of this token. Without keys the call is a
    prefill with causal attention.
    """
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


def reference(*tensors):
    return layer(*(t.double() for t in tensors))


@marker.parametrize(
    "batch,length,cached",
    [(1, 1, 1024), (16, 1, 1024), (64, 1, 1024), (16, 1, 8192), (1, 1, 32768), (1, 2048, 0), (4, 2048, 0)],
    [(1, 1, 1024)],
)
@marker.benchmark("impl", ["jitnorm", "torch"])
def bench(batch: int, length: int, cached: int, impl: str) -> marker.BenchResult:
    """Measure a decoder layer of the size of Llama 8B, with and without batch-invariant mode: decode and prefill."""
    x, cache = marker.create_random(batch, length, HIDDEN), marker.create_random(2, batch, KV_HEADS, cached, HEAD_DIM)
    weights = [marker.create_random(*size) * 0.02 for size in SIZES]
    norms = [1 + 0.1 * marker.create_random(HIDDEN) for _ in range(2)]
    # The graph is captured here, with the operators as they are now.
    with set_batch_invariant_mode() if impl == "jitnorm" else contextlib.nullcontext():
        return marker.do_bench(
            layer,
            input_args=(x, cache, *weights, *norms),
            check=reference if length == 1 else None,  # the float64 scores of long sequences do not fit into memory
            tolerance=0.02,  # of intermediate results that are rounded
        )


if __name__ == "__main__":
    bench.main()
