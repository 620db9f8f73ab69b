"""Patch decoder layers of Hugging Face models: a residual addition and the next norm in one launch.

A layer adds twice. The first sum is normalised in the layer, the second by the next layer's first norm or by the
model's final norm. The kernel writes its sum over the residual, so the layer has to own that tensor: the second
residual is the layer's own first sum, the first one the output of the layer before. `transformers_state` says when that
is owned.
"""

# No `from __future__ import annotations`: torch.fx writes the annotations of forward into its code, as types, not text.

import functools
from typing import Any

import torch

from jitnorm.core.norm_modules import original_class
from jitnorm.integrations.transformers_norms import PatchedNorm, add_and_normalise, can_add_and_normalise
from jitnorm.integrations.transformers_sources import is_known, reason_if_unknown
from jitnorm.integrations.transformers_state import ForwardState, can_fuse, current_state, is_plain, is_plain_linear

LLAMA_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
DECODER_LAYERS = (*LLAMA_LAYERS, "Gemma3DecoderLayer")
MODELS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "Gemma3TextModel")

# What the layers pass on to attention although their caller left it out.
_LLAMA_DEFAULTS: dict[str, Any] = {
    "attention_mask": None,
    "position_ids": None,
    "past_key_values": None,
    "use_cache": False,
    "position_embeddings": None,
}
_GEMMA_DEFAULTS = {name: value for name, value in _LLAMA_DEFAULTS.items() if name != "use_cache"}


class PatchedDecoderLayer(torch.nn.Module):
    """The base class that a patched decoder layer has before the original one."""

    _jitnorm_original: type[torch.nn.Module]
    _defaults: dict[str, Any]
    # The names of the norms: of the first sum, and Gemma's of the outputs of attention and MLP.
    _norm_of_sum: str
    _norm_of_attention: str | None
    _norm_of_mlp: str | None
    gradient_checkpointing: bool

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or (self.gradient_checkpointing and self.training) or not can_fuse(self, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        modules, state = self._modules, current_state.get()
        owned = state is not None and state.total is hidden_states
        normalised = modules["input_layernorm"](hidden_states)  # type: ignore[misc]
        x, _ = modules["self_attn"](hidden_states=normalised, **{**self._defaults, **kwargs})  # type: ignore[misc]
        if self._norm_of_attention:
            x = modules[self._norm_of_attention](x)  # type: ignore[misc]
        norm = modules[self._norm_of_sum]
        if owned and reason_not_to_add(self, "self_attn") is None and can_add_and_normalise(norm, x, hidden_states):
            add_and_normalise(norm, x, total := hidden_states)  # type: ignore[arg-type]
        else:
            total = hidden_states + x
            x = norm(total)  # type: ignore[misc]
        x = modules["mlp"](x)  # type: ignore[misc]
        if self._norm_of_mlp:
            x = modules[self._norm_of_mlp](x)  # type: ignore[misc]
        if state is None:
            return total + x
        following = reason_of_norm(self) or reason_not_to_add(self, "mlp") or next_norm(state, self)
        if isinstance(following, str) or not can_add_and_normalise(following, x, total):
            state.total = state.normalised = state.norm = None
            return total + x
        add_and_normalise(following, x, total)
        state.total, state.normalised, state.norm = total, x, following
        return total


def next_norm(state: ForwardState, layer: torch.nn.Module) -> PatchedNorm | str:
    """Return the norm that the model applies to the output of `layer`, or why anything else may see that output."""
    if layer not in state.following:
        return "the model does not call the layer"
    if not is_plain(layer):
        return "the layer has hooks or a forward of its own"
    following = state.following[layer]
    if following is None:
        norm = state.final_norm
    elif isinstance(following, PatchedDecoderLayer) and is_plain(following):
        norm = following._modules["input_layernorm"]
    else:
        return "the next layer is not patched, has hooks or a forward of its own"
    return norm if isinstance(norm, PatchedNorm) and is_plain(norm) else "the next norm is not patched or has hooks"


def reason_not_to_add(layer: PatchedDecoderLayer, part: str) -> str | None:
    """Return why the output of a part of the layer cannot be overwritten, or None if nothing else can see it.

    Args:
        layer: the layer.
        part: "self_attn" or "mlp".
    """
    name = layer._norm_of_attention if part == "self_attn" else layer._norm_of_mlp
    if name is not None:  # the part's output is normalised, into a new tensor
        norm = layer._modules[name]
        return None if isinstance(norm, PatchedNorm) and is_plain(norm) else f"{name} is not patched or has hooks"
    module: Any = layer._modules[part]
    projection = "o_proj" if part == "self_attn" else "down_proj"
    if not is_known(original_class(module)):
        return f"the forward of {part} is not one that jitnorm knows"
    if not is_plain(module):
        return f"{part} has hooks or a forward of its own"
    if not is_plain_linear(module._modules.get(projection)):
        return f"{part}.{projection} is not a torch.nn.Linear without hooks"
    return None


def reason_of_norm(layer: PatchedDecoderLayer) -> str | None:
    """Return why a kernel cannot normalise the layer's first sum, or None. A hook of the norm would see that sum."""
    norm = layer._modules[layer._norm_of_sum]
    is_patched = isinstance(norm, PatchedNorm) and is_plain(norm)
    return None if is_patched else f"{layer._norm_of_sum} is not patched or has hooks"


def layer_attributes(original: type[torch.nn.Module]) -> dict[str, Any]:
    """Return what the patched class of a decoder layer has besides its bases."""
    if original.__name__ in LLAMA_LAYERS:
        return {
            "_defaults": _LLAMA_DEFAULTS,
            "_norm_of_sum": "post_attention_layernorm",
            "_norm_of_attention": None,
            "_norm_of_mlp": None,
        }
    return {
        "_defaults": _GEMMA_DEFAULTS,
        "_norm_of_sum": "pre_feedforward_layernorm",
        "_norm_of_attention": "post_attention_layernorm",
        "_norm_of_mlp": "post_feedforward_layernorm",
    }


def model_attributes(original: type[torch.nn.Module]) -> dict[str, Any]:
    """Return what the patched class of a model has besides its base.

    It keeps its names: transformers looks up what a model can record, and writes its config, by the name of its class.
    """

    @functools.wraps(original.forward)
    def forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original.forward(self, *args, **kwargs)
        token = current_state.set(ForwardState(self))
        try:
            return original.forward(self, *args, **kwargs)
        finally:
            current_state.reset(token)

    return {"forward": forward, "__module__": original.__module__, "__qualname__": original.__qualname__}


def reason_to_leave_layer(module: torch.nn.Module) -> str | None:
    """Return why a decoder layer or a model cannot be patched, or None if it can."""
    name = type(module).__name__
    if name not in DECODER_LAYERS + MODELS:
        return f"{name} is not a class that jitnorm supports"
    return reason_if_unknown(module)
