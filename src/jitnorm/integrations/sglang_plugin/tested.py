"""The versions of SGLang that the plugin was tested with, and the sources of the functions that it relies on.

A function whose source differs may compute something else, so what relies on it is left to SGLang.
"""

from __future__ import annotations

import functools
import pkgutil
import re

from jitnorm.integrations.engine_plugins import source_hash

MIN_VERSION, END_VERSION = (0, 5, 16), (0, 6)
TESTED = "0.5.16"

# By the part of the plugin that relies on them: the first 16 digits of the SHA-256 of each function's source.
SOURCES: dict[str, dict[str, str]] = {
    "RMSNorm": {
        "sglang.srt.layers.layernorm:RMSNorm.__init__": "6cbcc62648a73ac3",
        "sglang.srt.layers.layernorm:RMSNorm.forward_cuda": "7843db5045162d03",
        "sglang.srt.layers.layernorm:RMSNorm.forward_native": "671406a88fe197a9",
        "sglang.srt.layers.utils.multi_platform:MultiPlatformOp.dispatch_forward": "1a4dc6df96388f19",
    },
    "GemmaRMSNorm": {
        "sglang.srt.layers.layernorm:GemmaRMSNorm.__init__": "da84ad3ba1a2d843",
        "sglang.srt.layers.layernorm:GemmaRMSNorm.forward_cuda": "4170a80624221908",
        "sglang.srt.layers.layernorm:GemmaRMSNorm._forward_impl": "900573344c31e168",
        "sglang.srt.layers.layernorm:GemmaRMSNorm.forward_native": "a5bcdf99d4da3e99",
        "sglang.srt.layers.utils.multi_platform:MultiPlatformOp.dispatch_forward": "1a4dc6df96388f19",
    },
    "Gemma3RMSNorm": {
        "sglang.srt.layers.layernorm:Gemma3RMSNorm.__init__": "eaea780bb8bb7dfb",
        "sglang.srt.layers.layernorm:Gemma3RMSNorm.forward_cuda": "defc0d56d3b4d3c7",
        "sglang.srt.layers.layernorm:Gemma3RMSNorm.forward_native": "0f3170748fc61770",
        "sglang.srt.layers.layernorm:Gemma3RMSNorm._norm": "a1c27ed5fac56db4",
        "sglang.srt.layers.utils.multi_platform:MultiPlatformOp.dispatch_forward": "1a4dc6df96388f19",
    },
    "SiluAndMul": {
        "sglang.srt.layers.activation:SiluAndMul.forward_cuda": "bb5451a8d8e00e29",
        "sglang.srt.layers.activation:SiluAndMul.forward_native": "14b495349c7e4f21",
        "sglang.srt.layers.utils.multi_platform:MultiPlatformOp.dispatch_forward": "1a4dc6df96388f19",
    },
    "GeluAndMul": {
        "sglang.srt.layers.activation:GeluAndMul.__init__": "9fb2a90a0e8b9a1d",
        "sglang.srt.layers.activation:GeluAndMul._forward_impl": "7f30f3ff1a3eae65",
        "sglang.srt.layers.activation:GeluAndMul.forward_cuda": "e688c05e18120188",
        "sglang.srt.layers.activation:GeluAndMul.forward_native": "3f53562ef2312b49",
        "sglang.srt.layers.utils.multi_platform:MultiPlatformOp.dispatch_forward": "1a4dc6df96388f19",
    },
    "apply_qk_norm": {
        "sglang.srt.models.utils:apply_qk_norm": "124cff13c71f74a6",
    },
    "Qwen3Attention": {
        "sglang.srt.models.qwen3:Qwen3Attention": "376d95631d89874b",
    },
    "Qwen2Attention": {
        "sglang.srt.models.qwen2:Qwen2Attention": "65eb8bb0a9c99b01",
    },
    "LlamaAttention": {
        "sglang.srt.models.llama:LlamaAttention": "5ddd7c4e2bd1e09c",
    },
    "Gemma3Attention": {
        "sglang.srt.models.gemma3_causal:Gemma3Attention": "bac1b9c6f24b07df",
        "sglang.srt.models.gemma3_causal:Gemma3RotaryEmbedding": "0412b376327d57fa",
    },
    "attention": {
        "sglang.srt.layers.radix_attention:RadixAttention": "78cd95e625656aa1",
        "sglang.srt.layers.rotary_embedding.base:RotaryEmbedding.forward_cuda": "1aad817b18145332",
        "sglang.srt.layers.rotary_embedding.base:RotaryEmbedding.forward_native": "e70aa8ff1c2eb148",
    },
    "KV store": {
        "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.__init__": "b78cdb49652bb0df",
        "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool.set_kv_buffer": "4735b90d0d440fdd",
        "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool._store_kv_layer": "325335c7b6f3432a",
        "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool._kv_buffer_shapes": "709abf44bdb42558",
        "sglang.srt.mem_cache.memory_pool:_set_kv_buffer_impl": "51e4c3889b356afe",
    },
    "ModelRunner": {
        "sglang.srt.model_executor.model_runner:ModelRunner.init_cuda_graphs": "ccfb604799dc43f8",
        "sglang.srt.model_executor.model_runner:ModelRunner.maybe_enable_batch_invariant_mode": "b811a5e9c6aba628",
    },
    "linear layers": {
        "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod.apply": "f89a73e2395d2b5d",
    },
    "LlamaMLP": {
        "sglang.srt.models.llama:LlamaMLP.__init__": "7fe693cbdda01727",
        "sglang.srt.models.llama:LlamaMLP.forward": "682b54dac399f5fe",
        "sglang.srt.layers.linear:MergedColumnParallelLinear.forward": "c132a31ba677968f",
    },
    "Qwen2MLP": {
        "sglang.srt.models.qwen2:Qwen2MLP.__init__": "0c3b0f82bfa64c0e",
        "sglang.srt.models.qwen2:Qwen2MLP.forward": "adc75b73b2cbc409",
        "sglang.srt.layers.linear:MergedColumnParallelLinear.forward": "c132a31ba677968f",
    },
    "Gemma3MLP": {
        "sglang.srt.models.gemma3_causal:Gemma3MLP.__init__": "b0ea222523d12a28",
        "sglang.srt.models.gemma3_causal:Gemma3MLP.forward": "7e00f1ca2e2334a8",
        "sglang.srt.layers.linear:MergedColumnParallelLinear.forward": "c132a31ba677968f",
    },
    "deterministic mode": {
        "sglang.srt.batch_invariant_ops.batch_invariant_ops:enable_batch_invariant_mode": "8170fd0f06d8a88f",
        "sglang.srt.batch_invariant_ops.batch_invariant_ops:matmul_persistent": "cad12a9b50278c2f",
        "sglang.srt.batch_invariant_ops.batch_invariant_ops:bmm_batch_invariant": "99a8632cfd01b8bc",
        "sglang.srt.batch_invariant_ops.batch_invariant_ops:log_softmax": "40ee9c9559c0368b",
        "sglang.srt.batch_invariant_ops.batch_invariant_ops:mean_dim": "c7ec98f564c144f5",
        "sglang.srt.batch_invariant_ops.batch_invariant_ops:rms_norm_batch_invariant": "8f1ff46c573c20ac",
        "sglang.srt.batch_invariant_ops.batch_invariant_ops:mm_batch_invariant": "9486abaa90312dd9",
        "sglang.srt.batch_invariant_ops.batch_invariant_ops:_mm_dtype_compat": "6cdc384ccdf22ff0",
        "sglang.srt.batch_invariant_ops.batch_invariant_ops:addmm_batch_invariant": "7c512163d38c63e2",
        "sglang.srt.batch_invariant_ops.batch_invariant_ops:_log_softmax_batch_invariant": "577324c9050eca69",
        "sglang.srt.batch_invariant_ops.batch_invariant_ops:mean_batch_invariant": "9ce82c8893aa2499",
    },
    "TritonAttnBackend": {
        "sglang.srt.layers.attention.triton_backend:TritonAttnBackend._set_kv_buffer": "a66a0eaddede3c8a",
        "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_extend": "2a836ac20b1c4959",
        "sglang.srt.layers.attention.triton_backend:TritonAttnBackend.forward_decode": "286ba0f0b393121c",
    },
    "FlashAttentionBackend": {
        "sglang.srt.layers.attention.flashattention_backend:FlashAttentionBackend.forward_extend": "b90b8cadcf44f171",
        "sglang.srt.layers.attention.flashattention_backend:FlashAttentionBackend.forward_decode": "f14b6ab17464664e",
    },
    "FlashInferAttnBackend": {
        "sglang.srt.layers.attention.flashinfer_backend:FlashInferAttnBackend.forward_extend": "b680096e44959ac8",
        "sglang.srt.layers.attention.flashinfer_backend:FlashInferAttnBackend.forward_decode": "f8505e6e4a343a05",
    },
    "TorchNativeAttnBackend": {
        "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend.forward_extend": "9d94d3cc90d249c5",
        "sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend.forward_decode": "057e1386b8475474",
    },
}


def version_problem(version: str) -> str | None:
    """Return why the plugin does nothing with this version of SGLang, or None."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    if match and MIN_VERSION <= tuple(int(number or 0) for number in match.groups()) < END_VERSION:
        return None
    accepted = f"{'.'.join(map(str, MIN_VERSION))} up to, and without, {'.'.join(map(str, END_VERSION))}"
    return f"jitnorm supports SGLang {accepted}, got {version}"


@functools.cache
def source_problem(part: str) -> str | None:
    """Return why a part of the plugin does not fit this SGLang, or None.

    Args:
        part: A key of SOURCES. Modules that its functions are in are imported.
    """
    for name, expected in SOURCES[part].items():
        try:
            function = pkgutil.resolve_name(name)
            if hasattr(function, "__wrapped__"):
                return f"{name} is wrapped by other code"
            if source_hash(function) != expected:
                return f"the source of {name} is not that of SGLang {TESTED}"
        except (ImportError, AttributeError, OSError, TypeError) as error:
            return f"{name} cannot be read: {error}"
    return None
