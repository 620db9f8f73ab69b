"""The subclasses that vLLM makes in place of its norms and gated activations, after `CustomOp.register_oot`.

vLLM disables these operators in compiled mode, so that Inductor generates them from `forward_native`. Inductor's norms
take longer than the kernels here, so the norms override `forward_native` too: a compiled model calls the kernels
whatever `custom_ops` says. Its activations are about as fast, so the activations override `forward_cuda` alone, which
vLLM calls where the operator is enabled: in eager mode, or by `custom_ops`. mlps.py replaces them together with GEMMs.

A subclass computes what its base does until `replace_operators` in models.py has found a kernel for the module.

Norms with a residual write in place, as vLLM's RMSNorm does: its callers do not read the arguments afterwards, except
for auxiliary hidden states of speculative decoding, with which Gemma's norms stay vLLM's. A compiled graph needs no
copy for that, because the inputs are not read again there either. Where `jitnorm_float32_residual` is set, the first
norm with a residual makes a float32 copy, and the others update that.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from jitnorm.activation import (
    GELU_AND_MUL,
    GELU_TANH_AND_MUL,
    SILU_AND_MUL,
    gelu_and_mul,
    gelu_tanh_and_mul,
    silu_and_mul,
)
from jitnorm.core import checks
from jitnorm.core.operators import DTYPES
from jitnorm.fused_add_rmsnorm import fused_add_rmsnorm, gemma_fused_add_rmsnorm
from jitnorm.general_rmsnorm import general_fused_add_rmsnorm, general_rmsnorm
from jitnorm.integrations.engine_norms import EngineNorm
from jitnorm.jit.spec import KernelSpec, Target
from jitnorm.rmsnorm import gemma_rmsnorm, rmsnorm


class JitnormRMSNorm(RMSNorm):  # type: ignore[misc]
    """vLLM's RMSNorm by this package's kernels."""

    jitnorm_is_active = False
    jitnorm_is_general = False  # whether only the general norms serve its hidden size, or its lack of a weight
    jitnorm_float32_residual = False

    def forward_native(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """Normalise, by the kernel if it supports the call."""
        weight = self.weight  # once, as it takes a microsecond
        if self.jitnorm_is_active and _supports(x, weight, residual, self.jitnorm_float32_residual):
            return self._jitnorm_forward(x, residual, weight)
        return super().forward_native(x, residual)

    def forward_cuda(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """Normalise, by the kernel if it supports the call."""
        weight = self.weight  # once, as it takes a microsecond
        if self.jitnorm_is_active and _supports(x, weight, residual, self.jitnorm_float32_residual):
            return self._jitnorm_forward(x, residual, weight)
        return super().forward_cuda(x, residual)

    def _jitnorm_forward(self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor) -> Any:
        if residual is not None and self.jitnorm_float32_residual:
            residual = residual.float()  # copies a half-precision residual, and returns a float32 one as it is
        if self.jitnorm_is_general:
            return _general_norm(x, residual, weight if self.has_weight else None, self.variance_epsilon, 0.0)
        if residual is None:
            return rmsnorm(x, weight, self.variance_epsilon)
        fused_add_rmsnorm(x, residual, weight, self.variance_epsilon)
        return x, residual


class JitnormGemmaRMSNorm(GemmaRMSNorm):  # type: ignore[misc]
    """vLLM's GemmaRMSNorm by this package's kernels."""

    jitnorm_is_active = False
    jitnorm_is_general = False  # whether only the general norms serve its hidden size, or its lack of a weight
    jitnorm_float32_residual = False

    def forward_native(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """Normalise, by the kernel if it supports the call."""
        weight = self.weight
        if not self.jitnorm_is_active or not _supports(x, weight, residual, self.jitnorm_float32_residual):
            return super().forward_native(x, residual)
        if residual is not None and self.jitnorm_float32_residual:
            residual = residual.float()
        if self.jitnorm_is_general:
            return _general_norm(x, residual, weight, self.variance_epsilon, 1.0)
        if residual is None:
            return gemma_rmsnorm(x, weight, self.variance_epsilon)
        gemma_fused_add_rmsnorm(x, residual, weight, self.variance_epsilon)
        return x, residual

    def forward_cuda(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        """Normalise as forward_native does, as in the base class."""
        return self.forward_native(x, residual)


class JitnormSiluAndMul(SiluAndMul):  # type: ignore[misc]
    """vLLM's SiluAndMul by this package's kernel, where the operator is enabled."""

    jitnorm_is_active = False

    def forward_cuda(self, x: torch.Tensor) -> torch.Tensor:
        """Compute `silu(gate) * up`, by the kernel if it supports the call."""
        if not self.jitnorm_is_active or not _supports_activation(x):
            return super().forward_cuda(x)  # type: ignore[no-any-return]
        return silu_and_mul(x)


class JitnormGeluAndMul(GeluAndMul):  # type: ignore[misc]
    """vLLM's GeluAndMul by this package's kernels, where the operator is enabled."""

    jitnorm_is_active = False

    def forward_cuda(self, x: torch.Tensor) -> torch.Tensor:
        """Compute `gelu(gate) * up`, by the kernel if it supports the call."""
        if not self.jitnorm_is_active or not _supports_activation(x):
            return super().forward_cuda(x)  # type: ignore[no-any-return]
        return gelu_tanh_and_mul(x) if self.approximate == "tanh" else gelu_and_mul(x)


# By the part of `compatibility.FINGERPRINTS` that each depends on.
REPLACEMENTS: dict[str, list[tuple[type[Any], type[Any]]]] = {
    "norms": [(RMSNorm, JitnormRMSNorm), (GemmaRMSNorm, JitnormGemmaRMSNorm)],
    "activations": [(SiluAndMul, JitnormSiluAndMul), (GeluAndMul, JitnormGeluAndMul)],
}
CLASSES = tuple(replacement for pairs in REPLACEMENTS.values() for _, replacement in pairs)
NORM_CLASSES = (JitnormRMSNorm, JitnormGemmaRMSNorm)


def _general_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float, weight_offset: float
) -> Any:
    if residual is None:
        return general_rmsnorm(x, weight, eps, weight_offset=weight_offset)
    general_fused_add_rmsnorm(x, residual, weight, eps, weight_offset=weight_offset)
    return x, residual


def _supports(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, float32_residual: bool) -> bool:
    """Return whether a norm's kernel takes these tensors.

    Heads in a slice of the QKV projection are not contiguous, and the only such tensors that models normalise often.
    """
    return (
        x.is_contiguous()
        and x.dtype in DTYPES
        and (weight.dtype == x.dtype or weight.dtype == torch.float32)
        and (
            residual is None
            or (
                (residual.dtype == x.dtype or (float32_residual and residual.dtype == torch.float32))
                and residual.shape == x.shape
                and residual.is_contiguous()
            )
        )
    )


def _supports_activation(x: torch.Tensor) -> bool:
    """Return whether an activation's kernel takes this tensor."""
    width = x.shape[-1] // 2 * x.element_size()
    return x.is_contiguous() and x.dtype in DTYPES and width > 0 and width % checks.MIN_ACCESS_BYTES == 0


def reason_to_leave(module: Any, dtype: torch.dtype) -> str | None:
    """Return why no kernel serves a module of one of CLASSES for inputs of a dtype, or None."""
    if not isinstance(module, NORM_CLASSES):
        is_enabled = getattr(module._forward_method, "__func__", None) is type(module).forward_cuda
        return None if is_enabled else "vLLM has not enabled it, and Inductor generates it"
    if isinstance(module, JitnormRMSNorm) and module.variance_size_override is not None:
        return "it normalises by a part of the hidden size"
    if module.weight.dtype not in (dtype, torch.float32):
        return f"its weight is {module.weight.dtype}, and the model {dtype}"
    return engine_norm(module, dtype).problem


def engine_norm(norm: Any, dtype: torch.dtype) -> EngineNorm:
    """Return what a norm of NORM_CLASSES computes for inputs of a dtype."""
    is_gemma = isinstance(norm, JitnormGemmaRMSNorm)
    has_weight = is_gemma or norm.has_weight
    return EngineNorm(norm.weight.shape[-1], dtype, norm.weight.dtype if has_weight else dtype, is_gemma, has_weight)


def specs(module: Any, dtype: torch.dtype, target: Target) -> list[KernelSpec]:
    """Return the kernels that a module of one of CLASSES calls for inputs of a dtype."""
    if isinstance(module, NORM_CLASSES):
        norm = engine_norm(module, dtype)
        return [norm.spec(op, target) for op in ("rmsnorm", "fused_add_rmsnorm")]
    activation = SILU_AND_MUL
    if isinstance(module, JitnormGeluAndMul):
        activation = GELU_TANH_AND_MUL if module.approximate == "tanh" else GELU_AND_MUL
    return [activation.spec(dtype, checks.CUDA_ALIGNMENT, target)]


def spec_with_float32_residual(norm: Any, dtype: torch.dtype, target: Target) -> KernelSpec:
    """Return the kernel that a norm calls for inputs of a half precision and a float32 residual."""
    return engine_norm(norm, dtype).spec("fused_add_rmsnorm_fp32_residual", target)
