"""The attention layers of vLLM's models with one launch between the QKV projection and the attention kernel.

The launch normalises q and k where the model does, rotates them, and stores k and v into the layer's cache. Like vLLM's
own `unified_kv_cache_update`, the operator finds the cache, its scales and the slots in the forward context, so they
are no arguments of a compiled graph. It writes no argument: it returns a new q, on which the attention kernel depends.
"""

# No `from __future__ import annotations`: infer_schema reads the annotations of the operator.

from typing import Any

import torch
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name

from jitnorm.integrations.vllm_plugin.classes import replace_class
from jitnorm.integrations.vllm_plugin.fusion import Fusion, norms_of
from jitnorm.integrations.vllm_plugin.operators import define
from jitnorm.qknorm_rope_store import (
    E4M3,
    qk_norm_rope_store,
)

OPERATOR = "jitnorm_vllm::qk_norm_rope_store"  # its name in a compiled graph

_is_compiling = torch.compiler.is_compiling


def _run(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    num_heads: int,
    head_dim: int,
    quantises_q: bool,
    layer_name: LayerNameType,
) -> torch.Tensor:
    """Launch the kernel for the layer of this name. Without slots, as in vLLM's profiling run, nothing is stored."""
    _, layer, kv_cache, slot_mapping = get_attention_context(_resolve_layer_name(layer_name))
    fusion: Fusion = layer.jitnorm_fusion
    tokens = qkv.shape[0]
    q, k, values = qkv.view(tokens, sum(fusion.heads), head_dim).split_with_sizes(fusion.heads, 1)
    q_out = qkv.new_empty((tokens, num_heads, head_dim), dtype=E4M3 if quantises_q else None)
    k_out = qkv.new_empty((tokens, fusion.heads[1], head_dim))  # written instead of qkv, which others may read
    v = k_cache = v_cache = slots = k_scale = v_scale = None
    if slot_mapping is not None and fusion.stores:
        v, slots = values, slot_mapping
        k_cache, v_cache = kv_cache.transpose(1, 2).split_with_sizes((head_dim, head_dim), -1)
        if fusion.is_fp8:
            k_cache, v_cache = k_cache.view(E4M3), v_cache.view(E4M3)
            k_scale, v_scale = layer._k_scale, layer._v_scale
    qk_norm_rope_store(
        *(q, k, v, cos_sin_cache, positions, k_cache, v_cache, slots),
        q_weight=q_weight,
        k_weight=k_weight,
        eps=fusion.eps,
        weight_offset=fusion.weight_offset,
        is_neox=fusion.is_neox,
        mrope_section=fusion.mrope_section,
        mrope_interleaved=fusion.mrope_interleaved,
        q_out=q_out,
        k_out=k_out,
        q_scale=layer._q_scale if quantises_q else None,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return q_out


def _fake(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    num_heads: int,
    head_dim: int,
    quantises_q: bool,
    layer_name: LayerNameType,
) -> torch.Tensor:
    return qkv.new_empty((qkv.shape[0], num_heads, head_dim), dtype=E4M3 if quantises_q else None)


define(OPERATOR.partition("::")[2], _run, _fake)


class _FusedAttention(torch.nn.Module):
    """The base class that a replaced attention class has before vLLM's."""

    qkv_proj: Any
    q_norm: Any
    k_norm: Any
    rotary_emb: Any
    attn: Any
    o_proj: Any
    _jitnorm_has_norms: bool

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Compute what vLLM's forward computes, with one launch between the projection and the attention kernel."""
        qkv, _ = self.qkv_proj(hidden_states)
        attn = self.attn
        fusion = attn.jitnorm_fusion
        num_heads, num_kv_heads, _ = fusion.heads
        head_dim = attn.head_size
        _, k, v = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim).split(list(fusion.heads), dim=1)
        output = torch.empty((qkv.shape[0], num_heads * head_dim), dtype=qkv.dtype, device=qkv.device)
        output_heads = output.view(-1, num_heads, head_dim)
        has_norms, layer_name = self._jitnorm_has_norms, _encode_layer_name(attn.layer_name)
        # In eager mode the function itself: torch's dispatcher would take several microseconds.
        launch = torch.ops.jitnorm_vllm.qk_norm_rope_store if _is_compiling() else _run
        # Nothing may come between the two operators: vLLM splits the graph at both, into one piece.
        q = launch(
            qkv,
            positions,
            self.rotary_emb.cos_sin_cache,
            self.q_norm.weight if has_norms else None,
            self.k_norm.weight if has_norms else None,
            num_heads,
            head_dim,
            fusion.quantises_q,
            layer_name,
        )
        # The attention kernels read k and v from the cache. These have the shapes that vLLM's operator takes.
        torch.ops.vllm.unified_attention_with_output(q, k, v, output_heads, layer_name)
        result, _ = self.o_proj(output)
        return result  # type: ignore[no-any-return]


def replace(module: Any, fusion: Fusion) -> None:
    """Change a module's class to one that makes the launch."""
    module.attn.jitnorm_fusion = fusion
    module._jitnorm_has_norms = norms_of(module) is not None
    replace_class(module, _FusedAttention)
