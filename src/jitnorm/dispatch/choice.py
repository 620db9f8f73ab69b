"""The choice of a backend for one call, and the reason for it in words: written once, for all four operators."""

from __future__ import annotations

import torch
import torch.fx

from jitnorm.core import checks, norms
from jitnorm.dispatch import flashinfer_backend
from jitnorm.dispatch.wanted import wanted

# norms.is_supported_hidden_size as a set: a third of the time, and dynamo can look up a symbolic size in it.
_KERNEL_SIZES = frozenset((*norms._WARP_HIDDEN_SIZES, *norms._BLOCK_HIDDEN_SIZES))
# For torch.fx.symbolic_trace, which records the call: its graph chooses when it runs.
TRACED = "torch.fx", "torch.fx is tracing"
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def explain(op: str, input: torch.Tensor, weight: torch.Tensor, other: torch.Tensor | None = None) -> tuple[str, str]:
    """Which backend serves a call of `op` here and now, and why: "flashinfer", "jit" or "torch", and words.

    Args:
        op: "rmsnorm", "gemma_rmsnorm", "fused_add_rmsnorm" or "gemma_fused_add_rmsnorm".
        input: as in the call. Nothing is written, built or launched; FlashInfer is imported if it matters.
        weight: as in the call.
        other: the residual of a fused operator; the `out` of others, if it is given.

    Raises:
        RuntimeError: the backend that was asked for cannot serve this call.
        ValueError: there is no operator `op`, or JITNORM_BACKEND names no backend.
        TypeError: an argument is not a tensor.
    """
    if op not in flashinfer_backend.RANKS:
        raise ValueError(f"op must be one of {', '.join(flashinfer_backend.RANKS)}, got {op!r}")
    return choose(op, input, weight, other)


def choose(op: str, input: torch.Tensor, weight: torch.Tensor, other: torch.Tensor | None) -> tuple[str, str]:
    """`explain`, on the way of every call: all that FlashInfer needs, then what is left where something is missing."""
    name = wanted()
    try:
        if name != "auto" and (without_flashinfer := _without_flashinfer(name, op, input, weight, other)):
            return without_flashinfer
        if not input.is_cuda:
            why = "the input is not on CUDA"
        elif _is_dynamo_compiling():
            why = "torch.compile is tracing"
        elif input.dtype not in (torch.float16, torch.bfloat16):
            why = "the input is neither float16 nor bfloat16"
        else:
            why = flashinfer_backend.absence() or flashinfer_backend.refusal(op, input, weight, other)
        if not why:
            return "flashinfer", "float16 or bfloat16 on CUDA, and FlashInfer is there"
        if name == "flashinfer":
            raise _cannot_serve(name, op, why)
        if input.shape[-1] in _KERNEL_SIZES:
            return "jit", why
        return "torch", f"{why}, and {_no_kernel(input)}"
    except torch.fx.proxy.TraceError:
        return TRACED
    except (AttributeError, IndexError):
        _check_tensors(input, weight, other)
        raise


def _without_flashinfer(
    name: str, op: str, input: torch.Tensor, weight: torch.Tensor, other: torch.Tensor | None
) -> tuple[str, str] | None:
    """What `name` settles whatever FlashInfer could do; None where it matters."""
    if isinstance(input, torch.fx.Proxy):
        return TRACED
    if name == "torch":
        return name, "it was asked for"
    if name == "jit":
        if input.shape[-1] not in _KERNEL_SIZES:
            raise _cannot_serve(name, op, _no_kernel(input))
        return name, "it was asked for"
    if name == "auto-fast" and _kernel_takes(input, weight, other):
        return "jit", "auto-fast was asked for, and jitnorm has a kernel"
    return None


def _cannot_serve(name: str, op: str, why: str) -> RuntimeError:
    return RuntimeError(f"the backend {name} was asked for and cannot serve this call of {op}: {why}")


def _kernel_takes(input: torch.Tensor, weight: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Whether jitnorm serves what another backend may serve too: its kernels want one stride from row to row."""
    return (
        input.shape[-1] in _KERNEL_SIZES
        and weight.dtype in (input.dtype, torch.float32)
        and _has_rows(input)
        and (other is None or _has_rows(other))
    )


def _has_rows(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.stride(-1) == 1 and checks.row_stride(tensor) is not None)


def _no_kernel(input: torch.Tensor) -> str:
    return f"jitnorm has no kernel for hidden size {input.shape[-1]}"


def _check_tensors(input: object, weight: object, other: object) -> None:
    checks.tensor("input", input)
    checks.tensor("weight", weight)
    if other is not None:
        checks.tensor("residual or out", other)
    if isinstance(input, torch.Tensor) and input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a scalar")
