"""FlashInfer as a backend: whether it is available, which calls it supports, and calling it."""

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
from jitnorm.core.torch_library import needs_dispatcher

# The operators, and the ranks that both of FlashInfer's implementations support (its CUDA one is the stricter).
RANKS = {
    "rmsnorm": (2, 3),
    "gemma_rmsnorm": (2,),
    "fused_add_rmsnorm": (2,),
    "gemma_fused_add_rmsnorm": (2,),
}
_MAX_HIDDEN_SIZE = 16384  # its fused kernels keep a row in shared memory, 4 bytes for an element
_MAX_ELEMENTS = 2**31  # its CUDA kernels index with 32 bits

_norm: Any = None  # flashinfer.norm
_unavailable_reason: str | None = None  # "" if FlashInfer is available, None before the first import
_lock = threading.RLock()


def unavailable_reason() -> str:
    """Return why FlashInfer cannot be used in this process, or "" if it can. The first call imports FlashInfer."""
    if _unavailable_reason is None:
        with _lock:
            if _unavailable_reason is None:
                _import_flashinfer()
    return _unavailable_reason or ""


def _import_flashinfer() -> None:
    global _norm, _unavailable_reason
    try:
        importlib.import_module("flashinfer")  # first, to distinguish an absent package from a broken one
        _norm = importlib.import_module("flashinfer.norm")
        for name in RANKS:  # a version before 0.6 may lack one, or its enable_pdl
            inspect.signature(getattr(_norm, name)).bind_partial(enable_pdl=None)
        _unavailable_reason = ""
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "flashinfer":
            _unavailable_reason = "FlashInfer is not installed"
        else:
            _disable(error)


def _disable(error: BaseException) -> None:
    """Treat FlashInfer as unavailable from now on, because of `error`, and warn once."""
    global _unavailable_reason
    with _lock:
        if _unavailable_reason:
            return
        text = " ".join(str(error).split())[:300]
        _unavailable_reason = f"FlashInfer is installed but does not work: {type(error).__name__}: {text}"
        warnings.warn(f"{_unavailable_reason}; jitnorm.dispatch uses the other backends", RuntimeWarning, stacklevel=2)


def unsupported_reason(op: str, input: torch.Tensor, weight: torch.Tensor, other: torch.Tensor | None) -> str:
    """Return which requirement of FlashInfer's this call does not meet, or "" if it meets all.

    The function lists what must be true, so that an unforeseen kind of call goes to another backend: FlashInfer's
    kernels check only the input's dtype, and no alignment (weights of another dtype gave NaN without an error:
    sgl-project/sglang#32807).

    Args:
        op: a key of `RANKS`.
        input: on CUDA, of a dtype that FlashInfer supports.
        weight: as in the call.
        other: the residual, or `out`.
    """
    if torch.is_grad_enabled() and (  # needs_grad, inlined because every call comes here
        input.requires_grad or weight.requires_grad or (other is not None and other.requires_grad)
    ):
        return "the call needs a gradient, and FlashInfer has none"
    if needs_dispatcher(input, weight, other):
        return "the tensors are traced, and FlashInfer requires tensors with storage"
    if input.get_device() != torch.cuda.current_device():  # its CuTe kernels are compiled for the current device
        return "FlashInfer requires inputs on the current CUDA device"
    if input.dim() not in RANKS[op]:
        return f"FlashInfer requires inputs of {' or '.join(map(str, RANKS[op]))} dimensions"
    hidden_size = input.size(-1)
    if not 0 < hidden_size <= _MAX_HIDDEN_SIZE:
        return f"FlashInfer supports hidden sizes up to {_MAX_HIDDEN_SIZE}"
    if not 0 < input.numel() < _MAX_ELEMENTS:
        return "FlashInfer supports inputs of at least one row and fewer than 2^31 elements"
    if not (weight.dtype == input.dtype and weight.device == input.device):
        return "FlashInfer requires weights of the input's dtype and device"
    if not (weight.dim() == 1 and weight.size(0) == hidden_size and weight.is_contiguous()):
        return "FlashInfer requires weights of one dimension, contiguous, of the hidden size"
    if weight.data_ptr() % 16:
        return "FlashInfer requires weights that are aligned to 16 bytes"
    if not _has_aligned_rows(input, hidden_size):
        return "FlashInfer requires inputs with rows of adjacent, aligned elements that do not overlap"
    if other is None:
        return ""
    if not (other.dtype == input.dtype and other.device == input.device and other.shape == input.shape):
        return f"FlashInfer requires {other_name(op)} to have the input's dtype, device and shape"
    if not _has_aligned_rows(other, hidden_size):
        return f"FlashInfer requires {other_name(op)} to have rows of adjacent, aligned elements that do not overlap"
    in_place = "fused" not in op and other.data_ptr() == input.data_ptr() and other.stride() == input.stride()
    if checks.extents_overlap(other, weight) or (checks.extents_overlap(other, input) and not in_place):
        return f"FlashInfer requires {other_name(op)} to share no memory with the other tensors"
    return ""


def other_name(op: str) -> str:
    """Return the name that `op` has for the tensor that it reads or writes besides `input` and `weight`."""
    return "residual" if "fused" in op else "gate" if "gated" in op else "out"


def _has_aligned_rows(tensor: torch.Tensor, hidden_size: int) -> bool:
    """Return whether rows are aligned for vectors of up to 16 bytes, and do not overlap.

    The address is aligned for the 128 bytes that FlashInfer's CuTe kernels assume as well.
    """
    if tensor.data_ptr() % max(16, math.gcd(128, 2 * hidden_size)):
        return False
    if tensor.is_contiguous():
        return True
    vector = math.gcd(8, hidden_size)
    return tensor.stride(-1) == 1 and all(
        size == 1 or (step >= hidden_size and step % vector == 0 and size * step < _MAX_ELEMENTS)
        for size, step in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    )


def call(
    operator: Callable[..., Any],
    *tensors: torch.Tensor,
    eps: float,
    enable_pdl: bool | None,
    **out: torch.Tensor | None,
) -> Any:
    """Call FlashInfer's function of the same name as `operator`.

    FlashInfer may be importable and still not work, because there is no compiler or because the driver is too old for
    its runtime (https://github.com/sgl-project/sglang/pull/30777): it fails before it launches anything. Then it is
    treated as unavailable, and `operator` selects another backend.

    Args:
        operator: a function of `jitnorm.dispatch`.
        tensors: its leading arguments, which meet all that `unsupported_reason` checks.
        eps: checked here.
        enable_pdl: checked here.
        out: the `out` of an operator that has one.

    Returns:
        What FlashInfer's function returns.

    Raises:
        TypeError, ValueError: eps or enable_pdl is not accepted.
        torch.OutOfMemoryError: FlashInfer could not allocate.
        RuntimeError: FlashInfer failed while a CUDA graph is being captured, or no other backend supports the call.
    """
    checks.eps(eps)
    checks.enable_pdl(enable_pdl)
    try:
        return getattr(_norm, operator.__name__)(*tensors, eps=eps, enable_pdl=enable_pdl, **out)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if torch.cuda.is_current_stream_capturing():
            raise  # FlashInfer may work outside a capture, and this capture is lost anyway
        _disable(error)
    return operator(*tensors, eps=eps, enable_pdl=enable_pdl, **out)
