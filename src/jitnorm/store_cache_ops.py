"""The kernels of `store_cache`, what it refuses, and its place in torch.ops.jitnorm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from jitnorm.core import checks
from jitnorm.core.operators import Operator
from jitnorm.core.targets import target_of
from jitnorm.core.torch_library import build_while_tracing, count_version, is_traced, needs_grad, register
from jitnorm.jit.environment import is_on
from jitnorm.jit.spec import KernelSpec, Target

_NUM_SPLITS = (0, 1, 2, 4)
_MOST_ROW_BYTES = 1 << 30

# Whether an index that is out of range is looked for, which waits for the GPU. Read once: asking costs as much as a
# launch.
check_indices = is_on("JITNORM_CHECK_INDICES")


@dataclass(frozen=True)
class StoreCache(Operator):
    """The one operator; its kernels know of a row only what one access can move."""

    def spec(self, vector_bytes: int, target: Target) -> KernelSpec:
        """What to build for rows that accesses of `vector_bytes` fit; the widths are known to the call alone."""
        full = vector_bytes == checks.CUDA_ALIGNMENT
        return KernelSpec(
            op=self.op,
            family="store_cache",
            entry=self.entry,
            name=self.op if full else f"{self.op}_by_{vector_bytes}",
            kernel=f"StoreCacheKernel<{vector_bytes}>",
            target=target,
            warmup=f"--op {self.op}" + ("" if full else f" --dtype bf16 --hidden-size {vector_bytes // 2}"),
        )

    def warmup_spec(self, width: int | None, dtype: torch.dtype, _: torch.dtype, target: Target) -> KernelSpec:
        """What to build for rows of `width` elements, or of whole 16 bytes where it is None."""
        if width is None:
            return self.spec(checks.CUDA_ALIGNMENT, target)
        _check_row(f"{width} {dtype}", width * dtype.itemsize)
        return self.spec(checks.vector_bytes(width * dtype.itemsize), target)

    def run(self, *arguments: Any) -> None:
        """Calls the kernel that serves `arguments`, which have been checked."""
        if arguments[0].is_complex():
            # As pairs of numbers: so no kernel is kept for complex dtypes, and every call is checked for conjugates.
            arguments = (*map(torch.view_as_real, arguments[:4]), *arguments[4:])
        k, v = arguments[:2]
        self.call((k.dtype,), (_vector_bytes(k, v), target_of(k)), *arguments)


STORE_CACHE = StoreCache("store_cache", "store_cache")


def _check_row(name: str, row_bytes: int) -> None:
    if row_bytes % 4 or not 0 < row_bytes <= _MOST_ROW_BYTES:
        raise RuntimeError(
            f"store_cache does not support rows of {row_bytes} bytes, as of {name}: "
            "supported are multiples of 4 up to 2^30"
        )


def _row_bytes(value: torch.Tensor) -> int:
    return int(math.prod(value.shape[1:])) * value.itemsize


def _vector_bytes(k: torch.Tensor, v: torch.Tensor) -> int:
    return checks.vector_bytes(math.gcd(_row_bytes(k), _row_bytes(v)))


def check(
    k: Any, v: Any, k_cache: Any, v_cache: Any, indices: Any, row_bytes: Any, num_split: Any, skip_index: Any
) -> None:
    """Raises for what the glue in csrc/elementwise/store_cache.h refuses."""
    named = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    row_bytes, num_split, _ = _check_types(k, v, k_cache, v_cache, indices, row_bytes, num_split, skip_index)
    _check_kinds(named, indices, row_bytes, num_split)
    checks.supported_device("k", k)
    for name, value in named.items():
        if value.is_conj():
            raise ValueError(f"{name} must not be a conjugate view, whose bytes are not its values: resolve_conj() it")
    alignment = _vector_bytes(k, v)
    rows = {name: _as_rows(name, value, alignment) for name, value in named.items()}
    checks.storage("indices", indices)
    checks.address("indices", indices, indices.element_size())
    if not indices.numel():
        return
    for cache, others in (("k_cache", ("k", "v")), ("v_cache", ("k", "v", "k_cache"))):
        if not rows[cache].numel():
            raise ValueError(f"{cache} must have a slot to write to, got shape {list(named[cache].shape)}")
        checks.written_rows(cache, rows[cache])
        checks.no_shared_memory(cache, rows[cache], "indices", indices)
        for other in others:
            checks.no_overlap(cache, rows[cache], other, rows[other], even_exactly=True)


def _check_types(
    k: Any, v: Any, k_cache: Any, v_cache: Any, indices: Any, row_bytes: Any, num_split: Any, skip_index: Any
) -> tuple[int, int, int | None]:
    """What torch's dispatcher would refuse in words of its own. Returns the numbers as Python's own."""
    for name, value in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache), ("indices", indices)):
        checks.tensor(name, value)
    return (
        checks.integer("row_bytes", row_bytes),
        checks.integer("num_split", num_split),
        None if skip_index is None else checks.integer("skip_index", skip_index),
    )


def _check_kinds(named: dict[str, torch.Tensor], indices: torch.Tensor, row_bytes: int, num_split: int) -> None:
    """What can be said of tensors without storage."""
    k = named["k"]
    for name, value in named.items():
        checks.dtype(name, value, (k.dtype,))
        checks.device(name, value, "k", k)
        if value.dim() < 2:
            raise ValueError(f"{name} must have two dimensions or more, got shape {list(value.shape)}")
    checks.indices("indices", indices, "k", k)
    for name in ("k", "v"):
        if named[name].shape[0] != indices.shape[0]:
            raise ValueError(f"{name} must have {indices.shape[0]} rows like indices, got {named[name].shape[0]}")
        row, cache_row = _row_bytes(named[name]), _row_bytes(named[f"{name}_cache"])
        _check_row(name, row)
        if row != cache_row:
            raise ValueError(f"{name}_cache must have rows of {row} bytes like {name}, got {cache_row}")
    slots, v_slots = named["k_cache"].shape[0], named["v_cache"].shape[0]
    if slots != v_slots:
        raise ValueError(f"v_cache must have {slots} slots like k_cache, got {v_slots}")
    if row_bytes not in (0, _row_bytes(k)):
        raise ValueError(f"row_bytes must be 0 or {_row_bytes(k)}, the bytes in a row of k, got {row_bytes}")
    if num_split not in _NUM_SPLITS:
        raise ValueError(f"num_split must be 0, 1, 2 or 4, got {num_split}")


def _as_rows(name: str, value: torch.Tensor, alignment: int) -> torch.Tensor:
    """`value`, [rows, ...], as [rows, elements]; refuses what has no such view."""
    step = 1
    for size, stride in zip(reversed(value.shape[1:]), reversed(value.stride()[1:]), strict=True):
        if size != 1 and stride != step:
            layout = f"shape {list(value.shape)} and strides {list(value.stride())}"
            raise ValueError(f"{name} must be contiguous within a row, got {layout}")
        step *= size
    checks.storage(name, value)
    rows = value.as_strided((value.shape[0], step), (value.stride(0), 1))
    checks.rows(name, rows, alignment)
    return rows


def check_range(indices: torch.Tensor, num_slots: int, skip_index: int | None) -> None:
    """IndexError for an index that is no slot's. Waits for the GPU; a graph under capture is not checked."""
    if not indices.numel() or (indices.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    out_of_range = (indices < 0) | (indices >= num_slots)
    if skip_index is not None:
        out_of_range &= indices != skip_index
    if out_of_range.any():
        position = int(out_of_range.nonzero()[0])
        raise IndexError(f"indices[{position}] is {int(indices[position])}, and the caches have {num_slots} slots")


def first_store_cache(*arguments: Any) -> None:
    """The way of a call that finds no kernel or is refused by it: says what is wrong, or gets the right kernel."""
    tensors = arguments[:5]
    if is_traced(*tensors):
        return dispatch_store_cache(*tensors, *_check_types(*arguments))
    check(*arguments)
    if needs_grad(*tensors):
        raise RuntimeError("store_cache has no gradient: call it under torch.no_grad()")
    _run_checked(*arguments)
    return None


def _run_checked(*arguments: Any) -> None:
    k_cache, indices, skip_index = arguments[2], arguments[4], arguments[7]
    if check_indices:
        check_range(indices, k_cache.shape[0], skip_index)
    STORE_CACHE.run(*arguments)


def dispatch_store_cache(*arguments: Any) -> None:
    """A call by way of torch's dispatcher."""
    if needs_grad(*arguments[:5]):
        raise RuntimeError("store_cache has no gradient: call it under torch.no_grad()")
    *tensors, row_bytes, num_split, skip_index = arguments
    torch.ops.jitnorm.store_cache(*tensors, row_bytes=row_bytes, num_split=num_split, skip_index=skip_index)


def _run(
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    indices: Any,
    *,
    row_bytes: int = 0,
    num_split: int = 0,
    skip_index: int | None = None,
) -> None:
    arguments = k, v, k_cache, v_cache, indices, row_bytes, num_split, skip_index
    if check_indices or not STORE_CACHE.call_last((k.dtype,), *arguments):
        check(*arguments)
        _run_checked(*arguments)
    count_version(k_cache, v_cache)


def _fake(
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    indices: Any,
    *,
    row_bytes: int = 0,
    num_split: int = 0,
    skip_index: int | None = None,
) -> None:
    named = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    _check_kinds(named, indices, row_bytes, num_split)
    build_while_tracing(STORE_CACHE, k, _vector_bytes(k, v))


register(
    "store_cache(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor indices, *, int row_bytes=0, "
    "int num_split=0, int? skip_index=None) -> ()",
    _run,
    _fake,
)
