"""What the launch of an attention layer has to compute, or why vLLM's own operators stay, and its kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding

from jitnorm.integrations.vllm_plugin import compatibility
from jitnorm.jit.spec import KernelSpec, Target
from jitnorm.qknorm_rope_store import E4M3, HEAD_DIMS, QK_NORM_ROPE_STORE, ROPE, ROTARY_STEP, Variant

# The part of `compatibility.FINGERPRINTS` that each forward depends on. Classes that inherit one are replaced too.
FORWARDS = {
    "vllm.model_executor.models.qwen3:Qwen3Attention.forward": "qwen3",
    "vllm.model_executor.models.qwen2:Qwen2Attention.forward": "qwen2",
    "vllm.model_executor.models.llama:LlamaAttention.forward": "llama",
    "vllm.model_executor.models.mistral:MistralAttention.forward": "mistral",
    "vllm.model_executor.models.gemma3:Gemma3Attention.forward": "gemma3",
}
# Attention backends whose caches are `[blocks, heads, block_size, k and v]` and whose kernels read k and v there, with
# their part of `compatibility.FINGERPRINTS`.
BACKENDS = {"FLASH_ATTN": "flash_attn", "TRITON_ATTN": "triton_attn"}
SAME_DTYPES, FP8_DTYPES = ("auto", "float16", "bfloat16"), ("fp8", "fp8_e4m3")


class Fusion(NamedTuple):
    """What the launch of one layer computes; the attention layer has it as `jitnorm_fusion`.

    Attributes:
        heads: The numbers of heads of q, k and v.
        eps: That of the norms.
        weight_offset: What the norms add to their weights.
        is_neox: Whether element i is rotated with i + rotary_dim / 2.
        mrope_section: The sections of three positions, or None.
        mrope_interleaved: Whether the sections alternate.
        stores: Whether the layer has a cache of its own, and not that of an earlier layer.
        is_fp8: Whether the cache is float8.
        quantises_q: Whether the attention kernel takes float8 q.
    """

    heads: tuple[int, int, int]
    eps: float
    weight_offset: float
    is_neox: bool
    mrope_section: list[int] | None
    mrope_interleaved: bool
    stores: bool
    is_fp8: bool
    quantises_q: bool


def has_attention(module: Any) -> bool:
    """Return whether a module calls vLLM's attention itself."""
    return any(isinstance(child, Attention) for child in module.children())


def part_of(module: Any) -> str | None:
    """Return the part that a module's forward belongs to, or None if it is no attention layer that is known."""
    return FORWARDS.get(compatibility.name_of_forward(module))


def norms_of(module: Any) -> tuple[Any, Any] | None:
    """Return the norms of q and k, or None for attention without."""
    return (module.q_norm, module.k_norm) if hasattr(module, "q_norm") else None


def find_fusion(module: Any, dtype: torch.dtype, config: Any) -> Fusion | str:
    """Return what the launch of an attention layer has to compute, or why it stays as it is.

    Args:
        module: A layer for which `part_of` returned a part.
        dtype: That of the model.
        config: vLLM's configuration.
    """
    attn, rotary, norms = module.attn, module.rotary_emb, norms_of(module)
    reason = (
        _reason_of_config(config)
        or _reason_of_attention(attn, dtype)
        or _reason_of_rotation(rotary, attn.head_size, dtype)
        or _reason_of_norms(norms, attn.head_size, dtype)
    )
    if reason:
        return reason
    if getattr(module, "do_llama_4_scaling", False):
        return "it scales q by its position after the rotation"
    return Fusion(
        heads=(attn.num_heads, attn.num_kv_heads, attn.num_kv_heads),
        eps=1e-6 if norms is None else float(norms[0].variance_epsilon),
        weight_offset=1.0 if norms is not None and isinstance(norms[0], GemmaRMSNorm) else 0.0,
        is_neox=rotary.is_neox_style,
        mrope_section=list(section) if (section := getattr(rotary, "mrope_section", None)) else None,
        mrope_interleaved=bool(getattr(rotary, "mrope_interleaved", False)),
        stores=attn.kv_sharing_target_layer_name is None,
        is_fp8=attn.kv_cache_dtype in FP8_DTYPES,
        quantises_q=attn.query_quant is not None and attn.impl.supports_quant_query_input,
    )


def _reason_of_config(config: Any) -> str | None:
    parallel = config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context parallelism attends to k and v of the step itself"
    if config.compilation_config.pass_config.fuse_attn_quant:
        return "vLLM fuses it with the quantisation of its result (fuse_attn_quant)"
    return None


def _reason_of_attention(attn: Any, dtype: torch.dtype) -> str | None:
    if type(attn) is not Attention:
        return f"its attention is {type(attn).__name__}"
    if attn.attn_type != "decoder":
        return f"its attention is of type {attn.attn_type}"
    if attn.use_direct_call:
        return "vLLM calls the attention of this platform without an operator"
    backend = attn.attn_backend.get_name()
    if backend not in BACKENDS:
        return f"the attention backend {backend} is not supported"
    if problem := compatibility.changed(BACKENDS[backend]):
        return problem
    if attn.attn_backend.forward_includes_kv_cache_update:
        return f"the attention backend {backend} stores k and v itself"
    if attn.calculate_kv_scales:
        return "the scales of its cache are calculated in the first forward pass"
    if attn.kv_cache_dtype not in SAME_DTYPES + FP8_DTYPES:
        return f"kv_cache_dtype {attn.kv_cache_dtype} is not supported"
    if attn.kv_cache_dtype in SAME_DTYPES and attn.kv_cache_torch_dtype != dtype:
        return f"its cache is {attn.kv_cache_torch_dtype}, and the model {dtype}"
    if attn.head_size_v != attn.head_size:
        return "heads of v have another size than those of k"
    if attn.query_quant is not None and attn._q_scale.numel() != 1:
        return "q is quantised with a scale for each head"
    return None if attn.head_size in HEAD_DIMS else f"no kernel supports head_dim {attn.head_size}"


def _reason_of_rotation(rotary: Any, head_dim: int, dtype: torch.dtype) -> str | None:
    cls = type(rotary)
    methods = ("forward", "forward_native", "forward_cuda")  # subclasses that only compute the cosines override none
    known = any(
        all(getattr(cls, name, None) is getattr(base, name) for name in methods)
        for base in (RotaryEmbedding, MRotaryEmbedding)
    )
    if not known or getattr(rotary, "use_flashinfer", False):
        return f"its rotary embedding is {cls.__name__}"
    if problem := compatibility.changed("rotation"):
        return problem
    if rotary.head_size != head_dim or rotary.cos_sin_cache.shape[-1] != rotary.rotary_dim:
        return f"its rotary embedding is for heads of {rotary.head_size} elements"
    if rotary.rotary_dim % ROTARY_STEP or not 0 < rotary.rotary_dim <= head_dim:
        return f"no kernel rotates {rotary.rotary_dim} of {head_dim} elements"
    if rotary.cos_sin_cache.dtype not in (dtype, torch.float32):
        return f"its cosines are {rotary.cos_sin_cache.dtype}, and the model {dtype}"
    return None


def _reason_of_norms(norms: tuple[Any, Any] | None, head_dim: int, dtype: torch.dtype) -> str | None:
    for norm in norms or ():
        if not isinstance(norm, (RMSNorm, GemmaRMSNorm)):
            return f"its norm of q and k is {type(norm).__name__}"
        if not getattr(norm, "has_weight", True) or getattr(norm, "variance_size_override", None) is not None:
            return "its norm of q and k has no weight, or another size"
        if norm.weight.shape != (head_dim,) or norm.weight.dtype not in (dtype, torch.float32):
            return f"its norm of q and k has a weight of {tuple(norm.weight.shape)}, {norm.weight.dtype}"
    if norms and (type(norms[0]), norms[0].variance_epsilon, norms[0].weight.dtype) != (
        *(type(norms[1]), norms[1].variance_epsilon, norms[1].weight.dtype),
    ):
        return "the norms of q and k differ"
    return None


def specs(module: Any, fusion: Fusion, dtype: torch.dtype, target: Target) -> list[KernelSpec]:
    """Return the kernels that a layer calls: with its cache, and without in vLLM's profiling run."""
    rotary, norms = module.rotary_emb, norms_of(module)
    variants = {
        Variant(
            head_dim=module.attn.head_size,
            rotary_dim=rotary.rotary_dim,
            dtype=dtype,
            weight_dtype=None if norms is None else norms[0].weight.dtype,
            cos_sin_dtype=rotary.cos_sin_cache.dtype,
            cache_dtype=cache_dtype,
            q_out_dtype=E4M3 if fusion.quantises_q else dtype,
            is_neox=fusion.is_neox,
            has_sections=has_sections,
        ): None
        for cache_dtype in (E4M3 if fusion.is_fp8 and fusion.stores else dtype, dtype)
        for has_sections in {False, fusion.mrope_section is not None}
    }
    operator = ROPE if norms is None else QK_NORM_ROPE_STORE
    return [operator.spec(variant, target) for variant in variants]
