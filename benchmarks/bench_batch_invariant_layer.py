"""A decoder layer of Llama-8B in batch-invariant mode and out of it, on a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from jitnorm.batch_invariant import set_batch_invariant_mode
from jitnorm.benchmark import marker

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 4096, 14336, 32, 8, 128
# (sequences, new tokens of each, tokens of each that are cached)
BATCHES = [(1, 1, 1024), (16, 1, 1024), (64, 1, 1024), (1, 2048, 0), (4, 2048, 0)]


def layer(x: torch.Tensor, past: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """x is [batch, new_tokens, HIDDEN], past the cached keys and values, [2, batch, HEADS, cached, HEAD_DIM]."""
    norm_before, qkv_proj, o_proj, norm_after, gate_up_proj, down_proj = weights
    h = F.linear(F.rms_norm(x, (HIDDEN,), norm_before, 1e-5), qkv_proj)
    q, k, v = h.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2).split((HEADS, KV_HEADS, KV_HEADS), 1)
    k, v = (torch.cat((old, t.repeat_interleave(HEADS // KV_HEADS, 1)), 2) for old, t in zip(past, (k, v), strict=True))
    h = F.scaled_dot_product_attention(q, k, v, is_causal=past.shape[3] == 0)
    x = x + F.linear(h.transpose(1, 2).flatten(2), o_proj)
    gate, up = F.linear(F.rms_norm(x, (HIDDEN,), norm_after, 1e-5), gate_up_proj).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, down_proj)


@marker.parametrize("batch,new_tokens,cached", BATCHES, [(1, 1, 1024)])
@marker.benchmark("impl", ["mode", "torch"])
def bench(batch: int, new_tokens: int, cached: int, impl: str) -> marker.BenchResult:
    """A decoder layer of Llama-8B in batch-invariant mode and out of it, on a GPU."""
    x = marker.create_random(batch, new_tokens, HIDDEN)
    if not x.is_cuda:
        marker.skip("a CUDA graph keeps the mode that it was captured in; on the CPU rounds in turns would not")
    past = marker.create_random(2, batch, HEADS, cached, HEAD_DIM)
    qkv_size = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    shapes = [(qkv_size, HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)]
    qkv_proj, o_proj, gate_up_proj, down_proj = (0.02 * marker.create_random(*shape) for shape in shapes)
    norms = [torch.ones(HIDDEN, device=x.device, dtype=x.dtype) for _ in range(2)]
    weights = (norms[0], qkv_proj, o_proj, norms[1], gate_up_proj, down_proj)
    with set_batch_invariant_mode(impl == "mode"):
        return marker.do_bench(layer, input_args=(x, past, *weights), metrics=(0.5,), disable_log_bandwidth=True)


if __name__ == "__main__":
    bench.main()
