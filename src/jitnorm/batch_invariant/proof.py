"""Whether a road keeps the promise for one product, found out on the GPU itself, once.

Rows are compared bit by bit, alone and in batches of every size from 1 to 256 and some up to 8192, at every place of
the batch. The operands make all terms of a sum cancel, so that nothing but the rounding errors of its additions is
left: another order gives another result in nearly every element.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from jitnorm.batch_invariant import cublaslt
from jitnorm.jit import cleanup, locations
from jitnorm.jit.cache import INVARIANCE
from jitnorm.jit.folder import UntrustedPath
from jitnorm.jit.log import logger

if TYPE_CHECKING:
    from jitnorm.batch_invariant.cuda_matmul import Problem, Road

BATCHES = (*range(1, 257), 384, 511, 512, 777, 1024, 2047, 2048, 3333, 4096, 8191, 8192)
_ROWS = 7  # different ones, which a batch repeats: being odd, each of them comes to every place of a tile
_COMPARED = 1 << 29  # elements at most in one product; 8192 rows of the widest layers, some of a vocabulary


@dataclass(frozen=True)
class Proof:
    """What was found, and of what."""

    road: str
    problem: str
    gpu: str
    driver: str
    library: str
    code: str  # a hash of what was run and of this file: what has changed is to be proven again
    holds: bool
    first: str  # where it fails first; empty where it holds

    @property
    def name(self) -> str:
        words = (self.road, self.problem, self.gpu, self.driver, self.library, self.code)
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:24] + ".json"


def holds(road: str, library: str, code: tuple[Path, ...], run: Road, problem: Problem) -> bool:
    """Whether `run` gives each row the same bits in any batch. Remembered on disk.

    Args:
        road: its name.
        library: whose kernels they are, with the version and what is asked of it.
        code: the files that choose them.
    """
    found = torch.cuda.get_device_properties(problem.device)
    gpu = f"{found.name}, {found.multi_processor_count} multiprocessors"  # fewer where a process is given a part
    subject = functools.partial(Proof, road, str(problem), gpu, driver_version(), library, _hash_of(code))
    if (known := _recall(subject(False, "").name)) is not None:
        return known.holds
    patience = threading.Timer(2, logger.info, [f"comparing {road} rows of {problem} in batches, once for this GPU"])
    patience.daemon = True
    patience.start()
    try:
        first = first_difference(run, problem)
    except torch.cuda.OutOfMemoryError:  # which says nothing of the road, so that it is not remembered
        logger.warning(
            f"no memory to find out whether {road} keeps the promise for {problem}: not taken in this process"
        )
        return False
    except cublaslt.Refused as error:
        first = str(error)
    finally:
        patience.cancel()
    proof = subject(not first, first)
    _remember(proof)
    return proof.holds


@functools.cache
def _hash_of(code: tuple[Path, ...]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in (*code, Path(__file__)))).hexdigest()[:16]


def first_difference(run: Road, problem: Problem) -> str:
    """Where `run` first gives a row other bits in a batch than alone; empty where it never does."""
    device = problem.device
    generator = torch.Generator(device).manual_seed(0)  # of its own: the user's random numbers stay what they were
    rows, b = cancelling_operands(_ROWS, problem.n, problem.k, problem.dtype, device, generator)
    b = _stored(b, problem)
    bias = torch.zeros(problem.n, dtype=problem.dtype, device=device) if problem.bias else None

    def product(a: torch.Tensor) -> torch.Tensor:
        out = torch.full((a.shape[0], problem.n), float("nan"), dtype=problem.out_dtype, device=device)
        run(a, b, bias, out)
        return out

    alone = torch.cat([product(rows[i : i + 1].clone()) for i in range(_ROWS)])
    if not alone.isfinite().all():
        return "the result of a single row is not finite"
    # As many differences in each batch: read once, at the end, as each reading waits for the GPU.
    batches = [m for m in BATCHES if m <= 256 or m * problem.n <= _COMPARED]
    different = torch.stack([_differences(product(_repeated(rows, m)), alone) for m in batches]).tolist()
    for m, count in zip(batches, different, strict=True):
        if count:
            return f"{count} of {m * problem.n} elements differ in a batch of {m}"
    return ""


def cancelling_operands(
    rows: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[rows, k]` and `[k, n]` whose product is zero, or 2^-22 for an odd k, but for the rounding of its additions."""
    half, odd = k // 2, k % 2
    randn = functools.partial(torch.randn, device=device, generator=generator)
    order = torch.randperm(2 * half, device=device, generator=generator)
    # Terms of many sizes, as those of one size would add exactly, and an order would not show.
    sizes = torch.randint(-4, 5, (half,), device=device, generator=generator).exp2()
    a = (randn(rows, half) * sizes).to(dtype)
    b = randn(half, n).to(dtype)
    tiny = 2.0**-11  # an odd k leaves a term that is no larger than what rounding leaves
    a = torch.cat((torch.cat((a, a), 1)[:, order], a.new_full((rows, odd), tiny)), 1)
    b = torch.cat((torch.cat((b, -b))[order], b.new_full((odd, n), tiny)))
    return a, b


def known_proofs() -> Iterator[Proof]:
    """All that are on disk, for `jitnorm doctor`."""
    names = (path.name for path in cleanup.records(locations.readable()) if path.parent.name == INVARIANCE)
    known = [proof for name in names if (proof := _recall(name))]
    yield from sorted(known, key=lambda proof: (proof.gpu, proof.problem, proof.road))


@functools.cache
def driver_version() -> str:
    """From the kernel module, which says it without a process or another library."""
    try:
        with open("/sys/module/nvidia/version") as file:
            return file.read().strip()
    except OSError:
        return f"cuda {torch.version.cuda}"


def _repeated(rows: torch.Tensor, count: int) -> torch.Tensor:
    return rows.repeat(-(-count // _ROWS), 1)[:count]


def _differences(out: torch.Tensor, alone: torch.Tensor) -> torch.Tensor:
    """How many elements of `out`, whose rows repeat those of `alone`, have other bits."""
    bits = {2: torch.int16, 4: torch.int32}[out.element_size()]
    out, alone = out.view(bits), alone.view(bits)
    whole = out.shape[0] // _ROWS * _ROWS
    count = (out[:whole].view(-1, *alone.shape) != alone).sum()
    return count + (out[whole:] != alone[: out.shape[0] - whole]).sum()


def _stored(b: torch.Tensor, problem: Problem) -> torch.Tensor:
    """With the strides that `problem` names."""
    across, down = (problem.k, problem.n) if problem.b_transposed else (problem.n, problem.k)
    memory = b.new_zeros(down, problem.b_stride)[:, :across]
    view = memory.t() if problem.b_transposed else memory
    return view.copy_(b)


def _recall(name: str) -> Proof | None:
    try:
        proof = Proof(**locations.readable().read_record(INVARIANCE, name))
    except TypeError:
        return None
    return proof if proof.name == name else None


def _remember(proof: Proof) -> None:
    try:
        locations.writable().write_record(INVARIANCE, proof.name, vars(proof))
    except (OSError, UntrustedPath) as error:
        logger.warning(f"cannot keep what was found of {proof.problem}: {error}")
