"""Attention of one new token of each sequence, in decode steps: to a paged KV cache, or to tensors with a mask.

Such a step takes as long as reading the keys and values, and for short sequences as long as the latencies of its parts.
Kernels of engines and of PyTorch are made for prompts too: a block of theirs takes so much shared memory that few are
on an SM, so that little of the cache is in flight where sequences are short. docs/contributing/decisions.md has times.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from jitnorm.core.checks import DTYPE_NAMES
from jitnorm.core.targets import cuda_target
from jitnorm.integrations.engine_plugins import EngineKernelSpec
from jitnorm.jit.load import load
from jitnorm.jit.spec import KernelSpec, Target

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
MAX_GROUP_SIZE = 16  # query heads of a head of k and v
MIN_ARCH = 8.0  # of the tensor core instruction
BLOCK_MULTIPLE = 16  # tokens: kTokensPerStep in csrc/attention/decode_attention.h
_MIN_SPLIT, _MAX_SPLIT = 256, 2048  # tokens
_USUAL_MAX_SPLITS = 16  # of a sequence; more for few heads, fewer for many sequences
_SPLITS_OF_ALL_HEADS = 128
_SPLITS_OF_ALL_SEQUENCES = 8192  # bounds the memory of partial results


class MaskedKernelSpec(EngineKernelSpec):
    """A kernel of decode steps with a mask, which a patched model loads in the first of them."""

    @property
    def warmup_command(self) -> str:
        """Return what builds it ahead of time."""
        return "run a decode step with a mask once where there is a compiler"


def spec(
    num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, target: Target, is_masked: bool = False
) -> KernelSpec:
    """Return the kernel for layers of this shape. Layers with the same num_heads / num_kv_heads share one."""
    group_size, name = num_heads // num_kv_heads, DTYPE_NAMES[dtype]
    op = "masked_decode_attention" if is_masked else "decode_attention"
    cls = MaskedKernelSpec if is_masked else EngineKernelSpec
    return cls(
        op=op,
        family="decode_attention",
        folder="attention",
        binding=op,
        name=f"{op}_{head_dim}x{group_size}_{name}",
        kernel=f"DecodeAttentionKernel<{head_dim}, {group_size}, {name}_t, {str(is_masked).lower()}>",
        target=target,
        warmup="",
    )


def ranges_spec(target: Target) -> KernelSpec:
    """Return the kernel that finds the range of visible tokens in each row of a mask, and zeroes counters of splits."""
    op = "mask_ranges"
    return MaskedKernelSpec(
        op=op,
        family=op,
        folder="attention",
        binding=op,
        name=op,
        kernel="MaskRangesKernel",
        target=target,
        warmup="",
    )


def reason_without_kernel(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> str | None:
    """Return why there is no kernel for layers of this shape, or None."""
    if num_heads % num_kv_heads or num_heads > MAX_GROUP_SIZE * num_kv_heads:
        return (
            f"num_heads must be num_kv_heads, {num_kv_heads}, or up to {MAX_GROUP_SIZE} times as many, got {num_heads}"
        )
    if head_dim not in HEAD_DIMS:
        return f"head_dim must be {' or '.join(map(str, HEAD_DIMS))}, got {head_dim}"
    if dtype not in DTYPES:
        return f"dtype must be bfloat16 or float16, got {dtype}"
    return None


class Splits(NamedTuple):
    """How a kernel splits sequences. A thread block computes one split after another.

    Attributes:
        max_count: of the splits of a sequence.
        max_tokens: of a split, unless the sequence has max_count splits.
    """

    max_count: int
    max_tokens: int


@functools.cache
def plan_splits(num_sequences: int, num_kv_heads: int, max_length: int, num_sms: int) -> Splits:
    """Return how sequences of up to `max_length` tokens are split.

    It does not depend on their lengths, which change from step to step of a CUDA graph. With more sequences splits are
    longer: each costs as much as about 100 tokens, and there are enough for all blocks.
    """
    items = max(1, num_sequences * num_kv_heads)
    max_tokens = _MIN_SPLIT
    while max_tokens < _MAX_SPLIT and items > num_sms * max_tokens // _MIN_SPLIT // 2:
        max_tokens *= 2
    max_count = max(_USUAL_MAX_SPLITS, _SPLITS_OF_ALL_HEADS // num_kv_heads)
    max_count = min(max_count, max(4, _SPLITS_OF_ALL_SEQUENCES // items))
    return Splits(max(1, min(max_count, -(-max_length // max_tokens))), max_tokens)


class DecodeAttention:
    """The attention to a paged cache of layers of one shape on one device.

    Its calls share counters, so no two of them may run at the same time.

    Attributes:
        has_refused: for callers: whether a call has returned False.

    Args:
        num_heads: of q; num_kv_heads, or up to MAX_GROUP_SIZE times as many.
        num_kv_heads: of the caches.
        head_dim: of both; one of HEAD_DIMS.
        dtype: of all tensors; one of DTYPES.
        device: a CUDA device with an index.
        max_sequences: of a call.

    Raises:
        ValueError: there is no kernel for this shape or dtype.
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
        if reason := reason_without_kernel(num_heads, num_kv_heads, head_dim, dtype):
            raise ValueError(reason)
        module: Any = load(spec(num_heads, num_kv_heads, head_dim, dtype, cuda_target(device.index)))
        self._function: Callable[..., int] = module.decode_attention
        self._heads, self._kv_heads, self._row = num_heads, num_kv_heads, head_dim + 2  # of partial results
        self._device, self._max_items = device, max_sequences * num_kv_heads
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._counters: torch.Tensor | None = None
        self.has_refused = False

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

        The result of a sequence depends on the number of sequences, those that pad a CUDA graph included, but not on
        what the others are, nor on its place among them. One without tokens has zeros.

        Args:
            q: `[sequences, heads, head_dim]`: the last token of each sequence.
            k_cache: `[blocks, block_size, kv_heads, head_dim]`. block_size is a multiple of BLOCK_MULTIPLE. As in q and
                out, the last stride is 1, and the others are multiples of 16 bytes, as the address is.
            v_cache: like `k_cache`.
            block_table: int32 `[sequences, max_blocks]`: the blocks of each sequence, in order. Those of tokens that
                a query attends to must be valid; no others are read.
            seq_lens: int32 `[sequences]`: the tokens of each sequence, the last included. More than the table has
                blocks for count as that many.
            out: written; like q.
            scale: of the logits.
            window: the last tokens that a query attends to, its own included. 0 for all.

        Returns:
            Whether the kernel takes these arguments. The first call must not be a part of a CUDA graph's capture.

        Raises:
            RuntimeError: the launch failed.
        """
        if self._counters is None:
            # Not before: an engine may load models into memory that it discards while it sleeps.
            if torch.cuda.is_current_stream_capturing():
                return False
            self._counters = torch.zeros(self._max_items, dtype=torch.int32, device=self._device)
        sequences = q.shape[0]
        max_length = block_table.shape[1] * k_cache.shape[1]
        splits, max_tokens = plan_splits(sequences, self._kv_heads, max_length, self._num_sms)
        partials = torch.empty(sequences * self._heads * splits * self._row, dtype=torch.float32, device=q.device)
        return not self._function(
            *(q, k_cache, v_cache, block_table, seq_lens, out, partials, self._counters),
            *(splits, max_tokens, self._num_sms, scale, window, None),
        )


class VisibleTokens(NamedTuple):
    """Which tokens the queries of a decode step see. `MaskedDecodeAttention` reads no keys and values of others.

    The calls with it must follow one another on a stream, since they share its counters.

    Attributes:
        mask: bool `[sequences, tokens]`.
        ranges: int32 `[sequences, 2]`: the first visible token, and the one after the last.
        counters: int32 `[sequences * kv_heads]`.
    """

    mask: torch.Tensor
    ranges: torch.Tensor
    counters: torch.Tensor


class MaskedDecodeAttention:
    """The attention of layers of one shape, on one device, to keys and values with a mask.

    Args:
        num_heads: of q; num_kv_heads, or up to MAX_GROUP_SIZE times as many.
        num_kv_heads: of k and v.
        head_dim: of all; one of HEAD_DIMS.
        dtype: of all tensors but the mask; one of DTYPES.
        device: a CUDA device with an index.

    Raises:
        ValueError: there is no kernel for this shape or dtype.
        RuntimeError: there is no compiler, or the build failed.
    """

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if reason := reason_without_kernel(num_heads, num_kv_heads, head_dim, dtype):
            raise ValueError(reason)
        target = cuda_target(device.index)
        module: Any = load(spec(num_heads, num_kv_heads, head_dim, dtype, target, is_masked=True))
        self._function: Callable[..., int] = module.masked_decode_attention
        module = load(ranges_spec(target))
        self._mask_ranges: Callable[..., int] = module.mask_ranges
        self._kv_heads, self._partials_of_split = num_kv_heads, num_heads * (head_dim + 2)
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count

    def find_visible(self, mask: torch.Tensor) -> VisibleTokens | None:
        """Return the visible tokens of a mask, or None if the kernel does not take it.

        Args:
            mask: bool `[sequences, tokens]` on the device: whether the query of a sequence sees a token. The last
                stride is 1. It must not change until the last call with the result, which may be of any layer with as
                many num_kv_heads or fewer.

        Raises:
            RuntimeError: the launch failed.
        """
        sequences = mask.shape[0]
        integers = torch.empty(sequences * (2 + self._kv_heads), dtype=torch.int32, device=mask.device)
        ranges, counters = integers[: 2 * sequences].view(sequences, 2), integers[2 * sequences :]
        return None if self._mask_ranges(mask, ranges, counters) else VisibleTokens(mask, ranges, counters)

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        visible: VisibleTokens,
        out: torch.Tensor,
        scale: float,
    ) -> bool:
        """Write the attention of q to the visible tokens of each sequence, or nothing.

        The result of a sequence depends on the number of sequences and on which tokens are visible, but not on the
        other sequences, its place among them, or the length of the cache. One without visible tokens has zeros. Keys
        and values between visible tokens are read, and must be finite.

        Args:
            q: `[sequences, heads, head_dim]`: of the last token of each sequence.
            k: `[sequences, kv_heads, tokens, head_dim]`. As in q and out, the last stride is 1, and the others are
                multiples of 16 bytes, as the address is.
            v: like `k`.
            visible: as `find_visible` returns it for a mask `[sequences, tokens]`.
            out: written; like q.
            scale: of the logits.

        Returns:
            Whether the kernel takes these arguments.

        Raises:
            RuntimeError: the launch failed.
        """
        sequences, tokens = q.shape[0], k.shape[2]
        # Of a cache that grows by a token in each step, many lengths have one plan.
        max_tokens = -(-tokens // _MIN_SPLIT) * _MIN_SPLIT
        splits, max_tokens_per_split = plan_splits(sequences, self._kv_heads, max_tokens, self._num_sms)
        partials = torch.empty(sequences * splits * self._partials_of_split, dtype=torch.float32, device=q.device)
        return not self._function(
            *(q, k, v, visible.mask, visible.ranges, out, partials, visible.counters),
            *(splits, max_tokens_per_split, self._num_sms, scale, None),
        )
