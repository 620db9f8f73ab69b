"""What a first call costs: a new size, and a size that the cache holds, beside `nvcc -c` of an empty kernel.

Each sample is a fresh process with a fresh cache; the imports are not counted, everything after is. CUDA is built for
sm_90a, which needs nvcc and no GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jitnorm.benchmark import marker
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
# With Triton beside it, torch leaves a full collection of its 70 ms due, which whatever is imported next would trigger.
_IMPORT = """
import gc, time, torch
gc.collect()
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


def empty_kernel() -> float:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cu")
        source.write_text("__global__ void empty() {}\n")
        start = time.perf_counter()
        subprocess.run([str(find_nvcc()), "-c", str(source), "-o", f"{folder}/empty.o"], check=True)
        return time.perf_counter() - start


MEASURES = {
    "import": lambda: fresh_process(_IMPORT),
    "CPU cold": lambda: first_call(_CPU, warm=False),
    "CPU warm": lambda: first_call(_CPU, warm=True),
    "nvcc -c": empty_kernel,
    "sm_90a cold": lambda: first_call(_CUDA, warm=False),
    "sm_90a warm": lambda: first_call(_CUDA, warm=True),
}


@marker.benchmark("what", list(MEASURES), unit="ms")
def bench(what: str) -> marker.BenchResult:
    """What a first call costs: a new size, and a size that the cache holds, beside `nvcc -c` of an empty kernel."""
    if what not in ("import", "CPU cold", "CPU warm") and not find_nvcc():
        marker.skip("no nvcc")
    measure = MEASURES[what]
    return marker.BenchResult.of([[measure()]], metrics=(0.5, "min", "max"), measure_round=lambda: ([measure()], None))


if __name__ == "__main__":
    bench.main()
