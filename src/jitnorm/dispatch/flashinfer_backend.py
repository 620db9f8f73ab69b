"""FlashInfer: whether it is here and works, which calls it can take, and calling it."""

from __future__ import annotations

import importlib
import inspect
import math
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from jitnorm.core import checks
from jitnorm.core.torch_library import is_traced

# The operators, and the ranks that both of FlashInfer's implementations take (its CUDA one is the stricter).
RANKS = {
    "rmsnorm": (2, 3),
    "gemma_rmsnorm": (2,),
    "fused_add_rmsnorm": (2,),
    "gemma_fused_add_rmsnorm": (2,),
}
_LARGEST_HIDDEN_SIZE = 16384  # its fused kernels keep a row in shared memory, 4 bytes for an element
_ELEMENTS = 2**31  # its CUDA kernels index with 32 bits

_norm: Any = None  # flashinfer.norm
_absence: str | None = None  # why there is none: "" if there is, None before anyone asked
_lock = threading.RLock()


def absence() -> str:
    """Why FlashInfer cannot be used here; "" where it can. Imports it the first time."""
    if _absence is None:
        with _lock:
            if _absence is None:
                _look()
    return _absence or ""


def _look() -> None:
    global _norm, _absence
    try:
        importlib.import_module("flashinfer")  # by itself first, so that an error tells absent from broken
        _norm = importlib.import_module("flashinfer.norm")
        for name in RANKS:  # a version before 0.6 may lack one, or its enable_pdl
            inspect.signature(getattr(_norm, name)).bind_partial(enable_pdl=None)
        _absence = ""
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "flashinfer":
            _absence = "FlashInfer is not installed"
        else:
            _give_up(error)


def _give_up(error: BaseException) -> None:
    """From now on FlashInfer counts as absent, because of `error`; a warning says so once."""
    global _absence
    with _lock:
        if _absence:
            return
        _absence = f"FlashInfer is installed but does not work: {type(error).__name__}: {_one_line(error)}"
        warnings.warn(f"{_absence}; jitnorm.dispatch goes on without it", RuntimeWarning, stacklevel=2)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def refusal(op: str, input: torch.Tensor, weight: torch.Tensor, other: torch.Tensor | None) -> str:
    """What FlashInfer needs and this call of `op` has not; "" where it has everything.

    `input` is on CUDA and of a dtype that FlashInfer takes; `other` is the residual, or out. Each condition is one that
    has to hold, so that a call of a kind that nobody thought of goes elsewhere: FlashInfer's kernels look at no dtype
    but the input's, and at no alignment (weights of another dtype gave NaN in silence: sgl-project/sglang#32807).
    """
    if torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (other is not None and other.requires_grad)
    ):
        return "the call needs a gradient, and FlashInfer has none"
    if is_traced(input, weight, other):
        return "the tensors are traced, and FlashInfer takes only those with storage"
    if input.get_device() != torch.cuda.current_device():  # its CuTe kernels are compiled for that one
        return "FlashInfer takes inputs on the current CUDA device"
    if input.dim() not in RANKS[op]:
        return f"FlashInfer takes inputs of {' or '.join(map(str, RANKS[op]))} dimensions"
    hidden_size = input.size(-1)
    if not 0 < hidden_size <= _LARGEST_HIDDEN_SIZE:
        return f"FlashInfer takes hidden sizes up to {_LARGEST_HIDDEN_SIZE}"
    if not 0 < input.numel() < _ELEMENTS:
        return "FlashInfer takes at least one row and fewer than 2^31 elements"
    if not (weight.dtype == input.dtype and weight.device == input.device):
        return "FlashInfer takes weights of the input's dtype and device"
    if not (weight.dim() == 1 and weight.size(0) == hidden_size and weight.is_contiguous()):
        return "FlashInfer takes weights of one dimension, contiguous, of the hidden size"
    if weight.data_ptr() % 16:
        return "FlashInfer takes weights that are aligned to 16 bytes"
    if not _has_aligned_rows(input, hidden_size):
        return "FlashInfer takes inputs with rows of adjacent, aligned elements that do not overlap"
    if other is None:
        return ""
    if not (other.dtype == input.dtype and other.device == input.device and other.shape == input.shape):
        return "FlashInfer takes a residual or out of the input's dtype, device and shape"
    if not _has_aligned_rows(other, hidden_size):
        return "FlashInfer takes a residual or out with rows of adjacent, aligned elements that do not overlap"
    in_place = "fused" not in op and other.data_ptr() == input.data_ptr() and other.stride() == input.stride()
    if checks.extents_meet(other, weight) or (checks.extents_meet(other, input) and not in_place):
        return "FlashInfer takes a residual or out that shares no memory with the other tensors"
    return ""


def _has_aligned_rows(rows: torch.Tensor, hidden_size: int) -> bool:
    """For vectors of up to 16 bytes, and for the 128 that FlashInfer's CuTe kernels take for granted."""
    if rows.data_ptr() % max(16, math.gcd(128, 2 * hidden_size)):
        return False
    if rows.is_contiguous():
        return True
    vector = math.gcd(8, hidden_size)
    return rows.stride(-1) == 1 and all(
        size == 1 or (step >= hidden_size and step % vector == 0 and size * step < _ELEMENTS)
        for size, step in zip(rows.shape[:-1], rows.stride()[:-1], strict=True)
    )


def call(
    ours: Callable[..., Any],
    *tensors: torch.Tensor,
    eps: float,
    enable_pdl: bool | None,
    **out: torch.Tensor | None,
) -> Any:
    """FlashInfer's function of the same name as `ours`, on a call that `refusal` has nothing against.

    One that imports may still not work, for lack of a compiler or with a driver that is too old for its runtime
    (https://github.com/sgl-project/sglang/pull/30777): it fails before it launches anything. Then it counts as absent,
    and `ours` decides again.
    """
    checks.eps(eps)
    checks.enable_pdl(enable_pdl)
    try:
        return getattr(_norm, ours.__name__)(*tensors, eps=eps, enable_pdl=enable_pdl, **out)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if torch.cuda.is_current_stream_capturing():
            raise  # what a capture forbids is no fault of FlashInfer's, and the capture is lost anyway
        _give_up(error)
    return ours(*tensors, eps=eps, enable_pdl=enable_pdl, **out)
