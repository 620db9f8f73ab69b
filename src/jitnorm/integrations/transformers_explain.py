"""Say what each module of a patched Hugging Face model became, and why others were left."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import torch

from jitnorm.core.norm_modules import original_class
from jitnorm.integrations.transformers_attention import ROTARY_CLASSES
from jitnorm.integrations.transformers_classes import find_replacement, is_patched, kind_of
from jitnorm.integrations.transformers_gated import PatchedGatedNorm
from jitnorm.integrations.transformers_layers import (
    MODELS,
    PatchedDecoderLayer,
    next_norm,
    reason_not_to_add,
    reason_of_norm,
)
from jitnorm.integrations.transformers_mlp import gated_activation
from jitnorm.integrations.transformers_norms import PatchedNorm
from jitnorm.integrations.transformers_projections import PROJECTIONS, is_fused, projections_of
from jitnorm.integrations.transformers_state import ForwardState, is_plain


class Explanation(UserDict[str, str]):
    """The name of each module of a kind to patch, with what became of it. Its text has one line for each."""

    def __str__(self) -> str:
        return "\n".join(f"{name or '(the model)'}: {text}" for name, text in self.items())


def explain(model: torch.nn.Module) -> Explanation:
    """Return what each norm, attention module, decoder layer and MLP of a Hugging Face model became.

    The model is described as it is now: a hook that was added after `patch_transformers` is a reason too. What is
    described runs in calls without gradients, outside autocast and torch.compile.

    Args:
        model: any module, patched or not.

    Returns:
        The name in the model of each such module, with one sentence.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    explanation = Explanation()
    additions = _additions(model)
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is None:
            continue
        cls = original_class(module).__name__
        if is_patched(module):
            explanation[name] = f"{cls}, patched: {additions.get(module) or _describe(module, kind)}"
        else:
            replacement = find_replacement(module, kind)
            rule = "" if replacement.kernels is None else f" (rule {replacement.kernels.rule.name})"
            explanation[name] = f"{cls}, left: {replacement.reason or f'patch_transformers can replace it{rule}'}"
    return explanation


def _describe(module: torch.nn.Module, kind: str) -> str:
    """Return what a patched module other than a decoder layer does."""
    name = original_class(module).__name__
    if name in MODELS:
        return "tells its layers which tensors they may overwrite"
    if name in ROTARY_CLASSES:
        return "prepares the cosines and sines for the kernels of its layers"
    if not is_plain(module) and "forward" in vars(module):
        return "but its forward was replaced on the instance since"
    if isinstance(module, (PatchedNorm, PatchedGatedNorm)):
        rule = module._jitnorm_kernels.rule
        return f"one kernel normalises and rounds once (rule {rule.name}: {rule.formula})"
    if kind == "attention":
        return f"one kernel rotates q and k, after their norms if there are any{_gemms(module, 'Attention')}"
    if kind == "mlp":
        if projections_of(module, "MLP") is None or gated_activation(module._modules.get("act_fn")) is None:
            return "but the original forward runs: its projections or activation are others now, or have hooks"
        return f"one kernel computes the activation and the product{_gemms(module, 'MLP')}"
    return "but the original additions run: it is in no patched model"


def _gemms(module: torch.nn.Module, kind: str) -> str:
    projections = projections_of(module, kind)
    names = " and ".join(PROJECTIONS[kind])
    return f"; one GEMM computes {names}" if projections is not None and is_fused(projections) else ""


def _additions(model: torch.nn.Module) -> dict[torch.nn.Module, str]:
    """Return what the layers of each patched model in `model` do with their two residual additions."""
    found: dict[torch.nn.Module, str] = {}
    for module in model.modules():
        if original_class(module).__name__ not in MODELS or not is_patched(module):
            continue
        reason: str | None = "its residual is the input of the model"
        layers: Any = module._modules["layers"]
        state = ForwardState(module)
        for layer in layers:
            if not isinstance(layer, PatchedDecoderLayer):
                reason = "the layer before is not patched"
                continue
            first = reason or reason_not_to_add(layer, "self_attn") or reason_of_norm(layer)
            norm = reason_of_norm(layer) or reason_not_to_add(layer, "mlp") or next_norm(state, layer)
            second = norm if isinstance(norm, str) else None
            found[layer] = _sentence(first, second)
            reason = f"PyTorch made its residual, because {second}" if second else None
    return found


def _sentence(first: str | None, second: str | None) -> str:
    if first is None and second is None:
        return "kernels add both residuals, each with the next norm"
    if first and second:
        return f"PyTorch adds both residuals: of attention, because {first}; of the MLP, because {second}"
    by_kernel, by_torch = ("MLP", "attention") if first else ("attention", "MLP")
    return (
        f"a kernel adds the residual of the {by_kernel}, with the next norm; PyTorch that of the {by_torch}, "
        f"because {first or second}"
    )
