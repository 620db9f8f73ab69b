"""Choose the patched class of a module of a Hugging Face model, or say why there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
from jitnorm.integrations.transformers_gated import (
    GATED_RULES,
    GatedKernels,
    PatchedGatedNorm,
    find_gated_kernels,
    gated_kernels_of,
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
from jitnorm.integrations.transformers_norms import NormKernels, PatchedNorm, base_of, find_kernels, kernels_of
from jitnorm.integrations.transformers_rules import NormRule, takes_gate
from jitnorm.nn import refuse_script

# Why a module of each kind but norms is left, or None.
_REASONS: dict[str, Callable[[torch.nn.Module], str | None]] = {
    "attention": reason_to_leave_attention,
    "layer": reason_to_leave_layer,
    "mlp": reason_to_leave_mlp,
}
Kernels = NormKernels | GatedKernels
_classes: dict[tuple[type[torch.nn.Module], Kernels | None, str], type[torch.nn.Module]] = {}
_NO_NAMES: Mapping[type[torch.nn.Module], NormRule] = {}


def kind_of(module: torch.nn.Module, named: Mapping[type[torch.nn.Module], NormRule] = _NO_NAMES) -> str | None:
    """Return which kind a module is: "norm", "attention", "layer" or "mlp", or None for other modules.

    A rotary embedding counts as attention, and the model around the layers as a layer. A norm is what may be an RMSNorm
    by its name: T5's are LayerNorms by name, and so are Cohere's, which the reason to leave them tells apart.

    Args:
        module: any module, patched or not.
        named: the classes of norms to which the user gives a rule.
    """
    original = original_class(module)
    name = original.__name__
    if "rmsnorm" in name.lower() or isinstance(module, PatchedNorm) or original in named:
        return "norm"
    if name.endswith(("Attention", "RotaryEmbedding")):
        return "attention"
    if name.endswith("DecoderLayer") or name in MODELS:
        return "layer"
    if name.endswith("MLP"):
        return "mlp"
    is_norm = name.lower().endswith("norm") or "layernorm" in name.lower()
    is_leaf = not module._modules and not module._buffers
    return "norm" if is_norm and is_leaf and not original.__module__.startswith("torch.") else None


def is_patched(module: torch.nn.Module) -> bool:
    """Return whether `patch_transformers` has replaced the class of a module."""
    return original_class(module) is not type(module)


class Replacement(NamedTuple):
    """What replaces a module, or why it is left."""

    cls: type[torch.nn.Module] | None
    reason: str | None = None
    kernels: Kernels | None = None


def find_replacement(
    module: torch.nn.Module,
    kind: str,
    named: Mapping[type[torch.nn.Module], NormRule] = _NO_NAMES,
    rounding: str = "once",
) -> Replacement:
    """Return the class to which to change the class of a module, or why there is none.

    Args:
        module: any module.
        kind: its kind.
        named: the classes of norms to which the user gives a rule.
        rounding: where kernels round: "once" or "hf".

    Raises:
        ValueError: a norm computes other values than the rule that the user gives to its class.
    """
    if is_patched(module):
        return Replacement(None, "already replaced")
    kernels = None
    if kind == "norm":
        rule = named.get(type(module))
        if rule is None and takes_gate(type(module)):
            found: Kernels | str = find_gated_kernels(module, rounding)
        else:
            found = find_kernels(module, rule, rounding)
        if isinstance(found, str):
            return Replacement(None, found)
        kernels = found
    elif reason := _REASONS[kind](module):
        return Replacement(None, reason)
    return Replacement(patched_class(type(module), kernels, rounding), None, kernels)


def is_patched_class(cls: type[torch.nn.Module]) -> bool:
    """Return whether `patched_class` has made a class; not for classes that were derived from such a class."""
    return "_jitnorm_original" in vars(cls)


def patched_class(
    original: type[torch.nn.Module], kernels: Kernels | None = None, rounding: str = "once"
) -> type[torch.nn.Module]:
    """Return the class to which a module of a class is changed. It is created once.

    Args:
        original: the class.
        kernels: what replaces a norm; None for other modules.
        rounding: where the kernels of other modules round.
    """
    if (original, kernels, rounding) not in _classes:
        bases, attributes = _bases_and_attributes(original, kernels)
        attributes = {
            "__module__": __name__,
            "__doc__": original.__doc__,
            "__prepare_scriptable__": refuse_script,
            "__reduce_ex__": _reduce,
            "_jitnorm_original": original,
            "_jitnorm_rounding": rounding,
            **attributes,
        }
        name = original.__name__ if original.__name__ in MODELS else f"Jitnorm{original.__name__}"
        _classes[original, kernels, rounding] = type(name, (*bases, original), attributes)
    return _classes[original, kernels, rounding]


def _bases_and_attributes(
    original: type[torch.nn.Module], kernels: Kernels | None
) -> tuple[tuple[type[torch.nn.Module], ...], dict[str, Any]]:
    name = original.__name__
    if isinstance(kernels, GatedKernels):
        return (PatchedGatedNorm,), {"_jitnorm_kernels": kernels}
    if kernels is not None:
        return (base_of(original),), {"_jitnorm_kernels": kernels}
    if name in ATTENTION_CLASSES:
        return (PatchedAttention,), attention_attributes(original)
    if name in ROTARY_CLASSES:
        return (PatchedRotaryEmbedding,), {}
    if name in DECODER_LAYERS:
        return (PatchedDecoderLayer,), layer_attributes(original)
    if name in MLP_CLASSES:
        return (PatchedMLP,), {}
    return (), model_attributes(original)


def _reduce(module: torch.nn.Module, protocol: Any) -> Any:
    # Pickle looks classes up by name, and a patched class is created at run time.
    rule = module._jitnorm_kernels.arguments if isinstance(module, (PatchedNorm, PatchedGatedNorm)) else ()
    patched: Any = type(module)
    return _rebuild, (original_class(module), patched._jitnorm_rounding, *rule), module.__dict__


def _rebuild(original: type[torch.nn.Module], rounding: str, *rule: Any) -> torch.nn.Module:
    find = gated_kernels_of if rule and rule[0] in GATED_RULES else kernels_of
    cls = patched_class(original, find(*rule) if rule else None, rounding)
    return cls.__new__(cls)
