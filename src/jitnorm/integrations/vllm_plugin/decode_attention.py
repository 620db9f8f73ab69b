"""The attention of vLLM's decode steps, in which each sequence has one new token, by this package's kernel.

Steps with prompts, and what the kernel does not compute, stay with FlashAttention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm import envs
from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.attention.attention import Attention

from jitnorm.core.targets import cuda_target
from jitnorm.integrations.decode_attention import DTYPES, HEAD_DIMS, MAX_GROUP_SIZE, MIN_ARCH, DecodeAttention, spec
from jitnorm.integrations.engine_plugins import build_and_load, reason_to_skip
from jitnorm.integrations.vllm_plugin import batch_invariant_mode, compatibility
from jitnorm.integrations.vllm_plugin.fusion import SAME_DTYPES
from jitnorm.integrations.vllm_plugin.report import Report
from jitnorm.jit.log import logger
from jitnorm.jit.spec import KernelSpec

_IMPL = ("vllm.v1.attention.backends.flash_attn", "FlashAttentionImpl")  # not imported: not every platform can


def replace(model: torch.nn.Module, config: Any, report: Report) -> None:
    """Replace the forward of the attention layers whose decode steps the kernel computes.

    Args:
        model: A loaded model of vLLM on a CUDA device.
        config: vLLM's configuration.
        report: Gets what was replaced, and why the rest was left.
    """
    reason = reason_to_skip("decode_attention") or compatibility.changed("decode attention") or _reason_of(config)
    dtype = config.model_config.dtype
    device = torch.empty(0, device=config.device_config.device).device  # with the worker's index
    target = cuda_target(device.index)
    failures: dict[KernelSpec, str] = {}
    kernels: dict[tuple[int, int, int], DecodeAttention] = {}
    for name, attn in model.named_modules():
        if not isinstance(attn, Attention):
            continue
        why = reason or _reason_to_leave(attn, dtype, target.arch)
        if not why:
            shape = (attn.num_heads, attn.num_kv_heads, attn.head_size)
            kernel = spec(*shape, dtype, target)
            if shape not in kernels and kernel not in failures:
                failures |= build_and_load([kernel])
            why = failures.get(kernel)
        if why:
            report.left[name] = f"{type(attn).__name__} in decode steps: {why}"
            continue
        if shape not in kernels:
            kernels[shape] = DecodeAttention(*shape, dtype, device, _max_sequences(config))
        attn.impl.forward = functools.partial(_forward, attn.impl, attn.impl.forward, kernels[shape])
        report.replaced[name] = f"{type(attn).__name__} in decode steps"


def _max_sequences(config: Any) -> int:
    """Return the most sequences of a step: a CUDA graph may be captured for more than vLLM schedules."""
    return max(  # type: ignore[no-any-return]
        config.scheduler_config.max_num_seqs, config.compilation_config.max_cudagraph_capture_size or 0
    )


def _reason_of(config: Any) -> str | None:
    if batch_invariant_mode.is_mode_requested():
        return "in the batch-invariant mode a token has the bits that it would have in a prompt"
    if config.speculative_config is not None:
        return "in speculative decoding a sequence has several new tokens"
    mode = config.compilation_config.cudagraph_mode
    if (mode and mode.mixed_mode() == CUDAGraphMode.FULL) or envs.VLLM_USE_BREAKABLE_CUDAGRAPH:
        return "a CUDA graph that was captured for a decode step may be replayed for prompts"
    parallel = config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context parallelism divides the tokens of a sequence"
    return "vLLM computes two batches at a time" if parallel.use_ubatching else None


def _reason_to_leave(attn: Any, dtype: torch.dtype, arch: str) -> str | None:
    impl = attn.impl
    if type(attn) is not Attention or (type(impl).__module__, type(impl).__qualname__) != _IMPL:
        return f"its attention is {type(impl).__name__}"
    if attn.attn_type != "decoder" or attn.use_direct_call:
        return "it is not called by vLLM's operator for decoders"
    if impl.alibi_slopes is not None or impl.logits_soft_cap or impl.sinks is not None:
        return "the kernel has no ALiBi, cap of logits or sinks"
    if dtype not in DTYPES or attn.kv_cache_dtype not in SAME_DTYPES or attn.kv_cache_torch_dtype != dtype:
        return f"no kernel is for a model of {dtype} and a cache of {attn.kv_cache_torch_dtype}"
    if attn.head_size not in HEAD_DIMS or attn.head_size_v != attn.head_size:
        return f"no kernel supports head_dim {attn.head_size}"
    if attn.num_heads > MAX_GROUP_SIZE * attn.num_kv_heads:
        return f"no kernel supports {attn.num_heads} query heads for {attn.num_kv_heads} of keys"
    return None if float(arch.rstrip("af")) >= MIN_ARCH else f"no kernel supports the architecture {arch}"


def skip_scheduler_metadata(builder: Any, layers: Sequence[Any]) -> None:
    """Let the builder of FlashAttention's metadata leave out the scheduler metadata of steps that the kernel computes.

    It is how FlashAttention splits a step over blocks: a launch of its own, and two more that copy it to a buffer.

    Args:
        builder: of the metadata of some layers, after the first step.
        layers: the modules, of attention or others that have a cache.
    """
    if not all(map(_is_replaced, layers)) or builder.aot_sliding_window is None:  # the first call sets it
        return
    kernels = {layer.impl.forward.args[2] for layer in layers}
    original = builder.build

    @functools.wraps(original)
    def build(common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False, **keywords: Any) -> Any:
        # After a kernel has refused a step, FlashAttention may be in a CUDA graph, and it reads the buffer.
        is_computed = common_attn_metadata.max_query_len == 1 and not any(kernel.has_refused for kernel in kernels)
        return original(common_prefix_len, common_attn_metadata, fast_build=fast_build or is_computed, **keywords)

    builder.build = build


def _is_replaced(layer: Any) -> bool:
    forward = getattr(getattr(layer, "impl", None), "forward", None)  # Mamba's layers have no impl
    return isinstance(forward, functools.partial) and forward.func is _forward


@functools.cache
def _warn_once() -> None:
    logger.warning("FlashAttention computes a decode step whose arguments jitnorm's kernel does not take")


def _forward(
    impl: Any,
    original: Callable[..., torch.Tensor],
    attention: DecodeAttention,
    layer: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    attn_metadata: Any,
    output: torch.Tensor,
    output_scale: torch.Tensor | None = None,
    output_block_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute what FlashAttentionImpl.forward computes."""
    if (
        attn_metadata is not None
        and attn_metadata.max_query_len == 1
        and not attn_metadata.use_cascade
        and attn_metadata.causal is True
        and attn_metadata.mm_prefix_range_tensor is None
        and attn_metadata.rswa_prefix_lens is None
        and output_scale is None
        and output_block_scale is None
    ):
        tokens = attn_metadata.num_actual_tokens  # the others pad a batch
        q, out = (query, output) if len(query) == tokens else (query[:tokens], output[:tokens])
        left, _ = attn_metadata.sliding_window or impl.sliding_window
        k_cache, v_cache = kv_cache.transpose(1, 2).split_with_sizes((impl.head_size, impl.head_size), -1)
        if attention(
            *(q, k_cache, v_cache, attn_metadata.block_table, attn_metadata.seq_lens, out, impl.scale),
            window=left + 1,  # left is -1 without a window
        ):
            return output
        attention.has_refused = True
        _warn_once()
    return original(
        *(layer, query, key, value, kv_cache, attn_metadata, output),
        output_scale=output_scale,
        output_block_scale=output_block_scale,
    )
