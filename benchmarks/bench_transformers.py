"""Measure decoder layers of the size of Qwen3-8B in transformers: unpatched, with Liger's patch, with jitnorm's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

from jitnorm.benchmark import marker

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 4096, 12288, 32, 8, 128
CACHED = 1024  # tokens that a decode step finds in the static cache

Model = torch.nn.Module


@functools.cache
def create_model(layers: int, device: torch.device, dtype: torch.dtype) -> Model:
    """Return transformers' model of some layers without its embedding and head, with random weights."""
    try:
        import transformers
    except ImportError as error:
        marker.skip(str(error))
    config = transformers.Qwen3Config(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=layers,
        vocab_size=128,
        initializer_range=0.02,
    )
    torch.manual_seed(0)
    with device:  # a CPU takes minutes for the weights of all layers
        model = transformers.Qwen3Model(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    return model


@functools.cache
def create_reference(layers: int, device: torch.device, dtype: torch.dtype) -> Model:
    """Return the same model, with the same weights, in float32."""
    return copy.deepcopy(create_model(layers, device, dtype)).float()


def jitnorm(model: Model, **options: bool) -> Callable[..., Any]:
    from jitnorm import patch_transformers

    patch_transformers(model, strict=True, **options)
    return model


def liger(model: Model) -> Callable[..., Any]:
    """Apply Liger's norms, rotary embedding and SwiGLU to this model, and not to the others of this process."""
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen3
    except ImportError as error:
        marker.skip(str(error))
    from transformers.models.qwen3 import modeling_qwen3

    before = dict(vars(modeling_qwen3))
    options = {"rope": True, "rms_norm": True, "swiglu": True}
    apply_liger_kernel_to_qwen3(**options, cross_entropy=False, fused_linear_cross_entropy=False, model=model)
    rotation = modeling_qwen3.apply_rotary_pos_emb
    vars(modeling_qwen3).update(before)

    def call(*args: Any, **kwargs: Any) -> Any:
        modeling_qwen3.apply_rotary_pos_emb = rotation
        try:
            return model(*args, **kwargs)
        finally:
            modeling_qwen3.apply_rotary_pos_emb = before["apply_rotary_pos_emb"]

    return call


IMPLS: dict[str, Callable[[Model], Callable[..., Any]]] = {
    "jitnorm": jitnorm,
    "fused_projections": functools.partial(jitnorm, fuse_projections=True),
    "timed_gemms": functools.partial(jitnorm, fuse_projections=True, time_gemms=True),
    "transformers": lambda model: model,
    "liger": liger,
}


@functools.cache
def create(impl: str, layers: int, device: torch.device, dtype: torch.dtype) -> Callable[..., Any]:
    """Return a copy of the model with the changes of an implementation."""
    return IMPLS[impl](copy.deepcopy(create_model(layers, device, dtype)))


def create_step(model: Callable[..., Any], original: Model, prompt: torch.Tensor) -> Callable[..., Any]:
    """Return a decode step of `model` after a prompt that `original` has processed. Each call repeats that step."""
    import transformers

    cache = transformers.StaticCache(config=original.config, max_cache_len=prompt.shape[1] + 8)
    original(inputs_embeds=prompt, past_key_values=cache)
    lengths = torch.full((len(cache.layers),), prompt.shape[1], device=prompt.device)
    for layer, length in zip(cache.layers, lengths, strict=True):
        layer.cumulative_length = length

    def step(embeds: torch.Tensor) -> torch.Tensor:
        out = model(inputs_embeds=embeds, past_key_values=cache).last_hidden_state
        lengths.fill_(prompt.shape[1])
        return out

    return step


@marker.parametrize(
    "mode,layers,batch,length",
    [
        *(("graph", 4, batch, 1) for batch in (1, 16, 64)),
        ("prefill", 4, 4, 1024),
        *(("eager", 36, batch, 1) for batch in (1, 16)),
    ],
    [("graph", 4, 1, 1)],
)
@marker.benchmark("impl", list(IMPLS))
def bench(mode: str, layers: int, batch: int, length: int, impl: str) -> marker.BenchResult:
    """Measure the layers of a model of the size of Qwen3-8B in transformers, with random weights.

    `graph` and `eager` are a decode step with a static cache, inside a CUDA graph and without one. `prefill` has no
    cache and no graph: transformers builds a mask where it is captured, and calls causal attention elsewhere. Eager
    steps are those of all layers of Qwen3-8B, since the host takes some time around the layers too.
    """
    embeds = marker.create_random(batch, length, HIDDEN)
    original = create_model(layers, embeds.device, embeds.dtype)
    model = create(impl, layers, embeds.device, embeds.dtype)
    reference = create_reference(layers, embeds.device, embeds.dtype)
    with torch.no_grad():
        if mode == "prefill":
            call = lambda x: model(inputs_embeds=x, use_cache=False).last_hidden_state  # noqa: E731
            check = lambda x: reference(inputs_embeds=x.float(), use_cache=False).last_hidden_state  # noqa: E731
        else:
            prompt = marker.create_random(batch, CACHED, HIDDEN)
            call = create_step(model, original, prompt)
            exact = create_step(reference, reference, prompt.float())
            check = lambda x: exact(x.float())  # noqa: E731
        return marker.do_bench(
            call,
            input_args=(embeds,),
            use_cuda_graph=mode == "graph",
            metrics=(0.5, "min", "max"),
            graph_clone_args=None,  # the weights are larger than any cache
            memory_args=None,
            memory_output=None,
            disable_log_bandwidth=True,
            check=check,
            tolerance=0.03 * (layers / 4) ** 0.5,  # of intermediate results that are rounded
            cold=False,
        )


if __name__ == "__main__":
    bench.main()
