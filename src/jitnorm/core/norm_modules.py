"""Recognise RMSNorm and attention modules, of engines and of transformers, that kernels can replace."""

from __future__ import annotations

from typing import Any

import torch

# What is known by name, for layers that get modules of engines. `patch_transformers` looks at what a class computes.
# Whole names, not endings: Gemma3n's and Gemma 4's classes, for example, multiply by the weight alone.
LLAMA_CLASSES = (
    "LlamaRMSNorm",
    "MistralRMSNorm",
    "MixtralRMSNorm",
    "Qwen2RMSNorm",
    "Qwen2MoeRMSNorm",
    "Qwen2_5_VLRMSNorm",
    "Qwen3RMSNorm",
    "Qwen3MoeRMSNorm",
    "Qwen3VLTextRMSNorm",
    "Phi3RMSNorm",
)
# Classes that multiply by 1 + weight.
GEMMA_CLASSES = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "Qwen3NextRMSNorm")
# Model families of transformers whose attention, layers and MLPs `patch_transformers` replaces.
PATCHABLE_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3")


def is_norm_family(family: str) -> bool:
    """Return whether kernels can replace the norms of a model family.

    Args:
        family: the model_type of a config, without "_" and without a final "text".
    """
    prefixes = (name.removesuffix("RMSNorm").replace("_", "") for name in LLAMA_CLASSES + GEMMA_CLASSES)
    return family in {prefix.lower().removesuffix("text") for prefix in prefixes}


def original_class(module: torch.nn.Module) -> type[torch.nn.Module]:
    """Return the class of `module`, or the class it had before `patch_transformers` replaced it."""
    original: type[torch.nn.Module] = getattr(type(module), "_jitnorm_original", type(module))
    return original


def weight_offset(norm: torch.nn.Module) -> float | None:
    """Return what `norm` adds to its weight, or None if it is not known to multiply by its weight and do no more."""
    if "forward" in norm.__dict__ or norm._forward_hooks or norm._forward_pre_hooks or _has_any_global_hook():
        return None
    name = original_class(norm).__name__
    if name == "RMSNorm" or name in LLAMA_CLASSES:
        return 0.0
    return 1.0 if name in GEMMA_CLASSES else None


def weight_of(norm: torch.nn.Module) -> Any:
    """Return the weight of `norm`, or None."""
    return getattr(norm, "weight", None)


def eps_of(norm: torch.nn.Module) -> Any:
    """Return the eps of `norm`, under either of its names, or None."""
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))


_has_any_global_hook = torch.nn.modules.module._has_any_global_hook
