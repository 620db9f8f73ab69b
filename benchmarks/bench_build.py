"""Measure builds: first calls of a process, warm-ups of a model and of 100 kernels, and `nvcc -c` of an empty kernel.

Each sample is a new process with a new cache; its time begins after the imports. CUDA is built for sm_90a, which needs
no GPU, with NVRTC where it is installed, and with nvcc.
"""

from __future__ import annotations

import json
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
# All that a model's config calls, and a hundred kernels of all families.
_CONFIG = """
from jitnorm import warmup
start = time.perf_counter()
results = [warmup(config={config!r}, arch="9.0a")]
"""
_HUNDRED = """
from jitnorm import warmup
norms = ["rmsnorm", "fused_add_rmsnorm", "gemma_rmsnorm", "gemma_fused_add_rmsnorm"]
norms += ["rmsnorm_quant_fp8_dynamic", "fused_add_rmsnorm_quant_fp8_dynamic"]
dtypes = {"dtype": ["bf16", "fp16"], "arch": "9.0a"}
start = time.perf_counter()
results = [
    warmup(norms, [1024, 2048, 2560, 3584, 4096, 5120], **dtypes),
    warmup(["fused_inplace_qknorm", "qk_norm_rope_store", "rope"], [64, 128, 256], **dtypes),
    warmup(["silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul", "store_cache", "per_token_quant_fp8"], **dtypes),
    warmup("store_cache_heads", [128], **dtypes),
]
"""
_KERNELS = """
seconds = time.perf_counter() - start
print(sum(len(result.built) for result in results), *(result for result in results if result.failed), file=sys.stderr)
print(seconds)
"""
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
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


def time_warmup(script: str, kernels: int) -> float:
    """Return the seconds of a warm-up, which must build as many kernels as this at least, and the launcher."""
    script = "import sys, time, torch, tvm_ffi\n" + script + _KERNELS
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "JITNORM_CACHE_DIR": f"{folder}/cache"}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    if done.returncode or int((done.stderr.split() or ["0"])[0]) < kernels:
        raise RuntimeError(f"the warm-up did not build {kernels} kernels: {done.stderr}")
    return float(done.stdout)


def time_warmup_of_llama_8b() -> float:
    """Return the seconds of a warm-up of what Llama 3.1 8B calls."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA_8B))
        return time_warmup(_CONFIG.format(config=folder), 4)


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
    "100 kernels": lambda: time_warmup(_HUNDRED, 100),
    "Llama 8B": time_warmup_of_llama_8b,
}


@marker.benchmark("what", list(MEASURES), unit="ms")
def bench(what: str) -> marker.BenchResult:
    """Measure builds: first calls, warm-ups, and `nvcc -c` of an empty kernel."""
    if what == "nvcc -c" and not find_nvcc():
        marker.skip("no nvcc")
    measure = MEASURES[what]
    return marker.BenchResult.of([[measure()]], metrics=(0.5, "min", "max"), measure_round=lambda: ([measure()], None))


if __name__ == "__main__":
    bench.main()
