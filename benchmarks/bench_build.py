"""What a first call costs: a new size, and a size that the cache holds. Ratios to `nvcc -c` of an empty kernel.

    python benchmarks/bench_build.py [--json results/FILE.json]

Each figure is the median over fresh processes with fresh caches; the imports are not counted, everything after is. CUDA
is built for sm_90a, which needs nvcc and no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jitnorm.jit.toolchain import find_nvcc

_CPU = """
x, w = torch.randn(4, {size}).bfloat16(), torch.randn({size}).bfloat16()
start = time.perf_counter(); jitnorm.rmsnorm(x, w); print(time.perf_counter() - start)
"""
_CUDA = """
from jitnorm.rmsnorm import _jit_rmsnorm_module
start = time.perf_counter()
_jit_rmsnorm_module({size}, torch.bfloat16, device="cuda", arch="9.0a"); print(time.perf_counter() - start)
"""
_IMPORT = """
import time, torch
start = time.perf_counter(); import jitnorm.rmsnorm; print(time.perf_counter() - start)
"""


def fresh_process(script: str, **environment: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def first_call(script: str, warm: bool) -> float:
    """Warm: without a PATH, so that no compiler can be found, let alone started."""
    script = "import time, torch, jitnorm.rmsnorm\n" + script.format(size=4096)
    with tempfile.TemporaryDirectory() as cache:
        seconds = fresh_process(script, JITNORM_CACHE_DIR=f"{cache}/cache")
        return fresh_process(script, JITNORM_CACHE_DIR=f"{cache}/cache", PATH="") if warm else seconds


def empty_kernel(nvcc: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cu")
        source.write_text("__global__ void empty() {}\n")
        start = time.perf_counter()
        subprocess.run([nvcc, "-c", str(source), "-o", f"{folder}/empty.o"], check=True)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    nvcc = find_nvcc()
    measures = {
        "import jitnorm after torch": lambda: fresh_process(_IMPORT),
        "first call, CPU, cold": lambda: first_call(_CPU, warm=False),
        "first call, CPU, warm, no PATH": lambda: first_call(_CPU, warm=True),
    }
    if nvcc:
        measures |= {
            "nvcc -c of an empty kernel": lambda: empty_kernel(nvcc),
            "first call, CUDA sm_90a, cold": lambda: first_call(_CUDA, warm=False),
            "first call, CUDA sm_90a, warm, no PATH": lambda: first_call(_CUDA, warm=True),
        }
    rounds: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(options.runs):
        for name, measure in measures.items():
            rounds[name].append(measure())
    medians = {name: statistics.median(times) for name, times in rounds.items()}
    unit = medians.get("nvcc -c of an empty kernel")
    for name, seconds in medians.items():
        ratio = f"{seconds / unit:8.3f} of nvcc -c" if unit else ""
        print(f"{name:>40} {seconds * 1e3:9.2f} ms {ratio}")
    if options.json:
        options.json.write_text(json.dumps({"seconds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
