"""Compare one row alone with the same row in batches, in every place, beside other rows, in other strides and modes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch

from jitnorm.batch_invariant.operands import count_differing_elements
from jitnorm.batch_invariant.verify.cases import Case, Operator, Shape
from jitnorm.core.checks import DTYPE_NAMES

MODES = ("eager", "cudagraph", "compiled")
_PLACES = {"first": lambda m: 0, "middle": lambda m: m // 2, "last": lambda m: m - 1}
_NEIGHBOURS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "others": lambda x: x,
    "zeros": torch.zeros_like,
    "large values": lambda x: x * (torch.finfo(x.dtype).max / 16),
    "NaNs": lambda x: torch.full_like(x, float("nan")),
}
_LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    # Padding of at least 16 bytes between rows, as in a slice of a larger tensor.
    "rows apart": lambda x: torch.cat((x, x[:, :64].new_zeros(x.shape[0], 64)), 1)[:, : x.shape[1]],
    "second of two": lambda x: torch.cat((x[:1], x))[1:],
}
# Batch sizes for other neighbours, layouts and modes. All batch sizes are compared in the plain case only.
_FEW_SIZES = (1, 2, 5, 17, 64)


@dataclass(frozen=True)
class Result:
    """What comparing one operator in one shape and dtype found."""

    op: str
    shape: Shape
    dtype: str
    device: str
    compared: int  # how often the row was compared; 0 if no mode runs on the device
    difference: str  # the first difference, in words; empty if there is none


def verify(
    name: str,
    operator: Operator,
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    max_batch: int,
    modes: Collection[str] = MODES,
) -> Result:
    """Compare until the first difference. The caller decides whether batch-invariant mode is on.

    Args:
        name: the operator's name, for the result.
        shape: its sizes, as `operator.sizes` names them.
        max_batch: the largest batch size, 2 or more.
        modes: the execution modes, of MODES. `cudagraph` is left out on the CPU.

    Raises:
        ValueError: `modes` is empty or names another mode, or `max_batch` is less than 2, which would compare nothing.
    """
    if unknown := [mode for mode in modes if mode not in MODES] or (not modes and ["none"]):
        raise ValueError(f"modes must be of {', '.join(MODES)}, got {', '.join(map(str, unknown))}")
    if max_batch < 2:
        raise ValueError(f"max_batch must be 2 or more, got {max_batch}")
    compared, difference = 0, ""
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        case = operator.make(shape, dtype, torch.device(device))
        for situation, row, alone in _situations(case, device, max_batch, modes):
            compared += 1
            if different := int(count_differing_elements(row, alone)):
                difference = f"{situation}: {different} of {alone.numel()} elements differ from the row's alone"
                break
    return Result(name, shape, DTYPE_NAMES[dtype], device, compared, difference)


def _situations(
    case: Case, device: str, max_batch: int, modes: Collection[str]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield a description, the row's result in that situation, and its result alone."""
    alone = case.call(case.row)
    others = torch.randn(max_batch, *case.row.shape[1:], device=device).to(case.row.dtype)
    few_sizes = [m for m in _FEW_SIZES if m <= max_batch]
    if "eager" in modes:
        for m in _batch_sizes(max_batch):
            yield from _in_every_place(case, case.call, alone, "", others[:m])
        for name, neighbours in _NEIGHBOURS.items():
            for m in few_sizes:
                yield from _in_every_place(case, case.call, alone, f" beside {name}", neighbours(others[:m]))
        for name, layout in _LAYOUTS.items():
            for m in few_sizes:
                yield from _in_every_place(case, case.call, alone, f", {name}", others[:m], layout)
    if "cudagraph" in modes and device.startswith("cuda"):
        for m in few_sizes:
            yield from _in_every_place(case, _in_cudagraph(case.call), alone, ", cudagraph", others[:m])
    if "compiled" in modes:
        # Recompilations for other cases count towards torch's limit, at which it would run eager code instead.
        torch.compiler.reset()
        # The first size becomes a constant, and all others are one dynamic size.
        compiled = torch.compile(case.call, fullgraph=True)
        # Compiled code rounds between operators in other places than eager code, so it is compared with itself.
        alone_compiled = compiled(case.row)
        for m in few_sizes:
            yield from _in_every_place(case, compiled, alone_compiled, ", compiled", others[:m])


def _in_every_place(
    case: Case,
    call: Callable[[torch.Tensor], torch.Tensor],
    alone: torch.Tensor,
    situation: str,
    others: torch.Tensor,
    layout: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Yield the row at the first, middle and last place of the batch `others`, as `_situations` does."""
    count = others.shape[0]
    for place, index_of in _PLACES.items():
        index = index_of(count)
        x = others.clone()
        x[index] = case.row[0]
        yield f"the {place} row of {count}{situation}", call(layout(x))[index : index + 1], alone


def _in_cudagraph(call: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that captures `call` in a CUDA graph and replays that."""

    def replay(x: torch.Tensor) -> torch.Tensor:
        call(x)  # builds kernels and checks invariance, which a capture cannot
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(x)
        out.view(torch.uint8).fill_(0xFF)  # NaN in every dtype that has one
        graph.replay()
        return out.clone()

    return replay


def _batch_sizes(max_batch: int) -> list[int]:
    """Return all sizes up to 33, some around multiples of 64, powers of two, and `max_batch`."""
    larger = (48, 63, 64, 65, 100, 128, 129, 200, 255, 256, *(1 << i for i in range(9, 40)), max_batch)
    return sorted({*range(1, min(max_batch, 33) + 1), *(m for m in larger if m <= max_batch)})
