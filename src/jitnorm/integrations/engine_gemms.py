"""Linear layers with few rows by the fastest of four GEMMs, all of which are timed when a model is loaded or patched.

They are torch's, this package's two (few_rows.py), and cuBLASLt without split k. torch takes the first kernel that
cuBLASLt proposes, which for few rows and columns is often not the fastest: on an H200 one row with n = 1024, k = 2048
took 12.9 us, where 16 rows took 6.1 by another kernel; 64 rows with n = 4096, k = 12288 took 32.7 us, and 28.3 without
split k.

`gated_linear` computes an MLP's projection to gates and factors, and the activation. Kernels of few_rows.py compute
both in one launch, where that is faster.

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

from jitnorm import activation as activations
from jitnorm.activation import HF, Activation
from jitnorm.batch_invariant.matmul import cublaslt
from jitnorm.batch_invariant.matmul.problem import Gemm, Problem, UnsupportedProblem
from jitnorm.core.checks import CUDA_ALIGNMENT
from jitnorm.core.targets import cuda_target, driver_version, gpu_name
from jitnorm.general_rmsnorm import general_rmsnorm
from jitnorm.integrations import few_rows, gemm_choices
from jitnorm.integrations.engine_plugins import build_and_load
from jitnorm.integrations.few_rows import FewRowsKernel
from jitnorm.integrations.gemm_choices import Choice
from jitnorm.jit.log import logger
from jitnorm.jit.spec import KernelSpec

ROWS = (1, 2, 4, 8, 16, 32, 64)  # at which all are timed; other numbers of rows count as the next of these
_CUBLASLT = "cuBLASLt without split k"
_MAX_CUBLASLT_COLUMNS = 4096  # with more, or with more than k, cuBLASLt took about the same time as torch
_MAX_RATIO = 0.97  # of the times, with the kernels before and after: a smaller gain may be noise
_MIN_SAMPLES, _MAX_SAMPLES = 3, 12
_AGREEMENT = 1.02  # of the two shortest samples: without it, another process may have used the GPU during all
_SLEEP_CYCLES, _MAX_SLEEP_CYCLES = 2_000_000, 16_000_000  # 1 to 8 ms, in which the host launches all of a sample
_MAX_TIMED_BYTES = 1 << 27  # of the weights of a shape: more than an L2 holds


class GatedActivation(NamedTuple):
    """An activation of gates and factors.

    Attributes:
        operator: which computes it.
        run: the operator's function, which takes `input` and `out`.
    """

    operator: Activation
    run: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]


ACTIVATIONS = {
    operator.op: GatedActivation(operator, run)
    for operator, run in (
        (activations.SILU_AND_MUL, activations.silu_and_mul),
        (activations.SILU_AND_MUL_HF, functools.partial(activations.silu_and_mul, rounding=HF)),
        (activations.GELU_AND_MUL, activations.gelu_and_mul),
        (activations.GELU_AND_MUL_HF, functools.partial(activations.gelu_and_mul, rounding=HF)),
        (activations.GELU_TANH_AND_MUL, activations.gelu_tanh_and_mul),
        (activations.GELU_TANH_AND_MUL_HF, functools.partial(activations.gelu_tanh_and_mul, rounding=HF)),
    )
}


class Shape(NamedTuple):
    """What a choice is made for: weights `[n, k]` of a dtype on a device, and a key of ACTIVATIONS or None."""

    n: int
    k: int
    dtype: torch.dtype
    device_index: int | None
    activation: str | None


# For each shape that has been timed: the numbers of rows for which a GEMM is faster than torch's, and that GEMM.
_chosen: dict[Shape, dict[int, Gemm]] = {}


def is_candidate(weight: object, activation: str | None = None) -> bool:
    """Return whether a weight `[n, k]` is one that `linear` may multiply by another GEMM than torch's.

    With a key of ACTIVATIONS: whether `gated_linear` may.
    """
    return (
        isinstance(weight, torch.Tensor)
        and weight.is_cuda
        and weight.dtype in (torch.bfloat16, torch.float16)
        and weight.dim() == 2
        and weight.is_contiguous()
        and weight.numel() > 0
        and not weight.data_ptr() % 16
        and (bool(_kernels_for(weight, activation)) or (activation is None and _suits_cublaslt(weight)))
    )


def _kernels_for(weight: torch.Tensor, activation: str | None) -> list[FewRowsKernel]:
    return [kernel for kernel in few_rows.KERNELS if kernel.is_supported(weight, _operator(activation))]


def _operator(activation: str | None) -> Activation | None:
    return None if activation is None else ACTIVATIONS[activation].operator


def _suits_cublaslt(weight: torch.Tensor) -> bool:
    n, k = weight.shape
    return n <= min(k, _MAX_CUBLASLT_COLUMNS) and not (n % 8 or k % 8)


class Selection(NamedTuple):
    """What `select` found.

    Attributes:
        shapes: `shape_of` the weights for which there is another GEMM than torch's, whether or not it is faster, and,
            with an activation, whose activation's kernel was built too.
        notes: what was chosen, and what could not be built, in words.
    """

    shapes: set[Shape]
    notes: list[str]


def select(
    after_norm: Iterable[torch.Tensor],
    others: Iterable[torch.Tensor],
    gated: Iterable[tuple[torch.Tensor, str]] = (),
) -> Selection:
    """Let `linear` and `gated_linear` use the fastest GEMM for each shape of a model's weights.

    All are timed on the weights, where the cache does not have the choice of an earlier start. Kernels that are not in
    the cache are built, and left out where they cannot be.

    Args:
        after_norm: candidates that multiply the result of a norm of this package, such as QKV projections. These norms
            let the GEMM after them be launched before they have ended, which kernels of few_rows.py use.
        others: candidates before a norm, such as output and down projections.
        gated: candidates after a norm for `gated_linear`, and the activation of each, a key of ACTIVATIONS. Where a
            kernel that this needs cannot be built, they count as `after_norm`.
    """
    by_shape: dict[Shape, list[torch.Tensor]] = {}
    shapes_of_others = set()
    for weight in after_norm:
        by_shape.setdefault(shape_of(weight), []).append(weight.detach())
    for weight in others:
        by_shape.setdefault(shape_of(weight), []).append(weight.detach())
        shapes_of_others.add(shape_of(weight))
    for weight, activation in gated:
        by_shape.setdefault(shape_of(weight, activation), []).append(weight.detach())
    kernels = {shape: _kernels_for(same[0], shape.activation) for shape, same in by_shape.items()}
    specs = {
        (shape, each): each.spec_of(by_shape[shape][0], _operator(shape.activation))
        for shape in kernels
        for each in kernels[shape]
    }
    of_activations = {shape: spec for shape in kernels if (spec := _spec_of_activation(shape)) is not None}
    failures = build_and_load([*specs.values(), *of_activations.values()])
    found = Selection(set(), [f"{spec.name}: {why}" for spec, why in failures.items()])
    not_gated: list[torch.Tensor] = []
    for shape, same in by_shape.items():
        built = [each for each in kernels[shape] if specs[shape, each] not in failures]
        if shape.activation and (not built or of_activations[shape] in failures):
            not_gated += same
            continue
        try:
            if not (gemms := _candidates(same[0], built, shape.activation)):
                continue
            found.shapes.add(shape)
            keys = {each.name: specs[shape, each].key for each in built}
            if shape.activation:
                keys[shape.activation] = of_activations[shape].key
            rows_by_name = _read_or_choose(gemms, keys, same, shape not in shapes_of_others, shape.activation)
        except RuntimeError as error:  # out of memory, for instance: torch's GEMM stays
            logger.debug("no GEMM was timed for %s: %s", shape, error)
            continue
        _chosen[shape] = {rows: gemms[name] for name, counts in rows_by_name.items() for rows in counts}
        chosen = [f"{name} for {', '.join(map(str, counts))}" for name, counts in rows_by_name.items() if counts]
        found.notes.append(f"{_in_words(shape)}, numbers of rows: {'; '.join(chosen) or 'none'}")
    if not_gated:
        more = select([weight for weight in not_gated if is_candidate(weight)], [])
        found.shapes.update(more.shapes)
        found.notes.extend(more.notes)
    return found


def _spec_of_activation(shape: Shape) -> KernelSpec | None:
    operator = _operator(shape.activation)
    return None if operator is None else operator.spec(shape.dtype, CUDA_ALIGNMENT, cuda_target(shape.device_index))


def _in_words(shape: Shape) -> str:
    return f"n={shape.n} k={shape.k}" + (f" with {shape.activation}" if shape.activation else "")


def linear(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x @ weight.t()` as torch.nn.functional.linear does; in `out` if given, contiguous and of that shape."""
    result = _by_chosen_gemm(x, weight, None, out)
    if result is not None:
        return result
    if out is None:
        return F.linear(x, weight)
    n, k = weight.shape
    torch.mm(x.reshape(-1, k), weight.t(), out=out.view(-1, n))
    return out


def gated_linear(
    x: torch.Tensor, weight: torch.Tensor, activation: str, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `activation(x @ gate.t()) * (x @ up.t())`, where gate and up are the halves of the weight `[2 * d, k]`.

    The products are rounded to the dtype and then activated, as by `linear` and the activation's operator.

    Args:
        x: `[..., k]`.
        weight: one that was given to `select` with the activation.
        activation: a key of ACTIVATIONS.
        out: `[..., d]`, contiguous, written. Allocated if None.
    """
    result = _by_chosen_gemm(x, weight, activation, out)
    return ACTIVATIONS[activation].run(linear(x, weight), out) if result is None else result


def _by_chosen_gemm(
    x: torch.Tensor, weight: torch.Tensor, activation: str | None, out: torch.Tensor | None
) -> torch.Tensor | None:
    """Return the result of the GEMM that is chosen for these operands, or None if there is none."""
    n, k = weight.shape
    rows = x.numel() // k
    gemm = None
    if 0 < rows <= ROWS[-1] and (choices := _chosen.get(shape_of(weight, activation))):
        gemm = choices.get(1 << (rows - 1).bit_length())
    if gemm is None or x.dtype != weight.dtype or not x.is_contiguous() or x.data_ptr() % 16:
        return None
    columns = n // 2 if activation else n
    result = x.new_empty(*x.shape[:-1], columns) if out is None else out
    try:
        gemm(x.view(rows, k), weight.t(), None, result.view(rows, columns))
    except UnsupportedProblem:  # a number of rows that was not timed, or new memory of the weight
        return None
    return result


def shape_of(weight: torch.Tensor, activation: str | None = None) -> Shape:
    """Return what a choice is made for."""
    return Shape(weight.shape[0], weight.shape[1], weight.dtype, weight.device.index, activation)


def _candidates(weight: torch.Tensor, kernels: Iterable[FewRowsKernel], activation: str | None) -> dict[str, Gemm]:
    """Return the GEMMs beside torch's that there are for a weight: by `kernels`, which are built, and cuBLASLt's."""
    found = {kernel.name: kernel.gemm(weight, _operator(activation)) for kernel in kernels}
    if activation is None and _suits_cublaslt(weight) and cublaslt.library_version() > 0:
        n, k, dtype = shape_of(weight)[:3]
        problem = Problem(weight.device, n, k, dtype, dtype, True, k, False, False)
        found[_CUBLASLT] = cublaslt.gemm(problem)
    return found


def _read_or_choose(
    gemms: dict[str, Gemm],
    keys: dict[str, str],
    weights: Sequence[torch.Tensor],
    after_norm: bool,
    activation: str | None,
) -> dict[str, list[int]]:
    """Return the cached choice, or time the GEMMs and cache it. `keys` are those of kernels, also the activation's."""
    shape = shape_of(weights[0], activation)
    # They are read in turns, as a model does, so that they are not in the L2.
    weights = weights[: max(2, -(-_MAX_TIMED_BYTES // weights[0].nbytes))]
    has_norm = _has_norm(weights[0], shape.k if after_norm else shape.n)
    choice = Choice(
        weight=f"{_in_words(shape)} {shape.dtype}",
        weights=len(weights),
        place=f"{'after' if after_norm else 'before'} a {'norm' if has_norm else 'kernel of torch'}",
        gpu=gpu_name(weights[0].device),
        driver=driver_version(),
        libraries=f"torch {torch.__version__}, cuBLASLt {cublaslt.library_version()}",
        candidates={name: keys.get(name, "") for name in gemms},
        activation=keys[activation] if activation else "",
        code=_hash_of_code(),
    )
    rows = gemm_choices.read(choice)
    if rows is None:
        rows = _choose(gemms, weights, after_norm if has_norm else None, activation)
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


def _choose(
    gemms: dict[str, Gemm], weights: Sequence[torch.Tensor], after_norm: bool | None, activation: str | None
) -> dict[str, list[int]]:
    """Return the numbers of rows for which each GEMM is faster than the others and torch's.

    A norm is before the GEMM or after it, as in the model; None: there is no kernel of the norm.
    """
    n, k, dtype = shape_of(weights[0])[:3]
    device = weights[0].device
    by_torch = _mm if activation is None else _mm_and(ACTIVATIONS[activation])
    found: dict[str, list[int]] = {name: [] for name in gemms}
    with torch.no_grad(), torch.cuda.device(device):
        for count in ROWS:
            columns = n // 2 if activation else n
            x, out = (torch.zeros(count, size, dtype=dtype, device=device) for size in (k, columns))
            # Where there is no norm, there is a kernel of torch, for attention or activation.
            write_x = _kernel(torch.randn_like(x), x, after_norm is True)
            read_out = _kernel(out, torch.empty_like(out), after_norm is False)
            running = {"torch": by_torch, **gemms}
            samples: dict[str, list[float]] = {name: [] for name in running}
            for i in range(1 + _MAX_SAMPLES):  # in turns, as clocks and temperature change
                for name, gemm in list(running.items()):
                    try:
                        sample = _seconds(gemm, x, weights, out, write_x, read_out)
                    except UnsupportedProblem:
                        del running[name]
                    else:
                        samples[name] += [sample] * (i > 0)  # the first warms up
                if i >= _MIN_SAMPLES and all(_agree(samples[name]) for name in running):
                    break
            seconds = {name: min(samples[name]) for name in running}
            fastest = min(seconds, key=seconds.__getitem__)
            if seconds[fastest] < _MAX_RATIO * seconds["torch"]:
                found[fastest].append(count)
    return found


def _agree(samples: list[float]) -> bool:
    shortest, next_shortest = sorted(samples)[:2]
    return next_shortest <= _AGREEMENT * shortest


def _kernel(source: torch.Tensor, to: torch.Tensor, is_norm: bool) -> Callable[[], object]:
    """Return what launches a kernel from `source` to `to`: a norm, or one of torch."""
    if is_norm:
        ones = torch.ones_like(source[0])
        return lambda: general_rmsnorm(source, ones, out=to)
    return lambda: torch.mul(source, 1, out=to)


def _mm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    torch.mm(a, b, out=out)


def _mm_and(activation: GatedActivation) -> Gemm:
    def run(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
        activation.run(torch.mm(a, b), out)

    return run


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
