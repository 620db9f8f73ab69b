"""`jitnorm demo`: the whole way once, on whatever device is here: build, check, find again, time."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import click
import torch
import torch.nn.functional as F

from jitnorm._version import __version__
from jitnorm.cli import output
from jitnorm.cli.base import Command
from jitnorm.cli.timing import median_us
from jitnorm.core.targets import resolve_target
from jitnorm.jit import locations
from jitnorm.jit.load import find
from jitnorm.rmsnorm import rmsnorm, rmsnorm_spec

_HIDDEN_SIZES = (128, 4096)  # a kernel that reduces a row in a warp, and one that does in a block
_SHAPES = ((1, 128), (4096, 128), (1, 4096), (64, 4096), (4096, 4096))
_DTYPE = torch.bfloat16
_EPS = 1e-6
_TOLERANCE = 3e-3  # bf16 keeps 8 bits: rounding the exact result once costs about 1.7e-3

# A process that finds nothing in the cache fails here: JITNORM_DISABLE_JIT is set for it.
_FRESH_PROCESS = """
import sys; sys.path[:] = {path!r}
import time, torch, jitnorm.rmsnorm
x = torch.ones(1, {hidden_size}, dtype={dtype}, device={device!r})
w, out = torch.ones_like(x[0]), torch.empty_like(x)
started = time.perf_counter()
jitnorm.rmsnorm(x, w, out=out)
print(1000 * (time.perf_counter() - started))
"""


@click.command(cls=Command, short_help="Build two kernels, check them and time them.")
def demo() -> None:
    """Build two kernels, compare them with PyTorch, find them again in a new process, and time them.

    Exits 1 if a result is not as exact as bfloat16 allows.
    """
    target = resolve_target()
    name = torch.cuda.get_device_name() if target.device == "cuda" else f"the CPU, {torch.get_num_threads()} threads"
    click.echo(f"jitnorm {__version__}, torch {torch.__version__}, on {name} ({target.sm})\n")
    for hidden_size in _HIDDEN_SIZES:
        _first_call(hidden_size, target.device)
    for hidden_size in _HIDDEN_SIZES:
        ms = _first_call_elsewhere(hidden_size, target.device)
        click.echo(f"a new process found hidden size {hidden_size} in the cache: first call {ms:.1f} ms, nothing built")
    click.echo()
    _times(target.device)


def _first_call(hidden_size: int, device: str) -> None:
    spec = rmsnorm_spec(hidden_size, _DTYPE, _DTYPE, resolve_target(device))
    built = find(spec, mark_in_use=False) is not None
    click.echo(f"{spec}: {'already built' if built else 'not built yet, building'}, in {locations.readable().root}")
    x, weight = _inputs(257, hidden_size, device)
    started = time.perf_counter()
    out = rmsnorm(x, weight, _EPS)
    seconds = time.perf_counter() - started
    exact = F.rms_norm(x.double(), (hidden_size,), weight.double(), _EPS)
    error = float((out.double() - exact).norm() / exact.norm())
    click.echo(f"  first call {seconds:.3f} s; relative error against PyTorch in float64: {error:.1e}")
    if not error <= _TOLERANCE:
        raise RuntimeError(f"{spec} is wrong: relative error {error:.1e}, at most {_TOLERANCE:.0e} is due to bfloat16")


def _first_call_elsewhere(hidden_size: int, device: str) -> float:
    """Milliseconds of the first call in a new process, which may not build."""
    code = _FRESH_PROCESS.format(path=sys.path, hidden_size=hidden_size, dtype=_DTYPE, device=device)
    environment = {**os.environ, "JITNORM_CACHE_DIR": str(locations.readable().root), "JITNORM_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if done.returncode or not done.stdout.split():
        said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode} and said nothing"]
        raise RuntimeError(f"a new process does not find the kernel in the cache: {said[-1]}")
    return float(done.stdout.split()[-1])


def _times(device: str) -> None:
    rows = []
    for num_tokens, hidden_size in _SHAPES:
        x, weight = _inputs(num_tokens, hidden_size, device)
        out = torch.empty_like(x)
        calls = (
            lambda x=x, weight=weight, out=out: rmsnorm(x, weight, _EPS, out),
            lambda x=x, weight=weight: rmsnorm(x, weight, _EPS),
            lambda x=x, weight=weight: F.rms_norm(x, (x.shape[-1],), weight, _EPS),
            lambda x=x, out=out: out.copy_(x),
        )
        rows.append([f"{num_tokens} x {hidden_size}", *(f"{median_us(call, device):.1f}" for call in calls)])
    click.echo(
        "median time per call in microseconds, bfloat16; the same tensors each time, so small ones stay in cache"
    )
    output.table(["tokens x hidden", "jitnorm(out=)", "jitnorm", "F.rms_norm", "copy"], rows, right=range(5))


def _inputs(num_tokens: int, hidden_size: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator(device).manual_seed(0)
    x = torch.randn(num_tokens, hidden_size, generator=random, device=device)
    return x.to(_DTYPE), torch.randn(hidden_size, generator=random, device=device).to(_DTYPE)
