"""The tensors of a call: how many bytes it reads and writes, and copies of them for calls to take in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Chosen = Literal["all"] | Sequence[Any] | None
_PAGE = 512  # copies keep the alignment that a tensor of its own would have


@dataclass(frozen=True)
class Call:
    """A function with its arguments. Only tensors that are arguments themselves are looked at, not those in lists."""

    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        return self.fn(*self.args, **self.kwargs)

    def tensors(self) -> dict[int | str, torch.Tensor]:
        """By position or name."""
        tensors: dict[int | str, torch.Tensor] = {
            i: arg for i, arg in enumerate(self.args) if isinstance(arg, torch.Tensor)
        }
        return tensors | {name: arg for name, arg in self.kwargs.items() if isinstance(arg, torch.Tensor)}

    def replaced(self, new: dict[int | str, torch.Tensor]) -> Call:
        args = tuple(new.get(i, arg) for i, arg in enumerate(self.args))
        return Call(self.fn, args, {name: new.get(name, arg) for name, arg in self.kwargs.items()})


def chosen(call: Call, args: Chosen, kwargs: Chosen) -> list[int | str]:
    """The positions and names that `graph_clone_args` and `graph_clone_kwargs` mean."""
    tensors = call.tensors()
    positions = [key for key in tensors if isinstance(key, int)] if args == "all" else [*(args or ())]
    names = [key for key in tensors if isinstance(key, str)] if kwargs == "all" else [*(kwargs or ())]
    for key in (*positions, *names):
        if key not in tensors:
            raise ValueError(f"there is no tensor among the arguments at {key!r}; there are {list(tensors)}")
    return [*positions, *names]


def check_chosen(name: str, value: Any, word: str, what: str) -> None:
    """`value` is this word, or what can be gone through; or None."""
    if value is None or (isinstance(value, str) and value == word):
        return
    if isinstance(value, str):
        raise ValueError(f"{name} must be {word!r} or {what}, got {value!r}")
    if isinstance(value, torch.Tensor) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be {word!r} or a tuple of {what}, got {type(value).__name__}")


def returned(result: Any) -> list[torch.Tensor]:
    """The tensors that a call gave back."""
    results = result if isinstance(result, (tuple, list)) else [result]
    return [r for r in results if isinstance(r, torch.Tensor)]


def memory(tensor: torch.Tensor) -> tuple[int, int]:
    """Which bytes, so that a view and what it views are one: the first of them, and how many."""
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


def distinct(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Each piece of memory once."""
    return list({memory(t): t for t in tensors}.values())


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(memory(t)[1] for t in tensors)


def rotate(call: Call, keys: Sequence[int | str], count: int) -> list[Call]:
    """`count` calls, each with copies of its own of the tensors at `keys`.

    A copy has the original's strides and alignment, and tensors that share memory share it in the copy: an `out` that
    is the input, or q and k as columns of one tensor. What lies between the columns is copied as well.
    """
    tensors = {key: call.tensors()[key] for key in keys}
    spans = _spans(tensors.values())
    blocks = {pointer: _copies(tensor, start, end, count) for pointer, (tensor, start, end) in spans.items()}
    places = {}  # of each tensor: the block that its copies are in, and from where in a row of it
    for key, tensor in tensors.items():
        pointer, size = tensor.untyped_storage().data_ptr(), tensor.element_size()
        places[key] = blocks[pointer], int(tensor.storage_offset()) - spans[pointer][1] // size
    return [
        call.replaced({key: _view(tensors[key], *place, row) for key, place in places.items()}) for row in range(count)
    ]


def _view(like: torch.Tensor, block: torch.Tensor, offset: int, row: int) -> torch.Tensor:
    view = torch.empty(0, dtype=like.dtype, device=like.device)
    start = row * (block.shape[1] // like.element_size()) + offset
    return view.set_(block.untyped_storage(), start, like.size(), like.stride())


def copied_bytes(call: Call, keys: Sequence[int | str]) -> int:
    """What one set of copies takes."""
    tensors = call.tensors()
    return sum(end - start for _, start, end in _spans([tensors[key] for key in keys]).values())


def _spans(tensors: Iterable[torch.Tensor]) -> dict[int, tuple[torch.Tensor, int, int]]:
    """For each storage one of its tensors, and the bytes from where to where they reach together."""
    spans: dict[int, tuple[torch.Tensor, int, int]] = {}
    for tensor in tensors:
        size, pointer = tensor.element_size(), tensor.untyped_storage().data_ptr()
        first = int(tensor.storage_offset()) * size
        reach = sum((n - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        last = first + (reach + 1) * size if tensor.numel() else first
        _, start, end = spans.get(pointer, (tensor, first, last))
        spans[pointer] = (tensor, min(start, first) // _PAGE * _PAGE, max(end, last))
    return spans


def _copies(tensor: torch.Tensor, start: int, end: int, count: int) -> torch.Tensor:
    """`count` rows of bytes, each a copy of those from `start` to `end` of the tensor's storage."""
    source = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    source.set_(tensor.untyped_storage(), start, (end - start,), (1,))
    block = torch.empty(count, max(1, -(-(end - start) // _PAGE)) * _PAGE, dtype=torch.uint8, device=tensor.device)
    block[:, : end - start] = source
    return block
