"""What holds for every operator of the package."""

from __future__ import annotations

import pytest
import torch

import jitnorm
from jitnorm.core.operators import OPERATORS, Operator

H = 128
E4M3 = torch.float8_e4m3fn


def rows(count=3, width=H):
    return torch.randn(count, width)


def float8(*shape):
    return torch.empty(shape, dtype=E4M3)


def heads(count):
    return torch.randn(3, count, 64)


# One call of each kernel, without gradients.
CALLS = {
    "rmsnorm": lambda: jitnorm.rmsnorm(rows(), torch.ones(H)),
    "gemma_rmsnorm": lambda: jitnorm.gemma_rmsnorm(rows(), torch.ones(H)),
    "fused_add_rmsnorm": lambda: jitnorm.fused_add_rmsnorm(rows(), rows(), torch.ones(H)),
    "fused_add_rmsnorm_round_sum": lambda: jitnorm.fused_add_rmsnorm(rows(), rows(), torch.ones(H), round_sum=True),
    "gemma_fused_add_rmsnorm": lambda: jitnorm.gemma_fused_add_rmsnorm(rows(), rows(), torch.ones(H)),
    "gemma_fused_add_rmsnorm_round_sum": lambda: jitnorm.gemma_fused_add_rmsnorm(
        rows(), rows(), torch.ones(H), round_sum=True
    ),
    "rmsnorm_quant_fp8": lambda: jitnorm.rmsnorm_quant_fp8(rows(), torch.ones(H), torch.ones(1)),
    "rmsnorm_quant_fp8_dynamic": lambda: jitnorm.rmsnorm_quant_fp8(rows(), torch.ones(H)),
    "fused_add_rmsnorm_quant_fp8": lambda: jitnorm.fused_add_rmsnorm_quant_fp8(
        rows(), rows(), torch.ones(H), torch.ones(1)
    ),
    "fused_add_rmsnorm_quant_fp8_dynamic": lambda: jitnorm.fused_add_rmsnorm_quant_fp8(rows(), rows(), torch.ones(H)),
    "per_tensor_quant_fp8": lambda: jitnorm.per_tensor_quant_fp8(rows(), float8(3, H), torch.ones(1), True),
    "per_tensor_quant_fp8_dynamic": lambda: jitnorm.per_tensor_quant_fp8(rows(), float8(3, H), torch.ones(1)),
    "per_token_quant_fp8": lambda: jitnorm.per_token_quant_fp8(rows(), float8(3, H), torch.ones(3)),
    "fused_inplace_qknorm": lambda: jitnorm.fused_inplace_qknorm(heads(4), heads(2), torch.ones(64), torch.ones(64)),
    "silu_and_mul": lambda: jitnorm.silu_and_mul(rows()),
    "gelu_and_mul": lambda: jitnorm.gelu_and_mul(rows()),
    "gelu_tanh_and_mul": lambda: jitnorm.gelu_tanh_and_mul(rows()),
    "store_cache": lambda: jitnorm.store_cache(rows(), rows(), rows(9), rows(9), torch.arange(3)),
}


def test_every_kernel_is_called_below():
    assert {*CALLS, "per_tensor_quant_fp8_maxima"} == {operator.op for operator in OPERATORS}


@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_finds_its_kernel_at_once(name, monkeypatch):
    """Nothing of the result shows it: the long way is right as well, and takes twenty times as long."""
    CALLS[name]()
    monkeypatch.setattr(Operator, "kernel", lambda *_: pytest.fail("the long way"))
    CALLS[name]()
    with torch.inference_mode():
        CALLS[name]()
