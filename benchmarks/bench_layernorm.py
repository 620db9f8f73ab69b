"""Measure LayerNorm, and LayerNorm with a float8 output, their peers and copies of the same bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peers import EPS, create
from row_copy import bench_row_copy

import jitnorm
from jitnorm.benchmark import marker
from jitnorm.benchmark.results import ROW_COPY

E4M3 = torch.float8_e4m3fn
# Of CLIP, BERT, ViT-L, SigLIP, Whisper, Falcon, StarCoder2, Nemotron 340B; an odd one; and long rows.
SIZES = [768, 1024, 1152, 1280, 4096, 4544, 6144, 18432, 1001, 65536]
ELEMENTS = 1 << 26  # of the largest input, which has 128 MiB in half precision
# Those that tell most come first: a run may be cut short.
SHAPES = [(size, n or ELEMENTS // size) for n in (64, None, 1, 1024) for size in SIZES if n != ELEMENTS // size]

# Functions of (input, weight, bias, out, scale). The result is in `out` or returned.
Call = Callable[..., object]


def layer_norm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b, EPS)


def quantised(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (layer_norm(x, w, b).float() / scale).clamp(-448, 448).to(E4M3)


def jitnorm_call(op: str) -> Call:
    if op == "layernorm":
        return lambda x, w, b, out, scale: jitnorm.layernorm(x, w, b, EPS, out)
    return lambda x, w, b, out, scale: jitnorm.layernorm_quant_fp8(x, w, b, scale, EPS, out)[0]


def torch_call(op: str) -> Call:
    if op == "layernorm":
        return lambda x, w, b, out, scale: layer_norm(x, w, b)
    return lambda x, w, b, out, scale: quantised(x, w, b, scale)


def compiled(op: str) -> Call:
    """Return PyTorch's call compiled for one shape; the compiler fuses the copy to `out`."""
    eager = torch_call(op)
    torch._dynamo.reset()
    return torch.compile(lambda x, w, b, out, scale: out.copy_(eager(x, w, b, out, scale)), dynamic=False)


def flashinfer(op: str) -> Call:
    """Return FlashInfer's calls, whose weight and bias are float32. The float8 output has a CUDA kernel alone."""
    import flashinfer.norm

    if op == "layernorm":
        return lambda x, w, b, out, scale: flashinfer.norm.layernorm(x, w, b, EPS)
    return lambda x, w, b, out, scale: flashinfer.norm.layernorm_quant(out, x, w, b, scale, EPS)


def quack(op: str) -> Call:
    """Return quack's call, whose weight and bias are float32."""
    if op != "layernorm":
        raise LookupError("quack's layernorm has no float8 output")
    from quack.rmsnorm import _rmsnorm_fwd

    return lambda x, w, b, out, scale: _rmsnorm_fwd(x, w, out, b, None, None, None, None, EPS, True)


def liger(op: str) -> Call:
    """Return Liger's forward pass, which also returns mean and rstd."""
    if op != "layernorm":
        raise LookupError("Liger's LayerNorm has no float8 output")
    from liger_kernel.ops.layer_norm import layer_norm_forward

    return lambda x, w, b, out, scale: layer_norm_forward(x, w, b, EPS)[0]


PEERS: dict[str, Callable[[str], Call]] = {
    "jitnorm": jitnorm_call,
    "flashinfer": flashinfer,
    "quack": quack,
    "liger": liger,
    "compile": compiled,
    "torch": torch_call,
}


@marker.parametrize("op", ["layernorm", "layernorm_quant_fp8"], ["layernorm"])
@marker.parametrize("weight", ["same", "fp32"], ["same"])  # the dtype of weight and bias: the input's, or FlashInfer's
@marker.parametrize("hidden_size,num_tokens", SHAPES, [(768, 64)])
@marker.benchmark("impl", [*PEERS, ROW_COPY])
def bench(op: str, weight: str, hidden_size: int, num_tokens: int, impl: str) -> marker.BenchResult:
    """Measure LayerNorm, and LayerNorm with a float8 output, their peers and copies of the same bytes."""
    if impl == ROW_COPY and op != "layernorm":
        marker.skip("a float8 output has fewer bytes than the input")
    if impl == ROW_COPY:
        return bench_row_copy(num_tokens, hidden_size)
    x, w, b = (marker.create_random(*shape) for shape in ((num_tokens, hidden_size), (hidden_size,), (hidden_size,)))
    if weight == "fp32":
        w, b = w.float(), b.float()
    elif impl in ("flashinfer", "quack"):
        marker.skip(f"{impl} takes weights of float32")
    out, scale = torch.empty_like(x, dtype=x.dtype if op == "layernorm" else E4M3), torch.full((1,), 0.25).to(x.device)
    call = create(PEERS[impl], op, impl)
    if isinstance(call, str):
        marker.skip(call)
    tensors = x, w, b, out, scale
    if impl != "jitnorm":
        try:
            call(*tensors)
        except Exception as error:
            marker.skip(f"{impl} does not serve {hidden_size}: {type(error).__name__}")

    def reference(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        differences = x.double() - x.double().mean(-1, keepdim=True)
        y = differences / torch.sqrt(differences.square().mean(-1, keepdim=True) + EPS) * w.double() + b.double()
        return y if op == "layernorm" else (y / scale.double()).clamp(-448, 448)

    return marker.do_bench(
        call,
        input_args=tensors,
        memory_args=(x, w, b),
        memory_output=(out,),
        metrics=(0.5,),
        check=reference,
        tolerance=None if op == "layernorm" else 0.04,  # of results off by one step: torch rounds the norm first
    )


if __name__ == "__main__":
    bench.main(copy=True)
