"""New keys and values into the cache of a decoder: `k_cache[indices] = k` and `v_cache[indices] = v`, in one launch."""

from __future__ import annotations

import torch

from jitnorm import store_cache_ops
from jitnorm.store_cache_ops import STORE_CACHE, dispatch_store_cache, first_store_cache

_kernels = STORE_CACHE.kernels
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
) -> None:
    """Writes row i of k and v into slot `indices[i]` of their caches: `k_cache[indices] = k; v_cache[indices] = v`.

    Bytes are moved as they are. One kernel serves every dtype and width that is a multiple of 16 bytes, one those of 8
    and one those of 4. An index that is no slot's is undefined behaviour, as is anything it overwrites, unless
    `JITNORM_CHECK_INDICES=1` was set when jitnorm was imported; where an index comes twice, which row's bytes are left,
    or a mixture of both, is not defined.

    Args:
        k: `[num_tokens, ...]`, of any dtype but PyTorch's quantised ones, on the CPU or a CUDA device; contiguous
            within a row, with any stride from row to row, as of a slice of fused QKV. No conjugate view, like those
            below. A row is a multiple of 4 bytes; on CUDA rows are aligned to 16 bytes where those of k and v both are
            multiples of 16, and else to 8 or 4.
        v: `[num_tokens, ...]`, likewise, of k's dtype and device; its rows may have another width.
        k_cache: `[num_slots, ...]`, written; of k's dtype and device, its rows of as many bytes as k's, with any stride
            that keeps them apart. Shares no memory with any other argument.
        v_cache: `[num_slots, ...]`, written; likewise, for v.
        indices: `[num_tokens]`, int32 or int64, contiguous, on k's device.
        row_bytes: the bytes in a row of k, or 0 for what k has; anything else is refused.
        num_split: how many warps of a block share a row on CUDA: 1, 2 or 4, or 0 for as many as suit its width. The
            bytes are the same.
        skip_index: rows of this index are not written, such as the padding of a graph's batch.

    Raises:
        TypeError: an argument is not a tensor or not an int, or of another dtype.
        ValueError: a shape, stride, device, alignment or overlap that is not accepted, or a bad row_bytes or num_split.
        IndexError: with `JITNORM_CHECK_INDICES=1`, for an index that is no slot's: nothing is written then. Every call
            outside a graph's capture looks for one, and waits for the GPU to do so.
        RuntimeError: the width is not supported (nothing is built then), a tensor needs a gradient, or the kernel
            cannot be built or launched.
    """
    arguments = k, v, k_cache, v_cache, indices, row_bytes, num_split, skip_index
    if _is_dynamo_compiling():
        return dispatch_store_cache(*arguments)
    try:
        if (
            not store_cache_ops.check_indices
            and k.__class__ is v.__class__ is k_cache.__class__ is v_cache.__class__ is indices.__class__ is _Tensor
            and (
                not (k.requires_grad or v.requires_grad or k_cache.requires_grad or v_cache.requires_grad)
                or not torch.is_grad_enabled()
            )
            and not _kernels[k.dtype](*arguments)
        ):
            return None
    except Exception:  # no kernel yet, or arguments that have no such attributes: the way below says what it was
        pass
    return first_store_cache(*arguments)
