"""Stores of new keys and values into a KV cache: `k_cache[indices] = k` and `v_cache[indices] = v`, in one launch."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from jitnorm import qknorm_rope_store
from jitnorm.core import checks
from jitnorm.core.operators import DTYPES, EXAMPLES, Example, Operator, Shape
from jitnorm.core.targets import target_of
from jitnorm.core.torch_library import (
    build_while_tracing,
    increment_versions,
    needs_dispatcher,
    needs_grad,
    refuse_gradient,
    register,
)
from jitnorm.jit.environment import is_on
from jitnorm.jit.spec import KernelSpec, Target
from jitnorm.qknorm_rope_store import E4M3, EXAMPLE_SIZES, NO_SKIP_INDEX, STORE_HEADS, Arguments

MAX_ROW_BYTES = 1 << 30  # kMaxRowBytes in csrc/elementwise/store_cache.h
_NUM_SPLITS = (0, 1, 2, 4)

# Whether indices are checked, which makes the CPU wait for the GPU. Read once, because reading an environment variable
# costs as much as a launch.
check_indices = is_on("JITNORM_CHECK_INDICES")


class StoreCache(Operator):
    """The operator. Its kernels are compiled for the bytes of one access, not for a width or a dtype."""

    size_name: ClassVar[str | None] = "elements in a row"
    needs_size: ClassVar[bool] = False

    def spec(self, vector_bytes: int, target: Target) -> KernelSpec:
        """Return what to build for rows of whole accesses of `vector_bytes`. A kernel supports every such width."""
        full = vector_bytes == checks.CUDA_ALIGNMENT
        return KernelSpec(
            op=self.op,
            family="store_cache",
            binding=self.binding,
            name=self.op if full else f"{self.op}_by_{vector_bytes}",
            kernel=f"StoreCacheKernel<{vector_bytes}>",
            target=target,
            warmup=f"--op {self.op}" + ("" if full else f" --dtype bf16 --hidden-size {vector_bytes // 2}"),
        )

    def warmup_spec(
        self, size: int | None, dtype: torch.dtype, weight_dtype: torch.dtype, target: Target
    ) -> KernelSpec:
        """Return what to build for rows of `size` elements, or of whole 16 bytes if it is None."""
        if size is None:
            return self.spec(checks.CUDA_ALIGNMENT, target)
        _check_row(f"{size} {dtype}", size * dtype.itemsize)
        return self.spec(checks.vector_bytes(size * dtype.itemsize), target)

    def run(self, *arguments: Any) -> None:
        """Run the kernel that supports `arguments`, which have been checked."""
        if arguments[0].is_complex():
            # As pairs of real numbers. No kernel is cached for a complex dtype, so that every call is checked for
            # conjugate views.
            arguments = (*map(torch.view_as_real, arguments[:4]), *arguments[4:])
        k, v = arguments[:2]
        self.call((k.dtype,), (_vector_bytes(k, v), target_of(k)), *arguments)


STORE_CACHE = StoreCache("store_cache", "store_cache")

_kernels = STORE_CACHE.fast_cache
_head_kernels = STORE_HEADS.fast_cache
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_Tensor = torch.Tensor


def store_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    indices: torch.Tensor,
    *,
    row_bytes: int = 0,
    num_split: int = 0,
    skip_index: int | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Write row i of k and v into slot `indices[i]` of their caches: `k_cache[indices] = k; v_cache[indices] = v`.

    Bytes are copied unchanged. One kernel supports rows of any dtype that are a multiple of 16 bytes, one multiples of
    8, and one multiples of 4. Other kernels support caches that are paged (`[blocks, block_size, heads, head_dim]`), of
    float8, or with heads at any strides. Out-of-range indices, and so negative ones, are undefined behaviour: pass
    `skip_index=-1` where rows of padding have the index -1. Set `JITNORM_CHECK_INDICES=1` before importing jitnorm to
    raise IndexError. If two rows have the same index, the slot may contain either row or a mixture of both.

    Args:
        k: `[num_tokens, ...]`, of any dtype but PyTorch's quantised ones, on the CPU or a CUDA device; contiguous
            within a row, with any stride from row to row, as in a slice of fused QKV. A row is a multiple of 4 bytes,
            up to 2^30. On CUDA rows are aligned to 16 bytes if the rows of k and v both are multiples of 16, otherwise
            to 8 or 4. Conjugate views are not accepted, here and below. For the caches that are paged, float8, or not
            contiguous within a row, `[num_tokens, heads, head_dim]` as in `jitnorm.qk_norm_rope_store`.
        v: `[num_tokens, ...]`, likewise, of k's dtype and device; its rows may have another width.
        k_cache: `[num_slots, ...]`, written; of k's dtype and device, its rows of as many bytes as k's, with any stride
            with which they do not overlap. Shares no memory with any other argument. Or as in
            `jitnorm.qk_norm_rope_store`: paged, where slot s is token `s % block_size` of block `s // block_size`, with
            free strides of blocks, tokens and heads, or of float8_e4m3fn.
        v_cache: `[num_slots, ...]`, written; likewise, for v.
        indices: `[num_tokens]`, int32 or int64, contiguous, on k's device.
        row_bytes: the bytes in a row of k, or 0 for that. Other values raise ValueError.
        num_split: how many warps of a block share a row on CUDA: 1, 2 or 4, or 0 to choose by the row's width. The
            result is the same.
        skip_index: rows with this index are not written, for example the padding of a CUDA graph's batch.
        k_scale: float32, one element or `[heads]`, on k's device: a float8 k_cache is k divided by it. None for 1.
        v_scale: likewise, for v.

    Raises:
        TypeError: an argument is not a tensor or not an int, or has another dtype.
        ValueError: a shape, stride, device, alignment or overlap is not accepted, or row_bytes or num_split is invalid.
        IndexError: with `JITNORM_CHECK_INDICES=1`, an index is out of range; nothing is written then. Every call waits
            for the GPU to check this, except while a CUDA graph is captured.
        RuntimeError: the width is not supported (nothing is built then), a tensor needs a gradient, or the kernel
            cannot be built or launched.
    """
    arguments = k, v, k_cache, v_cache, indices, row_bytes, num_split, skip_index
    if _is_dynamo_compiling():
        return _call_torch_op(*arguments, k_scale, v_scale)
    try:
        if (
            not check_indices
            and k.__class__ is v.__class__ is k_cache.__class__ is v_cache.__class__ is indices.__class__ is _Tensor
            and (
                not (k.requires_grad or v.requires_grad or k_cache.requires_grad or v_cache.requires_grad)
                or not torch.is_grad_enabled()
            )
        ):
            kernel = _kernels.get(k.dtype)
            if kernel is not None and k_scale is v_scale is None and not kernel(*arguments):
                return None
            kernels = _head_kernels.get(k.dtype)
            if (
                kernels is not None
                and row_bytes == num_split == 0
                and (k_scale is None or k_scale.__class__ is _Tensor)
                and (v_scale is None or v_scale.__class__ is _Tensor)
                and not needs_grad(k_scale, v_scale)
                and not _store_heads(kernels[k.size(-1)], arguments, k_scale, v_scale)
            ):
                return None
    except Exception:  # arguments without such attributes: the slow path raises for these
        pass
    return _store_cache_slow_path(*arguments, k_scale, v_scale)


def _store_heads(kernel: Any, arguments: tuple[Any, ...], k_scale: Any, v_scale: Any) -> Any:
    """Call a kernel of STORE_HEADS, through the bindings in csrc/elementwise/qknorm_rope_store.h."""
    k, v, k_cache, v_cache, indices, _, _, skip_index = arguments
    skip_index = NO_SKIP_INDEX if skip_index is None else skip_index
    return kernel(
        *(None, k, v, None, None, k_cache, v_cache, indices, None, None, 0.0, 0.0, True, 0, 0, 0, False, None, None),
        *(None, k_scale, v_scale, skip_index, False, None),
    )


def _store_cache_slow_path(*arguments: Any) -> None:
    """Check the arguments, then run the right kernel, which is built and cached if need be."""
    for name, value in zip(("k_scale", "v_scale"), arguments[8:], strict=True):
        if value is not None:
            checks.tensor(name, value)
    tensors = [t for t in (*arguments[:5], *arguments[8:]) if t is not None]
    if needs_dispatcher(*tensors):
        return _call_torch_op(*arguments[:5], *_check_types(*arguments[:8]), *arguments[8:])
    heads = check(*arguments)
    refuse_gradient(STORE_CACHE.op, *tensors)
    return _run_checked(heads, *arguments)


def _run_checked(heads: Arguments | None, *arguments: Any) -> None:
    if heads is not None:
        return qknorm_rope_store.run_checked(heads)
    k_cache, indices, skip_index = arguments[2], arguments[4], arguments[7]
    if check_indices:
        checks.index_range("indices", indices, k_cache.shape[0], "the caches have {} slots", skip_index)
    return STORE_CACHE.run(*arguments[:8])


def _as_heads(
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    indices: Any,
    row_bytes: Any,
    num_split: Any,
    skip_index: Any,
    k_scale: Any,
    v_scale: Any,
) -> Arguments | None:
    """Return the arguments of STORE_HEADS for caches that are paged, float8 or not contiguous within a row, or None."""
    tensors = (k, v, k_cache, v_cache)
    if not all(isinstance(t, torch.Tensor) and t.dim() in (3, 4) for t in tensors) or k.dim() != 3:
        return None
    is_quantised = k_cache.dtype == E4M3 != k.dtype or k_scale is not None or v_scale is not None
    if not is_quantised and (k.dtype not in DTYPES or _are_rows(tensors, indices)):
        return None
    _, num_split, skip_index = _check_types(k, v, k_cache, v_cache, indices, row_bytes, num_split, skip_index)
    _check_settings(k, row_bytes, num_split)
    skip_index = NO_SKIP_INDEX if skip_index is None else skip_index
    return Arguments.of_store(k, v, k_cache, v_cache, indices, k_scale, v_scale, skip_index)


def _are_rows(tensors: tuple[torch.Tensor, ...], indices: Any) -> bool:
    """Return whether the kernels of STORE_CACHE serve these k, v and caches, or their checks explain why none does."""
    k, v, k_cache, v_cache = tensors
    is_contiguous = all(_has_contiguous_rows(t) for t in tensors)
    if k_cache.dim() == 3:
        return is_contiguous or any(t.stride(-1) != 1 for t in tensors)
    # A 4-D cache may hold rows of other dimensions than k's, or be paged with one token in each block.
    return (
        is_contiguous
        and _row_bytes(k) == _row_bytes(k_cache)
        and _row_bytes(v) == _row_bytes(v_cache)
        and isinstance(indices, torch.Tensor)
        and indices.shape == k.shape[:1]
    )


def _has_contiguous_rows(value: torch.Tensor) -> bool:
    step = 1
    for size, stride in zip(reversed(value.shape[1:]), reversed(value.stride()[1:]), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def check(
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    indices: Any,
    row_bytes: Any,
    num_split: Any,
    skip_index: Any,
    k_scale: Any = None,
    v_scale: Any = None,
) -> Arguments | None:
    """Raise for what the bindings refuse. Return the arguments of STORE_HEADS if that serves the call."""
    heads = _as_heads(k, v, k_cache, v_cache, indices, row_bytes, num_split, skip_index, k_scale, v_scale)
    if heads is not None:
        return qknorm_rope_store.check(heads)
    for name, value in (("k_scale", k_scale), ("v_scale", v_scale)):
        if value is not None:
            raise ValueError(f"{name} must be None unless the caches are float8_e4m3fn, got {type(value).__name__}")
    tensors = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    row_bytes, num_split, _ = _check_types(k, v, k_cache, v_cache, indices, row_bytes, num_split, skip_index)
    _check_metadata(tensors, indices, row_bytes, num_split)
    checks.supported_device("k", k)
    for name, value in tensors.items():
        if value.is_conj():
            raise ValueError(f"{name} must not be a conjugate view, whose bytes are not its values: resolve_conj() it")
    alignment = _vector_bytes(k, v)
    rows = {name: _as_rows(name, value, alignment) for name, value in tensors.items()}
    checks.storage("indices", indices)
    checks.address("indices", indices, indices.element_size())
    if not indices.numel():
        return None
    for cache, others in (("k_cache", ("k", "v")), ("v_cache", ("k", "v", "k_cache"))):
        if not rows[cache].numel():
            raise ValueError(f"{cache} must have a slot to write to, got shape {list(tensors[cache].shape)}")
        checks.no_row_overlap(cache, rows[cache])
        checks.no_shared_memory(cache, rows[cache], "indices", indices)
        for other in others:
            checks.no_overlap(cache, rows[cache], other, rows[other], reject_identical=True)
    return None


def _check_types(
    k: Any, v: Any, k_cache: Any, v_cache: Any, indices: Any, row_bytes: Any, num_split: Any, skip_index: Any
) -> tuple[int, int, int | None]:
    """Raise for bad types, and return row_bytes, num_split and skip_index as Python's own numbers.

    torch's dispatcher would raise for bad types too, with messages that name no argument.
    """
    for name, value in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache), ("indices", indices)):
        checks.tensor(name, value)
    return (
        checks.integer("row_bytes", row_bytes),
        checks.integer("num_split", num_split),
        None if skip_index is None else checks.integer("skip_index", skip_index),
    )


def _check_metadata(tensors: dict[str, torch.Tensor], indices: torch.Tensor, row_bytes: int, num_split: int) -> None:
    """Raise for what is wrong with dtypes, shapes and devices; works on fake and meta tensors too."""
    k = tensors["k"]
    for name, value in tensors.items():
        checks.dtype(name, value, (k.dtype,))
        checks.device(name, value, "k", k)
        if value.dim() < 2:
            raise ValueError(f"{name} must have two dimensions or more, got shape {list(value.shape)}")
    checks.indices("indices", indices, "k", k)
    for name in ("k", "v"):
        if tensors[name].shape[0] != indices.shape[0]:
            raise ValueError(f"{name} must have {indices.shape[0]} rows like indices, got {tensors[name].shape[0]}")
        row, cache_row = _row_bytes(tensors[name]), _row_bytes(tensors[f"{name}_cache"])
        _check_row(name, row)
        if row != cache_row:
            raise ValueError(f"{name}_cache must have rows of {row} bytes like {name}, got {cache_row}")
    slots, v_slots = tensors["k_cache"].shape[0], tensors["v_cache"].shape[0]
    if slots != v_slots:
        raise ValueError(f"v_cache must have {slots} slots like k_cache, got {v_slots}")
    _check_settings(k, row_bytes, num_split)


def _check_settings(k: torch.Tensor, row_bytes: int, num_split: int) -> None:
    if row_bytes not in (0, _row_bytes(k)):
        raise ValueError(f"row_bytes must be 0 or {_row_bytes(k)}, the bytes in a row of k, got {row_bytes}")
    if num_split not in _NUM_SPLITS:
        raise ValueError(f"num_split must be {checks.enumeration(_NUM_SPLITS, 'or')}, got {num_split}")


def _check_row(name: str, row_bytes: int) -> None:
    if row_bytes % checks.MIN_ACCESS_BYTES or not 0 < row_bytes <= MAX_ROW_BYTES:
        raise RuntimeError(
            f"store_cache does not support rows of {row_bytes} bytes, as of {name}: "
            f"supported are multiples of {checks.MIN_ACCESS_BYTES} up to {checks.power_of_two(MAX_ROW_BYTES)}"
        )


def _row_bytes(value: torch.Tensor) -> int:
    return int(math.prod(value.shape[1:])) * value.itemsize


def _vector_bytes(k: torch.Tensor, v: torch.Tensor) -> int:
    return checks.vector_bytes(math.gcd(_row_bytes(k), _row_bytes(v)))


def _as_rows(name: str, value: torch.Tensor, alignment: int) -> torch.Tensor:
    """Return `value`, [rows, ...], as [rows, elements]. ValueError if it has no such view."""
    if not _has_contiguous_rows(value):
        layout = f"shape {list(value.shape)} and strides {list(value.stride())}"
        raise ValueError(f"{name} must be contiguous within a row, got {layout}")
    checks.storage(name, value)
    rows = value.as_strided((value.shape[0], math.prod(value.shape[1:])), (value.stride(0), 1))
    checks.rows(name, rows, alignment)
    return rows


def _call_torch_op(*arguments: Any) -> None:
    """Call the operator in torch.ops.jitnorm, for tracers."""
    *tensors, row_bytes, num_split, skip_index, k_scale, v_scale = arguments
    refuse_gradient(STORE_CACHE.op, *tensors)
    torch.ops.jitnorm.store_cache(
        *tensors, row_bytes=row_bytes, num_split=num_split, skip_index=skip_index, k_scale=k_scale, v_scale=v_scale
    )


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
    k_scale: Any = None,
    v_scale: Any = None,
) -> None:
    arguments = k, v, k_cache, v_cache, indices, row_bytes, num_split, skip_index
    is_quantised = k_scale is not None or v_scale is not None
    if check_indices or is_quantised or not STORE_CACHE.try_cached((k.dtype,), *arguments):
        _run_checked(check(*arguments, k_scale, v_scale), *arguments)
    increment_versions(k_cache, v_cache)


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
    k_scale: Any = None,
    v_scale: Any = None,
) -> None:
    heads = _as_heads(k, v, k_cache, v_cache, indices, row_bytes, num_split, skip_index, k_scale, v_scale)
    if heads is not None:
        qknorm_rope_store.check_metadata(heads)
        build_while_tracing(heads.operator, k, heads.variant)
        return
    tensors = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    _check_metadata(tensors, indices, row_bytes, num_split)
    build_while_tracing(STORE_CACHE, k, _vector_bytes(k, v))


register(
    "store_cache(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor indices, *, int row_bytes=0, "
    "int num_split=0, int? skip_index=None, Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
    _run,
    _fake,
)


def _arguments(shape: Shape) -> dict[str, Any]:
    slots = 2 * shape.rows
    return {
        "k": shape.randn(),
        "v": shape.randn(),
        "k_cache": shape.zeros(slots, shape.size),
        "v_cache": shape.zeros(slots, shape.size),
        "indices": torch.randperm(slots, device=shape.device)[: shape.rows],
    }


EXAMPLES[STORE_CACHE.op] = Example(
    store_cache,
    _arguments,
    written=("k_cache", "v_cache"),
    per_row=("k", "v", "indices"),
    slots="indices",
    sizes=(1024, 6),  # rows for accesses of 16 bytes, and of 8 or 4
)


def _head_arguments(shape: Shape) -> dict[str, Any]:
    blocks, block_size = 2 * shape.rows, 2
    new = {name: shape.randn(shape.rows, 1, shape.size) for name in ("k", "v")}
    caches = {f"{name}_cache": shape.zeros(blocks, block_size, 1, shape.size) for name in ("k", "v")}
    indices = torch.randperm(blocks * block_size, device=shape.device)[: shape.rows]
    return {**new, **caches, "indices": indices}


EXAMPLES[STORE_HEADS.op] = Example(
    store_cache,
    _head_arguments,
    written=("k_cache", "v_cache"),
    per_row=("k", "v", "indices"),
    slots="indices",
    slot_dims=2,
    sizes=EXAMPLE_SIZES,
)
