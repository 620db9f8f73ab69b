"""What tests of several modules use: the dtypes, a reference of the norm, and comparisons."""

from __future__ import annotations

import pytest
import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Relative, over a whole tensor: one rounding to the dtype, and float32's own on the way.
TOLERANCE = {torch.float16: 4e-4, torch.bfloat16: 3e-3, torch.float32: 1e-6}
# Dtypes of an input and its weight.
WEIGHTS = [(d, d) for d in DTYPES] + [(torch.float16, torch.float32), (torch.bfloat16, torch.float32)]


def rmsnorm_reference(input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """In float64, from the definition."""
    x = input.double()
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight.double()


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over norm of the reference; NaN where a NaN is in either."""
    return float((out.double() - reference).norm() / reference.norm())


def assert_refused(calls, name: str) -> None:
    """Of `calls`, (name, exception, words that the message holds, a call), the one of that name is, in one line."""
    _, kind, words, call = next(c for c in calls if c[0] == name)
    with pytest.raises(kind, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def compiled(function, dynamic: bool = True):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = torch.atleast_1d(a, b)
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
