"""Attention of one new token of each sequence to a paged KV cache: for the decode steps of engines.

Such a step takes as long as reading the keys and values, and for short sequences as long as the latencies of its parts.
The engines' kernels are made for prompts too: a block of theirs takes so much shared memory that few are on an SM, so
that little of the cache is in flight where sequences are short. docs/performance.md has their times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from jitnorm.core.targets import cuda_target
from jitnorm.jit.load import load
from jitnorm.jit.spec import KernelSpec, Target

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
HEAD_DIMS = (64, 128)
MAX_GROUP = 16  # query heads of a head of k and v
MIN_ARCH = 8.0  # of the tensor core instruction
BLOCK_MULTIPLE = 16  # tokens: kTokensPerStep in csrc/attention/decode_attention.h
_MIN_PART, _MAX_MIN_PART = 256, 2048  # tokens
_MAX_PARTS = 128  # of all heads of a sequence together, or 16 of each


class _Spec(KernelSpec):
    @property
    def warmup_command(self) -> str:
        return "load the model once where there is a compiler"


def spec(head_dim: int, group: int, dtype: torch.dtype, target: Target) -> KernelSpec:
    """Return the kernel for heads of this size, of which so many queries share a key and a value."""
    name = DTYPES[dtype]
    return _Spec(
        op="decode_attention",
        family="decode_attention",
        folder="attention",
        binding="decode_attention",
        name=f"decode_attention_{head_dim}x{group}_{name}",
        kernel=f"DecodeAttentionKernel<{head_dim}, {group}, {name}_t>",
        target=target,
        warmup="",
    )


class Division(NamedTuple):
    """How a kernel divides sequences into parts, which blocks take.

    Attributes:
        max_parts: of a sequence.
        min_tokens_per_part: but for the last part.
    """

    max_parts: int
    min_tokens_per_part: int


def divide(num_sequences: int, num_kv_heads: int, max_tokens: int, num_sms: int) -> Division:
    """Return how sequences of up to `max_tokens` tokens are divided.

    It does not depend on their lengths, which change from step to step of a CUDA graph. With more sequences parts are
    longer, because each costs as much as about 100 tokens, and the blocks have enough of them.
    """
    per_sm = num_sequences * num_kv_heads / num_sms
    min_tokens = _MIN_PART
    while min_tokens < _MAX_MIN_PART and per_sm > min_tokens / _MIN_PART / 2:
        min_tokens *= 2
    most = max(16, _MAX_PARTS // num_kv_heads)
    return Division(max(1, min(most, -(-max_tokens // min_tokens))), min_tokens)


class DecodeAttention:
    """The attention of layers of one shape on one device.

    Its calls share counters, so no two of them may run at the same time.

    Args:
        num_heads: of q.
        num_kv_heads: of the caches.
        head_dim: of both; one of HEAD_DIMS.
        dtype: of all tensors: bfloat16 or float16.
        device: a CUDA device.
        max_sequences: of a call.

    Raises:
        RuntimeError: there is no compiler, or the build failed.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        max_sequences: int,
    ) -> None:
        self._heads, self._kv_heads, self._row = num_heads, num_kv_heads, head_dim + 2  # of partial results
        module: Any = load(spec(head_dim, num_heads // num_kv_heads, dtype, cuda_target(device.index)))
        self._function: Callable[..., int] = module.decode_attention
        self._counters = torch.zeros(max_sequences * num_kv_heads, dtype=torch.int32, device=device)
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count

    def __call__(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        out: torch.Tensor,
        scale: float,
        window: int = 0,
    ) -> bool:
        """Write the attention of q to the tokens of each sequence, or nothing.

        A sequence has the same bits in any batch of as many sequences. One without tokens has zeros.

        Args:
            q: `[sequences, heads, head_dim]`: the last token of each sequence.
            k_cache: `[blocks, block_size, kv_heads, head_dim]`, with any strides but a last one other than 1.
                block_size is a multiple of BLOCK_MULTIPLE.
            v_cache: like `k_cache`.
            block_table: int32 `[sequences, max_blocks]`: the blocks of each sequence, in order. Those of tokens that
                a sequence has must be valid; no others are read.
            seq_lens: int32 `[sequences]`: the tokens of each sequence, the last included. More than the table has
                blocks for count as that many.
            out: written; like q.
            scale: of the logits.
            window: the last tokens that a query attends to, its own included. 0 for all.

        Returns:
            Whether the kernel takes these arguments.
        """
        sequences = q.shape[0]
        max_tokens = block_table.shape[1] * k_cache.shape[1]
        parts, min_tokens = divide(sequences, self._kv_heads, max_tokens, self._num_sms)
        partials = torch.empty(sequences * self._heads * parts * self._row, dtype=torch.float32, device=q.device)
        return not self._function(
            *(q, k_cache, v_cache, block_table, seq_lens, out, partials, self._counters),
            *(parts, min_tokens, self._num_sms, scale, window, None),
        )
