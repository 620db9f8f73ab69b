"""Measure the first call of rmsnorm in a process, by jitnorm and its peers, with empty and with warm caches.

Each sample is a new process, whose caches are in a home folder of its own. "call" is the time of the first call, with
torch, the package and tvm-ffi imported (which jitnorm would import only then) and CUDA initialised; "process" is that
of the whole process, from `python` to a result. Both come from the same processes. An installed wheel contains
jitnorm's launcher; in a source checkout the first call with an empty cache builds that too.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jitnorm.benchmark import marker

SAMPLES = 7
NUM_TOKENS, HIDDEN_SIZE = 64, 4096

_SCRIPT = """
import time, torch
x, w = (torch.randn(shape).bfloat16().to({device!r}) for shape in [({num_tokens}, {hidden_size}), ({hidden_size},)])
out = torch.empty_like(x)
{setup}
if x.is_cuda:
    torch.cuda.synchronize()
start = time.perf_counter()
call()
if x.is_cuda:
    torch.cuda.synchronize()
print(time.perf_counter() - start)
"""
_JITNORM = "import tvm_ffi\nfrom jitnorm import rmsnorm\ncall = lambda: rmsnorm(x, w, 1e-6, out)"
_SETUPS = {
    "jitnorm": _JITNORM,
    "jitnorm_nvcc": _JITNORM,
    "sglang": "from sglang.jit_kernel.norm import rmsnorm\ncall = lambda: rmsnorm(x, w, out, 1e-6)",
    "quack": "from quack.rmsnorm import _rmsnorm_fwd\n"
    "call = lambda: _rmsnorm_fwd(x, w, out, None, None, None, None, None, 1e-6, False, 0.0)",
    "liger": "from liger_kernel.ops.rms_norm import rms_norm_forward\n"
    "call = lambda: rms_norm_forward(x, w, 1e-6, 0.0, 'llama', None)",
    "compile": "call = torch.compile(lambda: torch.nn.functional.rms_norm(x, x.shape[-1:], w, 1e-6))",
}
_ENVIRONMENTS = {"jitnorm_nvcc": {"JITNORM_CUDA_COMPILER": "nvcc"}}


def environment(impl: str, home: Path) -> dict[str, str]:
    """Return the variables of a process all of whose caches are below `home`."""
    kept = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    return kept | {"HOME": str(home), "TMPDIR": str(home)} | _ENVIRONMENTS.get(impl, {})


def run_process(impl: str, device: str, home: Path) -> tuple[float, float]:
    """Return the seconds of the first call, and of the process."""
    sizes = {"num_tokens": NUM_TOKENS, "hidden_size": HIDDEN_SIZE}
    script = _SCRIPT.format(device=device, setup=_SETUPS[impl], **sizes)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script], env=environment(impl, home), capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        error = done.stderr.strip().rpartition("\n")[2]
        if "ModuleNotFoundError" in error:
            marker.skip(error.partition(": ")[2])
        raise RuntimeError(f"the process ended with status {done.returncode}: {error}")
    return float(done.stdout.splitlines()[-1]), seconds


@functools.cache  # the rows "call" and "process" have the same samples
def take_samples(impl: str, device: str, warm: bool) -> list[tuple[float, float]]:
    """Return the seconds of first calls and of their processes."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        if warm:
            run_process(impl, device, Path(folder))
        for sample in range(SAMPLES):
            home = Path(folder) if warm else Path(folder, str(sample))
            home.mkdir(exist_ok=True)
            found.append(run_process(impl, device, home))
    return found


@marker.parametrize("caches", ["empty", "warm"], ["empty"])
@marker.parametrize("what", ["call", "process"], ["call"])
@marker.benchmark("impl", list(_SETUPS), unit="ms")
def bench(what: str, caches: str, impl: str) -> marker.BenchResult:
    """Measure the first call of rmsnorm in a process, by jitnorm and its peers, with empty and with warm caches."""
    samples = take_samples(impl, marker.create_empty(0).device.type, caches == "warm")
    return marker.BenchResult.of([[sample[what == "process"]] for sample in samples], metrics=(0.5, "min", "max"))


if __name__ == "__main__":
    bench.main()
