"""FlashInfer where it serves, this package's kernels elsewhere, PyTorch for the sizes that neither takes.

The four functions have sgl_kernel's names and signatures, and choose at each call:

1. FlashInfer, if it is importable, the input is float16 or bfloat16 and on CUDA, torch.compile is not tracing, the call
   needs no gradient, and FlashInfer can take it: the current device, weights of the input's dtype (others it would
   misread in silence), 2 dimensions (for rmsnorm 2 or 3), rows that its vectors can reach, a hidden size up to 16384.
2. This package's kernels, if they serve the hidden size (see `jitnorm.rmsnorm`).
3. PyTorch's rms_norm in float32, so that any other hidden size works too.

FlashInfer is imported when the first call asks for it. One that does not work, whether it says so at its import or when
it is called, counts as absent from then on; one warning says why. `explain` and `jitnorm doctor` say what is chosen
and why.

`backend(name)` for a `with` block, or JITNORM_BACKEND, read once at the first call, overrides this:

- "auto": the rule above, and the default.
- "auto-fast": this package's kernels wherever they can serve, else as "auto". On an H200 with bfloat16 they were faster
  than both of FlashInfer's implementations in all 25 rows of benchmarks/results/rmsnorm_h200.json, by 1% in the
  closest, and in 5 of 6 of fused_add_rmsnorm_h200.json, where one took 0.7% longer.
- "jit", "flashinfer", "torch": that one, and RuntimeError where it cannot serve.

A compiled graph keeps the backend it was traced with, which is never FlashInfer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx

from jitnorm.dispatch import flashinfer_backend, torch_backend
from jitnorm.dispatch.choice import choose as _choose
from jitnorm.dispatch.choice import explain
from jitnorm.dispatch.wanted import BACKENDS, backend
from jitnorm.fused_add_rmsnorm import fused_add_rmsnorm as _jit_fused_add_rmsnorm
from jitnorm.fused_add_rmsnorm import gemma_fused_add_rmsnorm as _jit_gemma_fused_add_rmsnorm
from jitnorm.rmsnorm import gemma_rmsnorm as _jit_gemma_rmsnorm
from jitnorm.rmsnorm import rmsnorm as _jit_rmsnorm

__all__ = [
    "BACKENDS",
    "backend",
    "explain",
    "fused_add_rmsnorm",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "rmsnorm",
]


def rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """`out = input / sqrt(mean(input^2) + eps) * weight` over the last dimension, by whatever backend serves the call.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, of any hidden size. Its strides are as
            `jitnorm.rmsnorm` takes them, if its kernels serve the size and FlashInfer does not.
        weight: `[hidden_size]`, of the input's dtype or float32, on the same device.
        eps: added to the mean of the squares; zero or more.
        out: written; of the input's shape, dtype and device; may be the input itself. Allocated where None. Has no
            gradient.
        enable_pdl: programmatic dependent launch; None leaves it to the backend. PyTorch has none.

    Returns:
        `out`.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: a shape, stride, device, alignment or overlap that is not accepted, a bad eps, or a JITNORM_BACKEND
            that does not exist.
        RuntimeError: the backend that was asked for cannot serve this call; a kernel cannot be built or launched; or
            out was given to a call that needs a gradient.
    """
    name, _ = _choose("rmsnorm", input, weight, out)
    if name == "jit":
        return _jit_rmsnorm(input, weight, eps, out, enable_pdl)
    if name == "torch":
        return torch_backend.rmsnorm("rmsnorm", 0.0, input, weight, eps, out, enable_pdl)
    if name == "torch.fx":
        return _record(rmsnorm, input, weight, eps, out, enable_pdl)  # type: ignore[no-any-return]
    result: torch.Tensor = flashinfer_backend.call(rmsnorm, input, weight, eps=eps, out=out, enable_pdl=enable_pdl)
    return result


def gemma_rmsnorm(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> torch.Tensor:
    """`out = input / sqrt(mean(input^2) + eps) * (1 + weight)`, the 1 added in float32; otherwise as `rmsnorm`.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, of any hidden size.
        weight: `[hidden_size]`, of the input's dtype or float32, on the same device.
        eps: added to the mean of the squares; zero or more.
        out: written; like the input, and may be the input itself. Allocated where None. Has no gradient.
        enable_pdl: programmatic dependent launch; None leaves it to the backend.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as `rmsnorm`.
    """
    name, _ = _choose("gemma_rmsnorm", input, weight, out)
    if name == "jit":
        return _jit_gemma_rmsnorm(input, weight, eps, out, enable_pdl)
    if name == "torch":
        return torch_backend.rmsnorm("gemma_rmsnorm", 1.0, input, weight, eps, out, enable_pdl)
    if name == "torch.fx":
        return _record(gemma_rmsnorm, input, weight, eps, out, enable_pdl)  # type: ignore[no-any-return]
    result: torch.Tensor = flashinfer_backend.call(
        gemma_rmsnorm, input, weight, eps=eps, out=out, enable_pdl=enable_pdl
    )
    return result


def fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """`residual += input; input = rmsnorm(residual) * weight`, both in place; the float32 sum is what is normalised.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, of any hidden size; written.
        residual: of the input's shape, dtype and device, sharing no memory with it; written.
        weight: `[hidden_size]`, of the input's dtype or float32, on the same device.
        eps: added to the mean of the squares; zero or more.
        enable_pdl: programmatic dependent launch; None leaves it to the backend.

    Raises:
        TypeError, ValueError, RuntimeError: as `rmsnorm`; RuntimeError too where a leaf that requires grad would be
            written.
    """
    name, _ = _choose("fused_add_rmsnorm", input, weight, residual)
    if name == "jit":
        return _jit_fused_add_rmsnorm(input, residual, weight, eps, enable_pdl)
    if name == "torch":
        return torch_backend.fused_add_rmsnorm("fused_add_rmsnorm", 0.0, input, residual, weight, eps, enable_pdl)
    if name == "torch.fx":
        return _record(fused_add_rmsnorm, input, residual, weight, eps, enable_pdl)  # type: ignore[no-any-return]
    flashinfer_backend.call(fused_add_rmsnorm, input, residual, weight, eps=eps, enable_pdl=enable_pdl)
    return None


def gemma_fused_add_rmsnorm(
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    enable_pdl: bool | None = None,
) -> None:
    """`residual += input; input = rmsnorm(residual) * (1 + weight)`, both in place; otherwise as `fused_add_rmsnorm`.

    Args:
        input: `[..., hidden_size]`, float16, bfloat16 or float32, of any hidden size; written.
        residual: of the input's shape, dtype and device, sharing no memory with it; written.
        weight: `[hidden_size]`, of the input's dtype or float32, on the same device.
        eps: added to the mean of the squares; zero or more.
        enable_pdl: programmatic dependent launch; None leaves it to the backend.

    Raises:
        TypeError, ValueError, RuntimeError: as `fused_add_rmsnorm`.
    """
    name, _ = _choose("gemma_fused_add_rmsnorm", input, weight, residual)
    if name == "jit":
        return _jit_gemma_fused_add_rmsnorm(input, residual, weight, eps, enable_pdl)
    if name == "torch":
        return torch_backend.fused_add_rmsnorm("gemma_fused_add_rmsnorm", 1.0, input, residual, weight, eps, enable_pdl)
    if name == "torch.fx":
        return _record(gemma_fused_add_rmsnorm, input, residual, weight, eps, enable_pdl)  # type: ignore[no-any-return]
    flashinfer_backend.call(gemma_fused_add_rmsnorm, input, residual, weight, eps=eps, enable_pdl=enable_pdl)
    return None


def _record(operator: Callable[..., Any], *arguments: Any) -> Any:
    """A call that torch.fx.symbolic_trace finds in its graph."""
    return torch.overrides.handle_torch_function(operator, arguments[:1], *arguments)


# Their calls stay in a graph of torch.fx though nothing uses what they return.
torch.fx.node.has_side_effect(fused_add_rmsnorm)
torch.fx.node.has_side_effect(gemma_fused_add_rmsnorm)
