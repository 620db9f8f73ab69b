"""Read a model's Hugging Face config.json: which operators its forward pass calls, and with which sizes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitnorm.activation import (
    GELU_AND_MUL,
    GELU_TANH_AND_MUL,
    RELU2,
    SILU_AND_MUL,
    SWIGLUOAI_AND_MUL,
    Activation,
)
from jitnorm.core.norm_modules import PATCHABLE_FAMILIES, is_norm_family
from jitnorm.core.operators import OPERATORS
from jitnorm.dual_rmsnorm import DUAL_RMSNORM
from jitnorm.gated_rmsnorm import ACTIVATIONS, GATED_RMSNORM, GATED_RMSNORM_GATE_FIRST, GatedForm
from jitnorm.qknorm import QKNORM
from jitnorm.qknorm_rope_store import QK_NORM_ROPE_STORE, ROPE, STORE_HEADS
from jitnorm.store_cache import STORE_CACHE

# The operators of activations, by their names in `hidden_act`.
HIDDEN_ACTS = {
    "silu": SILU_AND_MUL.op,
    "swish": SILU_AND_MUL.op,
    "gelu": GELU_AND_MUL.op,
    "gelu_new": GELU_TANH_AND_MUL.op,
    "gelu_pytorch_tanh": GELU_TANH_AND_MUL.op,
    "relu2": RELU2.op,  # of MLPs without gates, such as Nemotron's
    "swigluoai": SWIGLUOAI_AND_MUL.op,  # of gpt-oss, whose config calls it "silu"
}

# Models that normalise each head of queries and keys, with the head_dim that the config may omit; None where that is
# hidden_size / num_attention_heads. Names are those of model_type, without "_" and a final "text".
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
# Models that normalise queries and keys over all heads at once.
_PER_PROJECTION = {"flexolmo", "minimaxm2", "olmo2", "olmo3", "olmoe"}
# Models whose norms of single heads come after the rotation, so that one launch cannot compute both.
_NORMS_AFTER_ROTATION = {"hunyuanv1dense", "hunyuanv1moe", "llama4"}
# Models that rotate elements 2 i and 2 i + 1 of a head, where most rotate i and i + rotary_dim / 2.
_INTERLEAVED = {"chatglm", "cohere", "cohere2", "ernie45", "ernie45moe", "glm", "glm4", "gptj"}
# The part of a head that is rotated, of models whose config may omit it.
_PARTIAL_ROTATIONS = {"glm": 0.5, "glm4": 0.5, "glm4moe": 0.5, "qwen3next": 0.25, "recurrentgemma": 0.5}
# Models with gated norms of the heads of linear attention, by the activation of the gate.
_GATED_HEADS = {
    **dict.fromkeys(("olmohybrid", "qwen35", "qwen35moe", "qwen3next", "qwen4exp"), "silu"),
    **dict.fromkeys(("bailinghybrid", "glm5next", "kimilinear"), "sigmoid"),
}
# Models with Mamba 2's norm of groups after the gate, and the number of groups where the config omits it.
_GATED_GROUPS = {"bamba": 1, "granitemoehybrid": 1, "mamba2": 8, "nemotronh": 8, "zamba2": 1}
_GROUPS_KEYS = ("n_groups", "mamba_n_groups", "mamba_ngroups")
# Known models without a rotation.
_NO_ROTATION = {"jamba", "mamba", "mamba2", "nemotronh"}
# Models whose norms multiply by 1 + weight.
_GEMMA_NORMS = {"gemma", "gemma2", "gemma3", "qwen3next", "recurrentgemma", "vaultgemma"}
# Models without norms of queries and keys, or whose config says whether they have them.
_PLAIN = {
    "arcee", "bitnet", "deepseekv2", "deepseekv3", "ernie45", "ernie45moe", "glm", "glm4", "glm4moe", "gptoss",
    "granite", "granitemoe", "granitemoeshared", "jamba", "kimik2", "llama", "mamba", "mamba2", "ministral", "mistral",
    "mistral3", "mixtral", "nemotronh", "phi3", "qwen2", "qwen2moe", "qwen2vl", "qwen25vl", "seedoss", "smollm3",
}  # fmt: skip
_KNOWN = {*_PER_HEAD, *_PER_PROJECTION, *_GEMMA_NORMS, *_PLAIN}
# The activations of families whose config may omit it.
_DEFAULT_ACTS = {
    **dict.fromkeys(("llama", "qwen", "mistral", "mixtral", "ministral"), "silu"),
    "gemma": "gelu_pytorch_tanh",
}
# The ranks of latent attention (DeepSeek and others), which are normalised.
_LATENT_RANKS = ("q_lora_rank", "kv_lora_rank")
# The widths of feed-forward layers.
_INTERMEDIATE_SIZES = (
    *("intermediate_size", "moe_intermediate_size"),
    *("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
)
# The keys of the activation, the most specific first.
_ACTIVATION_KEYS = ("hidden_activation", "hidden_act", "mlp_hidden_act")
# The keys of a rotary embedding: one of them shows that an unknown model has one.
_ROTATION_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "rotary_dim", "partial_rotary_factor")
# The keys under which multimodal models describe their language model.
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config")


@dataclass(frozen=True)
class Rotation:
    """How a model rotates heads of queries and keys.

    Attributes:
        head_dim: The elements of a head.
        rotary_dim: How many of them are rotated.
        is_interleaved: Whether elements 2 i and 2 i + 1 form a pair.
        has_sections: Whether tokens may have three positions (mRoPE).
        follows_norm: Whether each head is normalised before.
    """

    head_dim: int
    rotary_dim: int
    is_interleaved: bool
    has_sections: bool
    follows_norm: bool


@dataclass(frozen=True)
class MixerNorm:
    """The gated norm of linear attention, or of a Mamba 2 mixer.

    Attributes:
        op: The operator.
        size: The elements that are normalised together.
        activation: That of the gate: "silu" or "sigmoid".
    """

    op: str
    size: int
    activation: str = "silu"


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and operators of a model.

    Attributes:
        path: The config.json.
        hidden_sizes: All sizes that are normalised; the hidden size is the first.
        head_dims: Those among them that are normalised head by head, in queries and keys.
        latent_ranks: Those of latent attention, of queries and of keys and values; empty where one is missing.
        intermediate_sizes: The sizes of its feed-forward layers, dense and of experts.
        hidden_act: Their activation.
        is_gemma: Whether norms multiply by 1 + weight.
        kv_sizes: The elements in a token's row of the key and value caches.
        dtype: The dtype as the config spells it.
        notes: What the model may call that the config does not say.
        is_patchable: Whether the class of its norms is one that patch_transformers is known to recognise.
        has_patchable_layers: Whether it knows the classes of its attention, layers and MLPs.
        rotation: How heads are rotated; None for models without a rotation, with latent attention, or with heads of
            unknown size.
        mixer_norm: The gated norm of its linear attention or mixers, or None.
    """

    path: Path
    hidden_sizes: list[int]
    head_dims: list[int]
    latent_ranks: list[int]
    intermediate_sizes: list[int]
    hidden_act: str | None
    is_gemma: bool
    kv_sizes: list[int]
    dtype: str | None
    notes: list[str]
    is_patchable: bool
    has_patchable_layers: bool
    rotation: Rotation | None
    mixer_norm: MixerNorm | None

    def operators(self) -> list[str]:
        """Return the names of the operators that a forward pass calls."""
        norm, fused_norm = "rmsnorm", "fused_add_rmsnorm"
        norms = [f"gemma_{norm}", f"gemma_{fused_norm}"] if self.is_gemma else [norm, fused_norm]
        heads = [QKNORM.op] if self.head_dims and not self.is_gemma else []
        heads += [DUAL_RMSNORM.op] if self.latent_ranks and not self.is_gemma else []
        has_activation = self.hidden_act in HIDDEN_ACTS and self.intermediate_sizes
        activations = [HIDDEN_ACTS[self.hidden_act]] if has_activation and self.hidden_act else []
        norms += [f"{norms[1]}_round_sum"] if self.has_patchable_layers else []  # as transformers adds and normalises
        gated = [self.mixer_norm.op] if self.mixer_norm else []
        return [*norms, *gated, *heads, *self._attention_operators(), *activations, STORE_CACHE.op]

    def _attention_operators(self) -> list[str]:
        """Return the name of the operator between the projection of queries, keys and values and attention."""
        if self.rotation is None:
            return []
        return [QK_NORM_ROPE_STORE.op if self.rotation.follows_norm else ROPE.op]

    def options_of(self, op: str) -> list[dict[str, Any]]:
        """Return the options of `Operator.warmup_spec` for each kernel of `op` that the model calls."""
        if op == DUAL_RMSNORM.op and self.latent_ranks:
            return [{"hidden_size2": self.latent_ranks[1]}]
        if self.mixer_norm and op == self.mixer_norm.op:
            return [{"form": str(GatedForm(activation=self.mixer_norm.activation))}]
        rotation = self.rotation
        if rotation is None or op not in (QK_NORM_ROPE_STORE.op, ROPE.op):
            return [{}]
        options = {"rotary_dim": rotation.rotary_dim, "interleaved": rotation.is_interleaved}
        # Some callers have computed a token's one row of cosines and sines from its three positions before.
        return [{**options, "mrope": mrope} for mrope in ((False, True) if rotation.has_sections else (False,))]

    def sizes_of(self, op: str) -> tuple[list[int] | list[None], str]:
        """Return the sizes that the model calls `op` with, and what a model without any does not have.

        A size of None stands for most sizes: the config does not say which one it is.
        """
        if op == QKNORM.op:
            return self.head_dims, "norms of single heads"
        if op == DUAL_RMSNORM.op:
            return self.latent_ranks[:1], "q_lora_rank and kv_lora_rank"
        if op in (GATED_RMSNORM.op, GATED_RMSNORM_GATE_FIRST.op):
            norm = self.mixer_norm
            return [norm.size] if norm and op == norm.op else [], "norm beside a gate of this order"
        if op in (QK_NORM_ROPE_STORE.op, ROPE.op, STORE_HEADS.op):
            if self.rotation is None:
                return [], "rotated heads of known size"
            if op == QK_NORM_ROPE_STORE.op and not self.rotation.follows_norm:
                return [], "norms of single heads before their rotation"
            return [self.rotation.head_dim], ""
        if op == STORE_CACHE.op:
            return self.kv_sizes or [None], ""
        if "fused_add" in op:
            return self.hidden_sizes[:1], ""  # only the hidden size has a residual
        if names := [name for name, activation in HIDDEN_ACTS.items() if activation == op]:
            is_called = self.hidden_act is None or self.hidden_act in names
            return (self.intermediate_sizes or [None]) if is_called else [], f"hidden_act {' or '.join(names)}"
        if isinstance(OPERATORS[op], Activation):  # of a module that the config does not name
            return self.intermediate_sizes or [None], ""
        return self.hidden_sizes, "norms"

    def note_on_patching(self) -> str:
        """Return a note on which of `operators` the modules of patch_transformers do not call."""
        operators = self.operators()
        called, what = (
            operators[:1],
            "the norms alone" if self.is_patchable else "the norms that it recognises",
        )
        if self.has_patchable_layers:
            attention, activations = self._attention_operators(), HIDDEN_ACTS.values()
            called += [op for op in operators if op.endswith("_round_sum") or op in attention or op in activations]
            what = "norms, attention, layers and MLPs"
        called += [self.mixer_norm.op] if self.mixer_norm else []
        rest = [op for op in operators if op not in called]
        return f"{self.path}: patch_transformers replaces {what}, which call {', '.join(called)}: other code calls " + (
            ", ".join(rest)
        )


@dataclass(frozen=True)
class _Keys:
    """The keys of a config. Each method raises ValueError if the value has another type."""

    file: Path
    values: dict[str, Any]

    def integer(self, key: str) -> int | None:
        """Return a positive integer, or None if the key is missing."""
        value = self.values.get(key)
        return None if value is None else self._positive(key, value)

    def integers(self, key: str) -> list[int]:
        """Return one integer, or one for each layer. Empty if the key is missing or 0: the model has no such part."""
        value = self.values.get(key) or []
        return [self._positive(key, v) for v in (value if isinstance(value, list) else [value])]

    def number(self, key: str) -> float | None:
        """Return a number above 0, or None if the key is missing."""
        value = self.values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
            raise ValueError(f"{self.file}: {key} must be a number above 0, got {value!r}")
        return value

    def fraction(self, key: str) -> float | None:
        """Return a number above 0 and up to 1, or None if the key is missing."""
        value = self.values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1):
            raise ValueError(f"{self.file}: {key} must be a number above 0 and up to 1, got {value!r}")
        return value

    def inner(self, key: str) -> _Keys:
        """Return the keys of an inner object, which has none if the key is missing."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{self.file}: {key} must be an object, got {value!r}")
        return _Keys(self.file, value or {})

    def text(self, key: str) -> str | None:
        """Return a text, or None if the key is missing or the text is empty."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{self.file}: {key} must be text, got {value!r}")
        return value or None

    def texts(self, key: str) -> list[str]:
        """Return a list of texts, which is empty if the key is missing."""
        value = self.values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise ValueError(f"{self.file}: {key} must be a list of names, got {value!r}")
        return value

    @property
    def family(self) -> str:
        """Return the normalised model_type, or else the start of the architecture: qwen3 for Qwen3ForCausalLM."""
        name = self.text("model_type") or (self.texts("architectures") or [""])[0].partition("For")[0]
        return name.replace("_", "").lower().removesuffix("text")

    @property
    def head_dim(self) -> int:
        """Return the size of a head, or 0 if it is unknown."""
        heads, hidden_size = self.integer("num_attention_heads"), self.integer("hidden_size")
        shared = hidden_size // heads if heads and hidden_size else 0
        return self.integer("head_dim") or _PER_HEAD.get(self.family) or shared

    def _positive(self, key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.file}: {key} must be a whole number above 0, got {value!r}")
        return value


def read_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Read a config.json, or the one in a folder.

    Raises:
        ValueError: It cannot be read, has values of a wrong type, or has no hidden_size.
    """
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
        raise ValueError(f"{file} is not a model's config: it contains no JSON object")
    text: dict[str, Any] = next((outer[name] for name in _TEXT_CONFIGS if isinstance(outer.get(name), dict)), {})
    # Keys that the inner config omits are those of the outer one: the dtype in Gemma 3.
    config = _Keys(file, {**outer, **{name: value for name, value in text.items() if value is not None}})
    hidden_size = config.integer("hidden_size")
    if hidden_size is None:
        raise ValueError(f"{file} has no hidden_size")
    per_head, per_projection = _qk_norm_sizes(config)
    rotation = _rotation(config, bool(per_head))
    latents = [rank for key in _LATENT_RANKS for rank in config.integers(key)]
    intermediate_sizes = list(dict.fromkeys(size for key in _INTERMEDIATE_SIZES for size in config.integers(key)))
    named_act = next((act for act in map(config.text, _ACTIVATION_KEYS) if act), None)
    hidden_act = "swigluoai" if config.family == "gptoss" else named_act or _default_act(config.family)
    return ModelConfig(
        path=file,
        hidden_sizes=list(dict.fromkeys([hidden_size, *per_head, *per_projection, *latents])),
        head_dims=per_head,
        latent_ranks=latents if all(len(config.integers(key)) == 1 for key in _LATENT_RANKS) else [],
        intermediate_sizes=intermediate_sizes,
        hidden_act=hidden_act,
        is_gemma=config.family in _GEMMA_NORMS,
        kv_sizes=_kv_sizes(config),
        dtype=config.text("dtype") or config.text("torch_dtype"),
        notes=[
            *_notes_on_family(config),
            *_notes_on_rotation(config, rotation),
            *_notes_on_activation(file, hidden_act, intermediate_sizes),
        ],
        is_patchable=is_norm_family(config.family),
        has_patchable_layers=config.family in map(str.lower, PATCHABLE_FAMILIES),
        rotation=rotation,
        mixer_norm=_mixer_norm(config),
    )


def _default_act(family: str) -> str | None:
    return next((act for start, act in _DEFAULT_ACTS.items() if family.startswith(start)), None)


def _notes_on_family(config: _Keys) -> list[str]:
    if config.family in _KNOWN:
        return []
    kind = config.text("model_type") or next(iter(config.texts("architectures")), None)
    had = f"model_type {kind!r}, which is not known here" if kind else "no model_type"
    return [f"{config.file} has {had}: norms of queries and keys may be missing (--op and --hidden-size name one)"]


def _notes_on_rotation(config: _Keys, rotation: Rotation | None) -> list[str]:
    if rotation or not _has_rotation(config) or config.integers("kv_lora_rank"):
        return []
    return [f"{config.file} has no head_dim and no num_attention_heads: no rotation is built (--op names one)"]


def _notes_on_activation(file: Path, hidden_act: str | None, sizes: list[int]) -> list[str]:
    if not hidden_act:
        return [f"{file} has no hidden_act: no activation is built (--op names one)"]
    if hidden_act not in HIDDEN_ACTS:
        return [f"{file} has hidden_act {hidden_act!r}, which no kernel serves: no activation is built"]
    return [] if sizes else [f"{file} has no intermediate_size: no activation is built (--op names one)"]


def _kv_sizes(config: _Keys) -> list[int]:
    """Return the elements in a token's row of each cache.

    Latent attention caches the latent and the part with positions, for all heads at once.
    """
    if latent := config.integers("kv_lora_rank"):
        return [*latent, config.integer("qk_rope_head_dim") or latent[0]]
    kv_heads = config.integer("num_key_value_heads") or config.integer("num_attention_heads") or 0
    return [kv_heads * config.head_dim] if kv_heads * config.head_dim else []


def _qk_norm_sizes(config: _Keys) -> tuple[list[int], list[int]]:
    """Return the sizes of norms over one head of queries and keys, and over all heads."""
    heads, head_dim = config.integer("num_attention_heads"), config.head_dim
    if config.family in _PER_PROJECTION and heads:
        return [], [heads * head_dim, (config.integer("num_key_value_heads") or heads) * head_dim]
    if config.family in _PER_HEAD or config.values.get("use_qk_norm"):  # GLM-4.5 and others say it themselves
        return [head_dim] if head_dim else [], []
    return [], []


def _mixer_norm(config: _Keys) -> MixerNorm | None:
    """Return the gated norm of linear attention, or of a Mamba 2 mixer, as the model's class in transformers has it."""
    family = config.family
    if family in _GATED_HEADS:
        activation = config.text("output_gate_type") or _GATED_HEADS[family]  # the former is Qwen 4's
        return MixerNorm(GATED_RMSNORM.op, _linear_head_dim(config), activation) if activation in ACTIVATIONS else None
    if family in _GATED_GROUPS:
        op = GATED_RMSNORM_GATE_FIRST.op
    elif family == "falconh1" and config.values.get("mamba_rms_norm"):
        is_first = config.values.get("mamba_norm_before_gate") is False
        op = GATED_RMSNORM_GATE_FIRST.op if is_first else GATED_RMSNORM.op
    else:
        return None
    width = _mixer_width(config)
    groups = next((n for n in map(config.integer, _GROUPS_KEYS) if n), _GATED_GROUPS.get(family, 1))
    return MixerNorm(op, width // groups) if width % groups == 0 else None


def _linear_head_dim(config: _Keys) -> int:
    """Return the size of a head of values in linear attention."""
    if size := config.integer("linear_value_head_dim"):
        return size
    if config.family == "olmohybrid":
        heads = config.integer("linear_num_key_heads") or config.integer("num_attention_heads") or 1
        key_size = config.integer("linear_key_head_dim") or int(0.75 * (config.integer("hidden_size") or 0) / heads)
        return 2 * key_size
    if config.family == "bailinghybrid":
        return config.integer("head_dim") or 128
    return config.inner("linear_attn_config").integer("head_dim") or config.integer("linear_head_dim") or 128


def _mixer_width(config: _Keys) -> int:
    """Return the elements of a token in a Mamba 2 mixer."""
    if config.family == "nemotronh":
        return (config.integer("mamba_num_heads") or 128) * (config.integer("mamba_head_dim") or 64)
    if config.family == "falconh1" and config.values.get("mamba_d_ssm", 1024) is not None:
        return config.integer("mamba_d_ssm") or 1024
    expand = next((n for n in map(config.number, ("mamba_expand", "expand")) if n), 2)
    return int(expand * (config.integer("hidden_size") or 0))


def _has_rotation(config: _Keys) -> bool:
    is_named = any(config.values.get(key) is not None for key in _ROTATION_KEYS)
    return is_named or (config.family in _KNOWN and config.family not in _NO_ROTATION)


def _rotation(config: _Keys, has_norms: bool) -> Rotation | None:
    """Return how the model rotates its heads. Latent attention rotates a part of a head that is a tensor of its own."""
    head_dim = config.head_dim
    if not head_dim or not _has_rotation(config) or config.integers("kv_lora_rank"):
        return None
    rope = [config.inner(key) for key in ("rope_parameters", "rope_scaling")]
    # Parameters may be given for each type of layer, as in Gemma 3.
    rope += [keys.inner(kind) for keys in rope for kind, value in keys.values.items() if isinstance(value, dict)]
    parts = [keys.fraction("partial_rotary_factor") for keys in (config, *rope)]
    part = next((part for part in parts if part is not None), _PARTIAL_ROTATIONS.get(config.family, 1.0))
    return Rotation(
        head_dim=head_dim,
        rotary_dim=config.integer("rotary_dim") or int(head_dim * part),
        is_interleaved=config.family in _INTERLEAVED,
        has_sections=any(keys.integers("mrope_section") for keys in rope),
        follows_norm=has_norms and config.family not in _NORMS_AFTER_ROTATION,
    )
