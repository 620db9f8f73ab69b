"""Measure norms with a float8 output and quantisation alone, their peers and a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peers import EPS, create

import jitnorm
from jitnorm.benchmark import marker

E4M3 = torch.float8_e4m3fn

# Functions of (input, residual, weight, out, scale, scales). Static quantisation reads `scale`; dynamic quantisation
# writes `scale` for a tensor, `scales` for each token.
Call = Callable[..., object]


def norm(x, residual, w):
    return F.rms_norm(x if residual is None else residual.add_(x), x.shape[-1:], w, EPS)


def quantize(y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (y.float() / scale).clamp(-448, 448).to(E4M3)


def quantize_per_token(y: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return quantize(y, scales.copy_(y.float().abs().amax(-1, keepdim=True) / 448))


TORCH: dict[str, Call] = {
    "rmsnorm_static": lambda x, r, w, out, scale, scales: out.copy_(quantize(norm(x, None, w), scale)),
    "rmsnorm_dynamic": lambda x, r, w, out, scale, scales: out.copy_(quantize_per_token(norm(x, None, w), scales)),
    "fused_add_static": lambda x, r, w, out, scale, scales: out.copy_(quantize(norm(x, r, w), scale)),
    "fused_add_dynamic": lambda x, r, w, out, scale, scales: out.copy_(quantize_per_token(norm(x, r, w), scales)),
    "per_tensor_static": lambda x, r, w, out, scale, scales: out.copy_(quantize(x, scale)),
    "per_tensor_dynamic": lambda x, r, w, out, scale, scales: out.copy_(
        quantize(x, scale.copy_(x.abs().amax().float() / 448))
    ),
    "per_token": lambda x, r, w, out, scale, scales: out.copy_(quantize_per_token(x, scales)),
}
JITNORM: dict[str, Call] = {
    "rmsnorm_static": lambda x, r, w, out, scale, scales: jitnorm.rmsnorm_quant_fp8(x, w, scale, EPS, out),
    "rmsnorm_dynamic": lambda x, r, w, out, scale, scales: jitnorm.rmsnorm_quant_fp8(
        x, w, None, EPS, out, scales=scales
    ),
    "fused_add_static": lambda x, r, w, out, scale, scales: jitnorm.fused_add_rmsnorm_quant_fp8(
        x, r, w, scale, EPS, out
    ),
    "fused_add_dynamic": lambda x, r, w, out, scale, scales: jitnorm.fused_add_rmsnorm_quant_fp8(
        x, r, w, None, EPS, out, scales=scales
    ),
    "per_tensor_static": lambda x, r, w, out, scale, scales: jitnorm.per_tensor_quant_fp8(x, out, scale, True),
    "per_tensor_dynamic": lambda x, r, w, out, scale, scales: jitnorm.per_tensor_quant_fp8(x, out, scale),
    "per_token": lambda x, r, w, out, scale, scales: jitnorm.per_token_quant_fp8(x, out, scales),
}


def compiled(op: str) -> Call:
    torch._dynamo.reset()
    return torch.compile(TORCH[op], dynamic=False)


def flashinfer(op: str) -> Call:
    import flashinfer.norm

    if op == "rmsnorm_static":
        return lambda x, r, w, out, scale, scales: flashinfer.norm.rmsnorm_quant(out, x, w, scale, EPS, True)
    if op == "fused_add_static":
        return lambda x, r, w, out, scale, scales: flashinfer.norm.fused_add_rmsnorm_quant(
            out, x, r, w, scale, EPS, True
        )
    raise LookupError("FlashInfer has no such operator")


def sglang(op: str) -> Call:
    from sglang.jit_kernel.per_tensor_quant_fp8 import per_tensor_quant_fp8

    if op == "per_tensor_static":
        return lambda x, r, w, out, scale, scales: per_tensor_quant_fp8(x, out, scale, True)
    if op == "per_tensor_dynamic":  # accumulates into its scale, which must be zero
        return lambda x, r, w, out, scale, scales: per_tensor_quant_fp8(x, out, scale.zero_(), False)
    raise LookupError("SGLang's JIT has no such operator")


IMPLS = {
    "jitnorm": JITNORM.__getitem__,
    "sglang": sglang,
    "flashinfer": flashinfer,
    "compile": compiled,
    "torch": TORCH.__getitem__,
}


@marker.parametrize("op", list(TORCH), ["rmsnorm_static", "per_tensor_dynamic"])
@marker.parametrize(
    "hidden_size,num_tokens", [(4096, 1), (4096, 64), (4096, 1024), (4096, 16384), (8192, 8192)], [(4096, 64)]
)
@marker.benchmark("impl", list(IMPLS))
def bench(op: str, hidden_size: int, num_tokens: int, impl: str) -> marker.BenchResult:
    """Measure bfloat16 to float8, with static and dynamic scales. With a residual the input is only read."""
    x, residual = (marker.create_random(num_tokens, hidden_size) for _ in range(2))
    w, out = marker.create_random(hidden_size), torch.zeros_like(x, dtype=E4M3)
    scale, scales = (torch.full(shape, 0.02, device=x.device) for shape in ((1,), (num_tokens, 1)))
    call = create(IMPLS[impl], op, impl)
    if isinstance(call, str):
        marker.skip(call)

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        call(*tensors)
        return tensors[3]  # the result to check

    read, written = (x, w), (out,)
    if "norm" not in op and "add" not in op:
        read = (x, x) if op == "per_tensor_dynamic" else (x,)  # read twice: for the maximum, then for the output
    elif "add" in op:
        read, written = (x, residual, w), (residual, out)
    return marker.do_bench(
        run,
        input_args=(x, residual, w, out, scale, scales),
        memory_args=read,
        memory_output=None,
        extra_memory_args=written,
        check=lambda *tensors: TORCH[op](*tensors),
        tolerance=0.04,  # of results off by one step: torch rounds the norm to bfloat16 before quantising
    )


if __name__ == "__main__":
    bench.main(copy=True)
