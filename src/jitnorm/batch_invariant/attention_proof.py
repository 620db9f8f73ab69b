"""Whether one call of attention for all sequences gives each of them the bits that it has alone.

It saves what sequences one by one cost: a launch for each, copies to put them together. A kernel that keeps the bits
for random operands of some sizes and strides does so for all of these sizes and strides, as it chooses its plan by
nothing else. That is found out at the first call of its kind, and kept for the process.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from jitnorm.jit.log import logger

# Of tensors with all sequences: the result, the logarithms of its sums or None, and more.
Call = Callable[..., tuple[Any, ...]]

_MOST = 4096
_known: dict[Hashable, bool] = {}


def one_call_keeps_the_bits(
    name: Hashable, call: Call, alone: Call, tensors: Sequence[torch.Tensor], bias: Sequence[torch.Tensor]
) -> bool:
    """Whether `call(*tensors, *bias)` has for each sequence the bits of `alone`. `name` says what else they depend on.

    Asked for the first time while a CUDA graph is captured, it says no, and remembers nothing.
    """
    key = (name, *((t.device, t.dtype, t.shape, t.stride()) for t in (*tensors, *bias)))
    known = _known.get(key)
    if known is None:
        if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        try:
            known = _compare(call, alone, [*map(_random_like, tensors), *bias])
        except torch.cuda.OutOfMemoryError:
            logger.warning(
                f"no memory to find out whether attention of {tensors[0].shape[0]} sequences can be one call"
            )
            return False
        if len(_known) >= _MOST:
            _known.clear()
        _known[key] = known
    return known


def _compare(call: Call, alone: Call, operands: Sequence[torch.Tensor]) -> bool:
    together = call(*operands)[:2]
    different = []
    for i, sequence in enumerate(zip(*(tensor.split(1) for tensor in operands), strict=True)):
        for whole, part in zip(together, alone(*sequence)[:2], strict=True):
            if whole is not None:
                bits = torch.int16 if whole.element_size() == 2 else torch.int32
                different.append((whole[i : i + 1].view(bits) != part.view(bits)).any())
    return not torch.stack(different).any()


def _random_like(tensor: torch.Tensor) -> torch.Tensor:
    """In the same strides. The user's random numbers stay what they were."""
    generator = torch.Generator(tensor.device).manual_seed(0)
    size = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    numbers = torch.randn(size, dtype=tensor.dtype, device=tensor.device, generator=generator)
    return numbers.as_strided(tensor.shape, tensor.stride())
