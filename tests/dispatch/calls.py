"""Calls of the operators of `jitnorm.dispatch`, and what they must compute.

These tests need neither FlashInfer nor a GPU: a fake module records FlashInfer's calls, and tensors on the CPU claim to
be on CUDA. test_flashinfer_gpu.py tests with the real ones.
"""

from __future__ import annotations

import torch
from helpers import relative_error, rmsnorm_reference, same_bits

from jitnorm import dispatch

OPS = ("rmsnorm", "gemma_rmsnorm", "fused_add_rmsnorm", "gemma_fused_add_rmsnorm")
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-6}
ROWS = 7


class OnCuda(torch.Tensor):
    """A tensor on the CPU that claims to be on CUDA: the selection believes it, and kernels can still compute it."""

    is_cuda = True


def on_cuda(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy, aligned as torch's allocator for CUDA aligns."""
    room = torch.empty(tensor.numel() + 256, dtype=tensor.dtype)
    start = -room.data_ptr() % 256 // room.element_size()
    return room[start : start + tensor.numel()].view(tensor.shape).copy_(tensor).as_subclass(OnCuda)


def reference(op, x, residual, weight, eps=1e-6):
    """Return the normalised tensor, and the sum or None, in float64."""
    total = x.double() + residual.double() if "fused" in op else None
    factor = weight.double() + (1 if "gemma" in op else 0)
    return rmsnorm_reference(x if total is None else total, factor, eps), total


def inputs(hidden_size=256, dtype=torch.bfloat16, shape=(ROWS,), weight_dtype=None):
    """Return an input, a residual and a weight."""
    x, residual = (torch.randn(*shape, hidden_size).to(dtype) for _ in range(2))
    weight = torch.randn(hidden_size).to(weight_dtype or dtype)
    # Gemma's operators multiply a weight of -1 to zeros, and at size 1 there would be nothing to compare.
    return x, residual, weight.masked_fill(weight == -1, 1)


def cuda_inputs(*arguments, **keywords):
    """Return what `inputs` returns, claiming to be on CUDA."""
    return tuple(map(on_cuda, inputs(*arguments, **keywords)))


def run(op, x, residual, weight, eps=1e-6, enable_pdl=None):
    """Call an operator on copies of what it overwrites; return the normalised tensor, and the sum or None."""
    function = getattr(dispatch, op)
    if "fused" not in op:
        return function(x, weight, eps, enable_pdl=enable_pdl), None
    x, residual = (on_cuda(t) if isinstance(t, OnCuda) else t.clone() for t in (x, residual))
    assert function(x, residual, weight, eps, enable_pdl) is None
    return x, residual


def check(op, x, residual, weight, eps=1e-6):
    """Assert that a call is right, and does not write what it must not write."""
    before = x.clone(), weight.clone()
    normalised, total = run(op, x, residual, weight, eps)
    expected, expected_total = reference(op, *(t.as_subclass(torch.Tensor) for t in (x, residual, weight)), eps)
    assert normalised.dtype == x.dtype and normalised.shape == x.shape
    assert relative_error(normalised, expected) < TOLERANCE[x.dtype]
    if total is not None:
        assert torch.equal(total, expected_total.to(x.dtype))
    assert same_bits(x, before[0]) and same_bits(weight, before[1])


def explained(op="rmsnorm", input=None, weight=None, other=None, **keywords):
    """Explain a call that FlashInfer supports, but for the given tensors; `keywords` are those of `inputs`."""
    x, residual, w = cuda_inputs(**keywords)
    input, weight = x if input is None else input, w if weight is None else weight
    if "fused" in op and other is None:
        other = residual
    return dispatch.explain(op, input, weight, other)
