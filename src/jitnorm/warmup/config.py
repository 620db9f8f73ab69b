"""Which RMSNorms a model has, from its Hugging Face config.json."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Models that normalise queries and keys head by head: over head_dim, which is this where the config leaves it out, and
# hidden_size / num_attention_heads where that is None. Names as in model_type, without "_" and a final "text".
_PER_HEAD: dict[str, int | None] = {
    "apertus": None,
    "dots1": None,
    "exaone4": None,
    "gemma3": 256,
    "gemma3n": 256,
    "hunyuanv1dense": None,
    "hunyuanv1moe": None,
    "lfm2": None,
    "qwen3": 128,
    "qwen3moe": None,
    "qwen3next": 256,
    "qwen3vl": 128,
    "qwen3vlmoe": None,
}
# Models that normalise them whole, over all heads at once.
_PER_PROJECTION = {"flexolmo", "minimaxm2", "olmo2", "olmo3", "olmoe"}
# The ranks that latent attention (DeepSeek and its kin) compresses to, and normalises.
_LATENTS = ("q_lora_rank", "kv_lora_rank")
# Where models with several parts describe their language model.
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True)
class ModelNorms:
    """The sizes that a model normalises, and the dtype that it runs in."""

    path: Path
    hidden_sizes: list[int]
    head_dims: list[int]  # those among them that are normalised head by head, in queries and keys
    dtype: str | None


def read_config(path: str | os.PathLike[str]) -> ModelNorms:
    """From a config.json, or the folder that holds one. ValueError where it cannot be read or describes no RMSNorm."""
    file = Path(path)
    if file.is_dir():
        file /= "config.json"
    try:
        outer = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(outer, dict):
        raise ValueError(f"{file} is not a model's config: it holds no JSON object")
    text: dict[str, Any] = next((outer[name] for name in _TEXT_CONFIGS if isinstance(outer.get(name), dict)), {})
    # What the inner config leaves out the outer one says: in Gemma 3 that is the dtype.
    config = {**outer, **{name: value for name, value in text.items() if value is not None}}
    if not isinstance(config.get("hidden_size"), int):
        raise ValueError(f"{file} has no hidden_size")
    per_head, whole = _qk_norm_sizes(config)
    sizes = [config["hidden_size"], *per_head, *whole, *(config[k] for k in _LATENTS if config.get(k))]
    return ModelNorms(file, list(dict.fromkeys(sizes)), per_head, config.get("dtype") or config.get("torch_dtype"))


def _qk_norm_sizes(config: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Of queries and keys that are normalised head by head, and of those that are normalised whole."""
    family, heads = _family(config), config.get("num_attention_heads")
    head_dim = config.get("head_dim") or _PER_HEAD.get(family) or (config["hidden_size"] // heads if heads else 0)
    if family in _PER_PROJECTION and heads:
        return [], [heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim]
    if family in _PER_HEAD or config.get("use_qk_norm"):  # GLM-4.5 and others say it themselves
        return [head_dim] if head_dim else [], []
    return [], []


def _family(config: dict[str, Any]) -> str:
    """The model_type, or else the start of the architecture's name: Qwen3 of Qwen3ForCausalLM."""
    name = config.get("model_type") or (config.get("architectures") or [""])[0].partition("For")[0]
    return str(name).replace("_", "").lower().removesuffix("text")
