"""Attention layers of vLLM's models for tests on the CPU, and what one launch has to compute for them, in float64."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, BLOCK, BLOCKS, POSITIONS = 256, 4, 2, 64, 16, 5, 512
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def make(family: str, name: str, cache_config: Any, rope: dict[str, Any] = ROPE, **options: Any) -> Any:
    """Return an attention layer of a family of models, whose attention backend is FlashAttention's."""
    import transformers
    from vllm.model_executor.models import gemma3, llama, mistral, qwen2, qwen3

    prefix = f"model.layers.{name}.self_attn"
    shared = {"cache_config": cache_config, "prefix": prefix}
    if family == "qwen3":
        sizes = {"head_dim": HEAD_DIM, "max_position": POSITIONS}
        return qwen3.Qwen3Attention(HIDDEN, HEADS, KV_HEADS, rope, **sizes, **shared, **options)
    if family == "qwen2":
        return qwen2.Qwen2Attention(HIDDEN, HEADS, KV_HEADS, rope, max_position=POSITIONS, **shared, **options)
    sizes = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": POSITIONS,
        "rope_parameters": rope,
        "num_hidden_layers": 2,
    }
    if family in ("llama", "mistral"):
        config = transformers.LlamaConfig(**sizes)
        for key, value in options.items():
            setattr(config, key, value)
        cls = llama.LlamaAttention if family == "llama" else mistral.MistralAttention
        return cls(config, HIDDEN, HEADS, KV_HEADS, max_position_embeddings=POSITIONS, **shared)
    assert family == "gemma3"
    parameters = {"full_attention": rope, "sliding_attention": rope}
    sizes |= {"rope_parameters": parameters, "layer_types": ["full_attention", "sliding_attention"]}
    config = transformers.Gemma3TextConfig(**sizes, sliding_window=32, query_pre_attn_scalar=HEAD_DIM)
    return gemma3.Gemma3Attention(config, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, POSITIONS, **shared, **options)


@contextmanager
def forward_context(config: Any, **slots: torch.Tensor):
    """Enter vLLM's context of a forward pass, with the slots of each layer by its prefix, and no metadata."""
    from vllm.forward_context import set_forward_context

    with set_forward_context(None, config, slot_mapping=slots):
        yield


class Recorder:
    """In place of an attention kernel: keeps its arguments, and returns q, so that a layer has a result."""

    def __init__(self, attn: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        attn.impl.forward = self

    def __call__(
        self, layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any, output: Any, **_: Any
    ):
        self.calls.append({"query": query.clone(), "key": key, "value": value, "kv_cache": kv_cache})
        output.copy_(query.float() * layer._q_scale if query.dtype == torch.float8_e4m3fn else query)
        return output


def exact(layer: Any, qkv: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q and k after norm and rotation, and v, `[tokens, heads, head_dim]`, in float64.

    The cosines are those of the layer's own table. With `[3, tokens]` positions each pair has its section's.
    """
    rotary = layer.rotary_emb
    q, k, v = qkv.double().view(len(qkv), -1, HEAD_DIM).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    if hasattr(layer, "q_norm"):
        offset = 1 if "Gemma" in type(layer.q_norm).__name__ else 0
        q, k = (
            x / (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * (norm.weight.double() + offset)
            for x, norm in ((q, layer.q_norm), (k, layer.k_norm))
        )
    angles = rotary.cos_sin_cache.double()[positions]
    cos, sin = angles.chunk(2, dim=-1)
    if positions.dim() == 2:
        section = torch.tensor(sections(rotary.mrope_section, rotary.mrope_interleaved))
        pick = section.expand(1, positions.shape[1], -1)
        cos, sin = cos.gather(0, pick)[0], sin.gather(0, pick)[0]
    cos, sin = cos[:, None], sin[:, None]
    half = rotary.rotary_dim // 2

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    return rotate(q), rotate(k), v


def sections(sizes: list[int], interleaved: bool) -> list[int]:
    """Return which of the three positions rotates each pair."""
    if not interleaved:
        return [i for i, size in enumerate(sizes) for _ in range(size)]
    return [i % 3 if i % 3 and i < 3 * sizes[i % 3] else 0 for i in range(sum(sizes))]


def caches(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the slots of the keys and of the values, `[slots, heads, head_dim]`, in float64."""
    values = kv_cache.view(torch.float8_e4m3fn).float() if kv_cache.dtype == torch.uint8 else kv_cache
    k, v = values.double().transpose(1, 2).reshape(-1, KV_HEADS, 2 * HEAD_DIM).split(HEAD_DIM, dim=-1)
    return k, v
