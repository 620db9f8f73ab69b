"""Patch attention modules of Hugging Face models: q and k norms and the rotary embedding of a layer in one launch.

The rotary embedding runs once in a forward of the model, and its result goes to every layer. Its patched class attaches
a `cos_sin_cache` and `positions` to that result, so that no layer has to build them.
"""

# No `from __future__ import annotations`: torch.fx writes the annotations of forward into its code, as types, not text.

import inspect
import sys
from collections.abc import Iterable
from typing import Any

import torch

from jitnorm.core.eligibility import can_call_operators
from jitnorm.core.norm_modules import ATTENTION_FAMILIES
from jitnorm.core.operators import DTYPES
from jitnorm.layers.qk_norm_rope import apply_qk_norm_rope, is_supported_size

ATTENTION_CLASSES = tuple(f"{family}Attention" for family in ATTENTION_FAMILIES)
ROTARY_CLASSES = tuple(f"{family}RotaryEmbedding" for family in ATTENTION_FAMILIES)

# All names in the code of a forward that PatchedAttention.forward can replace. With another one it does something else.
_ATTRIBUTES = "config head_dim k_norm k_proj layer_idx o_proj q_norm q_proj scaling sliding_window v_proj"
_LOCALS = (
    "attention_interface attention_mask attn_output attn_weights cos hidden_shape hidden_states input_shape key_states "
    "kwargs past_key_values position_embeddings query_states self sin value_states"
)
_CALLED = (
    "ALL_ATTENTION_FUNCTIONS apply_rotary_pos_emb eager_attention_forward get_interface contiguous reshape shape "
    "transpose update view"
)
_NAMES = {*_ATTRIBUTES.split(), *_LOCALS.split(), *_CALLED.split(), "_attn_implementation"}
_NAMES |= {"attention_dropout", "training"}
_OPTIONAL_NAMES = {"k_norm", "q_norm", "sliding_window"}


class PositionEmbeddings(tuple[torch.Tensor, ...]):
    """The pair of cosines and sines that a rotary embedding of transformers returns, and the same as the kernel's.

    Attributes:
        cos_sin_cache: `[rows, head_dim]`: cosines, then sines, without transformers' repetition of each.
        positions: `[tokens]`, int32: the row of each token of the batch.
    """

    cos_sin_cache: torch.Tensor | None
    positions: torch.Tensor | None

    def __new__(
        cls,
        pair: Iterable[torch.Tensor],
        cos_sin_cache: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> "PositionEmbeddings":
        """Create it from an iterable, as a tuple is: code that moves tuples to another device rebuilds it so."""
        self = super().__new__(cls, pair)
        self.cos_sin_cache, self.positions = cos_sin_cache, positions
        return self


class PatchedRotaryEmbedding(torch.nn.Module):
    """The base class that a patched rotary embedding has before the original one."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        pair = super().forward(x, *args, **kwargs)
        cos, sin = pair
        if not can_call_operators(cos, x) or cos.dim() != 3 or x.dim() != 3 or cos.shape[0] not in (1, x.shape[0]):
            return pair
        half = cos.shape[-1] // 2
        cos_sin_cache = torch.cat([cos[..., :half], sin[..., :half]], dim=-1).flatten(0, 1)
        positions = torch.arange(cos_sin_cache.shape[0], dtype=torch.int32, device=cos.device)
        if cos.shape[0] != x.shape[0]:  # all sequences of the batch have the same positions
            positions = positions.repeat(x.shape[0])
        return PositionEmbeddings(pair, cos_sin_cache, positions)


class PatchedAttention(torch.nn.Module):
    """The base class that a patched attention module has before the original one."""

    _jitnorm_original: type[torch.nn.Module]
    _has_norms: bool
    _passes_sliding_window: bool
    _functions: Any
    _eager_attention: Any
    config: Any
    head_dim: int
    layer_idx: int
    scaling: float
    attention_dropout: float
    sliding_window: int | None
    q_proj: torch.nn.Module
    k_proj: torch.nn.Module
    v_proj: torch.nn.Module
    o_proj: torch.nn.Module
    q_norm: torch.nn.Module
    k_norm: torch.nn.Module

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not self._can_fuse(hidden_states, position_embeddings):
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        input_shape = hidden_states.shape[:-1]
        query, key = apply_qk_norm_rope(
            self.q_proj(hidden_states),
            self.k_proj(hidden_states),
            self.q_norm if self._has_norms else None,
            self.k_norm if self._has_norms else None,
            self.head_dim,
            position_embeddings.cos_sin_cache,
            position_embeddings.positions,
            allow_inplace=False,  # a hook of a projection may have kept its output
        )
        query, key, value = (
            x.view(*input_shape, -1, self.head_dim).transpose(1, 2) for x in (query, key, self.v_proj(hidden_states))
        )
        # The rest is as in transformers.
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = self._functions.get_interface(self.config._attn_implementation, self._eager_attention)
        if self._passes_sliding_window:
            kwargs["sliding_window"] = self.sliding_window
        output, weights = attention(
            *(self, query, key, value, attention_mask),
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*input_shape, -1).contiguous()), weights

    def _can_fuse(self, hidden_states: torch.Tensor, position_embeddings: Any) -> bool:
        """Return whether the kernel, and not the original forward, computes this call."""
        return (
            isinstance(position_embeddings, PositionEmbeddings)
            and position_embeddings.cos_sin_cache is not None
            and position_embeddings.positions is not None
            and can_call_operators(hidden_states, position_embeddings.cos_sin_cache)
            and hidden_states.dtype in DTYPES
            and hidden_states.dtype == position_embeddings.cos_sin_cache.dtype
            and position_embeddings.cos_sin_cache.shape[-1] == self.head_dim
            and hidden_states.dim() == 3
            and hidden_states.shape[0] * hidden_states.shape[1] == position_embeddings.positions.shape[0]
            and not torch.is_autocast_enabled(hidden_states.device.type)
            and not (
                torch.is_grad_enabled()
                and (hidden_states.requires_grad or any(p.requires_grad for p in self.parameters()))
            )
        )


def attention_attributes(original: type[torch.nn.Module]) -> dict[str, Any]:
    """Return what the patched class of an attention class has besides its bases."""
    names = _names_of(original)
    module = sys.modules[original.__module__]
    return {
        "_has_norms": "q_norm" in names,
        "_passes_sliding_window": "sliding_window" in names,
        "_functions": module.ALL_ATTENTION_FUNCTIONS,
        "_eager_attention": staticmethod(module.eager_attention_forward),
    }


def reason_to_leave_attention(module: torch.nn.Module) -> str | None:
    """Return why an attention module or a rotary embedding cannot be patched, or None if it can."""
    name = type(module).__name__
    if name not in ATTENTION_CLASSES + ROTARY_CLASSES:
        return f"{name} is not a class that jitnorm supports"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if name in ROTARY_CLASSES:
        return None
    names = _names_of(type(module))
    if not names <= _NAMES or not names >= _NAMES - _OPTIONAL_NAMES:
        return f"the forward of {name} is not the one of transformers that jitnorm knows"
    head_dim: Any = module.head_dim
    return None if is_supported_size(head_dim, head_dim) else f"no kernel supports head_dim {head_dim}"


def _names_of(original: type[torch.nn.Module]) -> set[str]:
    """Return all names in the code of a class's forward."""
    code = getattr(inspect.unwrap(original.forward), "__code__", None)
    return set() if code is None else {*code.co_names, *code.co_varnames}
