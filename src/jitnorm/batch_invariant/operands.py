"""Prepare and compare operands: what GEMMs, attention, reductions and their invariance checks share."""

from __future__ import annotations

import functools

import torch

from jitnorm.core.torch_library import needs_grad

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def require_eager(name: str, alternative: str, *tensors: object) -> None:
    """Raise RuntimeError if autograd or torch.compile would have to handle a call of the function `name`."""
    if needs_grad(*tensors):
        raise RuntimeError(f"{name} has no gradient: call {alternative} in the mode, or this under torch.no_grad()")
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{name} cannot be compiled: call {alternative} in the mode")


def contiguous_aligned(tensor: torch.Tensor, alignment: int = 64) -> torch.Tensor:
    """Return the tensor, or a copy, that is contiguous and begins at a multiple of `alignment` bytes.

    Newly allocated memory is always aligned to 64 bytes.
    """
    if not tensor.is_contiguous():
        return tensor.contiguous()
    return tensor if tensor.data_ptr() % alignment == 0 else tensor.clone()


def count_differing_elements(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return how many elements of two tensors of one dtype differ in a bit, as a tensor on their device.

    NaNs with the same bits are equal, and 0 and -0 differ. `b` is broadcast to the shape of `a`. The result stays on
    the device, so that a caller with many comparisons waits for the GPU once.
    """
    bits = _BITS[a.element_size()]
    return (a.view(bits) != b.view(bits)).sum()


def cancelling_operands(
    rows: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random `[rows, k]` and `[k, n]` whose matrix product is exactly zero, or 2^-22 if k is odd.

    A computed product is then nothing but the rounding errors of its additions, and another order of additions changes
    nearly every element.
    """
    half, odd = k // 2, k % 2
    randn = functools.partial(torch.randn, device=device, generator=generator)
    order = torch.randperm(2 * half, device=device, generator=generator)
    # Terms of many magnitudes: sums of terms of one magnitude may be exact, and would not show the order.
    magnitudes = torch.randint(-4, 5, (half,), device=device, generator=generator).exp2()
    a = (randn(rows, half) * magnitudes).to(dtype)
    b = randn(half, n).to(dtype)
    tiny = 2.0**-11  # the one term that an odd k leaves must not exceed the rounding errors
    a = torch.cat((torch.cat((a, a), 1)[:, order], a.new_full((rows, odd), tiny)), 1)
    b = torch.cat((torch.cat((b, -b))[order], b.new_full((odd, n), tiny)))
    return a, b
