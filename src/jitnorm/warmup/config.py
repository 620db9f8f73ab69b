"""Which kernels a model asks for, from its Hugging Face config.json."""

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
# Models whose norms multiply by 1 + weight.
_ADDS_ONE = {"gemma", "gemma2", "gemma3", "qwen3next", "recurrentgemma", "vaultgemma"}
# The ranks that latent attention (DeepSeek and its kin) compresses to, and normalises.
_LATENTS = ("q_lora_rank", "kv_lora_rank")
# The widths of feed-forward layers.
_INTERMEDIATE = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size")
# Where models with several parts describe their language model.
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True)
class Model:
    """The sizes that a model normalises and activates, and the dtype that it runs in."""

    path: Path
    hidden_sizes: list[int]
    head_dims: list[int]  # those among them that are normalised head by head, in queries and keys
    intermediate_sizes: list[int]  # of its feed-forward layers, dense and of experts
    hidden_act: str | None  # their activation
    adds_one: bool  # norms multiply by 1 + weight
    kv_sizes: list[int]  # elements in a token's row of the caches
    dtype: str | None


def read_config(path: str | os.PathLike[str]) -> Model:
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
    return Model(
        path=file,
        hidden_sizes=list(dict.fromkeys(sizes)),
        head_dims=per_head,
        intermediate_sizes=[config[k] for k in _INTERMEDIATE if isinstance(config.get(k), int)],
        hidden_act=config.get("hidden_activation") or config.get("hidden_act") or _default_act(config),
        adds_one=_family(config) in _ADDS_ONE,
        kv_sizes=_kv_sizes(config),
        dtype=config.get("dtype") or config.get("torch_dtype"),
    )


def _default_act(config: dict[str, Any]) -> str | None:
    """Gemma's configs may leave it out."""
    return "gelu_pytorch_tanh" if _family(config).startswith("gemma") else None


def _kv_sizes(config: dict[str, Any]) -> list[int]:
    """Of latent attention the latent and the part with positions, which are cached for all heads at once."""
    if config.get("kv_lora_rank"):
        return [config["kv_lora_rank"], config.get("qk_rope_head_dim") or config["kv_lora_rank"]]
    kv_heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or 0
    return [kv_heads * _head_dim(config)] if kv_heads * _head_dim(config) else []


def _qk_norm_sizes(config: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Of queries and keys that are normalised head by head, and of those that are normalised whole."""
    family, heads, head_dim = _family(config), config.get("num_attention_heads"), _head_dim(config)
    if family in _PER_PROJECTION and heads:
        return [], [heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim]
    if family in _PER_HEAD or config.get("use_qk_norm"):  # GLM-4.5 and others say it themselves
        return [head_dim] if head_dim else [], []
    return [], []


def _head_dim(config: dict[str, Any]) -> int:
    """0 where it cannot be known."""
    heads = config.get("num_attention_heads")
    shared = config["hidden_size"] // heads if heads else 0
    return config.get("head_dim") or _PER_HEAD.get(_family(config)) or shared


def _family(config: dict[str, Any]) -> str:
    """The model_type, or else the start of the architecture's name: Qwen3 of Qwen3ForCausalLM."""
    name = config.get("model_type") or (config.get("architectures") or [""])[0].partition("For")[0]
    return str(name).replace("_", "").lower().removesuffix("text")
