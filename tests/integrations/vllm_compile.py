"""Compile a tiny Qwen3 with the plugin by vLLM's own compiler, on the CPU, for test_vllm_plugin.py.

    python tests/integrations/vllm_compile.py FOLDER

FOLDER holds the model's config.json, and vLLM's cache. What needs vLLM's compiled libraries is left out: the attention
kernel, whose result is q here, and a pass that rewrites calls of operators in those libraries.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any


def main(folder: Path) -> None:
    """Print how many modules were replaced, whether the graph came from the cache, and its distance from eager mode."""
    os.environ |= {"JITNORM_VLLM": "1", "VLLM_CACHE_ROOT": str(folder), "VLLM_LOGGING_LEVEL": "ERROR"}
    import torch
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    class Platform(CpuPlatform):
        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            """Keep the compiler of CUDA: on the CPU vLLM has another."""

    vllm.platforms._current_platform = Platform()
    from vllm.config import (
        CacheConfig,
        CompilationConfig,
        CompilationMode,
        DeviceConfig,
        LoadConfig,
        ModelConfig,
        VllmConfig,
        set_current_vllm_config,
    )
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.forward_context import set_forward_context

    from jitnorm.integrations import vllm_plugin

    vllm_plugin.register()
    config = VllmConfig(
        model_config=ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=256),
        cache_config=CacheConfig(block_size=16),
        device_config=DeviceConfig(device="cpu"),
        load_config=LoadConfig(load_format="dummy"),
        compilation_config=CompilationConfig(
            mode=CompilationMode.VLLM_COMPILE, backend="inductor", cudagraph_mode="NONE", compile_sizes=[]
        ),
    )
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/store{os.getpid()}", 0, "gloo")
        initialize_model_parallel(1, 1)
        model = load(config)
        slots = {}
        for name, attn in config.compilation_config.static_forward_context.items():
            attn.kv_cache = torch.zeros(8, 16, attn.num_kv_heads, 2 * attn.head_size, dtype=torch.bfloat16).transpose(
                1, 2
            )
            attn.impl.forward = attention
            slots[name] = torch.arange(20, 27)
        tokens = torch.arange(7)
        results = []
        for skip_compiled in (False, True):
            context = set_forward_context(None, config, num_tokens=7, slot_mapping=slots, skip_compiled=skip_compiled)
            with torch.inference_mode(), context:
                results.append(model(tokens, tokens).double())
            caches = [attn.kv_cache.clone() for attn in config.compilation_config.static_forward_context.values()]
            assert all(cache[1, :, 4:11].count_nonzero() == cache[1, :, 4:11].numel() for cache in caches)
            assert all(cache.count_nonzero() == cache[1, :, 4:11].numel() for cache in caches)
            for attn in config.compilation_config.static_forward_context.values():
                attn.kv_cache.zero_()
    compiled, eager = results
    (report,) = vllm_plugin.explain()
    print(len(report.replaced), model.model.was_aot_compile_fn_loaded_from_disk)
    print(float((compiled - eager).pow(2).mean().sqrt() / eager.std()))


def load(config: Any) -> Any:
    """Load a model by vLLM's loader, and give it random weights."""
    import torch
    import vllm.model_executor.layers.attention.attention as of_vllm
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    def choose_linear(self: Any, layer: Any) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    of_vllm.get_attn_backend = lambda *_, **__: FlashAttentionBackend
    FixFunctionalizationPass.__call__ = lambda self, graph: None
    UnquantizedLinearMethod.process_weights_after_loading = choose_linear
    UnquantizedEmbeddingMethod.process_weights_after_loading = choose_linear
    torch.ops._C.silu_and_mul = None
    model = get_model_loader(config.load_config).load_model(vllm_config=config, model_config=config.model_config)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.1 * noise if parameter.dim() == 1 else 0.08 * noise)
    return model


def attention(layer: Any, query: Any, key: Any, value: Any, kv_cache: Any, metadata: Any, output: Any, **_: Any) -> Any:
    """Return q, in place of an attention kernel."""
    output.copy_(query)
    return output


if __name__ == "__main__":
    main(Path(sys.argv[1]))
