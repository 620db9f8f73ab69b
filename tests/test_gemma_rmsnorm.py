"""gemma_rmsnorm against its definition in float64; what it shares with rmsnorm is tested there."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, TOLERANCE, relative_error, rmsnorm_reference, same_bits

from jitnorm import gemma_rmsnorm


@pytest.mark.parametrize("hidden_size", [64, 256, 512, 3328, 8192])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_definition(device, hidden_size, dtype):
    for weight_dtype in {dtype, torch.float32}:
        x = torch.randn(65, hidden_size, device=device).to(dtype)
        w = torch.randn(hidden_size, device=device).mul(0.1).to(weight_dtype)
        out = torch.full_like(x, float("nan"))
        assert gemma_rmsnorm(x, w, 1e-6, out) is out
        assert relative_error(out, rmsnorm_reference(x, w.double() + 1, 1e-6)) <= TOLERANCE[dtype]
        assert same_bits(gemma_rmsnorm(x, w), out)
        gemma_rmsnorm(x, w, out=x)
        assert same_bits(x, out)


def test_small_weights_are_not_lost(device):
    """In bfloat16, 1 + 2^-10 is 1; the sum is formed in float32, and a float32 output shows it."""
    x = torch.ones(2, 512, device=device)
    w = torch.full((512,), 2.0**-10, device=device)
    assert (gemma_rmsnorm(x, w, 0.0) == 1 + 2.0**-10).all()


def test_unsupported_sizes_are_named():
    with pytest.raises(RuntimeError, match="gemma_rmsnorm does not support hidden_size 300"):
        gemma_rmsnorm(torch.randn(2, 300), torch.randn(300))
