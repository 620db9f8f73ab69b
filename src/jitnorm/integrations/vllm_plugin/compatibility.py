"""Compare vLLM's version and the source of what is replaced with those that were tested. Does not import vLLM itself.

A plugin that replaces a method has to know what the method did. So each part of the plugin names the functions whose
behaviour it reproduces, or whose calls it relies on, and is left out if the source of one of them has changed.
"""

from __future__ import annotations

import functools
import pkgutil
import re
from importlib import metadata
from typing import Any

from jitnorm.integrations.engine_plugins import source_hash

TESTED = "0.26.0"
_MINOR_VERSION = re.compile(r"0\.26\.\d+")

_MODELS = "vllm.model_executor.models"
_LAYERS = "vllm.model_executor.layers"
_BACKENDS = "vllm.v1.attention.backends"
_GPU = "vllm.v1.worker.gpu"
_ROTARY = f"{_LAYERS}.rotary_embedding"

# The first 16 hexadecimal digits of SHA-256 of the source of each function in the tested version, by the part of the
# plugin that depends on it.
FINGERPRINTS: dict[str, dict[str, str]] = {
    "loading": {
        "vllm.model_executor.model_loader.base_loader:BaseModelLoader.load_model": "820d6f6570faf623",
    },
    "configuration": {
        "vllm.config.compilation:CompilationConfig.set_splitting_ops_for_v1": "1f374c746517a1ee",
        "vllm.config.vllm:VllmConfig.compute_hash": "5d5531f2157139f0",
    },
    "norms": {
        "vllm.model_executor.custom_op:CustomOp.__new__": "51c0f2816907bdca",
        "vllm.model_executor.custom_op:CustomOp.__init__": "35d008ad5a373a98",
        "vllm.model_executor.custom_op:CustomOp.dispatch_forward": "191239144c3e20bd",
        "vllm.model_executor.custom_op:CustomOp.register_oot": "5fc7c00a62aebb79",
        f"{_LAYERS}.layernorm:RMSNorm.__init__": "99deda66339a2ae8",
        f"{_LAYERS}.layernorm:RMSNorm.forward_native": "1f37da1444707040",
        f"{_LAYERS}.layernorm:RMSNorm.forward_cuda": "e86da8b93c37a6fd",
        f"{_LAYERS}.layernorm:GemmaRMSNorm.__init__": "939a95114b962fc6",
        f"{_LAYERS}.layernorm:GemmaRMSNorm.forward_native": "128b88f553516376",
        f"{_LAYERS}.layernorm:GemmaRMSNorm.forward_cuda": "4eed6a1c9a351e08",
    },
    "residuals": {
        f"{_MODELS}.qwen2:Qwen2Model.forward": "a0dc7899a93283f2",
        f"{_MODELS}.llama:LlamaModel.forward": "00b1fa210abbcdcf",
        f"{_MODELS}.mistral:MistralModel.forward": "aa16f1289793d8af",
        f"{_MODELS}.gemma3:Gemma3Model.forward": "5a7c6b0f032e32f3",
        f"{_MODELS}.qwen3:Qwen3DecoderLayer.forward": "2dbae90ca479be51",
        f"{_MODELS}.qwen2:Qwen2DecoderLayer.forward": "2dbae90ca479be51",
        f"{_MODELS}.llama:LlamaDecoderLayer.forward": "ab84e40134637a42",
        f"{_MODELS}.mistral:MistralDecoderLayer.forward": "3e31c233b1d1f69b",
        f"{_MODELS}.gemma3:Gemma3DecoderLayer.forward": "3563fea051637315",
    },
    "activations": {
        "vllm.model_executor.custom_op:CustomOp.__new__": "51c0f2816907bdca",
        "vllm.model_executor.custom_op:CustomOp.__init__": "35d008ad5a373a98",
        "vllm.model_executor.custom_op:CustomOp.dispatch_forward": "191239144c3e20bd",
        "vllm.model_executor.custom_op:CustomOp.register_oot": "5fc7c00a62aebb79",
        f"{_LAYERS}.activation:SiluAndMul.__init__": "dca1cc20d7cc21ab",
        f"{_LAYERS}.activation:SiluAndMul.forward_native": "9b60270df7fc0dab",
        f"{_LAYERS}.activation:SiluAndMul.forward_cuda": "f5d916fd707788b0",
        f"{_LAYERS}.activation:GeluAndMul.__init__": "8a4446a4b84e9bdc",
        f"{_LAYERS}.activation:GeluAndMul.forward_native": "c9d84b0582a9c1ec",
        f"{_LAYERS}.activation:GeluAndMul.forward_cuda": "f5d916fd707788b0",
    },
    "attention": {
        f"{_LAYERS}.attention.attention:Attention.forward": "213499b2acb41ace",
        f"{_LAYERS}.attention.attention:get_attention_context": "c90e77d37a61e6cb",
        f"{_LAYERS}.attention.attention:unified_kv_cache_update": "54f16fcc7edcca21",
        f"{_LAYERS}.attention.attention:unified_attention_with_output": "75f9ca48e47de404",
    },
    "rotation": {
        f"{_ROTARY}.base:RotaryEmbedding.forward_static": "1b4ae7f6310e89f3",
        f"{_ROTARY}.base:RotaryEmbedding.forward_native": "083c343f9bd4cb49",
        f"{_ROTARY}.base:RotaryEmbedding.forward_cuda": "b9f9a5bc20818d9d",
        f"{_ROTARY}.mrope:MRotaryEmbedding.forward_native": "be022e367f4ef64d",
        f"{_ROTARY}.mrope:MRotaryEmbedding.forward_cuda": "eff1eaf92e6d9805",
        f"{_ROTARY}.mrope:apply_interleaved_rope": "bdd8bafb5d91e20d",
        f"{_ROTARY}.common:ApplyRotaryEmb.forward_static": "391ffe46fbe743b1",
    },
    "qwen3": {
        f"{_MODELS}.qwen3:Qwen3Attention.forward": "06bb52cad8244111",
    },
    "qwen2": {
        f"{_MODELS}.qwen2:Qwen2Attention.forward": "0aec3ad4f6a49c43",
    },
    "llama": {
        f"{_MODELS}.llama:LlamaAttention.forward": "a0f9f508aa380b8b",
    },
    "mistral": {
        f"{_MODELS}.mistral:MistralAttention.forward": "9ed09b173fdc3103",
    },
    "gemma3": {
        f"{_MODELS}.gemma3:Gemma3Attention.forward": "5992ae0a21bbb544",
    },
    "flash_attn": {
        f"{_BACKENDS}.flash_attn:FlashAttentionBackend.get_kv_cache_shape": "0330eaec59875526",
        f"{_BACKENDS}.flash_attn:FlashAttentionImpl.forward": "5fc740485145d52b",
        f"{_BACKENDS}.flash_attn:FlashAttentionImpl.do_kv_cache_update": "406220a1ba8445df",
    },
    "decode attention": {
        f"{_LAYERS}.attention.attention:unified_attention_with_output": "75f9ca48e47de404",
        f"{_BACKENDS}.flash_attn:FlashAttentionBackend.get_kv_cache_shape": "0330eaec59875526",
        f"{_BACKENDS}.flash_attn:FlashAttentionMetadata": "997b3dca7be24b26",
        f"{_BACKENDS}.flash_attn:FlashAttentionMetadataBuilder.build": "a09d3afbdb80c8d5",
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState.prepare_attn": "30d27405e16f7931",
        # Which steps replay the graph of a decode step, and that a step runs before it is captured.
        "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager._init_candidates": "63797dbda0785d1c",
        "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.capture": "be8e4d40a3be3d3f",
        "vllm.v1.worker.gpu.cudagraph_utils:_is_compatible": "bf7f92a40822c366",
        "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.dispatch": "d77ce17fbf7db9ee",
        "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.initialize_cudagraph_keys": "31b2840d3c63b247",
        f"{_BACKENDS}.flash_attn:FlashAttentionImpl.__init__": "404d8b34a60b0c38",
        f"{_BACKENDS}.flash_attn:FlashAttentionImpl.forward": "5fc740485145d52b",
    },
    "decode steps": {
        f"{_GPU}.model_runner:GPUModelRunner.add_requests": "6c6c142a6202950e",
        f"{_GPU}.model_runner:GPUModelRunner.execute_model": "ebcc12adaaf4d693",
        f"{_GPU}.model_runner:GPUModelRunner.prepare_inputs": "baafd2ea7eca7db1",
        f"{_GPU}.model_runner:GPUModelRunner.prepare_attn": "cc5438d48f761b06",
        f"{_GPU}.model_runner:GPUModelRunner.sample": "2a48846515eadaf8",
        f"{_GPU}.model_runner:GPUModelRunner.sample_tokens": "1b261d09b992ee5b",
        f"{_GPU}.model_runner:GPUModelRunner.postprocess_sampled": "98d9a45f698e7d3d",
        f"{_GPU}.model_runner:sort_batch_req_ids": "e96b40e141e52449",
        f"{_GPU}.input_batch:InputBatch": "cbf4055784f8c46b",
        f"{_GPU}.input_batch:prepare_pos_seq_lens": "ef17c08c1dee0207",
        f"{_GPU}.input_batch:combine_sampled_and_draft_tokens": "a1d4485d15ba5e6e",
        f"{_GPU}.input_batch:get_num_sampled_and_rejected": "57da8d694e3213c2",
        f"{_GPU}.input_batch:post_update": "aa7d3b6f3a5b4403",
        f"{_GPU}.input_batch:_prepare_pos_seq_lens_kernel": "33c07567a9fe63e1",
        f"{_GPU}.input_batch:_combine_sampled_and_draft_tokens_kernel": "c02435e0be07b2fa",
        f"{_GPU}.input_batch:_get_num_sampled_and_rejected_kernel": "17bfac5e1599de85",
        f"{_GPU}.input_batch:_post_update_kernel": "1f8738a0c9e9928a",
        f"{_GPU}.block_table:BlockTables": "f100baf05b8d9aee",
        f"{_GPU}.block_table:_gather_block_tables_kernel": "e9f87a675c06a40b",
        f"{_GPU}.block_table:_compute_slot_mappings_kernel": "2eeb10f87a568a72",
        f"{_GPU}.buffer_utils:UvaBufferPool": "e048de6c10bccd1f",
        f"{_GPU}.states:RequestState": "f2a42fb37354a0b3",
        f"{_GPU}.sample.sampler:Sampler": "ce4a84b9742bd4ff",
        f"{_GPU}.sample.output:SamplerOutput": "736b3843d6550283",
        f"{_GPU}.sample.states:SamplingStates": "e8dfddbb2a3f1858",
        f"{_GPU}.sample.penalties:PenaltiesState.add_request": "c09dd07820c6c58d",
        f"{_GPU}.sample.penalties:PenaltiesState.apply_staged_writes": "d0ff4f881923111e",
        f"{_GPU}.sample.logit_bias:LogitBiasState.apply_staged_writes": "8a35d93b7b8af174",
        f"{_GPU}.sample.bad_words:BadWordsState.apply_staged_writes": "f0d8b30374d09cc6",
        f"{_GPU}.sample.logprob:LogprobTokenIdsState.apply_staged_writes": "d51e380cc7a90b36",
        f"{_GPU}.sample.gumbel:gumbel_sample": "71bddd90df471566",
        f"{_GPU}.sample.gumbel:_gumbel_sample_kernel": "10070a81106f2127",
        f"{_GPU}.sample.gumbel:gumbel_block_argmax": "aca9b33ca7162e0c",
        f"{_GPU}.sample.prompt_logprob:PromptLogprobsWorker.compute_prompt_logprobs": "2e4f558cae11935e",
        f"{_GPU}.sample.logit_bias:LogitBiasState.add_request": "bc6de84cd81d81fe",
        f"{_GPU}.sample.bad_words:BadWordsState.add_request": "b80c5e0bafa0048a",
        f"{_GPU}.async_utils:AsyncOutput.__init__": "a732aa4253109e34",
        f"{_GPU}.buffer_utils:UvaBackedTensor": "708e8bb4b5f1e5b7",
        f"{_GPU}.buffer_utils:StagedWriteTensor": "d818acee9e381800",
        "vllm.sampling_params:SamplingParams.__post_init__": "ade62da764bbea7c",
    },
    "triton_attn": {
        f"{_BACKENDS}.triton_attn:TritonAttentionBackend.get_kv_cache_shape": "7b43eba6625041df",
        f"{_BACKENDS}.triton_attn:TritonAttentionImpl.forward": "b1d3fb9c4035d52c",
        f"{_BACKENDS}.triton_attn:TritonAttentionImpl.do_kv_cache_update": "ab4e8b0582a46058",
    },
    "linear layers": {
        f"{_LAYERS}.linear:UnquantizedLinearMethod.apply": "a4b103119d9814b6",
        f"{_LAYERS}.utils:dispatch_unquantized_gemm": "45a8acccf97c8ea7",
        f"{_LAYERS}.utils:default_unquantized_gemm": "046576d5cfcb9a40",
    },
    "MLPs": {
        f"{_LAYERS}.linear:ColumnParallelLinear.forward": "308fabe081224a58",
    },
    "Qwen2MLP": {
        f"{_MODELS}.qwen2:Qwen2MLP.forward": "ab63fe100a57275b",
    },
    "LlamaMLP": {
        f"{_MODELS}.llama:LlamaMLP.forward": "c53e9215b55cc875",
    },
    "MistralMLP": {
        f"{_MODELS}.mistral:MistralMLP.forward": "c53e9215b55cc875",
    },
    "Gemma3MLP": {
        f"{_MODELS}.gemma3:Gemma3MLP.forward": "7e00f1ca2e2334a8",
    },
    "batch-invariant mode": {
        f"{_LAYERS}.batch_invariant:linear_batch_invariant": "564858b3b35a0e8b",
        f"{_LAYERS}.batch_invariant:matmul_batch_invariant": "c6d95bf65817e1d1",
        f"{_LAYERS}.batch_invariant:matmul_persistent": "4ea941a86dc63bf6",
        f"{_LAYERS}.batch_invariant:bmm_batch_invariant": "acccb02b00a3ae3b",
        f"{_LAYERS}.batch_invariant:_log_softmax_batch_invariant": "53ec95cc60a7bf93",
        f"{_LAYERS}.batch_invariant:softmax_batch_invariant": "480fe74cf2eb6abd",
        f"{_LAYERS}.batch_invariant:mean_batch_invariant": "401f9643c811f94c",
        f"{_LAYERS}.batch_invariant:rms_norm_batch_invariant": "6d9b3b0de1f087a4",
        f"{_LAYERS}.batch_invariant:enable_batch_invariant_mode": "8a73db7a9077ff2d",
        f"{_LAYERS}.linear:UnquantizedLinearMethod.apply": "a4b103119d9814b6",
        f"{_LAYERS}.vocab_parallel_embedding:UnquantizedEmbeddingMethod.apply": "a4b103119d9814b6",
    },
}


def version_problem() -> str | None:
    """Return why the installed vLLM is not one that was tested, or None."""
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return "the package vllm is not installed"
    if _MINOR_VERSION.match(version):
        return None
    return f"its version is {version}, and the plugin was tested with {TESTED}"


def name_of_forward(module: Any) -> str:
    """Return "module:qualname" of the forward of a module's class; of a TorchScript module, ":", as it has none."""
    forward = getattr(type(module), "forward", None)
    return f"{getattr(forward, '__module__', '')}:{getattr(forward, '__qualname__', '')}"


@functools.cache
def changed(part: str) -> str | None:
    """Return which function of a part has another source than in the tested version, or None."""
    for name, expected in FINGERPRINTS[part].items():
        try:
            found = source_hash(pkgutil.resolve_name(name))
        except (ImportError, AttributeError, OSError, TypeError):
            return f"vLLM has no {name}, which was in {TESTED}"
        except Exception as error:  # a module of vLLM may raise anything when it is imported
            return f"vLLM's {name} cannot be imported: {type(error).__name__}: {error}"
        if found != expected:
            return f"the source of {name} is not that of vLLM {TESTED}"
    return None
