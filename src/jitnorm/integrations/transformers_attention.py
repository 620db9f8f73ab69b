"""Patch attention modules of Hugging Face models: q and k norms and the rotary embedding of a layer in one launch.

The rotary embedding runs once in a forward of the model, and its result goes to every layer. Its patched class attaches
a `cos_sin_cache` and `positions` to that result, so that no layer has to build them.
"""

# No `from __future__ import annotations`: torch.fx writes the annotations of forward into its code, as types, not text.

import sys
from collections.abc import Iterable
from typing import Any

import torch

from jitnorm.core.eligibility import can_call_operators, has_kernel_layout
from jitnorm.core.norm_modules import PATCHABLE_FAMILIES
from jitnorm.core.operators import DTYPES
from jitnorm.core.torch_library import needs_dispatcher
from jitnorm.integrations.transformers_decode_attention import MasksOfForward, attend
from jitnorm.integrations.transformers_norms import PatchedNorm, eps_of_norm, offset_of_norm
from jitnorm.integrations.transformers_projections import fused_linear, project, projections_of
from jitnorm.integrations.transformers_sources import reason_if_unknown
from jitnorm.integrations.transformers_state import is_plain, uses_timed_gemms
from jitnorm.layers.qk_norm_rope import apply_qk_norm_rope, is_supported_size
from jitnorm.qknorm_rope_store import qk_norm_rope_store

ATTENTION_CLASSES = tuple(f"{family}Attention" for family in PATCHABLE_FAMILIES)
ROTARY_CLASSES = tuple(f"{family}RotaryEmbedding" for family in PATCHABLE_FAMILIES)
_CLASSES_WITH_NORMS = ("Gemma3Attention", "Qwen3Attention")


class PositionEmbeddings(tuple[torch.Tensor, ...]):
    """The pair of cosines and sines that a rotary embedding of transformers returns, and the same as the kernel's.

    Attributes:
        cos_sin_cache: `[rows, head_dim]`: cosines, then sines, without transformers' repetition of each.
        positions: `[tokens]`, int32: the row of each token of the batch.
        masks: of the forward; None before its first decode attention.
    """

    cos_sin_cache: torch.Tensor | None
    positions: torch.Tensor | None
    masks: MasksOfForward | None = None

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
    _jitnorm_rounding: str
    _has_norms: bool
    _sliding_window_of: str | None
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
        query, key, value, is_own = self._project(hidden_states)
        query, key = normalise_and_rotate(self, query, key, position_embeddings, is_own)
        query, key, value = (x.view(*input_shape, -1, self.head_dim).transpose(1, 2) for x in (query, key, value))
        # The rest is as in transformers.
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention = self._functions.get_interface(self.config._attn_implementation, self._eager_attention)
        if self._sliding_window_of == "self":
            kwargs["sliding_window"] = self.sliding_window
        elif self._sliding_window_of == "config":
            kwargs["sliding_window"] = getattr(self.config, "sliding_window", None)
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = None, None
        if query.shape[2] == 1 and not (dropout or torch.compiler.is_compiling() or self._jitnorm_rounding == "hf"):
            if position_embeddings.masks is None:
                position_embeddings.masks = MasksOfForward()
            masks = position_embeddings.masks
            output = attend(masks, self, attention, query, key, value, attention_mask, self.scaling, kwargs)
        if output is None:
            output, weights = attention(
                self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
        return project(output.reshape(*input_shape, -1).contiguous(), self.o_proj, uses_timed_gemms(self)), weights

    def _project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
        """Return q, k and v, and whether nothing else, such as a hook of a projection, can see them."""
        projections = None if torch.compiler.is_compiling() else projections_of(self, "Attention")
        if projections is None:
            return self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states), False
        uses_timed = uses_timed_gemms(self)
        fused = fused_linear(hidden_states, projections, uses_timed)
        if fused is None:
            query, key, value = (project(hidden_states, linear, uses_timed) for linear in projections)
        else:
            query, key, value = fused.split([linear.out_features for linear in projections], dim=-1)
        return query, key, value, True

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


def normalise_and_rotate(
    attention: PatchedAttention, query: torch.Tensor, key: torch.Tensor, angles: PositionEmbeddings, is_own: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q and k, normalised by the attention's norms if it has any, and rotated.

    Args:
        attention: the module.
        query: `[batch, length, heads * head_dim]`.
        key: Likewise.
        angles: of this forward of the model, with a cos_sin_cache.
        is_own: whether q and k may be overwritten.
    """
    head_dim, cos_sin_cache, positions = attention.head_dim, angles.cos_sin_cache, angles.positions
    assert cos_sin_cache is not None and positions is not None  # as _can_fuse has checked
    modules: Any = attention._modules
    q_norm, k_norm = (modules["q_norm"], modules["k_norm"]) if attention._has_norms else (None, None)
    # apply_qk_norm_rope makes the same call, after checks that take longer than the kernel.
    if is_own and not needs_dispatcher(query) and _are_plain((q_norm, k_norm), query, head_dim):
        tokens = positions.shape[0]
        qk_norm_rope_store(
            query.view(tokens, query.shape[-1] // head_dim, head_dim),
            key.view(tokens, key.shape[-1] // head_dim, head_dim),
            None,
            cos_sin_cache,
            positions,
            q_weight=None if q_norm is None else q_norm._parameters["weight"],
            k_weight=None if k_norm is None else k_norm._parameters["weight"],
            eps=1e-6 if q_norm is None else eps_of_norm(q_norm, query),
            weight_offset=0.0 if q_norm is None else offset_of_norm(q_norm),
            rounding="each_step" if attention._jitnorm_rounding == "hf" else "once",
        )
        return query, key
    return apply_qk_norm_rope(query, key, q_norm, k_norm, head_dim, cos_sin_cache, positions, allow_inplace=is_own)


def _are_plain(norms: tuple[Any, Any], query: torch.Tensor, head_dim: int) -> bool:
    """Return whether the operator computes what `norms` compute: patched norms without hooks and with the same eps."""
    if query.device.type not in ("cpu", "cuda") or torch.version.hip is not None:
        return False
    if norms[0] is None:
        return True
    for norm in norms:
        if not isinstance(norm, PatchedNorm) or not is_plain(norm):
            return False
        weight = norm._parameters.get("weight")
        if weight is None or weight.dtype != query.dtype or weight.shape[0] != head_dim:
            return False
        if weight.device != query.device or not has_kernel_layout(weight):
            return False
    first, second = norms
    return eps_of_norm(first, query) == eps_of_norm(second, query) and offset_of_norm(first) == offset_of_norm(second)


def attention_attributes(original: type[torch.nn.Module]) -> dict[str, Any]:
    """Return what the patched class of an attention class has besides its bases."""
    name, module = original.__name__, sys.modules[original.__module__]
    return {
        "_has_norms": name in _CLASSES_WITH_NORMS,
        "_sliding_window_of": {"LlamaAttention": None, "MistralAttention": "config"}.get(name, "self"),
        "_functions": module.ALL_ATTENTION_FUNCTIONS,
        "_eager_attention": staticmethod(module.eager_attention_forward),
    }


def reason_to_leave_attention(module: torch.nn.Module) -> str | None:
    """Return why an attention module or a rotary embedding cannot be patched, or None if it can."""
    name = type(module).__name__
    if name not in ATTENTION_CLASSES + ROTARY_CLASSES:
        return f"{name} is not a class that jitnorm supports"
    reason = reason_if_unknown(module)
    if reason is not None or name in ROTARY_CLASSES:
        return reason
    head_dim: Any = module.head_dim
    return None if is_supported_size(head_dim, head_dim) else f"no kernel supports head_dim {head_dim}"
