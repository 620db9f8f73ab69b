"""Run a float8 decoder layer like Qwen3's in four variants: count the kernels that each launches, and time it.

    python examples/fp8_decoder_layer.py                # on the GPU, if there is one: 1024 tokens of a layer of 8B
    python examples/fp8_decoder_layer.py --device cpu   # 16 tokens of a small layer

The layer is written once. The setting of jitnorm.layers and the variant decide what runs:

- eager: every operator is a kernel of its own
- eager, norms quantise: jitnorm.fused_add_rmsnorm_quant_fp8 gives the products their input as float8
- compiled, kernels quantise: torch.compile, where one custom kernel before each product quantises its input
- compiled, inductor quantises: torch.compile, where the quantisation is plain PyTorch and joins the kernels before it
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import jitnorm
from jitnorm.layers import apply_fp8_linear, apply_qk_norm, set_compiler

E4M3 = torch.float8_e4m3fn
EPS = 1e-6


@dataclass(frozen=True)
class Variant:
    name: str
    compiled: bool = False
    norms_quantise: bool = False
    kernels_quantise: bool = True


VARIANTS = (
    Variant("eager"),
    Variant("eager, norms quantise", norms_quantise=True),
    Variant("compiled, kernels quantise", compiled=True),
    Variant("compiled, inductor quantises", compiled=True, kernels_quantise=False),
)


@dataclass(frozen=True)
class Sizes:
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 12288


DEFAULTS = {"cuda": (1024, Sizes.hidden, Sizes.intermediate), "cpu": (16, 1024, 3072)}  # tokens and sizes


class Fp8Linear(torch.nn.Module):
    """Multiplies by a weight with one scale. The input's scale is static, as in checkpoints."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        weight = torch.randn(out_features, in_features) * in_features**-0.5
        scale = weight.abs().amax() / 448
        self.register_buffer("weight", (weight / scale).to(E4M3).t())
        self.register_buffer("weight_scale", scale.reshape(1))
        self.register_buffer("input_scale", torch.full((1,), 0.05))

    def forward(self, x: torch.Tensor, variant: Variant) -> torch.Tensor:
        quantised_by = "eager" if variant.kernels_quantise else "inductor"
        return apply_fp8_linear(
            x, self.weight, self.weight_scale, self.input_scale, compressed_tensor_quant=True, compiler=quantised_by
        )


class DecoderLayer(torch.nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.q_size, self.kv_size = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        self.input_norm = torch.nn.RMSNorm(sizes.hidden, EPS)
        self.qkv = Fp8Linear(sizes.hidden, self.q_size + 2 * self.kv_size)
        self.q_norm = torch.nn.RMSNorm(sizes.head_dim, EPS)
        self.k_norm = torch.nn.RMSNorm(sizes.head_dim, EPS)
        self.out = Fp8Linear(self.q_size, sizes.hidden)
        self.post_norm = torch.nn.RMSNorm(sizes.hidden, EPS)
        self.gate_up = Fp8Linear(sizes.hidden, 2 * sizes.intermediate)
        self.down = Fp8Linear(sizes.intermediate, sizes.hidden)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        slots: torch.Tensor,
        variant: Variant,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, residual = add_norm(x, residual, self.input_norm, self.qkv, variant)
        x = self.attention(self.qkv(x, variant), k_cache, v_cache, slots)
        x, residual = add_norm(self.out(x, variant), residual, self.post_norm, self.gate_up, variant)
        return self.down(gate(self.gate_up(x, variant), variant), variant), residual

    def attention(
        self, qkv: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """Compute causal attention for a prompt."""
        q, k, v = qkv.split((self.q_size, self.kv_size, self.kv_size), dim=-1)
        q, k = apply_qk_norm(q, k, self.q_norm, self.k_norm, self.sizes.head_dim)
        q, k, v = (t.unflatten(-1, (-1, self.sizes.head_dim)) for t in (q, k, v))
        q, k = rotate(q), rotate(k)
        jitnorm.store_cache(k, v, k_cache, v_cache, slots)
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)


def add_norm(
    x: torch.Tensor, residual: torch.Tensor, norm: torch.nn.RMSNorm, following: Fp8Linear, variant: Variant
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised sum, and the sum; in plain PyTorch for a compiler, which fuses it into one kernel."""
    if variant.compiled:
        total = x + residual
        return norm(total), total
    if variant.norms_quantise:
        x, _ = jitnorm.fused_add_rmsnorm_quant_fp8(x, residual, norm.weight, following.input_scale, EPS)
    else:
        jitnorm.fused_add_rmsnorm(x, residual, norm.weight, EPS)
    return x, residual


def gate(x: torch.Tensor, variant: Variant) -> torch.Tensor:
    if variant.compiled:
        gates, factors = x.chunk(2, dim=-1)
        return F.silu(gates) * factors
    return jitnorm.silu_and_mul(x)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Apply the rotary position embedding to `[tokens, heads, head_dim]`."""
    half = x.shape[-1] // 2
    frequency = 1e6 ** (-torch.arange(half, device=x.device) / half)
    angle = torch.arange(x.shape[0], device=x.device)[:, None, None] * frequency
    first, second = x.float().chunk(2, dim=-1)
    rotated = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat(rotated, dim=-1).to(x.dtype)


def count_kernels(run: Callable[[], object], variant: Variant, device: str) -> int | None:
    """Count the kernels that one call launches: on a GPU all, on the CPU inductor's loops and what it calls."""
    if device == "cpu" and not variant.compiled:
        return None  # the profiler does not see jitnorm's direct calls
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if device == "cuda" else activity.CPU]) as profile:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    if device == "cuda":
        return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
    return sum("Call CompiledFxGraph" in getattr(event.cpu_parent, "name", "") for event in profile.events())


def microseconds(run: Callable[[], object], device: str, repeats: int) -> float:
    """Return the median time of one call: on a GPU, GPU time inside a CUDA graph, without the host."""
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    times = []
    for _ in range(repeats):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 100)
        else:
            begin = time.perf_counter()
            run()
            times.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(times)


@dataclass(frozen=True)
class Measurement:
    variant: Variant
    kernels: int | None  # where they can be counted
    microseconds: float
    difference: float  # relative, from the first variant's result


@torch.no_grad()
def measure(sizes: Sizes, tokens: int, device: str, repeats: int = 20) -> list[Measurement]:
    """Run the layer in every variant on the same input."""
    torch.manual_seed(0)
    torch._inductor.config.cpp.enable_kernel_profile = True  # makes inductor's CPU loops visible to the profiler
    layer = DecoderLayer(sizes)
    for norm in (layer.input_norm, layer.q_norm, layer.k_norm, layer.post_norm):
        norm.to(torch.bfloat16)
    layer = layer.to(device)
    inputs = [torch.randn(tokens, sizes.hidden, device=device).bfloat16() for _ in range(2)]
    caches = [torch.zeros(2 * tokens, sizes.kv_heads, sizes.head_dim, device=device).bfloat16() for _ in range(2)]
    slots = torch.randperm(2 * tokens, device=device)[:tokens]
    measurements: list[Measurement] = []
    first = None
    for variant in VARIANTS:
        set_compiler("inductor" if variant.compiled else "eager")
        torch._dynamo.reset()
        forward = torch.compile(layer, fullgraph=True) if variant.compiled else layer
        x, residual = (t.clone() for t in inputs)

        def run(forward: Callable[..., object] = forward, x=x, residual=residual, variant=variant):  # type: ignore[no-untyped-def]
            return forward(x, residual, *caches, slots, variant)

        result = torch.cat(run()).double()
        first = result if first is None else first
        difference = float((result - first).norm() / first.norm())
        kernels = count_kernels(run, variant, device)
        measurements.append(Measurement(variant, kernels, microseconds(run, device, repeats), difference))
    set_compiler("eager")
    return measurements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--hidden-size", type=int)
    parser.add_argument("--intermediate-size", type=int)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    tokens, hidden, intermediate = DEFAULTS[arguments.device]
    tokens, hidden = arguments.tokens or tokens, arguments.hidden_size or hidden
    heads = hidden // Sizes.head_dim
    sizes = Sizes(hidden, heads, max(1, heads // 4), Sizes.head_dim, arguments.intermediate_size or intermediate)
    measured = measure(sizes, tokens, arguments.device, arguments.repeats)
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    print(f"{tokens} tokens, {sizes}, {where}, torch {torch.__version__}")
    for m in measured:
        kernels = "?" if m.kernels is None else m.kernels
        print(f"{m.variant.name:30} {kernels:>4} kernels {m.microseconds:10.1f} us   differs by {m.difference:.1e}")
    *_, custom, fused = measured
    print(
        f"inductor's quantisation: {custom.kernels - fused.kernels} kernels fewer than with a custom kernel for it, "
        f"in {fused.microseconds / custom.microseconds:.2f} of the time"
    )


if __name__ == "__main__":
    main()
