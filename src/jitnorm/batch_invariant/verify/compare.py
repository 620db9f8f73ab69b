"""One row, alone and in company: every batch, place, kind of neighbour, layout and way to run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch

from jitnorm.batch_invariant.verify.operators import Case, Operator, Shape
from jitnorm.core.checks import DTYPE_NAMES

PLACES = {"first": lambda m: 0, "middle": lambda m: m // 2, "last": lambda m: m - 1}
NEIGHBOURS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "others": lambda x: x,
    "zeros": torch.zeros_like,
    "large values": lambda x: x * (torch.finfo(x.dtype).max / 16),
    "NaNs": lambda x: torch.full_like(x, float("nan")),
}
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    # 16 bytes and more between rows, as in a slice of a larger tensor
    "rows apart": lambda x: torch.cat((x, x[:, :64].new_zeros(x.shape[0], 64)), 1)[:, : x.shape[1]],
    "second of two": lambda x: torch.cat((x[:1], x))[1:],
}
WAYS = ("eager", "captured", "compiled")
# The neighbours, layouts and ways to run that are not the plain ones, in these batches.
_SOME = (1, 2, 5, 17, 64)


@dataclass(frozen=True)
class Result:
    """Of one operator, shape and dtype."""

    op: str
    shape: Shape
    dtype: str
    device: str
    compared: int  # rows, each with the one alone; 0 where no way is for the device
    difference: str  # the first; empty where there is none


def verify(
    name: str,
    operator: Operator,
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    max_batch: int,
    ways: Collection[str] = WAYS,
) -> Result:
    """Compares until the first difference. Under the mode that the caller has set.

    Raises:
        ValueError: a way that is none, or a `max_batch` in which a row has no company: that would compare nothing.
    """
    if unknown := [way for way in ways if way not in WAYS] or (not ways and ["none"]):
        raise ValueError(f"ways must be of {', '.join(WAYS)}, got {', '.join(map(str, unknown))}")
    if max_batch < 2:
        raise ValueError(f"max_batch must be 2 or more, got {max_batch}")
    compared, difference = 0, ""
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(0)
        case = operator.make(shape, dtype, torch.device(device))
        for situation, row, alone in _situations(case, device, max_batch, ways):
            compared += 1
            if different := _different(row, alone):
                difference = f"{situation}: {different} of {alone.numel()} elements differ from the row's alone"
                break
    return Result(name, shape, DTYPE_NAMES[dtype], device, compared, difference)


def _situations(
    case: Case, device: str, max_batch: int, ways: Collection[str]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """A name, what the row became there, and what it became alone."""
    alone = case.call(case.row)
    others = torch.randn(max_batch, *case.row.shape[1:], device=device).to(case.row.dtype)
    some = [m for m in _SOME if m <= max_batch]
    if "eager" in ways:
        for m in _batches(max_batch):
            yield from _places(case, case.call, alone, "", others[:m])
        for name, neighbours in NEIGHBOURS.items():
            for m in some:
                yield from _places(case, case.call, alone, f" beside {name}", neighbours(others[:m]))
        for name, layout in LAYOUTS.items():
            for m in some:
                yield from _places(case, case.call, alone, f", {name}", others[:m], layout)
    if "captured" in ways and device.startswith("cuda"):
        for m in some:
            yield from _places(case, _captured(case.call), alone, ", captured", others[:m])
    if "compiled" in ways:
        torch.compiler.reset()  # or the limit on recompilations, which counts other cases, turns this into eager calls
        compiled = torch.compile(case.call, fullgraph=True)  # the first size is fixed, the others are one dynamic size
        # Compiled code rounds between operators elsewhere than eager code does, so that it is compared with itself.
        alone_compiled = compiled(case.row)
        for m in some:
            yield from _places(case, compiled, alone_compiled, ", compiled", others[:m])


def _places(
    case: Case,
    call: Callable[[torch.Tensor], torch.Tensor],
    alone: torch.Tensor,
    words: str,
    others: torch.Tensor,
    layout: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    count = others.shape[0]
    for place, index_in in PLACES.items():
        index = index_in(count)
        x = others.clone()
        x[index] = case.row[0]
        yield f"the {place} row of {count}{words}", call(layout(x))[index : index + 1], alone


def _captured(call: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def replay(x: torch.Tensor) -> torch.Tensor:
        call(x)  # what has to be found out, is found out before
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = call(x)
        out.view(torch.uint8).fill_(0xFF)  # NaN in every dtype that has one
        graph.replay()
        return out.clone()

    return replay


def _batches(most: int) -> list[int]:
    larger = (48, 63, 64, 65, 100, 128, 129, 200, 255, 256, *(1 << i for i in range(9, 40)), most)
    return sorted({*range(1, min(most, 33) + 1), *(m for m in larger if m <= most)})


def _different(a: torch.Tensor, b: torch.Tensor) -> int:
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[b.element_size()]
    return int((a.contiguous().view(bits) != b.contiguous().view(bits)).sum())
