"""Measure RMSNorm beside a gate, of Mamba 2's groups and Qwen3-Next's heads, its peers and a copy of the same bytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peers import EPS, create

import jitnorm
from jitnorm.benchmark import marker

Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], object]
OPS = {"gated_rmsnorm": True, "gated_rmsnorm_gate_first": False}  # with the norm_before_gate of each
# Rows as models have them, with the size of a row and that of a group. Qwen3-Next has 32 heads of 128 elements;
# Mamba 2 2.7B one group, Zamba 2 7B two, and Nemotron-H 8B eight.
SHAPES = {"gated_rmsnorm": [(128, 128)], "gated_rmsnorm_gate_first": [(5120, 5120), (7168, 3584), (8192, 1024)]}
TOKENS = (64, 8192, 1, 1024)  # those that tell most come first: a run may be cut short
ROWS = [(op, size, group, n * (32 if size == 128 else 1)) for n in TOKENS for op in OPS for size, group in SHAPES[op]]


def definition(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, group: int, before: bool) -> torch.Tensor:
    """Compute the norm in the dtype of the arguments, as transformers does but for its roundings."""
    y = x if before else x * F.silu(gate)
    groups = y.unflatten(-1, (-1, group))
    y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + EPS)).flatten(-2) * weight
    return y * F.silu(gate) if before else y


def _jitnorm(group: int, before: bool) -> Call:
    return lambda x, gate, w, out: jitnorm.gated_rmsnorm(
        x, gate, w, EPS, out, group_size=group, norm_before_gate=before
    )


def _torch(group: int, before: bool) -> Call:
    def call(x: torch.Tensor, gate: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return definition(x.float(), gate.float(), w.float(), group, before).to(x.dtype)

    return call


def _compile(group: int, before: bool) -> Call:
    eager = _torch(group, before)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, gate, w, out: out.copy_(eager(x, gate, w, out)), dynamic=False)
    return lambda *tensors: compiled(*tensors)


def _sglang(group: int, before: bool) -> Call:
    """Return mamba_ssm's Triton kernel, as SGLang has it for Mamba."""
    from sglang.kernels.ops.mamba.triton_ops.layernorm_gated import rms_norm_gated

    options = {"eps": EPS, "group_size": group, "norm_before_gate": before}
    return lambda x, gate, w, out: rms_norm_gated(x, w, None, z=gate, **options)


def _fla(group: int, before: bool) -> Call:
    """Return flash-linear-attention's Triton kernel, as SGLang has it for Qwen3-Next."""
    from sglang.kernels.ops.attention.fla.layernorm_gated import rms_norm_gated

    options = {"eps": EPS, "group_size": group, "norm_before_gate": before, "is_rms_norm": True}
    return lambda x, gate, w, out: rms_norm_gated(x=x, weight=w, bias=None, z=gate, **options)


def _vllm(group: int, before: bool) -> Call:
    """Return vLLM's version of mamba_ssm's Triton kernel."""
    from vllm.model_executor.layers.mamba.ops.layernorm_gated import rms_norm_gated

    options = {"eps": EPS, "group_size": group, "norm_before_gate": before}
    return lambda x, gate, w, out: rms_norm_gated(x, w, None, z=gate, **options)


PEERS = {
    "jitnorm": _jitnorm,
    "sglang": _sglang,
    "fla": _fla,
    "vllm": _vllm,
    "compile": _compile,
    "torch": _torch,
}


@marker.parametrize("op,hidden_size,group_size,num_rows", ROWS, [("gated_rmsnorm", 128, 128, 2048)])
@marker.benchmark("impl", list(PEERS))
def bench(op: str, hidden_size: int, group_size: int, num_rows: int, impl: str) -> marker.BenchResult:
    """Measure RMSNorm beside a gate, of Mamba 2's groups and Qwen3-Next's heads, its peers and a copy."""
    norm_before_gate = OPS[op]
    x, gate = marker.create_random(num_rows, hidden_size), marker.create_random(num_rows, hidden_size)
    weight, out = marker.create_random(hidden_size), marker.create_empty(num_rows, hidden_size)
    call = create(lambda _: PEERS[impl](group_size, norm_before_gate), op, impl)
    if isinstance(call, str):
        marker.skip(call)

    def reference(x: torch.Tensor, gate: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return definition(x.double(), gate.double(), w.double(), group_size, norm_before_gate)

    if impl != "jitnorm":
        try:
            call(x, gate, weight, out)
        except Exception as error:
            marker.skip(f"{impl} does not serve {hidden_size}: {type(error).__name__}")
    return marker.do_bench(
        call,
        input_args=(x, gate, weight, out),
        memory_args=(x, gate, weight),
        memory_output=(out,),
        metrics=(0.5,),
        check=reference,
    )


if __name__ == "__main__":
    bench.main(copy=True)
