"""RMSNorm beside its peers and a copy of the same bytes, all in one run.

    python benchmarks/bench_rmsnorm.py [--device cuda|cpu] [--impl copy jitnorm ...] [--json results/FILE.json]

On a GPU: bf16, the time of one call inside a CUDA graph over rotating buffers, the median of three rounds that take the
implementations in turn. On the CPU: every dtype, `out` given and allocated, as multiples of torch's own time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from peers import EPS, PEERS, Call, available

import jitnorm

# (hidden size, rows): decode batches, prefill, q/k heads, and more than 100 MB each way where it fits.
GPU_SHAPES = [
    *((64, n) for n in (64, 1048576)),
    *((128, n) for n in (64, 4096, 1048576)),
    (256, 262144),
    (512, 131072),
    *((1024, n) for n in (64, 131072)),
    *((2048, n) for n in (64, 65536)),
    *((4096, n) for n in (1, 64, 256, 1024, 4096, 32768)),
    *((5120, n) for n in (64, 32768)),
    *((7168, n) for n in (64, 16384)),
    *((8192, n) for n in (1, 64, 1024, 16384)),
]


def reference_error(call: Call, x: torch.Tensor, w: torch.Tensor) -> float:
    """Relative error of a peer's result, which is in `out` or returned."""
    x = x[:1024]
    out = torch.full_like(x, float("nan"))
    result = call(x, w, out)
    got = (out if not out.isnan().any() else result).double()
    exact = x.double() / torch.sqrt((x.double() ** 2).mean(-1, keepdim=True) + EPS) * w.double()
    return float((got - exact).norm() / exact.norm())


def gpu_row(calls: dict[str, Call], op: str, hidden_size: int, num_tokens: int) -> dict[str, object]:
    from gpu_timing import in_turn_us, rotating_buffers, usable

    inputs, outs = rotating_buffers(num_tokens, hidden_size, torch.bfloat16)
    weight = torch.randn(hidden_size, device="cuda").bfloat16()
    factor = 1 + weight.float() if op == "gemma_rmsnorm" else weight
    copy = {name: call for name, call in calls.items() if name == "copy"}
    peers = {name: call for name, call in calls.items() if name != "copy"}
    good = copy | usable(
        peers,
        lambda call: reference_error(lambda x, w, out: call(x, weight, out), inputs[0], factor),
        f"{hidden_size}x{num_tokens}",
    )
    bound = {name: (lambda i, call=call: call(inputs[i], weight, outs[i])) for name, call in good.items()}
    rounds = in_turn_us(bound, len(inputs))
    return {
        "op": op,
        "hidden_size": hidden_size,
        "num_tokens": num_tokens,
        "bytes": 4 * hidden_size * num_tokens,
        "us": {name: statistics.median(times) for name, times in rounds.items()},
        "rounds": rounds,
    }


def gpu(options: argparse.Namespace) -> list[dict]:
    from gpu_timing import print_table

    calls, absent = available(options.impl, options.op)
    for name, why in absent.items():
        print(f"{name} is absent: {why}", file=sys.stderr)
    rows = [gpu_row(calls, options.op, *shape) for shape in GPU_SHAPES]
    print_table(rows, [name for name in options.impl if name in calls])
    return rows


def median_s(call: Callable[[], object], seconds: float = 0.25) -> float:
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 3000):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def cpu(options: argparse.Namespace) -> list[dict]:
    rows = []
    print(f"{'hidden':>6} {'rows':>5} dtype  {'torch us':>10} {'jitnorm us':>10}  torch/jitnorm: out given, allocated")
    for hidden_size in (64, 256, 1024, 4096, 8192):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for num_tokens in (1, 64, 4096):
                x = torch.randn(num_tokens, hidden_size).to(dtype)
                w, out = torch.randn(hidden_size).to(dtype), torch.empty_like(x)
                given, allocated, theirs = (
                    median_s(call)
                    for call in (
                        lambda x=x, w=w, out=out: jitnorm.rmsnorm(x, w, EPS, out),
                        lambda x=x, w=w: jitnorm.rmsnorm(x, w, EPS),
                        lambda x=x, w=w: F.rms_norm(x, (x.shape[-1],), w, EPS),
                    )
                )
                name = str(dtype).removeprefix("torch.")
                rows.append(
                    {"hidden_size": hidden_size, "num_tokens": num_tokens, "dtype": name}
                    | {"torch_us": theirs * 1e6, "out_us": given * 1e6, "allocated_us": allocated * 1e6}
                )
                print(
                    f"{hidden_size:>6} {num_tokens:>5} {name:8} {theirs * 1e6:9.1f} {given * 1e6:10.2f} "
                    f"{theirs / given:14.1f} {theirs / allocated:10.1f}"
                )
    return rows


def machine(device: str) -> dict[str, object]:
    about: dict[str, object] = {"python": platform.python_version(), "torch": torch.__version__}
    about["jitnorm"] = jitnorm.__version__
    if device == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    else:
        about |= {"processor": platform.machine(), "threads": torch.get_num_threads()}
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--op", choices=("rmsnorm", "gemma_rmsnorm"), default="rmsnorm")
    parser.add_argument("--impl", nargs="+", choices=PEERS, default=[n for n in PEERS if n != "torch"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = gpu(options) if options.device == "cuda" else cpu(options)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(options.device), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
