"""Check on the GPU itself whether a GEMM backend gives a row the same bits in every batch, and keep the result on disk.

Rows are compared bit by bit, alone and in batches of every size from 1 to 256 and of some sizes up to 8192, at every
place of the batch. The operands make all terms of a sum cancel, so that only the rounding errors of its additions are
left: another order of additions gives another result in nearly every element.
"""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from jitnorm.batch_invariant import operands
from jitnorm.batch_invariant.matmul.problem import BATCH_SIZES, Gemm, Problem, UnsupportedProblem
from jitnorm.batch_invariant.operands import cancelling_operands, count_differing_elements
from jitnorm.core.targets import driver_version, gpu_name
from jitnorm.jit import cleanup, locations
from jitnorm.jit.cache import INVARIANCE
from jitnorm.jit.folder import UntrustedPath
from jitnorm.jit.log import logger

_ROWS = 7  # different rows, which a batch repeats: as 7 is odd, each of them comes to every place of a tile
_MAX_ELEMENTS = 1 << 29  # of one result: 8192 rows of the widest layers, fewer of a vocabulary
_SECONDS_UNTIL_LOGGED = 2


@dataclass(frozen=True)
class CheckResult:
    """The result of one check, and what it depends on."""

    backend: str
    problem: str
    gpu: str
    driver: str
    library: str  # the library whose kernels ran, its version and what it was asked for
    code: str  # a hash of the files that chose the kernels and of the check itself
    passed: bool
    first_difference: str  # empty if it passed

    @property
    def file_name(self) -> str:
        """Return the name of its file in the cache, a hash of what the result depends on."""
        key = (self.backend, self.problem, self.gpu, self.driver, self.library, self.code)
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24] + ".json"


def passes(backend: str, library: str, sources: tuple[Path, ...], gemm: Gemm, problem: Problem) -> bool:
    """Return whether a backend gives each row of `problem` the same bits in every batch that is tried.

    The result is kept in the cache. On out-of-memory nothing is cached, and the answer is False.

    Args:
        backend: its name.
        library: the library whose kernels it runs, with the version and what is asked of it.
        sources: the files that choose the kernels.
        gemm: the backend, bound to the problem.
    """
    result = functools.partial(
        CheckResult,
        *(backend, str(problem), gpu_name(problem.device), driver_version(), library, _hash_of_sources(sources)),
    )
    if (cached := _read(result(False, "").file_name)) is not None:
        return cached.passed
    message = "checking that rows of %s have the same bits in every batch with %s, once for this GPU"
    timer = threading.Timer(_SECONDS_UNTIL_LOGGED, logger.info, (message, problem, backend))
    timer.daemon = True
    timer.start()
    try:
        difference = find_first_difference(gemm, problem)
    except torch.cuda.OutOfMemoryError:  # says nothing about the backend, so it is not cached
        logger.warning(
            "not enough GPU memory to check whether %s is batch-invariant for %s: this process does not use it",
            backend,
            problem,
        )
        return False
    except UnsupportedProblem as error:
        difference = str(error)
    finally:
        timer.cancel()
    checked = result(not difference, difference)
    _write(checked)
    return checked.passed


def find_first_difference(gemm: Gemm, problem: Problem) -> str:
    """Return in which batch a row first has other bits than alone, in words; an empty string if in none."""
    device = problem.device
    generator = torch.Generator(device).manual_seed(0)  # leaves the state of torch's own generators as it is
    rows, b = cancelling_operands(_ROWS, problem.n, problem.k, problem.dtype, device, generator)
    b = _with_strides_of(problem, b)
    bias = torch.zeros(problem.n, dtype=problem.dtype, device=device) if problem.bias else None

    def multiply(a: torch.Tensor) -> torch.Tensor:
        out = torch.full((a.shape[0], problem.n), float("nan"), dtype=problem.out_dtype, device=device)
        gemm(a, b, bias, out)
        return out

    alone = torch.cat([multiply(rows[i : i + 1].clone()) for i in range(_ROWS)])
    if not alone.isfinite().all():
        return "the result of a single row is not finite"
    # All counts are read together at the end, because each read waits for the GPU.
    sizes = [m for m in BATCH_SIZES if m <= 256 or m * problem.n <= _MAX_ELEMENTS]
    counts = torch.stack([_count_differences(multiply(_repeat(rows, m)), alone) for m in sizes]).tolist()
    for m, count in zip(sizes, counts, strict=True):
        if count:
            return f"{count} of {m * problem.n} elements differ in a batch of {m}"
    return ""


def cached_results() -> Iterator[CheckResult]:
    """Yield all results in the cache, for `jitnorm doctor`."""
    names = (path.name for path in cleanup.records(locations.readable()) if path.parent.name == INVARIANCE)
    results = [result for name in names if (result := _read(name))]
    yield from sorted(results, key=lambda result: (result.gpu, result.problem, result.backend))


@functools.cache
def _hash_of_sources(sources: tuple[Path, ...]) -> str:
    files = (*sources, Path(__file__), Path(operands.__file__))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _repeat(rows: torch.Tensor, count: int) -> torch.Tensor:
    return rows.repeat(-(-count // _ROWS), 1)[:count]


def _count_differences(out: torch.Tensor, alone: torch.Tensor) -> torch.Tensor:
    """Return how many elements differ between `out` and the rows of `alone`, repeated."""
    whole = out.shape[0] // _ROWS * _ROWS
    rest = count_differing_elements(out[whole:], alone[: out.shape[0] - whole])
    return rest + count_differing_elements(out[:whole].view(-1, *alone.shape), alone)


def _with_strides_of(problem: Problem, b: torch.Tensor) -> torch.Tensor:
    """Return a copy of `b` with the strides that `problem` names."""
    rows, columns = (problem.n, problem.k) if problem.b_transposed else (problem.k, problem.n)
    stored = b.new_zeros(rows, problem.b_stride)[:, :columns]
    view = stored.t() if problem.b_transposed else stored
    return view.copy_(b)


def _read(file_name: str) -> CheckResult | None:
    try:
        result = CheckResult(**locations.readable().read_record(INVARIANCE, file_name))
    except TypeError:  # no such file, or one with other fields
        return None
    return result if result.file_name == file_name else None


def _write(result: CheckResult) -> None:
    try:
        locations.writable().write_record(INVARIANCE, result.file_name, vars(result))
    except (OSError, UntrustedPath) as error:
        logger.warning("cannot write the invariance check of %s to the cache: %s", result.problem, error)
