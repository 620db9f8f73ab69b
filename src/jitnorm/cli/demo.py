"""`jitnorm demo`: build two kernels, check them, load them in a new process, and time them."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import click
import torch
import torch.nn.functional as F

from jitnorm._version import __version__
from jitnorm.benchmark.options import format_option
from jitnorm.cli import output
from jitnorm.cli.base import Command
from jitnorm.core.targets import resolve_target
from jitnorm.jit import locations
from jitnorm.jit.find import find
from jitnorm.rmsnorm import rmsnorm, rmsnorm_spec

_HIDDEN_SIZES = (128, 4096)  # one for a kernel that reduces a row in a warp, and one for a kernel that does in a block
_SHAPES = ((1, 128), (4096, 128), (1, 4096), (64, 4096), (4096, 4096))
_DTYPE = torch.bfloat16
_EPS = 1e-6
_TOLERANCE = 3e-3  # bf16 has 8 significant bits: rounding the exact result once costs about 1.7e-3
_COLUMNS = ("jitnorm(out=)", "jitnorm", "F.rms_norm", "copy")

_BUDGET_S = 0.2
_SAMPLE_S = 0.002  # long compared with the clock's resolution, and with the synchronisation at its end
_MIN_SAMPLES = 5

# JITNORM_DISABLE_JIT is set for this process, so that it fails if the kernel is not in the cache. Imports are not
# timed.
_NEW_PROCESS = """
import sys; sys.path[:] = {path!r}
import time, torch, tvm_ffi, jitnorm.rmsnorm
x = torch.ones(1, {hidden_size}, dtype={dtype}, device={device!r})
w, out = torch.ones_like(x[0]), torch.empty_like(x)
started = time.perf_counter()
jitnorm.rmsnorm(x, w, out=out)
print(1000 * (time.perf_counter() - started))
"""


@click.command(cls=Command)
@format_option
def demo(output_format: str) -> None:
    """Build two kernels, compare them with PyTorch, load them in a new process, and time them.

    Exits 1 if a result is not as accurate as bfloat16 allows.
    """
    target = resolve_target()
    echo = click.echo if output_format == "table" else lambda *_: None
    name = torch.cuda.get_device_name() if target.device == "cuda" else f"the CPU, {torch.get_num_threads()} threads"
    echo(f"jitnorm {__version__}, torch {torch.__version__}, on {name} ({target.sm})\n")
    kernels = []
    for hidden_size in _HIDDEN_SIZES:
        kernels.append(kernel := _first_call(hidden_size, target.device, echo))
        seconds, error = kernel["first_call_s"], kernel["relative_error"]
        echo(f"  first call {seconds:.3f} s; relative error against PyTorch in float64: {error:.1e}")
    for kernel in kernels:
        ms = kernel["new_process_ms"] = _first_call_in_new_process(kernel["hidden_size"], target.device)
        size = kernel["hidden_size"]
        echo(f"a new process found hidden size {size} in the cache: first call {ms:.1f} ms, nothing built")
    times = [_times(*shape, target.device) for shape in _SHAPES]
    if output_format == "json":
        output.as_json({"device": name, "arch": target.sm, "kernels": kernels, "median_us": times})
        return
    echo("\nmedian time per call in microseconds, bfloat16; the same tensors each time, so small ones stay in cache")
    rows = [[f"{t['num_tokens']} x {t['hidden_size']}", *(f"{t[column]:.1f}" for column in _COLUMNS)] for t in times]
    output.table(["tokens x hidden", *_COLUMNS], rows, right=range(1 + len(_COLUMNS)))


def _first_call(hidden_size: int, device: str, echo: Callable[[str], Any]) -> dict[str, Any]:
    """Call the operator, which builds its kernel unless the cache has it, and compare the result with PyTorch's.

    Raises:
        RuntimeError: the result is wrong.
    """
    spec = rmsnorm_spec(hidden_size, _DTYPE, _DTYPE, resolve_target(device))
    built = find(spec, mark_in_use=False) is not None
    echo(f"{spec}: {'already built' if built else 'not built yet, building'}, in {locations.readable().root}")
    x, weight = _inputs(257, hidden_size, device)
    started = time.perf_counter()
    out = rmsnorm(x, weight, _EPS)
    seconds = time.perf_counter() - started
    exact = F.rms_norm(x.double(), (hidden_size,), weight.double(), _EPS)
    error = float((out.double() - exact).norm() / exact.norm())
    if not error <= _TOLERANCE:
        raise RuntimeError(
            f"{spec} is wrong: its relative error is {error:.1e}, and rounding to bfloat16 explains {_TOLERANCE:.0e}. "
            "Run jitnorm cache verify, and report it if that finds nothing"
        )
    return {"hidden_size": hidden_size, "already_built": built, "first_call_s": seconds, "relative_error": error}


def _first_call_in_new_process(hidden_size: int, device: str) -> float:
    """Return the milliseconds of the first call in a new process that cannot build.

    Raises:
        RuntimeError: the process failed.
    """
    code = _NEW_PROCESS.format(path=sys.path, hidden_size=hidden_size, dtype=_DTYPE, device=device)
    environment = {**os.environ, "JITNORM_CACHE_DIR": str(locations.readable().root), "JITNORM_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if done.returncode or not done.stdout.split():
        lines = done.stderr.strip().splitlines() or [f"it exited with status {done.returncode} and printed nothing"]
        raise RuntimeError(f"a new process does not find the kernel in the cache: {lines[-1]}")
    return float(done.stdout.split()[-1])


def _times(num_tokens: int, hidden_size: int, device: str) -> dict[str, float]:
    """Return the median time of each call, in microseconds. They illustrate: published times are the benchmarks'."""
    x, weight = _inputs(num_tokens, hidden_size, device)
    out = torch.empty_like(x)
    calls = (
        lambda: rmsnorm(x, weight, _EPS, out),
        lambda: rmsnorm(x, weight, _EPS),
        lambda: F.rms_norm(x, (x.shape[-1],), weight, _EPS),
        lambda: out.copy_(x),
    )
    medians = {column: _median_us(call, device) for column, call in zip(_COLUMNS, calls, strict=True)}
    return {"num_tokens": num_tokens, "hidden_size": hidden_size, **medians}


def _inputs(num_tokens: int, hidden_size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator(device).manual_seed(0)
    x = torch.randn(num_tokens, hidden_size, generator=random, device=device)
    return x.to(_DTYPE), torch.randn(hidden_size, generator=random, device=device).to(_DTYPE)


def _median_us(call: Callable[[], object], device: str) -> float:
    """Return the median time of a call in microseconds, of samples of as many calls as are long enough to measure."""
    _seconds(call, 1, device)  # the first call allocates, and may start threads
    count = max(1, int(_SAMPLE_S / _seconds(call, 3, device)))
    samples: list[float] = []
    deadline = time.perf_counter() + _BUDGET_S
    while len(samples) < _MIN_SAMPLES or time.perf_counter() < deadline:
        samples.append(_seconds(call, count, device))
    return 1e6 * statistics.median(samples)


def _seconds(call: Callable[[], object], count: int, device: str) -> float:
    """Return the seconds of one call, on average over `count` of them."""
    started = time.perf_counter()
    for _ in range(count):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / count
