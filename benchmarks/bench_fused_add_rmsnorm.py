"""The residual forms on a GPU, beside their peers and a copy of the same bytes, all in one run, bf16.

python benchmarks/bench_fused_add_rmsnorm.py [--op gemma_fused_add_rmsnorm] [--impl jitnorm quack ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
from bench_rmsnorm import machine
from gpu_timing import in_turn_us, print_table, rotating_buffers, usable
from peers import EPS, PEERS, Call, available

SHAPES = [(1024, 64), (4096, 1), (4096, 64), (4096, 1024), (4096, 16384), (8192, 8192)]


def reference_error(call: Call, x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, offset: float) -> float:
    """Relative error of what a peer leaves in its input."""
    x, residual = x[:1024].clone(), residual[:1024].clone()
    total = x.double() + residual.double()
    exact = total / torch.sqrt((total**2).mean(-1, keepdim=True) + EPS) * (w.double() + offset)
    call(x, residual, w)
    return float((x.double() - exact).norm() / exact.norm())


def row(calls: dict[str, Call], op: str, hidden_size: int, num_tokens: int) -> dict[str, object]:
    inputs, residuals = rotating_buffers(num_tokens, hidden_size, torch.bfloat16)
    residuals.normal_()
    weight = torch.randn(hidden_size, device="cuda").bfloat16()
    offset = 1.0 if "gemma" in op else 0.0
    good = usable(
        calls,
        lambda call: reference_error(call, inputs[0], residuals[0], weight, offset),
        f"{hidden_size}x{num_tokens}",
    )
    sources, targets = rotating_buffers(2 * num_tokens, hidden_size, torch.bfloat16)
    bound = {name: (lambda i, call=call: call(inputs[i], residuals[i], weight)) for name, call in good.items()}
    bound["copy"] = lambda i: targets[i % len(targets)].copy_(sources[i % len(sources)])
    rounds = in_turn_us(bound, len(inputs))
    return {
        "op": op,
        "hidden_size": hidden_size,
        "num_tokens": num_tokens,
        "bytes": 8 * hidden_size * num_tokens,
        "us": {name: statistics.median(times) for name, times in rounds.items()},
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=("fused_add_rmsnorm", "gemma_fused_add_rmsnorm"), default="fused_add_rmsnorm")
    names = [n for n in PEERS if n not in ("copy", "torch")]
    parser.add_argument("--impl", nargs="+", choices=names, default=names)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    calls, absent = available(options.impl, options.op)
    for name, why in absent.items():
        print(f"{name} is absent: {why}", file=sys.stderr)
    rows = [row(calls, options.op, *shape) for shape in SHAPES]
    print_table(rows, ["copy", *calls])
    if options.json:
        options.json.write_text(json.dumps({"machine": machine("cuda"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
