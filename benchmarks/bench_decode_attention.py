"""Measure the attention of a decode step to a paged KV cache, beside FlashAttention 3 as vLLM calls it, and torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from jitnorm.benchmark import marker
from jitnorm.integrations.decode_attention import DecodeAttention

# Of Qwen3-0.6B, Llama-3.2-1B, and Qwen3-8B with Llama-3.1-8B.
SHAPES = [(16, 8, 128), (32, 8, 64), (32, 8, 128)]
BLOCK = 16  # tokens of a page: vLLM's
MAX_LENGTH = 32768  # of a sequence: the width of the table, for which vLLM captures its graphs
MAX_SPLITS = 32  # vLLM's, in CUDA graphs

Call = Callable[..., torch.Tensor]


def by_jitnorm(q: torch.Tensor, cache: torch.Tensor, lengths: torch.Tensor) -> Call:
    if not q.is_cuda:
        marker.skip("it needs CUDA")
    sequences, heads, head_dim = q.shape
    attention = DecodeAttention(heads, cache.shape[1], head_dim, q.dtype, q.device, sequences)

    def call(q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        k, v = cache.transpose(1, 2).split(head_dim, dim=-1)
        if not attention(q, k, v, table, lengths, out, head_dim**-0.5):
            raise RuntimeError("the kernel does not take these arguments")
        return out

    return call


def by_flash_attention(q: torch.Tensor, cache: torch.Tensor, lengths: torch.Tensor) -> Call:
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata
    except ImportError as error:
        marker.skip(f"vLLM is not installed: {error}")
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        marker.skip("FlashAttention 3 needs sm_90")
    sequences, heads, head_dim = q.shape
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=q.device)
    metadata = get_scheduler_metadata(
        batch_size=sequences,
        max_seqlen_q=1,
        max_seqlen_k=MAX_LENGTH,
        num_heads_q=heads,
        num_heads_kv=cache.shape[1],
        headdim=head_dim,
        cache_seqlens=lengths,
        qkv_dtype=q.dtype,
        cu_seqlens_q=starts,
        page_size=BLOCK,
        causal=True,
        num_splits=MAX_SPLITS,
    )

    def call(q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        k, v = cache.transpose(1, 2).split(head_dim, dim=-1)
        flash_attn_varlen_func(
            *(q, k, v),
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=lengths,
            max_seqlen_k=MAX_LENGTH,
            causal=True,
            block_table=table,
            scheduler_metadata=metadata,
            num_splits=MAX_SPLITS,
            fa_version=3,
        )
        return out

    return call


def by_torch(q: torch.Tensor, cache: torch.Tensor, lengths: torch.Tensor) -> Call:
    """Copy the pages of each sequence. All sequences have the same length."""
    context, head_dim = int(lengths[0]), q.shape[-1]

    def call(q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        pages = table[:, : -(-context // BLOCK)]
        tokens = cache[pages].transpose(1, 2).flatten(2, 3)[:, :, :context]
        k, v = tokens.split(head_dim, dim=-1)
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q.unsqueeze(2), k, v, enable_gqa=True).squeeze(2)

    return call


CALLS = {"jitnorm": by_jitnorm, "flash_attention_3": by_flash_attention, "torch": by_torch}


@marker.parametrize("num_q_heads,num_kv_heads,head_dim", SHAPES, SHAPES[:1])
@marker.parametrize("context", [64, 512, 4096, 32768], [64])
@marker.parametrize("num_sequences", [1, 16, 64, 256], [16])
@marker.benchmark("impl", list(CALLS))
def bench(
    num_q_heads: int, num_kv_heads: int, head_dim: int, context: int, num_sequences: int, impl: str
) -> marker.BenchResult:
    """Measure the attention of a decode step, and a copy of the same bytes."""
    if context * num_sequences > 1 << 21:
        marker.skip("the caches are too large")
    q = marker.create_random(num_sequences, num_q_heads, head_dim)
    blocks = -(-context // BLOCK)
    cache = marker.create_random(num_sequences * blocks, num_kv_heads, BLOCK, 2 * head_dim)
    table = torch.randperm(num_sequences * blocks, dtype=torch.int32, device=q.device).view(num_sequences, blocks)
    table = torch.nn.functional.pad(table, (0, MAX_LENGTH // BLOCK - blocks))
    lengths = torch.full((num_sequences,), context, dtype=torch.int32, device=q.device)

    def check(q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        results = []
        for heads, pages in zip(q, table[:, :blocks].long(), strict=True):
            tokens = cache[pages].transpose(1, 2).flatten(0, 1)[:context].double()
            k, v = tokens.repeat_interleave(num_q_heads // num_kv_heads, dim=1).split(head_dim, dim=-1)
            weights = torch.einsum("hd,thd->ht", heads.double() * head_dim**-0.5, k).softmax(dim=1)
            results.append(torch.einsum("ht,thd->hd", weights, v))
        return torch.stack(results)

    call = CALLS[impl](q, cache, lengths)
    return marker.do_bench(call, input_args=(q, cache, table, lengths), memory_args=(q, cache), check=check)


if __name__ == "__main__":
    bench.main(copy=True)
