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
if failed := [result.failed for result in results if result.failed]:
    raise SystemExit(str(failed))
print(seconds, sum(len(result.built) for result in results))
"""
CONFIGS: dict[str, dict[str, object]] = json.loads(Path(__file__).with_name("model_configs.json").read_text())
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


def run_warmup(script: str, cache: str) -> tuple[float, int]:
    """Return the seconds of a warm-up in a new process, and the number of kernels that it built beside the launcher."""
    script = "import time, torch, tvm_ffi\n" + script + _KERNELS
    environment = {**os.environ, "JITNORM_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the warm-up failed: {done.stderr.strip()}")
    seconds, built = done.stdout.split()
    return float(seconds), int(built)


def warm_up_model(name: str, folder: str) -> tuple[float, int]:
    """Do what `run_warmup` does with the config of a model, in the cache of this folder."""
    Path(folder, "config.json").write_text(json.dumps(CONFIGS[name]))
    return run_warmup(_CONFIG.format(config=folder), f"{folder}/cache")


def time_warmup_of_a_model() -> float:
    """Return the seconds of a warm-up of what Llama 3.1 8B calls."""
    with tempfile.TemporaryDirectory() as folder:
        return warm_up_model("Llama-3.1-8B", folder)[0]


def time_warmup_of_a_hundred() -> float:
    """Return the seconds of a warm-up of a hundred kernels."""
    with tempfile.TemporaryDirectory() as folder:
        seconds, built = run_warmup(_HUNDRED, f"{folder}/cache")
    if built < 100:
        raise RuntimeError(f"the warm-up built {built} kernels instead of 100")
    return seconds


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
    "100 kernels": time_warmup_of_a_hundred,
    "Llama 8B": time_warmup_of_a_model,
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
