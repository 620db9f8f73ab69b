"""Describe a call: create its tensors, copy them, count the bytes that it moves and check what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from jitnorm.benchmark.settings import current_settings

Selection = Literal["all"] | Sequence[Any] | None
_ALIGNMENT = 512  # bytes, of a copy: that of a tensor with a storage of its own
# Relative error of a whole tensor. Rounding once accounts for a third of it; the rest is for rounding twice.
_TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 1e-5}


def create_empty(
    *shape: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> torch.Tensor:
    """Return an uninitialised tensor, by default of the run's dtype on the run's device."""
    settings = current_settings()
    return torch.empty(*shape, dtype=_check_dtype(dtype or settings.dtype), device=device or settings.device)


def create_random(
    *shape: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> torch.Tensor:
    """Return standard normal values. Zeros would hide errors and may run faster."""
    settings = current_settings()
    return torch.randn(*shape, device=device or settings.device).to(_check_dtype(dtype or settings.dtype))


def _check_dtype(dtype: object) -> torch.dtype:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    return dtype


@dataclass(frozen=True)
class Call:
    """A function with its arguments. Tensors inside lists or other containers are ignored."""

    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        return self.fn(*self.args, **self.kwargs)

    def tensors(self) -> dict[int | str, torch.Tensor]:
        """Return the arguments that are tensors, by position or name."""
        tensors: dict[int | str, torch.Tensor] = {
            i: arg for i, arg in enumerate(self.args) if isinstance(arg, torch.Tensor)
        }
        return tensors | {name: arg for name, arg in self.kwargs.items() if isinstance(arg, torch.Tensor)}

    def with_tensors(self, new: dict[int | str, torch.Tensor]) -> Call:
        """Return the same call with other tensors at some positions and names."""
        args = tuple(new.get(i, arg) for i, arg in enumerate(self.args))
        return Call(self.fn, args, {name: new.get(name, arg) for name, arg in self.kwargs.items()})

    def copy(self) -> Call:
        """Return the same call on copies of all tensors."""
        return rotating_copies(self, list(self.tensors()), 1)[0]


def select_tensors(call: Call, args: Selection, kwargs: Selection) -> list[int | str]:
    """Return the positions and names that `graph_clone_args` and `graph_clone_kwargs` select."""
    tensors = call.tensors()
    positions = [key for key in tensors if isinstance(key, int)] if args == "all" else [*(args or ())]
    names = [key for key in tensors if isinstance(key, str)] if kwargs == "all" else [*(kwargs or ())]
    for key in (*positions, *names):
        if key not in tensors:
            raise ValueError(f"there is no tensor among the arguments at {key!r}; there are {list(tensors)}")
    return [*positions, *names]


def check_selection(name: str, value: Any, keyword: str, items: str) -> None:
    """Raise unless `value` is `keyword`, None or an iterable of `items`."""
    if value is None or (isinstance(value, str) and value == keyword):
        return
    if isinstance(value, str):
        raise ValueError(f"{name} must be {keyword!r} or {items}, got {value!r}")
    if isinstance(value, torch.Tensor) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be {keyword!r} or a tuple of {items}, got {type(value).__name__}")


def output_tensors(result: Any) -> list[torch.Tensor]:
    """Return the tensors among what a call returned."""
    results = result if isinstance(result, (tuple, list)) else [result]
    return [r for r in results if isinstance(r, torch.Tensor)]


def memory_range(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the address and the number of bytes, which identify the memory of a tensor or a view of all of it."""
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


def unique_tensors(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return one tensor for each memory range."""
    return list({memory_range(t): t for t in tensors}.values())


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of all tensors."""
    return sum(memory_range(t)[1] for t in tensors)


# Copies for successive calls.


def rotating_copies(call: Call, keys: Sequence[int | str], count: int) -> list[Call]:
    """Return `count` calls, each on copies of its own of the tensors at `keys`.

    A copy has the strides and the alignment of the original. Tensors that share memory share it in the copy, such as an
    `out` that is the input, or q and k that are columns of one tensor; what lies between the columns is copied, too.
    """
    tensors = {key: call.tensors()[key] for key in keys}
    spans = _storage_spans(tensors.values())
    blocks = {pointer: _copy_span(tensor, start, end, count) for pointer, (tensor, start, end) in spans.items()}
    locations = {}  # of each tensor: the block with its copies, and the offset in a row of it
    for key, tensor in tensors.items():
        pointer, size = tensor.untyped_storage().data_ptr(), tensor.element_size()
        locations[key] = blocks[pointer], int(tensor.storage_offset()) - spans[pointer][1] // size
    return [
        call.with_tensors({key: _view_row(tensors[key], *location, row) for key, location in locations.items()})
        for row in range(count)
    ]


def count_copied_bytes(call: Call, keys: Sequence[int | str]) -> int:
    """Return the bytes that one set of copies takes."""
    tensors = call.tensors()
    return sum(end - start for _, start, end in _storage_spans([tensors[key] for key in keys]).values())


def _view_row(like: torch.Tensor, block: torch.Tensor, offset: int, row: int) -> torch.Tensor:
    view = torch.empty(0, dtype=like.dtype, device=like.device)
    start = row * (block.shape[1] // like.element_size()) + offset
    return view.set_(block.untyped_storage(), start, like.size(), like.stride())


def _storage_spans(tensors: Iterable[torch.Tensor]) -> dict[int, tuple[torch.Tensor, int, int]]:
    """Return, for each storage, one of its tensors and the range of bytes that all of them cover."""
    spans: dict[int, tuple[torch.Tensor, int, int]] = {}
    for tensor in tensors:
        size, pointer = tensor.element_size(), tensor.untyped_storage().data_ptr()
        first = int(tensor.storage_offset()) * size
        extent = sum((n - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        last = first + (extent + 1) * size if tensor.numel() else first
        _, start, end = spans.get(pointer, (tensor, first, last))
        spans[pointer] = (tensor, min(start, first) // _ALIGNMENT * _ALIGNMENT, max(end, last))
    return spans


def _copy_span(tensor: torch.Tensor, start: int, end: int, count: int) -> torch.Tensor:
    """Return `count` rows of bytes, each a copy of the bytes from `start` to `end` of the tensor's storage."""
    source = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    source.set_(tensor.untyped_storage(), start, (end - start,), (1,))
    row_bytes = max(1, -(-(end - start) // _ALIGNMENT)) * _ALIGNMENT
    block = torch.empty(count, row_bytes, dtype=torch.uint8, device=tensor.device)
    block[:, : end - start] = source
    return block


# Comparison with a reference.


def check_result(
    call: Call,
    outputs: Sequence[int | str],
    poisoned: Sequence[int | str],
    reference: Callable[..., Any],
    tolerance: float | None,
) -> float:
    """Return the largest relative error among the results of a call.

    The results are what the call returns or, where that contains no tensor, its arguments at `outputs`.

    Args:
        call: a copy, whose tensors are written.
        outputs: the arguments that the call writes.
        poisoned: the arguments that hold NaN before the call, so that a result that is not written is found.
        reference: takes the same arguments, and returns the correct tensors in the same order.
        tolerance: the largest error allowed; None for what rounding to the dtype of the result accounts for.

    Raises:
        ValueError: an error exceeds the tolerance, or call and reference differ in the number of results or a shape.
    """
    tensors = call.tensors()
    on_copies = call.with_tensors({key: tensor.clone() for key, tensor in tensors.items()})  # which it may write
    expected = output_tensors(reference(*on_copies.args, **on_copies.kwargs))
    for key in poisoned:
        tensors[key].fill_(float("nan") if tensors[key].is_floating_point() else -1)
    results = output_tensors(call()) or [tensors[key] for key in outputs]
    if len(results) != len(expected) or not expected:
        raise ValueError(f"the call has {len(results)} results to check, and the reference {len(expected)}")
    errors = [_relative_error(result, correct) for result, correct in zip(results, expected, strict=True)]
    for result, error in zip(results, errors, strict=True):
        allowed = _TOLERANCE.get(result.dtype, 0.0) if tolerance is None else tolerance
        if not error <= allowed:  # or NaN
            raise ValueError(
                f"wrong result, relative error {error:.1e} where {allowed:.0e} is allowed ({result.dtype})"
            )
    return max(errors)


def _relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    if result.shape != expected.shape:
        raise ValueError(f"wrong result, of shape {tuple(result.shape)} instead of {tuple(expected.shape)}")
    reference = expected.double()
    norm = float(reference.norm())
    return float((result.double() - reference).norm()) / norm if norm else float(result.double().norm())
