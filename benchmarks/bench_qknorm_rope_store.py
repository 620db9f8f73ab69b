"""Measure the launches between the QKV projection and attention: norms of q and k, rotation, and the cache store."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from peers import EPS, Builds, create, rmsnorm_reference
from torch import Tensor

from jitnorm.benchmark import marker
from jitnorm.qknorm_rope_store import angles_of

# (head_dim, query heads, key heads, rotary_dim)
HEADS = [(128, 32, 8, 128), (128, 64, 8, 128), (128, 16, 8, 128), (256, 16, 2, 64), (64, 8, 1, 64)]
TOKENS = [1, 16, 64, 256, 1024, 4096, 16384]
# The steps in one call, and the dtype of the caches: the input's, or float8.
STEPS = [
    *(("norm+rope+store", "input"), ("norm+rope+store", "fp8"), ("rope+store", "input"), ("rope", "input")),
    ("store", "fp8"),
]
MAX_POSITION = 4096
BLOCK_SIZE = 16

# (q, k, v, angles, positions, k_cache, v_cache, slots, q_weight, k_weight); writes q, k and the caches.
Call = Callable[..., object]


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Return x with its first elements rotated, by the definition."""
    cos, sin = angles[:, None].chunk(2, dim=-1)
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def store(cache: Tensor, slots: Tensor, heads: Tensor) -> None:
    cache[slots // BLOCK_SIZE, slots % BLOCK_SIZE] = heads.to(cache.dtype)


def jitnorm(steps: str) -> Call:
    from jitnorm import qk_norm_rope_store, rope, rope_and_store, store_cache

    def norm_rope_store(*tensors: Tensor) -> None:
        qk_norm_rope_store(*tensors[:8], q_weight=tensors[8], k_weight=tensors[9], eps=EPS)

    return {
        "norm+rope+store": norm_rope_store,
        "rope+store": lambda *tensors: rope_and_store(*tensors[:8]),
        "rope": lambda *tensors: rope(tensors[0], tensors[1], *tensors[3:5]),
        "store": lambda *tensors: store_cache(tensors[1], tensors[2], *tensors[5:8]),
    }[steps]


def separate(steps: str) -> Call:
    """Return jitnorm's operators one after another."""
    from jitnorm import fused_inplace_qknorm, rope, store_cache

    def call(*tensors: Tensor) -> None:
        q, k, v, angles, positions, k_cache, v_cache, slots, q_weight, k_weight = tensors
        if "norm" in steps:
            fused_inplace_qknorm(q, k, q_weight, k_weight, EPS)
        rope(q, k, angles, positions)
        store_cache(k, v, k_cache, v_cache, slots)

    if "+" not in steps:
        raise LookupError("it is one operator")
    return call


def sglang(steps: str) -> Call:
    from sglang.jit_kernel.kvcache import store_cache
    from sglang.jit_kernel.norm import fused_inplace_qknorm
    from sglang.jit_kernel.rope import apply_rope_inplace, apply_rope_inplace_with_kvcache

    def call(*tensors: Tensor) -> None:
        q, k, v, angles, positions, k_cache, v_cache, slots, q_weight, k_weight = tensors
        if k_cache.dtype != k.dtype:
            marker.skip("it stores in the input's dtype")
        k_rows, v_rows = (cache.view(-1, k.shape[1] * k.shape[2]) for cache in (k_cache, v_cache))
        if "norm" in steps:
            fused_inplace_qknorm(q, k, q_weight, k_weight, EPS)
        if steps == "rope":
            apply_rope_inplace(q, k, angles, positions, is_neox=True)
        elif "rope" in steps:
            apply_rope_inplace_with_kvcache(q, k, v, k_rows, v_rows, angles, positions, slots, is_neox=True)
        else:
            store_cache(k.flatten(1), v.flatten(1), k_rows, v_rows, slots)

    return call


def flashinfer(steps: str) -> Call:
    """Return its norm and its rotation; nothing of it stores at slots, so SGLang's store ends the chain."""
    import flashinfer.norm
    import flashinfer.rope
    from sglang.jit_kernel.kvcache import store_cache

    def call(*tensors: Tensor) -> None:
        q, k, v, angles, positions, k_cache, v_cache, slots, q_weight, k_weight = tensors
        if k_cache.dtype != k.dtype:
            marker.skip("it stores in the input's dtype")
        if "norm" in steps:
            flashinfer.norm.rmsnorm(q, q_weight, EPS, out=q, enable_pdl=True)
            flashinfer.norm.rmsnorm(k, k_weight, EPS, out=k, enable_pdl=True)
        flashinfer.rope._apply_rope_pos_ids_cos_sin_cache(
            q=q, k=k, q_rope=q, k_rope=k, cos_sin_cache=angles, pos_ids=positions, interleave=False
        )
        if "store" not in steps:
            return
        k_rows, v_rows = (cache.view(-1, k.shape[1] * k.shape[2]) for cache in (k_cache, v_cache))
        store_cache(k.flatten(1), v.flatten(1), k_rows, v_rows, slots)

    if steps == "store":
        raise LookupError("it stores at no slots")
    return call


def vllm(steps: str) -> Call:
    import vllm._custom_ops as ops

    one = torch.ones((), device="cuda")

    def call(*tensors: Tensor) -> None:
        q, k, v, angles, positions, k_cache, v_cache, slots, q_weight, k_weight = tensors
        heads = (q.shape[1], k.shape[1], v.shape[1], q.shape[2])
        qkv = q.as_strided((q.shape[0], sum(heads[:3]) * heads[3]), (q.stride(0), 1))
        if "norm" in steps:
            ops.fused_qk_norm_rope(qkv, *heads, EPS, q_weight, k_weight, angles, True, positions)
        elif "rope" in steps:
            ops.rotary_embedding(positions, q, k, q.shape[2], angles, True)
        if "store" not in steps:
            return
        dtype = "auto" if k_cache.dtype == k.dtype else "fp8"
        caches = (k_cache, v_cache) if dtype == "auto" else (k_cache.view(torch.uint8), v_cache.view(torch.uint8))
        ops.reshape_and_cache_flash(k, v, *caches, slots, dtype, one, one)

    return call


def plain(steps: str) -> Call:
    """Return the plain formula, which returns q and k: torch.compile would copy slices that are written in place."""

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v, angles, positions, k_cache, v_cache, slots, q_weight, k_weight = tensors

        def changed(x: Tensor, weight: Tensor) -> Tensor:
            y = x.float()
            if "norm" in steps:
                y = torch.nn.functional.rms_norm(y, y.shape[-1:], weight.float(), EPS)
            if "rope" in steps:
                y = rotate(y, angles[positions].float())
            return y.to(x.dtype)

        if steps != "store":
            q, k = changed(q, q_weight), changed(k, k_weight)
        if "store" in steps:
            store(k_cache, slots, k)
            store(v_cache, slots, v)
        return q, k

    return call


def compiled(steps: str) -> Call:
    functions: dict[Any, Call] = {}

    def call(*tensors: Tensor) -> object:
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if key not in functions:
            torch._dynamo.reset()
            functions[key] = torch.compile(plain(steps), dynamic=False)
        return functions[key](*tensors)

    return call


IMPLS = {
    "jitnorm": jitnorm,
    "separate": separate,
    "sglang": sglang,
    "flashinfer": flashinfer,
    "vllm": vllm,
    "compile": compiled,
}


def reference(steps: str) -> Callable[..., tuple[Tensor, ...]]:
    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        q, k, v, angles, positions, k_cache, v_cache, slots, q_weight, k_weight = tensors
        if "norm" in steps:
            q, k = rmsnorm_reference(q, q_weight), rmsnorm_reference(k, k_weight)
        if "rope" in steps:
            q, k = (rotate(x.double(), angles.double()[positions]) for x in (q, k))
        k_cache, v_cache = k_cache.double(), v_cache.double()
        if "store" in steps:
            store(k_cache, slots, k)
            store(v_cache, slots, v)
        return q, k, k_cache, v_cache

    return call


def create_inputs(
    head_dim: int, num_q_heads: int, num_kv_heads: int, rotary_dim: int, cache: str, num_tokens: int
) -> tuple[Tensor, ...]:
    """Return the tensors of a Call: slices of a fused projection, and slots in whole pages of 16 tokens."""
    qkv = marker.create_random(num_tokens, num_q_heads + 2 * num_kv_heads, head_dim)
    q, k, v = qkv.split([num_q_heads, num_kv_heads, num_kv_heads], dim=1)
    weights = marker.create_random(head_dim), marker.create_random(head_dim)
    positions = torch.randint(MAX_POSITION, (num_tokens,), device=qkv.device)
    num_blocks = 2 * -(-num_tokens // BLOCK_SIZE)
    slots = torch.randperm(num_blocks, device=qkv.device).repeat_interleave(BLOCK_SIZE)[:num_tokens] * BLOCK_SIZE
    slots += torch.arange(num_tokens, device=qkv.device) % BLOCK_SIZE
    dtype = qkv.dtype if cache == "input" else torch.float8_e4m3fn
    shape = (num_blocks, BLOCK_SIZE, num_kv_heads, head_dim)
    k_cache, v_cache = (torch.zeros(shape, device=qkv.device).to(dtype) for _ in range(2))
    # SGLang's and FlashInfer's kernels take float32 alone.
    angles = angles_of(MAX_POSITION, rotary_dim).to(qkv.device)
    return q, k, v, angles, positions, k_cache, v_cache, slots, *weights


def make_first_calls(impl: str) -> None:
    """Call an implementation once for each kernel that the benchmark needs of it."""
    for heads in HEADS:
        for steps, cache in STEPS:
            run = create(IMPLS[impl], steps, impl)
            if not isinstance(run, str):
                with contextlib.suppress(Exception):  # the cells of this call will end with the same exception
                    run(*create_inputs(*heads, cache, 1))


# SGLang compiles a kernel for each size of a head, and FlashInfer all of its norms and rotations at once.
BUILDS = Builds(make_first_calls, ["sglang", "flashinfer"])


@marker.parametrize("head_dim,num_q_heads,num_kv_heads,rotary_dim", HEADS, [HEADS[0]])
@marker.parametrize("steps,cache", STEPS, STEPS[:2])
@marker.parametrize("num_tokens", TOKENS, [64])
@marker.benchmark("impl", list(IMPLS))
def bench(
    head_dim: int,
    num_q_heads: int,
    num_kv_heads: int,
    rotary_dim: int,
    steps: str,
    cache: str,
    num_tokens: int,
    impl: str,
) -> marker.BenchResult:
    """Measure norms of q and k, rotation and store, on slices of a fused projection, into pages of 16 tokens.

    `separate` is jitnorm's own chain of operators. The layers of a model share the positions, slots, cosines and sines.
    """
    run = create(IMPLS[impl], steps, impl)
    failure = run if isinstance(run, str) else BUILDS.wait(impl)
    if failure:
        marker.skip(failure)
    inputs = create_inputs(head_dim, num_q_heads, num_kv_heads, rotary_dim, cache, num_tokens)
    q, k, v, _, positions, k_cache, _, slots, *_ = inputs

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        q, k = run(*tensors) or tensors[:2]  # a compiled formula returns new ones
        return q, k, tensors[5], tensors[6]  # to be checked

    changed = () if steps == "store" else (q, k)
    reads = {"store": (k, v, slots), "rope": (q, k, positions)}.get(steps, (q, k, v, positions, slots))
    # As many bytes as the caches get.
    stored = tuple(torch.empty_like(x, dtype=k_cache.dtype) for x in (k, v) if "store" in steps)
    return marker.do_bench(
        call,
        input_args=inputs,
        graph_clone_args=(0, 1, 2, 5, 6, 8, 9),
        memory_args=reads,
        memory_output=changed,
        extra_memory_args=stored,
        check=reference(steps),
        tolerance=None if cache == "input" else 4e-2,
    )


if __name__ == "__main__":
    bench.main(copy=True)
