"""Check whether one call of a fused attention kernel gives each sequence the bits of a call of its own.

One call for all sequences saves a launch for each of them and the copies that join the results. A kernel chooses its
plan by sizes and strides alone, so what it does with random operands it does with all operands of the same sizes and
strides. The check runs at the first such call, and its result is kept for the process.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from jitnorm.batch_invariant.operands import count_differing_elements
from jitnorm.jit.log import logger

# A fused kernel: from query, key, value and perhaps a bias to the result, its log-sum-exp or None, and more.
FusedAttention = Callable[..., tuple[Any, ...]]

_MAX_RESULTS = 4096
_results: dict[Hashable, bool] = {}


def one_call_passes(
    name: Hashable,
    batched: FusedAttention,
    single: FusedAttention,
    tensors: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor],
) -> bool:
    """Return whether `batched(*tensors, *bias)` gives each sequence the bits of `single` with that sequence alone.

    On out-of-memory, or at a first call while a CUDA graph is captured, the answer is False and nothing is cached.

    Args:
        name: what the kernel's plan depends on beside sizes, strides, dtypes and device.
        batched: called with all sequences.
        single: called with one sequence.
    """
    key = (name, *((t.device, t.dtype, t.shape, t.stride()) for t in (*tensors, *bias)))
    passed = _results.get(key)
    if passed is None:
        if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        try:
            passed = _compare(batched, single, [*map(_random_like, tensors), *bias])
        except torch.cuda.OutOfMemoryError:
            logger.warning(
                "not enough GPU memory to check whether attention of %d sequences can be one call: each sequence is a "
                "call of its own",
                tensors[0].shape[0],
            )
            return False
        if len(_results) >= _MAX_RESULTS:
            _results.clear()
        _results[key] = passed
    return passed


def _compare(batched: FusedAttention, single: FusedAttention, operands: Sequence[torch.Tensor]) -> bool:
    together = batched(*operands)[:2]
    counts = []
    for i, sequence in enumerate(zip(*(tensor.split(1) for tensor in operands), strict=True)):
        for whole, part in zip(together, single(*sequence)[:2], strict=True):
            if whole is not None:
                counts.append(count_differing_elements(whole[i : i + 1], part))
    return not torch.stack(counts).any()


def _random_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return random numbers in the strides of `tensor`. The state of torch's own generators stays as it is."""
    generator = torch.Generator(tensor.device).manual_seed(0)
    size = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    numbers = torch.randn(size, dtype=tensor.dtype, device=tensor.device, generator=generator)
    return numbers.as_strided(tensor.shape, tensor.stride())
