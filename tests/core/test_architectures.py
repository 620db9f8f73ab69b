"""The CUDA sources compile for every architecture that the README names; nothing runs.

Most of the time of a build goes to the start of the compilers and to headers, so that kernels of one architecture are
built together: one source, one cubin.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch

from jitnorm.activation import (
    FATRELU_AND_MUL,
    GELU_AND_MUL,
    GELU_TANH_AND_MUL,
    MUL_AND_SILU,
    QUICK_GELU,
    RELU2,
    SILU_AND_MUL,
    SILU_AND_MUL_HF,
    SILU_AND_MUL_WITH_CLAMP,
    SWIGLUOAI_AND_MUL,
)
from jitnorm.dual_rmsnorm import DUAL_RMSNORM
from jitnorm.fused_add_rmsnorm import (
    FUSED_ADD_RMSNORM,
    FUSED_ADD_RMSNORM_FP32_RESIDUAL,
    FUSED_ADD_RMSNORM_ROUND_SUM,
    GEMMA_FUSED_ADD_RMSNORM,
)
from jitnorm.jit.build import build
from jitnorm.jit.spec import KernelSpec, Target
from jitnorm.qknorm import HEAD_DIMS, QKNORM
from jitnorm.qknorm_rope_store import QK_NORM_ROPE_STORE, ROPE, Variant
from jitnorm.quant_fp8 import PARTIAL_AMAX, PER_TENSOR, PER_TENSOR_DYNAMIC, PER_TOKEN
from jitnorm.rmsnorm import RMSNORM
from jitnorm.rmsnorm_quant_fp8 import FUSED_ADD_RMSNORM_QUANT_FP8_DYNAMIC, RMSNORM_QUANT_FP8
from jitnorm.store_cache import STORE_CACHE

pytestmark = pytest.mark.nvcc

F16, BF16, F32, E4M3 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn
ARCHITECTURES = ("7.5", "8.0", "8.9", "9.0a", "10.0a", "12.0a")
# Each kernel class, activation and access once, and weights of either dtype: vectors of float32 weights are loaded in
# two parts. Each is compiled before sm_80, for it, and for sm_90, where the sources differ. sm_89 has only conversions
# to float8 of its own, and those after sm_90 compile the same code: for these, one kernel of each family.
KERNELS = (
    (RMSNORM, 128, F16, F32),
    (RMSNORM, 8192, BF16, BF16),
    (GEMMA_FUSED_ADD_RMSNORM, 256, BF16, BF16),
    (FUSED_ADD_RMSNORM_ROUND_SUM, 4096, F16, F32),
    (FUSED_ADD_RMSNORM_FP32_RESIDUAL, 8192, BF16, BF16),
    (QKNORM, 128, BF16, BF16),
    (QKNORM, 1024, F16, F32),
    (DUAL_RMSNORM, 1536, 576, BF16, BF16),  # blocks with idle threads
    (DUAL_RMSNORM, 64, 8192, F16, F32),
    (RMSNORM_QUANT_FP8, 4096, BF16, BF16),
    (FUSED_ADD_RMSNORM_QUANT_FP8_DYNAMIC, 256, F32, F32),
    (PER_TENSOR, BF16),
    (PARTIAL_AMAX, BF16),
    (PER_TENSOR_DYNAMIC, BF16),
    (PER_TOKEN, BF16),
    (SILU_AND_MUL, BF16, 16),
    (GELU_AND_MUL, F32, 8),  # float32 has an exponential of its own
    (GELU_TANH_AND_MUL, F16, 4),
    (SILU_AND_MUL_HF, BF16, 16),  # rounding to bfloat16 differs before sm_80
    (SILU_AND_MUL_HF, F16, 8),
    (MUL_AND_SILU, F32, 16),
    (FATRELU_AND_MUL, BF16, 8),
    (SILU_AND_MUL_WITH_CLAMP, F16, 16),
    (SWIGLUOAI_AND_MUL, BF16, 16),
    (SWIGLUOAI_AND_MUL, F32, 4),  # an access has half a pair
    (QUICK_GELU, F16, 16),
    (RELU2, BF16, 4),
    (STORE_CACHE, 16),
    (STORE_CACHE, 4),
    # Both norms' weights, pairings, sections or one position, float8 or not, rounding, all rotated or a part, and heads
    # whose vectors are not a power of two.
    (QK_NORM_ROPE_STORE, Variant(128, 128, BF16, BF16, BF16, BF16, BF16)),
    (QK_NORM_ROPE_STORE, Variant(80, 32, F16, F32, F32, E4M3, E4M3, False, True, rounds_each_step=True)),
    (ROPE, Variant(192, 64, F32, None, F32, E4M3, F32, True, True)),
)
# One of each file of sources.
FAMILIES = (
    (RMSNORM, 512, BF16, BF16),
    (QKNORM, 256, BF16, BF16),
    (DUAL_RMSNORM, 1536, 512, BF16, BF16),
    (PER_TOKEN, F16),
    (SILU_AND_MUL, F16, 16),
    (STORE_CACHE, 8),
    (QK_NORM_ROPE_STORE, Variant(256, 64, BF16, F32, F32, E4M3, BF16)),
)


@dataclass(frozen=True)
class Together(KernelSpec):
    """The first of some kernels, whose source contains the others as well."""

    others: tuple[KernelSpec, ...] = ()

    @property
    def source(self) -> str:
        parts = [super().source]
        for number, spec in enumerate(self.others):
            kernel = f"jitnorm::Kernel{number}"
            source = re.sub(r"\bKernel\b", f"Kernel{number}", spec.source)
            # A cubin has one description. Those of the others are compiled and not kept.
            described = f"static_assert({kernel}::info_t::of<{kernel}>().launch.threads > 0);"
            parts.append(source.replace(f"JITNORM_DEFINE_INFO({kernel})", described))
        return "\n".join(parts)


def build_together(arch: str, kernels) -> None:
    first, *others = [operator.spec(*key, Target.cuda(arch)) for operator, *key in kernels]
    entry = build(Together(**vars(first), others=tuple(others)))
    assert entry.manifest["arch"] == Target.cuda(arch).sm
    content = entry.verify()
    assert all(spec.name.encode() in content for spec in (first, *others))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "compiler"), [*((arch, "nvrtc") for arch in ARCHITECTURES), ("7.5", "nvcc"), ("9.0a", "nvcc")]
)
def test_compiles(arch, compiler, monkeypatch):
    monkeypatch.setenv("JITNORM_CUDA_COMPILER", compiler)
    build_together(arch, FAMILIES if arch in ("8.9", "10.0a", "12.0a") else KERNELS)


@pytest.mark.parametrize(("arch", "kernel"), [*zip(ARCHITECTURES * 2, FAMILIES, strict=False)])
def test_a_build_of_one_kernel(arch, kernel):
    """As above for a source that includes the header of one family alone, and has the bindings of that family."""
    build_together(arch, [kernel])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "operator", "sizes", "dtype", "weight_dtype"),
    [
        ("9.0a", RMSNORM, range(512, 8193, 768), BF16, BF16),
        ("8.0", FUSED_ADD_RMSNORM, range(512, 8193, 768), F32, F32),
        ("9.0a", FUSED_ADD_RMSNORM_FP32_RESIDUAL, (64, 128, 256, *range(512, 8193, 768)), F16, F32),
        ("8.9", RMSNORM_QUANT_FP8, range(512, 8193, 768), F16, F32),
        ("9.0a", QKNORM, HEAD_DIMS, BF16, BF16),
        ("7.5", QKNORM, HEAD_DIMS, F32, F32),
    ],
)
def test_sizes_compile(arch, operator, sizes, dtype, weight_dtype):
    """A schedule is chosen at compile time: for an untested size it might be one that does not compile.

    The bindings contain nothing else that depends on the size.
    """
    build_together(arch, [(operator, size, dtype, weight_dtype) for size in sizes])
