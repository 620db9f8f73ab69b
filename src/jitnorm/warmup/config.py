"""Which kernels a model asks for, from its Hugging Face config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitnorm.activation_ops import GELU_AND_MUL, GELU_TANH_AND_MUL, SILU_AND_MUL
from jitnorm.integrations.transformers import is_supported_family

# What models call the activations that have kernels.
HIDDEN_ACTS = {
    "silu": SILU_AND_MUL.op,
    "swish": SILU_AND_MUL.op,
    "gelu": GELU_AND_MUL.op,
    "gelu_new": GELU_TANH_AND_MUL.op,
    "gelu_pytorch_tanh": GELU_TANH_AND_MUL.op,
}

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
# Models that have norms of other kinds only, or that say more themselves.
_PLAIN = {
    "arcee", "bitnet", "deepseekv2", "deepseekv3", "ernie45", "ernie45moe", "glm", "glm4", "glm4moe", "gptoss",
    "granite", "granitemoe", "granitemoeshared", "jamba", "kimik2", "llama", "mamba", "mamba2", "ministral", "mistral",
    "mistral3", "mixtral", "phi3", "qwen2", "qwen2moe", "qwen2vl", "qwen25vl", "seedoss", "smollm3",
}  # fmt: skip
_KNOWN = {*_PER_HEAD, *_PER_PROJECTION, *_ADDS_ONE, *_PLAIN}
# What families take for the activation where the config leaves it out.
_DEFAULT_ACTS = {
    **dict.fromkeys(("llama", "qwen", "mistral", "mixtral", "ministral"), "silu"),
    "gemma": "gelu_pytorch_tanh",
}
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
    notes: list[str]  # what the model may call that cannot be told from the config, a line each
    is_patchable: bool  # whether patch_transformers knows the class of its norms

    def note_on_patch(self, ops: Sequence[str]) -> str:
        """Return which of `ops`, all that is built for the model, the modules of patch_transformers do not call."""
        norm = "gemma_rmsnorm" if self.adds_one else "rmsnorm"
        if not self.is_patchable:
            return f"{self.path}: patch_transformers replaces no module of this model_type: other code calls these"
        rest = ", ".join(op for op in ops if op != norm)
        return f"{self.path}: patch_transformers replaces the norms alone, which call {norm}: other code calls {rest}"


@dataclass(frozen=True)
class _Keys:
    """The keys of a config, each of the type that it must have. ValueError where it is not."""

    file: Path
    values: dict[str, Any]

    def whole(self, key: str) -> int | None:
        """None where it is left out."""
        value = self.values.get(key)
        return None if value is None else self._whole(key, value)

    def wholes(self, key: str) -> list[int]:
        """One, or one for each layer. None of them where it is left out, or 0: the model has no such part."""
        value = self.values.get(key) or []
        return [self._whole(key, v) for v in (value if isinstance(value, list) else [value])]

    def text(self, key: str) -> str | None:
        """None where it is left out, or empty."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{self.file}: {key} must be text, got {value!r}")
        return value or None

    def texts(self, key: str) -> list[str]:
        """None of them where it is left out."""
        value = self.values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ValueError(f"{self.file}: {key} must be a list of names, got {value!r}")
        return value

    @property
    def family(self) -> str:
        """The model_type, or else the start of the architecture's name: Qwen3 of Qwen3ForCausalLM."""
        name = self.text("model_type") or (self.texts("architectures") or [""])[0].partition("For")[0]
        return name.replace("_", "").lower().removesuffix("text")

    @property
    def head_dim(self) -> int:
        """0 where it cannot be known."""
        heads, hidden_size = self.whole("num_attention_heads"), self.whole("hidden_size")
        shared = hidden_size // heads if heads and hidden_size else 0
        return self.whole("head_dim") or _PER_HEAD.get(self.family) or shared

    def _whole(self, key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.file}: {key} must be a whole number above 0, got {value!r}")
        return value


def read_config(path: str | os.PathLike[str]) -> Model:
    """From a config.json, or the folder that holds one. ValueError where it cannot be read or describes no RMSNorm."""
    if not os.fspath(path):
        raise ValueError(f"config must be a file or a folder, got {path!r}")
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
    config = _Keys(file, {**outer, **{name: value for name, value in text.items() if value is not None}})
    hidden_size = config.whole("hidden_size")
    if hidden_size is None:
        raise ValueError(f"{file} has no hidden_size")
    per_head, whole = _qk_norm_sizes(config)
    latents = [rank for key in _LATENTS for rank in config.wholes(key)]
    intermediate_sizes = list(dict.fromkeys(size for key in _INTERMEDIATE for size in config.wholes(key)))
    hidden_act = config.text("hidden_activation") or config.text("hidden_act") or _default_act(config.family)
    return Model(
        path=file,
        hidden_sizes=list(dict.fromkeys([hidden_size, *per_head, *whole, *latents])),
        head_dims=per_head,
        intermediate_sizes=intermediate_sizes,
        hidden_act=hidden_act,
        adds_one=config.family in _ADDS_ONE,
        kv_sizes=_kv_sizes(config),
        dtype=config.text("dtype") or config.text("torch_dtype"),
        notes=[*_notes_on_family(config), *_notes_on_activation(file, hidden_act, intermediate_sizes)],
        is_patchable=is_supported_family(config.family),
    )


def _default_act(family: str) -> str | None:
    return next((act for start, act in _DEFAULT_ACTS.items() if family.startswith(start)), None)


def _notes_on_family(config: _Keys) -> list[str]:
    if config.family in _KNOWN:
        return []
    kind = config.text("model_type") or next(iter(config.texts("architectures")), None)
    had = f"model_type {kind!r}, which is not known here" if kind else "no model_type"
    return [f"{config.file} has {had}: norms of queries and keys may be missing (--op and --hidden-size name one)"]


def _notes_on_activation(file: Path, hidden_act: str | None, sizes: list[int]) -> list[str]:
    if not hidden_act:
        return [f"{file} has no hidden_act: no activation is built (--op names one)"]
    if hidden_act not in HIDDEN_ACTS:
        return [f"{file} has hidden_act {hidden_act!r}, which no kernel serves: no activation is built"]
    return [] if sizes else [f"{file} has no intermediate_size: no activation is built (--op names one)"]


def _kv_sizes(config: _Keys) -> list[int]:
    """Of latent attention the latent and the part with positions, which are cached for all heads at once."""
    if latent := config.wholes("kv_lora_rank"):
        return [*latent, config.whole("qk_rope_head_dim") or latent[0]]
    kv_heads = config.whole("num_key_value_heads") or config.whole("num_attention_heads") or 0
    return [kv_heads * config.head_dim] if kv_heads * config.head_dim else []


def _qk_norm_sizes(config: _Keys) -> tuple[list[int], list[int]]:
    """Of queries and keys that are normalised head by head, and of those that are normalised whole."""
    heads, head_dim = config.whole("num_attention_heads"), config.head_dim
    if config.family in _PER_PROJECTION and heads:
        return [], [heads * head_dim, (config.whole("num_key_value_heads") or heads) * head_dim]
    if config.family in _PER_HEAD or config.values.get("use_qk_norm"):  # GLM-4.5 and others say it themselves
        return [head_dim] if head_dim else [], []
    return [], []
