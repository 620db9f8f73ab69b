"""The CUDA sources compile for every architecture that the README names; nothing runs."""

from __future__ import annotations

import pytest
import torch

from jitnorm.jit.build import build
from jitnorm.jit.spec import Target
from jitnorm.rmsnorm import rmsnorm_spec

pytestmark = pytest.mark.nvcc

ARCHITECTURES = ("7.5", "8.0", "8.9", "9.0a", "10.0a", "12.0a")
# One of each class; float32 weights take another way through the vectors, and sm_75 has conversions of its own.
KERNELS = ((128, torch.float16, torch.float32), (8192, torch.bfloat16, torch.bfloat16))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("hidden_size", "dtype", "weight_dtype"), KERNELS)
def test_compiles(arch, hidden_size, dtype, weight_dtype):
    entry = build(rmsnorm_spec(hidden_size, dtype, weight_dtype, Target.cuda(arch)))
    assert entry.manifest["arch"] == Target.cuda(arch).sm
    entry.verify()


def test_every_size_compiles_for_one_architecture():
    """The schedules are worked out at compile time: a size in between could ask for one that does not exist."""
    for hidden_size in range(512, 8193, 768):
        build(rmsnorm_spec(hidden_size, torch.bfloat16, torch.bfloat16, Target.cuda("9.0a")))
        build(rmsnorm_spec(hidden_size, torch.float32, torch.float32, Target.cuda("8.0")))
