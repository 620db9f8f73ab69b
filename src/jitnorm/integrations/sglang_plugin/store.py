"""Decide whether jitnorm may store an attention layer's k and v, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from jitnorm.integrations.sglang_plugin.tested import source_problem
from jitnorm.qknorm_rope_store import E4M3

# Backends that store k and v at `forward_batch.out_cache_loc`, and whose attention is otherwise the same without it.
BACKENDS = ("TritonAttnBackend", "FlashAttentionBackend", "FlashInferAttnBackend", "TorchNativeAttnBackend")


@dataclass(frozen=True)
class Store:
    """Where a layer's k and v are stored.

    Attributes:
        pool: SGLang's pool of caches.
        index: The layer's place in the pool's lists of caches.
        scales: Those of float8 caches of k and v: float32, of one element, on the device. None for 1.
    """

    pool: Any
    index: int
    scales: tuple[torch.Tensor | None, torch.Tensor | None]

    def caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the caches of k and v, `[slots, kv_heads, head_dim]`."""
        k_cache, v_cache = self.pool.k_buffer[self.index], self.pool.v_buffer[self.index]
        dtype = self.pool.dtype
        if k_cache.dtype != dtype:  # SGLang keeps float8 caches as bytes
            return k_cache.view(dtype), v_cache.view(dtype)
        return k_cache, v_cache


def find_store(runner: Any, module: Any, dtype: torch.dtype) -> Store | str:
    """Return where a layer's k and v are stored, or why SGLang must store them.

    Args:
        runner: SGLang's ModelRunner, whose caches and attention backend exist.
        module: The attention layer.
        dtype: The dtype of k and v.
    """
    pool, attn = runner.token_to_kv_pool, module.attn
    if reason := _runner_problem(runner) or _backend_problem(runner.attn_backend, pool):
        return reason
    if type(pool).__name__ != "MHATokenToKVPool":
        return f"its caches are in a {type(pool).__name__}"
    if reason := source_problem("KV store"):
        return reason
    if "set_kv_buffer" in vars(pool):
        return "the set_kv_buffer of its pool was replaced on the instance"
    if pool.is_quantized_kv_cache or pool.kv_cache_layout != "nhd" or pool.use_hnd:
        return f"its caches are quantised in blocks, or have the layout {pool.kv_cache_layout}"
    if pool.dtype not in (dtype, E4M3):
        return f"no kernel stores {dtype} into caches of {pool.dtype}"
    index = attn.layer_id - pool.start_layer
    if not 0 <= index < len(pool.k_buffer):
        return "its pool has no caches for it"
    shape = (module.num_kv_heads, module.head_dim)
    if any(tuple(buffers[index].shape[1:]) != shape for buffers in (pool.k_buffer, pool.v_buffer)):
        return f"its caches do not have rows of {list(shape)}"
    k_scale, v_scale = attn.k_scale, attn.v_scale
    if pool.dtype == dtype or (k_scale is None and v_scale is None):
        return Store(pool, index, (None, None))
    if not (_is_scale(k_scale) and _is_scale(v_scale)):
        return "the scales of its float8 caches are not two float32 tensors of one element"
    if "TorchNativeAttnBackend" in _backend_names(runner.attn_backend):
        return "TorchNativeAttnBackend does not scale float8 caches"
    return Store(pool, index, (k_scale.detach(), v_scale.detach()))


def _is_scale(scale: Any) -> bool:
    return isinstance(scale, torch.Tensor) and scale.numel() == 1 and scale.dtype == torch.float32


def _runner_problem(runner: Any) -> str | None:
    """Return which option of the server makes the place or the time of the store another, or None."""
    args = runner.server_args
    options = {
        "speculative decoding": args.speculative_algorithm is not None,
        "decode context parallelism": args.dcp_size > 1,
        "prefill context parallelism": args.enable_prefill_context_parallel or args.attn_cp_size > 1,
        "two-batch overlap": args.enable_two_batch_overlap,
        "layer-sharded caches": getattr(runner.token_to_kv_pool, "layer_shard_enabled", False),
    }
    return next((f"{name} is on" for name, is_on in options.items() if is_on), None)


def _backend_problem(backend: Any, pool: Any) -> str | None:
    for name in _backend_names(backend):
        if name not in BACKENDS:
            return f"{name} is not a tested attention backend"
        if reason := source_problem(name):
            return reason
    if backend.token_to_kv_pool is not pool:
        return "its attention backend has another pool"
    if any(getattr(part, "fa_skip_kv_cache", False) for part in _backends(backend)):
        return "its attention backend stores nothing"
    return None


def _backends(backend: Any) -> list[Any]:
    """Return an attention backend, or both backends of one that chooses by the phase."""
    is_hybrid = type(backend).__name__ == "HybridAttnBackend"
    return [backend.prefill_backend, backend.decode_backend] if is_hybrid else [backend]


def _backend_names(backend: Any) -> list[str]:
    return [type(part).__name__ for part in _backends(backend)]
