"""Attention of patched Hugging Face models in decode steps whose mask is a tensor, as those with a static cache have.

transformers calls PyTorch's attention with a mask there, whose kernels are made for prompts. With the scheduling of
`decode_attention`, no keys and values outside what the mask shows are read: neither the places of a static cache that
are still empty, nor those before a sliding window.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._device import DeviceContext

from jitnorm.batch_invariant.mode import is_batch_invariant_mode_enabled
from jitnorm.core.targets import cuda_target
from jitnorm.core.torch_library import needs_dispatcher
from jitnorm.integrations.decode_attention import (
    MIN_ARCH,
    MaskedDecodeAttention,
    VisibleTokens,
    reason_without_kernel,
)
from jitnorm.jit.log import warn_once

_SDPA = torch._C._nn.scaled_dot_product_attention  # PyTorch's own, where a library has replaced that of F
# Arguments of transformers' function that change what it computes or returns, or that it refuses. It ignores others.
_OPTIONS = ("softcap", "position_bias", "cache", "is_causal", "output_attentions")


class MasksOfForward:
    """The masks that the layers of a model had in one forward, with the tokens that are visible in each.

    Most layers have the same one, so that it is read once. Position embeddings that a caller keeps outlive a forward:
    the second call of a layer begins another one, in which all masks are read again.
    """

    def __init__(self) -> None:
        self._found: list[tuple[torch.Tensor, tuple[int, bool], VisibleTokens | None]] = []
        self._layers: set[int] = set()  # the ids of those that have called

    def find(
        self, kernel: MaskedDecodeAttention, mask: torch.Tensor, key: torch.Tensor, layer: object
    ) -> VisibleTokens | None:
        """Return the visible tokens of a mask `[sequences or 1, 1, 1, tokens]`, or None if the kernel does not take it.

        A mask that was changed in place between two layers is read again, and so is one if a capture of a CUDA graph
        began there.
        """
        if id(layer) in self._layers:
            self._found.clear()
            self._layers.clear()
        self._layers.add(id(layer))
        sequences, kv_heads = key.shape[:2]
        state = (0 if mask.is_inference() else mask._version, mask.is_cuda and torch.cuda.is_current_stream_capturing())
        for found, at, visible in self._found:
            if found is mask and at == state and (visible is None or visible.counters.shape[0] >= sequences * kv_heads):
                return visible
        visible = kernel.find_visible(mask[:, 0, 0].expand(sequences, -1))
        self._found.append((mask, state, visible))
        return visible


def attend(
    masks: MasksOfForward,
    layer: torch.nn.Module,
    attention: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: Any,
    scale: float,
    options: dict[str, Any],
) -> torch.Tensor | None:
    """Return the attention of one token of each sequence, or None where transformers' function is to be called.

    Args:
        masks: of this forward of the model.
        layer: the attention module.
        attention: transformers' function.
        query: `[sequences, heads, length, head_dim]`.
        key: `[sequences, kv_heads, tokens, head_dim]`.
        value: Likewise.
        mask: as transformers made it.
        scale: of the logits.
        options: other arguments of `attention`.

    Returns:
        `[sequences, 1, heads, head_dim]`, as `attention` returns it.
    """
    if not _can_attend(attention, query, key, value, mask, options) or needs_dispatcher(query, key, value, mask):
        return None
    sequences, heads, _, head_dim = query.shape
    kernel = _kernel(heads, key.shape[1], head_dim, query.dtype, query.device)
    if kernel is None:
        return None
    visible = masks.find(kernel, mask, key, layer)
    out = torch.empty(sequences, 1, heads, head_dim, dtype=query.dtype, device=query.device)
    if visible is None or not kernel(query[:, :, 0], key, value, visible, out[:, 0], scale):
        return None
    return out


def _can_attend(
    attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, options: dict[str, Any]
) -> bool:
    return (
        query.shape[2] == 1
        and isinstance(mask, torch.Tensor)
        and mask.dtype == torch.bool
        and query.device == key.device == value.device == mask.device
        and query.dtype == key.dtype == value.dtype
        and not (query.requires_grad or key.requires_grad or value.requires_grad)
        and mask.shape in ((query.shape[0], 1, 1, key.shape[2]), (1, 1, 1, key.shape[2]))
        and _is_sdpa(attention)
        and all(options.get(name) is None or options.get(name) is False for name in _OPTIONS)
        and not is_batch_invariant_mode_enabled()
    )


def _is_sdpa(attention: Any) -> bool:
    """Return whether it is transformers' function, which calls PyTorch's attention, and neither has been replaced."""
    module = sys.modules.get("transformers.integrations.sdpa_attention")
    return (
        attention is getattr(module, "sdpa_attention_forward", None)
        and F.scaled_dot_product_attention is _SDPA
        and not _has_function_mode()
    )


def _has_function_mode() -> bool:
    """Return whether a TorchFunctionMode is active, other than that of a default device."""
    count = torch._C._len_torch_function_stack()
    return any(not isinstance(torch._C._get_function_stack_at(i), DeviceContext) for i in range(count))


@functools.cache
def _kernel(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> MaskedDecodeAttention | None:
    """Return the kernel for layers of this shape, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    if reason_without_kernel(heads, kv_heads, head_dim, dtype) is not None:
        return None
    try:
        if float(cuda_target(device.index).arch.rstrip("af")) < MIN_ARCH:
            return None
        return MaskedDecodeAttention(heads, kv_heads, head_dim, dtype, device)
    except (RuntimeError, OSError) as error:
        warn_once(f"PyTorch computes the attention of decode steps: {error}")
        return None
