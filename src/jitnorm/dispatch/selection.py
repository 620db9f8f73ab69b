"""Select the backend of a call: what the user requested, the automatic rule, and the reason for the result."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar

import torch
import torch.fx

from jitnorm.core import checks
from jitnorm.core.eligibility import has_general_layout
from jitnorm.core.norms import MAX_HIDDEN_SIZE
from jitnorm.core.operators import DTYPES
from jitnorm.core.torch_library import mark_constant
from jitnorm.dispatch import flashinfer_backend
from jitnorm.dispatch.torch_backend import FLOATS

BACKENDS = ("auto", "auto-fast", "jit", "flashinfer", "torch")
VARIABLE = "JITNORM_BACKEND"
OPS = (*flashinfer_backend.RANKS, "gated_rmsnorm", "layernorm")

# torch.fx.symbolic_trace records the call, and its graph selects the backend when it runs.
_RECORDED = "torch.fx", "torch.fx is tracing"
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling

_override: ContextVar[str | None] = ContextVar("jitnorm_dispatch_backend", default=None)


def backend(name: str) -> AbstractContextManager[None]:
    """Override JITNORM_BACKEND in a `with` block, for this thread's (or asyncio task's) calls.

    Blocks nest, and leaving one, by an exception too, restores the outer one. A thread started inside a block
    has a setting of its own. Enter a block around a compiled function, not inside one: a compiled graph keeps the
    backend with which it was traced.

    Args:
        name: "auto", "auto-fast", "jit", "flashinfer" or "torch"; see `jitnorm.dispatch`.

    Returns:
        The context manager.

    Raises:
        ValueError: there is no such backend.
    """
    return _overridden(_check_name(name, "backend"))


@contextlib.contextmanager
def _overridden(name: str) -> Iterator[None]:
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def requested_backend() -> str:
    """Return the name that `backend` or JITNORM_BACKEND sets for a call made now, or "auto".

    Raises:
        ValueError: JITNORM_BACKEND names no backend.
    """
    return _override.get() or _backend_from_environment()


mark_constant(requested_backend)


@functools.cache  # reading the environment costs more than all the rest of a selection
def _backend_from_environment() -> str:
    return _check_name(os.environ.get(VARIABLE) or "auto", VARIABLE)


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def explain(
    op: str,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    other: torch.Tensor | None = None,
    *,
    group_size: int | None = None,
    **forms: object,
) -> tuple[str, str]:
    """Return which backend a call of `op` would use now, and why.

    Nothing is written, built or launched; FlashInfer is imported if the answer depends on it.

    Args:
        op: "rmsnorm", "gemma_rmsnorm", "fused_add_rmsnorm", "gemma_fused_add_rmsnorm", "gated_rmsnorm" or
            "layernorm".
        input: as in the call.
        weight: as in the call.
        other: the residual of a fused operator, or the gate; `out` of the others, if it is given.
        group_size: of gated_rmsnorm, as in the call.
        forms: `bias`, `rounding` and `return_rstd`, or `return_stats`, as in the call.

    Returns:
        "flashinfer", "jit" or "torch", and the reason in words.

    Raises:
        RuntimeError: the requested backend does not support this call.
        ValueError: there is no operator `op`, it takes no group_size, or JITNORM_BACKEND names no backend.
        TypeError: an argument is not a tensor, or its dtype is not accepted.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    if group_size is not None and op != "gated_rmsnorm":
        raise ValueError(f"group_size must be None for {op}, got {group_size!r}: only gated_rmsnorm takes it")
    _check_tensors(op, input, weight, other)
    checks.dtype("input", input, FLOATS)
    if weight is not None:
        checks.dtype("weight", weight, FLOATS)
    plain = op in flashinfer_backend.RANKS and is_plain(weight, **forms)  # type: ignore[arg-type]
    return select_backend(op, input, weight, other, plain, group_size)


def is_plain(
    weight: torch.Tensor | None, bias: torch.Tensor | None = None, rounding: str = "once", return_rstd: bool = False
) -> bool:
    """Return whether a call has the form that all backends have."""
    return weight is not None and bias is None and rounding == "once" and not return_rstd


def select_backend(
    op: str,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    other: torch.Tensor | None,
    is_plain: bool,
    group_size: object = None,
) -> tuple[str, str]:
    """Do what `explain` documents, for an `op` that exists; every call of an operator begins with this.

    Args:
        op: as `explain`.
        input: as `explain`.
        weight: as `explain`.
        other: as `explain`.
        is_plain: what the function of this name returns.
        group_size: how many elements of a row are normalised together; None for all of them.

    Returns:
        As `explain`, or "torch.fx" for a call that torch.fx.symbolic_trace is to record.
    """
    name = requested_backend()
    try:
        if name != "auto" and (selection := _select_without_flashinfer(name, op, input, weight, other, group_size)):
            return selection
        if not input.is_cuda:
            reason = "the input is not on CUDA"
        elif _is_dynamo_compiling():
            reason = "torch.compile is tracing"
        elif input.dtype not in (torch.float16, torch.bfloat16):
            reason = "the input is neither float16 nor bfloat16"
        elif op not in flashinfer_backend.RANKS:
            reason = f"jitnorm.dispatch calls no {op} of FlashInfer"
        elif weight is None or not is_plain:
            reason = "FlashInfer has neither norms without a weight nor bias, rstd or another rounding"
        else:
            reason = flashinfer_backend.unavailable_reason() or flashinfer_backend.unsupported_reason(
                op, input, weight, other
            )
        if not reason:
            return "flashinfer", "the input is float16 or bfloat16 on CUDA, and FlashInfer is available"
        if name == "flashinfer":
            raise _unsupported(name, op, reason)
        if lacking := _missing_kernel(input, weight, other, group_size):
            return "torch", f"{reason}, and {lacking}"
        return "jit", reason
    except torch.fx.proxy.TraceError:
        return _RECORDED
    except (AttributeError, IndexError):
        _check_tensors(op, input, weight, other)
        raise


def _select_without_flashinfer(
    name: str,
    op: str,
    input: torch.Tensor,
    weight: torch.Tensor | None,
    other: torch.Tensor | None,
    group_size: object,
) -> tuple[str, str] | None:
    """Return what `select_backend` returns where that does not depend on FlashInfer, or else None."""
    if isinstance(input, torch.fx.Proxy):
        return _RECORDED
    if name == "torch":
        return name, "it was requested"
    if name == "jit":
        if lacking := _missing_kernel(input, weight, other, group_size):
            raise _unsupported(name, op, lacking)
        return name, "it was requested"
    if name == "auto-fast" and not _missing_kernel(input, weight, other, group_size):
        return "jit", "auto-fast was requested, and jitnorm has a kernel"
    return None


def _unsupported(name: str, op: str, reason: str) -> RuntimeError:
    return RuntimeError(
        f"the backend {name} was requested and does not support this call of {op}: {reason}; "
        "request auto to have a supported backend selected"
    )


def _missing_kernel(
    input: torch.Tensor, weight: torch.Tensor | None, other: torch.Tensor | None, group_size: object
) -> str:
    """Return why no kernel of this package takes the call, or nothing."""
    size: object = input.shape[-1]
    what = "hidden size"
    if group_size is not None and size:
        size, what = group_size, "group size"
    # The operator raises for a group size that is no number, too small, or does not divide the row.
    if not input.shape[-1] or (isinstance(size, int) and size > MAX_HIDDEN_SIZE):
        return f"jitnorm has no kernel for {what} {size}"
    if input.dtype not in DTYPES or (weight is not None and weight.dtype not in DTYPES):
        return f"jitnorm has kernels for {checks.enumeration(DTYPES)} alone"
    if input.device.type not in ("cpu", "cuda", "meta"):
        return f"jitnorm has no kernel for {input.device.type}"
    are_accepted = (
        has_general_layout(input)
        and (other is None or has_general_layout(other))
        and (weight is None or has_general_layout(weight))
    )
    if not are_accepted:
        return "jitnorm's kernels need adjacent elements, and rows under at most three strides"
    return ""


def _check_tensors(op: str, input: object, weight: object, other: object) -> None:
    """Raise for an argument that is not a tensor, or has no last dimension."""
    checks.tensor("input", input)
    if weight is not None:
        checks.tensor("weight", weight)
    if other is not None:
        checks.tensor(flashinfer_backend.other_name(op), other)
    if isinstance(input, torch.Tensor) and input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a scalar")
