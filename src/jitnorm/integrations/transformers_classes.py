"""Choose the patched class of a module of a Hugging Face model, or say why there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jitnorm.core.norm_modules import original_class
from jitnorm.integrations.transformers_attention import (
    ATTENTION_CLASSES,
    ROTARY_CLASSES,
    PatchedAttention,
    PatchedRotaryEmbedding,
    attention_attributes,
    reason_to_leave_attention,
)
from jitnorm.integrations.transformers_layers import (
    DECODER_LAYERS,
    MODELS,
    PatchedDecoderLayer,
    layer_attributes,
    model_attributes,
    reason_to_leave_layer,
)
from jitnorm.integrations.transformers_mlp import MLP_CLASSES, PatchedMLP, reason_to_leave_mlp
from jitnorm.integrations.transformers_norms import NORM_CLASSES, PatchedNorm, reason_to_leave_norm
from jitnorm.nn import refuse_script

# Why a module of each kind is left, or None.
_REASONS: dict[str, Callable[[torch.nn.Module], str | None]] = {
    "norm": reason_to_leave_norm,
    "attention": reason_to_leave_attention,
    "layer": reason_to_leave_layer,
    "mlp": reason_to_leave_mlp,
}
_classes: dict[type[torch.nn.Module], type[torch.nn.Module]] = {}


def kind_of(module: torch.nn.Module) -> str | None:
    """Return which kind a module is: "norm", "attention", "layer" or "mlp", or None for other modules.

    A rotary embedding counts as attention, and the model around the layers as a layer.
    """
    name = original_class(module).__name__
    if "rmsnorm" in name.lower():
        return "norm"
    if name.endswith(("Attention", "RotaryEmbedding")):
        return "attention"
    if name.endswith("DecoderLayer") or name in MODELS:
        return "layer"
    return "mlp" if name.endswith("MLP") else None


def is_patched(module: torch.nn.Module) -> bool:
    """Return whether `patch_transformers` has replaced the class of a module."""
    return original_class(module) is not type(module)


def reason_to_leave(module: torch.nn.Module, kind: str) -> str | None:
    """Return why a module of a kind cannot be patched, or None if it can."""
    return "already replaced" if is_patched(module) else _REASONS[kind](module)


def patched_class(original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Return the class to which a module of a class is changed. It is created once."""
    if original not in _classes:
        bases, attributes = _bases_and_attributes(original)
        attributes = {
            "__module__": __name__,
            "__doc__": original.__doc__,
            "__prepare_scriptable__": refuse_script,
            "__reduce_ex__": _reduce,
            "_jitnorm_original": original,
            **attributes,
        }
        name = original.__name__ if original.__name__ in MODELS else f"Jitnorm{original.__name__}"
        _classes[original] = type(name, (*bases, original), attributes)
    return _classes[original]


def _bases_and_attributes(
    original: type[torch.nn.Module],
) -> tuple[tuple[type[torch.nn.Module], ...], dict[str, Any]]:
    name = original.__name__
    if name in ATTENTION_CLASSES:
        return (PatchedAttention,), attention_attributes(original)
    if name in ROTARY_CLASSES:
        return (PatchedRotaryEmbedding,), {}
    if name in DECODER_LAYERS:
        return (PatchedDecoderLayer,), layer_attributes(original)
    if name in MLP_CLASSES:
        return (PatchedMLP,), {}
    if name in MODELS:
        return (), model_attributes(original)
    return (PatchedNorm,), {"_jitnorm_class": NORM_CLASSES[name]}


def _reduce(module: torch.nn.Module, protocol: Any) -> Any:
    # Pickle looks classes up by name, and a patched class is created at run time.
    return _rebuild, (original_class(module),), module.__dict__


def _rebuild(original: type[torch.nn.Module]) -> torch.nn.Module:
    cls = patched_class(original)
    return cls.__new__(cls)
