"""Linear layers with few rows by the fastest of four GEMMs, all of which are timed when a model is loaded or patched.

They are torch's, this package's two (few_rows.py), and cuBLASLt without split k. torch takes the first kernel that
cuBLASLt proposes, which for few rows and columns is often not the fastest: on an H200 one row with n = 1024, k = 2048
took 12.9 us, where 16 rows took 6.1 by another kernel; 64 rows with n = 4096, k = 12288 took 32.7 us, and 28.3 without
split k.

The choice is kept in the cache (gemm_choices.py). Two processes that time a shape at once may choose differently, where
the times are close. So a layer whose result must be the same on all ranks of tensor parallelism, such as the router of
experts, must not be among the weights.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from jitnorm.batch_invariant.matmul import cublaslt
from jitnorm.batch_invariant.matmul.problem import Gemm, Problem, UnsupportedProblem
from jitnorm.core.targets import driver_version, gpu_name
from jitnorm.general_rmsnorm import general_rmsnorm
from jitnorm.integrations import few_rows, gemm_choices
from jitnorm.integrations.engine_plugins import build_and_load
from jitnorm.integrations.few_rows import FewRowsKernel
from jitnorm.integrations.gemm_choices import Choice
from jitnorm.jit.log import logger

ROWS = (1, 2, 4, 8, 16, 32, 64)  # at which all are timed; other numbers of rows count as the next of these
_CUBLASLT = "cuBLASLt without split k"
_MAX_CUBLASLT_COLUMNS = 4096  # with more, or with more than k, cuBLASLt took about the same time as torch
_MAX_RATIO = 0.97  # of the times, with the kernels before and after: a smaller gain may be noise
_SAMPLES = 3
_SLEEP_CYCLES, _MAX_SLEEP_CYCLES = 2_000_000, 16_000_000  # 1 to 8 ms, in which the host launches all of a sample
_MAX_TIMED_BYTES = 1 << 27  # of the weights of a shape: more than an L2 holds

Shape = tuple[int, int, torch.dtype, int | None]  # n, k, and the device's index
# For each shape that has been timed: the numbers of rows for which a GEMM is faster than torch's, and that GEMM.
_chosen: dict[Shape, dict[int, Gemm]] = {}


def is_candidate(weight: object) -> bool:
    """Return whether a weight `[n, k]` is one that `linear` may multiply by another GEMM than torch's."""
    return (
        isinstance(weight, torch.Tensor)
        and weight.is_cuda
        and weight.dtype in (torch.bfloat16, torch.float16)
        and weight.dim() == 2
        and weight.is_contiguous()
        and weight.numel() > 0
        and not weight.data_ptr() % 16
        and (bool(_kernels_for(weight)) or _suits_cublaslt(weight))
    )


def _kernels_for(weight: torch.Tensor) -> list[FewRowsKernel]:
    return [kernel for kernel in few_rows.KERNELS if kernel.is_supported(weight)]


def _suits_cublaslt(weight: torch.Tensor) -> bool:
    n, k = weight.shape
    return n <= min(k, _MAX_CUBLASLT_COLUMNS) and not (n % 8 or k % 8)


class Selection(NamedTuple):
    """What `select` found.

    Attributes:
        shapes: `shape_of` the weights for which there is another GEMM than torch's, whether or not one is faster.
        notes: what was chosen, and what could not be built, in words.
    """

    shapes: set[Shape]
    notes: list[str]


def select(after_norm: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> Selection:
    """Let `linear` use the fastest GEMM for each shape of a model's weights.

    All are timed on the weights, where the cache does not have the choice of an earlier start. Kernels that are not in
    the cache are built, and left out where they cannot be.

    Args:
        after_norm: candidates that multiply the result of a norm of this package, such as QKV projections. These norms
            let the GEMM after them be launched before they have ended, which kernels of few_rows.py use.
        others: candidates before a norm, such as output and down projections.
    """
    by_shape: dict[Shape, list[torch.Tensor]] = {}
    shapes_of_others = set()
    for weight in after_norm:
        by_shape.setdefault(shape_of(weight), []).append(weight.detach())
    for weight in others:
        by_shape.setdefault(shape_of(weight), []).append(weight.detach())
        shapes_of_others.add(shape_of(weight))
    kernels = {shape: _kernels_for(same[0]) for shape, same in by_shape.items()}
    specs = {(shape, each): each.spec_of(by_shape[shape][0]) for shape in kernels for each in kernels[shape]}
    failures = build_and_load([*specs.values()])
    found = Selection(set(), [f"{spec.name}: {why}" for spec, why in failures.items()])
    for shape, same in by_shape.items():
        built = [each for each in kernels[shape] if specs[shape, each] not in failures]
        try:
            if not (gemms := _candidates(same[0], built)):
                continue
            found.shapes.add(shape)
            keys = {each.name: specs[shape, each].key for each in built}
            rows_by_name = _read_or_choose(gemms, keys, same, shape not in shapes_of_others)
        except RuntimeError as error:  # out of memory, for instance: torch's GEMM stays
            logger.debug("no GEMM was timed for %s: %s", shape, error)
            continue
        _chosen[shape] = {rows: gemms[name] for name, counts in rows_by_name.items() for rows in counts}
        chosen = [f"{name} for {', '.join(map(str, counts))}" for name, counts in rows_by_name.items() if counts]
        found.notes.append(f"n={shape[0]} k={shape[1]}, numbers of rows: {'; '.join(chosen) or 'none'}")
    return found


def linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x @ weight.t()` as torch.nn.functional.linear does; in `out` if given, contiguous and of that shape."""
    n, k = weight.shape
    rows = x.numel() // k
    gemm = None
    if 0 < rows <= ROWS[-1] and (choices := _chosen.get(shape_of(weight))):
        gemm = choices.get(1 << (rows - 1).bit_length())
    if gemm and x.dtype == weight.dtype and x.is_contiguous() and not x.data_ptr() % 16:
        result = x.new_empty(*x.shape[:-1], n) if out is None else out
        try:
            gemm(x.view(rows, k), weight.t(), None, result.view(rows, n))
            return result
        except UnsupportedProblem:  # a number of rows that was not timed, or new memory of the weight
            pass
    if out is None:
        return F.linear(x, weight)
    torch.mm(x.reshape(rows, k), weight.t(), out=out.view(rows, n))
    return out


def shape_of(weight: torch.Tensor) -> Shape:
    """Return what a choice is made for."""
    return weight.shape[0], weight.shape[1], weight.dtype, weight.device.index


def _candidates(weight: torch.Tensor, kernels: Iterable[FewRowsKernel]) -> dict[str, Gemm]:
    """Return the GEMMs beside torch's that there are for a weight: by `kernels`, which are built, and cuBLASLt's."""
    found = {kernel.name: kernel.gemm(weight) for kernel in kernels}
    if _suits_cublaslt(weight) and cublaslt.library_version() > 0:
        n, k, dtype, _ = shape_of(weight)
        problem = Problem(weight.device, n, k, dtype, dtype, True, k, False, False)
        found[_CUBLASLT] = cublaslt.gemm(problem)
    return found


def _read_or_choose(
    gemms: dict[str, Gemm], keys: dict[str, str], weights: Sequence[torch.Tensor], after_norm: bool
) -> dict[str, list[int]]:
    """Return the cached choice, or time the GEMMs and cache it. `keys` are those of the kernels."""
    n, k, dtype, _ = shape_of(weights[0])
    # They are read in turns, as a model does, so that they are not in the L2.
    weights = weights[: max(2, -(-_MAX_TIMED_BYTES // weights[0].nbytes))]
    has_norm = _has_norm(weights[0], k if after_norm else n)
    choice = Choice(
        weight=f"n={n} k={k} {dtype}",
        weights=len(weights),
        place=f"{'after' if after_norm else 'before'} a {'norm' if has_norm else 'kernel of torch'}",
        gpu=gpu_name(weights[0].device),
        driver=driver_version(),
        libraries=f"torch {torch.__version__}, cuBLASLt {cublaslt.library_version()}",
        candidates={name: keys.get(name, "") for name in gemms},
        code=_hash_of_code(),
    )
    rows = gemm_choices.read(choice)
    if rows is None:
        rows = _choose(gemms, weights, after_norm if has_norm else None)
        gemm_choices.write(dataclasses.replace(choice, rows=rows))
    return rows


@functools.cache
def _hash_of_code() -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in (Path(__file__), *cublaslt.SOURCES))).hexdigest()[:16]


def _has_norm(like: torch.Tensor, size: int) -> bool:
    """Return whether there is a kernel for the norm beside a GEMM: it is missing with JITNORM_DISABLE_JIT=1."""
    try:
        general_rmsnorm(like.new_ones(1, size), like.new_ones(size))
    except RuntimeError as error:
        logger.debug("GEMMs are timed beside a kernel of torch: %s", error)
        return False
    return True


def _choose(gemms: dict[str, Gemm], weights: Sequence[torch.Tensor], after_norm: bool | None) -> dict[str, list[int]]:
    """Return the numbers of rows for which each GEMM is faster than the others and torch's.

    A norm is before the GEMM or after it, as in the model; None: there is no kernel of the norm.
    """
    n, k, dtype, _ = shape_of(weights[0])
    device = weights[0].device
    found: dict[str, list[int]] = {name: [] for name in gemms}
    with torch.no_grad(), torch.cuda.device(device):
        for count in ROWS:
            x, out = (torch.zeros(count, size, dtype=dtype, device=device) for size in (k, n))
            # Where there is no norm, there is a kernel of torch, for attention or activation.
            write_x = _kernel(torch.randn_like(x), x, after_norm is True)
            read_out = _kernel(out, torch.empty_like(out), after_norm is False)
            running = {"torch": _mm, **gemms}
            samples: dict[str, list[float]] = {name: [] for name in running}
            for _ in range(1 + _SAMPLES):  # in turns, as clocks and temperature change
                for name, gemm in list(running.items()):
                    try:
                        samples[name].append(_seconds(gemm, x, weights, out, write_x, read_out))
                    except UnsupportedProblem:
                        del running[name]
            seconds = {name: min(samples[name][1:]) for name in running}
            fastest = min(seconds, key=seconds.__getitem__)
            if seconds[fastest] < _MAX_RATIO * seconds["torch"]:
                found[fastest].append(count)
    return found


def _kernel(source: torch.Tensor, to: torch.Tensor, is_norm: bool) -> Callable[[], object]:
    """Return what launches a kernel from `source` to `to`: a norm, or one of torch."""
    if is_norm:
        ones = torch.ones_like(source[0])
        return lambda: general_rmsnorm(source, ones, out=to)
    return lambda: torch.mul(source, 1, out=to)


def _mm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    torch.mm(a, b, out=out)


def _seconds(
    gemm: Gemm,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    out: torch.Tensor,
    write_x: Callable[[], object],
    read_out: Callable[[], object],
) -> float:
    """Return the GPU's time for a GEMM with each weight, between two kernels, as in a model.

    Without these, a kernel of few_rows.py would load a weight during the GEMM before. The GPU waits until the host has
    launched all, as a launch may take the host longer than the GEMM. A CUDA graph would do the same, but its workspaces
    of cuBLAS might be those of the engine's graphs.

    Raises:
        RuntimeError: the GPU waited for the host.
    """
    cycles = _SLEEP_CYCLES
    while cycles <= _MAX_SLEEP_CYCLES:
        asleep, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize()
        began = time.perf_counter()
        asleep.record()
        torch.cuda._sleep(cycles)
        start.record()
        for weight in weights:
            write_x()
            gemm(x, weight.t(), None, out)
            read_out()
        end.record()
        launched = time.perf_counter() - began
        end.synchronize()
        if launched < asleep.elapsed_time(start) / 1e3:
            return float(start.elapsed_time(end)) / 1e3
        cycles *= 2
    raise RuntimeError("the host takes too long to launch the GEMMs")
