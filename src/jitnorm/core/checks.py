"""What is wrong with an argument, in one line: its name, what it was, what is accepted.

The glue in csrc decides in nanoseconds whether a kernel can take its arguments; these functions say why not, and stand
guard before a kernel is built. Both sides hold the same conditions; tests/core/test_checks_agree.py sees to that.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import TypeGuard

import torch

DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
CUDA_ALIGNMENT = 16  # bytes in the widest access of a CUDA kernel
MIN_ACCESS_BYTES = 4  # in the narrowest


def tensor(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got one with layout {value.layout}")
    if value.is_quantized:
        raise TypeError(f"{name} must not be quantised by PyTorch, got {str(value.dtype).removeprefix('torch.')}")


def types(eps_value: object, enable_pdl_value: object, **tensors: object) -> None:
    """What torch's dispatcher would refuse in words of its own, so that traced calls are asked before it."""
    for name, value in tensors.items():
        tensor(name, value)
    eps(eps_value)
    enable_pdl(enable_pdl_value)


def dtype(name: str, value: torch.Tensor, accepted: Sequence[torch.dtype]) -> None:
    if value.dtype not in accepted:
        names = " or ".join(str(d).removeprefix("torch.") for d in dict.fromkeys(accepted))
        raise TypeError(f"{name} must be {names}, got {str(value.dtype).removeprefix('torch.')}")


def device(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like {like_name}, got {value.device}")


def supported_device(name: str, value: torch.Tensor) -> None:
    if value.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} must be on the CPU or a CUDA device, got {value.device}")


def shape(name: str, value: torch.Tensor, expected: Sequence[int], why: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {list(expected)} ({why}), got {list(value.shape)}")


def vector_bytes(row_bytes: int) -> int:
    """What one access of a CUDA kernel moves of rows that are any multiple of 4 bytes."""
    return next(n for n in (CUDA_ALIGNMENT, 8, MIN_ACCESS_BYTES) if row_bytes % n == 0)


def power(limit: int) -> str:
    """Return a power of two as messages write it, such as 2^30."""
    return f"2^{limit.bit_length() - 1}"


def storage(name: str, value: torch.Tensor) -> None:
    if value.numel() and value.data_ptr() == 0:
        raise ValueError(f"{name} must have storage, got a tensor without any")


def indices(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """`value` is a contiguous vector of int32 or int64 beside `like`."""
    dtype(name, value, (torch.int32, torch.int64))
    if value.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got shape {list(value.shape)}")
    if value.shape[0] > 1 and value.stride(0) != 1:
        raise ValueError(f"{name} must be contiguous, got a stride of {value.stride(0)}")
    device(name, value, like_name, like)


def rows(name: str, value: torch.Tensor, alignment: int = CUDA_ALIGNMENT) -> None:
    """`value` is [..., hidden_size]: elements adjacent, one stride from row to row, storage that a kernel can reach."""
    layout = f"shape {list(value.shape)} and strides {list(value.stride())}"
    if value.stride(-1) != 1:
        raise ValueError(f"{name} must have a last stride of 1, got {layout}")
    if value.numel() == 0:
        return
    if row_stride(value) is None:
        raise ValueError(f"{name} must have leading dimensions that collapse to one row stride, got {layout}")
    storage(name, value)
    aligned(name, value, row_stride(value) or 0, to=alignment)


def aligned(name: str, value: torch.Tensor, *strides: int, to: int = CUDA_ALIGNMENT) -> None:
    """On CUDA, every row is whole accesses of a kernel; rows are these numbers of elements apart."""
    if not value.is_cuda:
        return
    address, steps = value.data_ptr() % to, [stride * value.element_size() for stride in strides]
    if address or any(step % to for step in steps):
        raise ValueError(
            f"{name} must be aligned to {to} bytes in every row, got an address of {address} modulo {to} "
            f"and strides of {' and '.join(map(str, steps))} bytes between rows"
        )


def elements(name: str, value: torch.Tensor, count: int, why: str, alignment: int = 1) -> None:
    """`value` is contiguous, of any shape, and has `count` elements."""
    if value.numel() != count:
        raise ValueError(f"{name} must have {count} element{'s' * (count != 1)} ({why}), got shape {list(value.shape)}")
    if not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got shape {list(value.shape)} and strides {list(value.stride())}")
    storage(name, value)
    if alignment == 1 or value.is_cuda:
        address(name, value, max(alignment, value.element_size()))


def address(name: str, value: torch.Tensor, alignment: int) -> None:
    if value.numel() and value.data_ptr() % alignment:
        raise ValueError(
            f"{name} must be aligned to {alignment} bytes, "
            f"got an address of {value.data_ptr() % alignment} modulo {alignment}"
        )


def row_stride(value: torch.Tensor) -> int | None:
    """Elements from one row to the next, of a tensor with rows; None where there is no one stride."""
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


def written_rows(name: str, value: torch.Tensor) -> None:
    hidden_size, stride = value.shape[-1], row_stride(value) or 0
    if value.numel() > hidden_size and stride < hidden_size:
        raise ValueError(f"{name} must not overlap itself, got a row stride of {stride} for {hidden_size} elements")


def written(name: str, value: torch.Tensor) -> None:
    """Of any strides, each dimension steps over all that lies within it."""
    taken = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1:
            if stride < taken:
                layout = f"shape {list(value.shape)} and strides {list(value.stride())}"
                raise ValueError(f"{name} must not overlap itself, got {layout}")
            taken += (size - 1) * stride


def no_overlap(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor, even_exactly: bool = False) -> None:
    """They share no memory or, unless `even_exactly`, are the same rows.

    Where their strides differ, or rows have no one stride, extents that meet count as sharing.
    """
    if not value.numel() or not like.numel():
        return
    stride, like_stride = _bytes(value, row_stride(value)), _bytes(like, row_stride(like))
    row, like_row = _bytes(value, value.shape[-1]), _bytes(like, like.shape[-1])
    offset = value.data_ptr() - like.data_ptr()
    if not even_exactly and offset == 0 and (stride == like_stride or value.nbytes == row):
        return
    if offset >= extent(like) or -offset >= extent(value):
        return
    if stride and stride == like_stride and like_row <= offset % stride <= stride - row:
        return
    itself = "" if even_exactly else f"be {like_name} itself or "
    raise ValueError(f"{name} must {itself}share no memory with {like_name}, got a view that overlaps it")


def no_shared_memory(name: str, value: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """For a written tensor and another, whatever lies between their rows."""
    if extents_meet(value, like):
        raise ValueError(f"{name} must share no memory with {like_name}, got a view that overlaps it")


def extents_meet(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether any of `b` lies between the first and the last element of `a`, or the other way round."""
    start, other = a.data_ptr(), b.data_ptr()
    return a.numel() > 0 and b.numel() > 0 and start < other + extent(b) and other < start + extent(a)


def _bytes(value: torch.Tensor, elements: int | None) -> int:
    return (elements or 0) * value.element_size()


def extent(value: torch.Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    last = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    return _bytes(value, last + 1)


def eps(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"eps must be a float, got {type(value).__name__}")
    if isinstance(value, int) and value.bit_length() > 63:
        raise ValueError(f"eps must be a float or a 64-bit integer, got one of {value.bit_length()} bits")
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(f"eps must be a float, got a {type(value).__name__} beyond its range") from None
    if not number >= 0:
        raise ValueError(f"eps must be zero or more, got {value}")


def is_integer(value: object) -> TypeGuard[int]:
    """NumPy's integers are, and True is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def integer(name: str, value: object) -> int:
    """`value` as Python's own int, with which comparisons do not overflow as with NumPy's."""
    if not is_integer(value):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    number = int(value)
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"{name} must fit 64 bits, got one of {number.bit_length()} bits")
    return number


def enable_pdl(value: object) -> None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"enable_pdl must be True, False or None, got {type(value).__name__}")
