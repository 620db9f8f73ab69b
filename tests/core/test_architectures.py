"""The CUDA sources compile for every architecture that the README names; nothing runs."""

from __future__ import annotations

import pytest
import torch

from jitnorm.fused_add_rmsnorm import FUSED_ADD_RMSNORM, FUSED_ADD_RMSNORM_ROUND_SUM, GEMMA_FUSED_ADD_RMSNORM
from jitnorm.jit.build import build
from jitnorm.jit.spec import Target
from jitnorm.qknorm import HEAD_DIMS, QKNORM
from jitnorm.quant_fp8 import PARTIAL_AMAX, PER_TENSOR, PER_TENSOR_DYNAMIC, PER_TOKEN
from jitnorm.rmsnorm import RMSNORM
from jitnorm.rmsnorm_quant_fp8 import FUSED_ADD_RMSNORM_QUANT_FP8_DYNAMIC, RMSNORM_QUANT_FP8

pytestmark = pytest.mark.nvcc

ARCHITECTURES = ("7.5", "8.0", "8.9", "9.0a", "10.0a", "12.0a")
# One of each class, with weights of either dtype: vectors of float32 weights are loaded in two parts. sm_75 has
# conversions of its own.
KERNELS = (
    (RMSNORM, 128, torch.float16, torch.float32),
    (RMSNORM, 8192, torch.bfloat16, torch.bfloat16),
    (GEMMA_FUSED_ADD_RMSNORM, 256, torch.bfloat16, torch.bfloat16),
    (FUSED_ADD_RMSNORM_ROUND_SUM, 4096, torch.float16, torch.float32),
    (QKNORM, 128, torch.bfloat16, torch.bfloat16),
    (QKNORM, 1024, torch.float16, torch.float32),
    (RMSNORM_QUANT_FP8, 4096, torch.bfloat16, torch.bfloat16),
    (FUSED_ADD_RMSNORM_QUANT_FP8_DYNAMIC, 256, torch.float32, torch.float32),
)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("norm", "hidden_size", "dtype", "weight_dtype"), KERNELS)
def test_compiles(arch, norm, hidden_size, dtype, weight_dtype):
    entry = build(norm.spec(hidden_size, dtype, weight_dtype, Target.cuda(arch)))
    assert entry.manifest["arch"] == Target.cuda(arch).sm
    entry.verify()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_quantisation_compiles(arch):
    for operator in (
        (PER_TENSOR, PARTIAL_AMAX, PER_TENSOR_DYNAMIC, PER_TOKEN) if arch == "9.0a" else (PER_TENSOR_DYNAMIC,)
    ):
        build(operator.spec(torch.bfloat16, Target.cuda(arch))).verify()


def test_every_size_compiles_for_one_architecture():
    """A schedule is chosen at compile time: for an untested size it might be one that does not compile."""
    for hidden_size in range(512, 8193, 768):
        build(RMSNORM.spec(hidden_size, torch.bfloat16, torch.bfloat16, Target.cuda("9.0a")))
        build(FUSED_ADD_RMSNORM.spec(hidden_size, torch.float32, torch.float32, Target.cuda("8.0")))
        build(RMSNORM_QUANT_FP8.spec(hidden_size, torch.float16, torch.float32, Target.cuda("8.9")))
    for head_dim in HEAD_DIMS:
        build(QKNORM.spec(head_dim, torch.bfloat16, torch.bfloat16, Target.cuda("9.0a")))
        build(QKNORM.spec(head_dim, torch.float32, torch.float32, Target.cuda("7.5")))
