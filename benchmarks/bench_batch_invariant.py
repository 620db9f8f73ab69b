"""Batch-invariant mode on a GPU, beside torch as it is outside the mode, all in one run, bf16.

python benchmarks/bench_batch_invariant.py [--part mm layer rows] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_rmsnorm import machine
from gpu_timing import time_us

from jitnorm.batch_invariant import cublaslt, cuda_matmul, matmul_persistent, set_batch_invariant_mode
from jitnorm.batch_invariant.cuda_matmul import Problem, Road

BF16 = torch.bfloat16
MATRICES = {  # (N, K)
    "Llama-8B qkv": (6144, 4096),
    "Llama-8B o": (4096, 4096),
    "Llama-8B gate_up": (28672, 4096),
    "Llama-8B down": (4096, 14336),
    "Qwen3-32B qkv": (10240, 5120),
    "Qwen3-32B o": (5120, 8192),
    "Qwen3-32B gate_up": (51200, 5120),
    "Qwen3-32B down": (5120, 25600),
}
ROWS = (1, 16, 128, 1024, 8192)
COLD = 256 << 20  # bytes that the buffers together exceed, several times the second-level cache


def in_turns(calls: dict[str, Callable[[int], object]], buffers: int, rounds: int = 3) -> dict[str, float]:
    """Medians, in microseconds. Names that begin with "mode" are called inside it."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            with set_batch_invariant_mode(name.startswith("mode")), torch.inference_mode():
                times[name].append(time_us(call, buffers))
    return {name: statistics.median(values) for name, values in times.items()}


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def products() -> list[dict[str, Any]]:
    """Each road for itself, the one that the mode takes, and cuBLAS as torch calls it."""
    rows = []
    for name, (n, k) in MATRICES.items():
        count = max(2, COLD // (2 * n * k) + 1)
        weights = [torch.randn(n, k, device="cuda", dtype=BF16).t() for _ in range(count)]
        roads = roads_of(Problem(weights[0].device, n, k, BF16, BF16, True, k, False, False))
        for m in ROWS:
            us = in_turns(calls_of(roads, weights, m), count)
            rows.append({"matrix": name, "n": n, "k": k, "m": m, "us": us})
            ratios = "  ".join(f"{road} {us['torch'] / t:.3f}" for road, t in us.items() if road != "torch")
            print(f"{name:18} m={m:<5} torch {us['torch']:9.2f} us   {ratios}", flush=True)
    for road in rows[0]["us"]:
        ratios = [row["us"]["torch"] / row["us"][road] for row in rows]
        print(f"mm, {road}: geometric mean {geometric_mean(ratios):.3f} of torch, at worst {min(ratios):.3f}")
    return rows


def roads_of(problem: Problem) -> dict[str, Road]:
    kernel = cuda_matmul.triton_module("triton_matmul")
    roads = {
        "triton": cuda_matmul.triton_road(problem),
        "triton, one tile": functools.partial(kernel.run, problem, True),
    }
    if cublaslt.library_version():
        roads["cublaslt"] = cublaslt.road(problem)
    return roads


def calls_of(roads: dict[str, Road], weights: list[torch.Tensor], m: int) -> dict[str, Callable[[int], object]]:
    k, n = weights[0].shape
    count = max(2, min(len(weights), COLD // (2 * m * k)))
    xs = [torch.randn(m, k, device="cuda", dtype=BF16) for _ in range(count)]
    out = torch.empty(m, n, device="cuda", dtype=BF16)
    calls: dict[str, Callable[[int], object]] = {
        "torch": lambda i: torch.mm(xs[i % count], weights[i], out=out),
        "jitnorm": lambda i: matmul_persistent(xs[i % count], weights[i]),
    }
    for road, run in roads.items():
        calls[road] = lambda i, run=run: run(xs[i % count], weights[i], None, out)
    return calls


def layer(x: torch.Tensor, past: torch.Tensor | None, w: dict[str, torch.Tensor]) -> torch.Tensor:
    """A decoder layer of Llama-8B, on [batch, length, 4096]; `past` is [2, batch, 32, cached, 128], or None."""
    batch, length, hidden = x.shape
    h = F.rms_norm(x, (hidden,), w["norm1"], 1e-5)
    q, k, v = F.linear(h, w["qkv"]).split((4096, 1024, 1024), -1)
    q, k, v = (t.view(batch, length, -1, 128).transpose(1, 2) for t in (q, k, v))
    k, v = (t.repeat_interleave(4, 1) for t in (k, v))
    if past is not None:
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
    h = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
    x = x + F.linear(h.transpose(1, 2).reshape(batch, length, hidden), w["o"])
    gate, up = F.linear(F.rms_norm(x, (hidden,), w["norm2"], 1e-5), w["gate_up"]).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, w["down"])


def layers() -> list[dict[str, Any]]:
    w = {
        name.split()[1]: torch.randn(*MATRICES[name], device="cuda", dtype=BF16) * 0.02
        for name in MATRICES
        if name.startswith("Llama")
    }
    w |= {name: torch.ones(4096, device="cuda", dtype=BF16) for name in ("norm1", "norm2")}
    rows = []
    for name, batch, length, cached in (
        ("decode", 1, 1, 1024),
        ("decode", 16, 1, 1024),
        ("decode", 64, 1, 1024),
        ("prefill", 1, 2048, 0),
        ("prefill", 4, 2048, 0),
    ):
        x = torch.randn(batch, length, 4096, device="cuda", dtype=BF16)
        past = torch.randn(2, batch, 32, cached, 128, device="cuda", dtype=BF16) if cached else None

        def call(i: int, x: torch.Tensor = x, past: torch.Tensor | None = past) -> torch.Tensor:
            return layer(x, past, w)

        us = in_turns({"torch": call, "mode": call}, 1)
        rows.append({"layer": name, "batch": batch, "length": length, "cached": cached, "us": us})
        print(
            f"layer, {name} {batch} x {length}, {cached} cached: {us['torch']:.1f} us, "
            f"in the mode {us['mode'] / us['torch']:.3f} of it",
            flush=True,
        )
    return rows


def row_operators() -> list[dict[str, Any]]:
    weight = {}

    def rms_norm(x: torch.Tensor) -> torch.Tensor:
        w = weight.setdefault(x.shape[-1], torch.randn(x.shape[-1], device="cuda", dtype=BF16))
        return F.rms_norm(x, (x.shape[-1],), w, 1e-6)

    operators: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "rms_norm": rms_norm,
        "softmax": lambda x: torch.softmax(x, -1),
        "log_softmax": lambda x: torch.log_softmax(x, -1),
        "mean": lambda x: x.mean(-1),
    }
    rows = []
    for name, operator in operators.items():
        for m, n in ((1, 4096), (64, 4096), (4096, 128), (4096, 4096), (16384, 8192), (1, 128256), (64, 128256)):
            if name == "rms_norm" and n > 8192:
                continue
            buffers = max(2, min(64, COLD // (4 * m * n) + 1))
            xs = [torch.randn(m, n, device="cuda", dtype=BF16) for _ in range(buffers)]
            torch.compiler.reset()
            compiled = torch.compile(operator, dynamic=False)
            call = lambda i, xs=xs, op=operator: op(xs[i])  # noqa: E731
            us = in_turns({"torch": call, "mode": call}, buffers)
            with torch.inference_mode():  # apart: entering the mode forgets what was compiled
                us["compiled"] = statistics.median(
                    time_us(lambda i, xs=xs, op=compiled: op(xs[i]), buffers) for _ in range(3)
                )
            best = min(us["torch"], us["compiled"])
            rows.append({"op": name, "m": m, "n": n, "us": us})
            print(
                f"{name:12} {m:>6} x {n:<7}"
                + "  ".join(f"{k} {t:8.2f}" for k, t in us.items())
                + f"   {us['mode'] / best:.3f}",
                flush=True,
            )
    return rows


PARTS = {"mm": products, "layer": layers, "rows": row_operators}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine("cuda")}
    for part in options.part:
        results[part] = PARTS[part]()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
