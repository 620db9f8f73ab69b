"""Argument checks. A message is one line: the argument's name, what is accepted and what was given.

The bindings in csrc check the same conditions in nanoseconds, and refuse a call without a reason. These functions raise
for such a call, and for a bad call whose kernel is not built yet. tests/core/test_checks_agree.py compares
the two.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import TypeGuard

import torch

DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
CUDA_ALIGNMENT = 16  # bytes in the widest access of a CUDA kernel
MIN_ACCESS_BYTES = 4  # in the narrowest


def tensor(name: str, value: object) -> None:
    """Raise unless `value` is a strided torch.Tensor that PyTorch has not quantised."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one with layout {value.layout}")
    if value.is_quantized:
        raise TypeError(f"{name} must not be quantised by PyTorch, got {str(value.dtype).removeprefix('torch.')}")


def types(eps_value: object, enable_pdl_value: object, **tensors: object) -> None:
    """Raise for bad types. torch's dispatcher would raise for them too, with messages that name no argument."""
    for name, value in tensors.items():
        tensor(name, value)
    eps(eps_value)
    enable_pdl(enable_pdl_value)


def dtype(name: str, value: torch.Tensor, accepted: Sequence[torch.dtype]) -> None:
    """Raise unless `value` has one of the accepted dtypes."""
    if value.dtype not in accepted:
        names = " or ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(accepted))
        raise TypeError(f"{name} must be {names}, got {str(value.dtype).removeprefix('torch.')}")


def device(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """Raise unless `value` is on the device of `like`."""
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like {like_name}, got {value.device}")


def supported_device(name: str, value: torch.Tensor) -> None:
    """Raise unless `value` is on the CPU or a CUDA device."""
    if value.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} must be on the CPU or a CUDA device, got {value.device}")


def shape(name: str, value: torch.Tensor, expected: Sequence[int], why: str) -> None:
    """Raise unless `value` has the expected shape; `why` explains it in the message."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {list(expected)} ({why}), got {list(value.shape)}")


def vector_bytes(row_bytes: int) -> int:
    """Return the bytes that one access of a CUDA kernel reads or writes in rows of `row_bytes`, a multiple of 4."""
    return next(n for n in (CUDA_ALIGNMENT, 8, MIN_ACCESS_BYTES) if row_bytes % n == 0)


def power_of_two(limit: int) -> str:
    """Return the text of a power of two, such as 2^30."""
    return f"2^{limit.bit_length() - 1}"


def enumeration(values: Iterable[object], conjunction: str = "and") -> str:
    """Return values as a message lists them, such as "1, 2 and 4"; dtypes without the prefix `torch.`."""
    *others, last = (str(value).removeprefix("torch.") for value in values)
    return f"{', '.join(others)} {conjunction} {last}" if others else last


def choice(name: str, value: object, accepted: Sequence[str]) -> None:
    """Raise unless `value` is one of the accepted texts."""
    if value not in accepted:
        raise ValueError(f"{name} must be {enumeration(map(repr, accepted), 'or')}, got {value!r}")


def storage(name: str, value: torch.Tensor) -> None:
    """Raise if `value` has elements and no storage."""
    if value.numel() and value.data_ptr() == 0:
        raise ValueError(f"{name} must have storage, got a tensor without any")


def indices(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """Raise unless `value` is a contiguous vector of int32 or int64 on the device of `like`."""
    dtype(name, value, (torch.int32, torch.int64))
    if value.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got shape {list(value.shape)}")
    if value.shape[0] > 1 and value.stride(0) != 1:
        raise ValueError(f"{name} must be contiguous, got a stride of {value.stride(0)}")
    device(name, value, like_name, like)


def index_range(name: str, value: torch.Tensor, size: int, what: str, skip_index: int | None = None) -> None:
    """Raise IndexError for an index out of range. Waits for the GPU, so nothing is checked during a graph capture.

    Args:
        name: The argument's name.
        value: The indices.
        size: The number of things that they count.
        what: What has that number, for the message: "the caches have {} slots".
        skip_index: An index that is allowed although it is out of range.
    """
    if not value.numel() or (value.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    out_of_range = (value < 0) | (value >= size)
    if skip_index is not None:
        out_of_range &= value != skip_index
    if out_of_range.any():
        position = out_of_range.nonzero()[0].tolist()
        index = int(value[tuple(position)])
        raise IndexError(f"{name}[{', '.join(map(str, position))}] is {index}, and {what.format(size)}")


def rows(name: str, value: torch.Tensor, alignment: int = CUDA_ALIGNMENT) -> None:
    """Raise unless `value`, [..., hidden_size], has adjacent elements, one row stride, memory and alignment."""
    layout = f"shape {list(value.shape)} and strides {list(value.stride())}"
    if value.stride(-1) != 1:
        raise ValueError(f"{name} must have a last stride of 1, got {layout}")
    if value.numel() == 0:
        return
    if row_stride(value) is None:
        raise ValueError(f"{name} must have leading dimensions that collapse to one row stride, got {layout}")
    storage(name, value)
    aligned(name, value, row_stride(value) or 0, alignment=alignment)


def aligned(name: str, value: torch.Tensor, *strides: int, alignment: int = CUDA_ALIGNMENT) -> None:
    """Raise if `value` is on CUDA and a row is not aligned to `alignment` bytes. Strides are in elements."""
    if not value.is_cuda:
        return
    address, steps = value.data_ptr() % alignment, [stride * value.element_size() for stride in strides]
    if address or any(step % alignment for step in steps):
        raise ValueError(
            f"{name} must be aligned to {alignment} bytes in every row, got an address of {address} modulo {alignment} "
            f"and strides of {' and '.join(map(str, steps))} bytes between rows"
        )


def elements(name: str, value: torch.Tensor, count: int, why: str, alignment: int = 1) -> None:
    """Raise unless `value` is contiguous and has `count` elements, in any shape; `why` explains the number."""
    if value.numel() != count:
        raise ValueError(f"{name} must have {count} element{'s' * (count != 1)} ({why}), got shape {list(value.shape)}")
    if not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got shape {list(value.shape)} and strides {list(value.stride())}")
    storage(name, value)
    if alignment == 1 or value.is_cuda:
        address(name, value, max(alignment, value.element_size()))


def address(name: str, value: torch.Tensor, alignment: int) -> None:
    """Raise unless the first element's address is a multiple of `alignment` bytes."""
    if value.numel() and value.data_ptr() % alignment:
        raise ValueError(
            f"{name} must be aligned to {alignment} bytes, "
            f"got an address of {value.data_ptr() % alignment} modulo {alignment}"
        )


def row_stride(value: torch.Tensor) -> int | None:
    """Return the elements from one row to the next. None if the leading dimensions do not collapse to one stride."""
    count, stride = 1, value.shape[-1]
    for size, step in zip(reversed(value.shape[:-1]), reversed(value.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if count == 1:
            stride = step
        elif step != stride * count:
            return None
        count *= size
    return stride


def no_row_overlap(name: str, value: torch.Tensor) -> None:
    """Raise if rows of `value`, which is written, overlap."""
    hidden_size, stride = value.shape[-1], row_stride(value) or 0
    if value.numel() > hidden_size and stride < hidden_size:
        raise ValueError(f"{name} must not overlap itself, got a row stride of {stride} for {hidden_size} elements")


def no_internal_overlap(name: str, value: torch.Tensor) -> None:
    """Raise if `value`, which is written and has any strides, overlaps itself."""
    extent_so_far = 1  # in elements, of the dimensions with smaller strides
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1:
            if stride < extent_so_far:
                layout = f"shape {list(value.shape)} and strides {list(value.stride())}"
                raise ValueError(f"{name} must not overlap itself, got {layout}")
            extent_so_far += (size - 1) * stride


_MAX_STEPS = 4  # kMaxSteps in csrc/include/jitnorm/strided.h


def heads(name: str, value: torch.Tensor, alignment: int = CUDA_ALIGNMENT) -> None:
    """Raise unless `value`, [..., heads, head_dim], has adjacent elements in a head, memory and alignment."""
    layout = f"shape {list(value.shape)} and strides {list(value.stride())}"
    if value.stride(-1) != 1:
        raise ValueError(f"{name} must have a last stride of 1, got {layout}")
    if value.numel() == 0:
        return
    strides = [stride for stride, size in zip(value.stride()[:-1], value.shape[:-1], strict=True) if size > 1]
    storage(name, value)
    aligned(name, value, *strides, alignment=alignment)


def are_same_rows(value: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of heads are the same memory, dimension by dimension."""
    return value.data_ptr() == other.data_ptr() and value.dtype == other.dtype and _leading(value) == _leading(other)


def no_shared_heads(
    name: str, value: torch.Tensor, other_name: str, other: torch.Tensor, has_heads: bool = True
) -> None:
    """Raise if a head of `value` shares memory with a head of `other`, or without `has_heads` with all its extent.

    Exact for equal strides, as of slices of one projection or of one cache. For different strides, for heads that
    overlap each other, and where heads of one lie between those of the other in more places than _MAX_STEPS,
    overlapping extents count as shared. As csrc/include/jitnorm/strided.h decides.
    """
    if extents_overlap(value, other) and _share_memory(value, other, has_heads):
        raise ValueError(f"{name} must share no memory with {other_name}, got a view that overlaps it")


def _share_memory(a: torch.Tensor, b: torch.Tensor, b_has_heads: bool) -> bool:
    if _is_self_overlapping(a) or (b_has_heads and _is_self_overlapping(b)):
        return True
    dims = []
    leading_b = _leading(b) if b_has_heads else [(1, 0)] * 3
    for (size_a, stride_a), (size_b, stride_b) in zip(_leading(a), leading_b, strict=True):
        if size_a > 1 and size_b > 1 and stride_a != stride_b:
            return True
        dims.append((stride_a if size_a > 1 else stride_b, size_a, size_b))
    dims.sort(key=lambda dim: -dim[0])
    row_a = a.shape[-1] * a.element_size()
    row_b = b.shape[-1] * b.element_size() if b_has_heads else extent(b)

    def meet(distance: int, level: int) -> bool:
        """Return whether rows this far apart can meet by steps along the dimensions from `level` on."""
        if level == len(dims):
            return distance < row_a and -distance < row_b
        stride, size_a, size_b = dims[level]
        if stride == 0:
            return size_a > 1 or size_b > 1 or meet(distance, level + 1)
        below_a = row_a + sum((size - 1) * stride for stride, size, _ in dims[level + 1 :])
        below_b = row_b + sum((size - 1) * stride for stride, _, size in dims[level + 1 :])
        first = max((distance - below_a) // stride + 1, 1 - size_b)
        last = min(-(-(distance + below_b) // stride) - 1, size_a - 1)
        if last - first >= _MAX_STEPS:
            return True
        return any(meet(distance - step * stride, level + 1) for step in range(first, last + 1))

    return meet(b.data_ptr() - a.data_ptr(), 0)


def _leading(value: torch.Tensor) -> list[tuple[int, int]]:
    """Return size and stride in bytes of the leading dimensions, three of them; strides of one element count as 0."""
    dims = list(zip(value.shape[:-1], value.stride()[:-1], strict=True))
    if len(dims) == 2:
        dims.insert(1, (1, 0))
    return [(size, stride * value.element_size() if size > 1 else 0) for size, stride in dims]


def _is_self_overlapping(value: torch.Tensor) -> bool:
    try:
        no_internal_overlap("", value)
    except ValueError:
        return True
    return False


def no_overlap(
    name: str, value: torch.Tensor, other_name: str, other: torch.Tensor, reject_identical: bool = False
) -> None:
    """Raise if two tensors of rows share memory; unless `reject_identical`, they may be the same rows.

    If their strides differ, or one has no single row stride, extents that intersect count as sharing.
    """
    if not value.numel() or not other.numel():
        return
    stride, other_stride = _bytes(value, row_stride(value)), _bytes(other, row_stride(other))
    row, other_row = _bytes(value, value.shape[-1]), _bytes(other, other.shape[-1])
    offset = value.data_ptr() - other.data_ptr()
    if not reject_identical and offset == 0 and (stride == other_stride or value.nbytes == row):
        return
    if offset >= extent(other) or -offset >= extent(value):
        return
    if stride and stride == other_stride and other_row <= offset % stride <= stride - row:
        return
    itself = "" if reject_identical else f"be {other_name} itself or "
    raise ValueError(f"{name} must {itself}share no memory with {other_name}, got a view that overlaps it")


def no_shared_memory(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Raise if the extents of two tensors intersect, even where one's elements lie between the rows of the other."""
    if extents_overlap(value, other):
        raise ValueError(f"{name} must share no memory with {other_name}, got a view that overlaps it")


def extents_overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether the address ranges of two tensors, from first to last element, intersect."""
    a_start, b_start = a.data_ptr(), b.data_ptr()
    return a.numel() > 0 and b.numel() > 0 and a_start < b_start + extent(b) and b_start < a_start + extent(a)


def _bytes(value: torch.Tensor, elements: int | None) -> int:
    return (elements or 0) * value.element_size()


def extent(value: torch.Tensor) -> int:
    """Return the bytes from the first element to the end of the last."""
    last = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    return _bytes(value, last + 1)


def eps(value: object) -> None:
    """Raise unless `value` is a number of zero or more that fits a float and, if an int, 64 bits."""
    number("eps", value)
    if not float(value) >= 0:  # type: ignore[arg-type]
        raise ValueError(f"eps must be zero or more, got {value}")


def number(name: str, value: object) -> None:
    """Raise unless `value` is a number that fits a float and, if an int, 64 bits."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ValueError(f"{name} must be a float or a 64-bit integer, got one of {value.bit_length()} bits")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a float, got a {type(value).__name__} beyond its range") from None


def is_integer(value: object) -> TypeGuard[int]:
    """Return whether `value` is an integer of Python or NumPy; a bool is not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def integer(name: str, value: object) -> int:
    """Return `value` as Python's int, whose comparisons do not overflow as NumPy's do. Raise unless it fits 64 bits."""
    if not is_integer(value):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    number = int(value)
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"{name} must fit 64 bits, got one of {number.bit_length()} bits")
    return number


def enable_pdl(value: object) -> None:
    """Raise unless `value` is True, False or None."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"enable_pdl must be True, False or None, got {type(value).__name__}")
