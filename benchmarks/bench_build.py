"""Measure the first call of a process, with an empty and with a warm cache, and `nvcc -c` of an empty kernel.

Each sample is a new process with a new cache; its time begins after the imports. CUDA is built for sm_90a, which needs
nvcc but no GPU.
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
# Where Triton is installed, `import torch` leaves a full garbage collection of 70 ms due, which the next import would
# trigger.
_IMPORT = """
import gc, time, torch
gc.collect()
start = time.perf_counter(); import jitnorm.rmsnorm; print(time.perf_counter() - start)
"""


def time_in_new_process(script: str, **environment: str) -> float:
    """Return the seconds that a script prints."""
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def time_first_call(script: str, warm: bool) -> float:
    """Return the seconds of the first call; with a warm cache without PATH, so that no compiler can be found."""
    script = "import time, torch, tvm_ffi, jitnorm.rmsnorm\n" + script.format(size=4096)
    with tempfile.TemporaryDirectory() as cache:
        seconds = time_in_new_process(script, JITNORM_CACHE_DIR=f"{cache}/cache")
        return time_in_new_process(script, JITNORM_CACHE_DIR=f"{cache}/cache", PATH="") if warm else seconds


def time_nvcc() -> float:
    """Return the seconds that nvcc takes to compile an empty kernel."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cu")
        source.write_text("__global__ void empty() {}\n")
        start = time.perf_counter()
        subprocess.run([str(find_nvcc()), "-c", str(source), "-o", f"{folder}/empty.o"], check=True)
        return time.perf_counter() - start


MEASURES = {
    "import": lambda: time_in_new_process(_IMPORT),
    "CPU cold": lambda: time_first_call(_CPU, warm=False),
    "CPU warm": lambda: time_first_call(_CPU, warm=True),
    "nvcc -c": time_nvcc,
    "sm_90a cold": lambda: time_first_call(_CUDA, warm=False),
    "sm_90a warm": lambda: time_first_call(_CUDA, warm=True),
}


@marker.benchmark("what", list(MEASURES), unit="ms")
def bench(what: str) -> marker.BenchResult:
    """Measure the first call of a process, with an empty and with a warm cache, and `nvcc -c` of an empty kernel."""
    if what not in ("import", "CPU cold", "CPU warm") and not find_nvcc():
        marker.skip("no nvcc")
    measure = MEASURES[what]
    return marker.BenchResult.of([[measure()]], metrics=(0.5, "min", "max"), measure_round=lambda: ([measure()], None))


if __name__ == "__main__":
    bench.main()
