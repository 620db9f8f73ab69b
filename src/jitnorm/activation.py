"""Activations of feed-forward layers: with a product, such as `out = activation(gate) * up`, and without."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from jitnorm.core import checks
from jitnorm.core.operators import CPP_TYPES, DTYPES, EXAMPLES, Example, Operator
from jitnorm.core.targets import target_of
from jitnorm.core.torch_library import (
    build_while_tracing,
    increment_versions,
    needs_dispatcher,
    needs_grad,
    refuse_torch_func,
    register,
    register_autograd,
)
from jitnorm.jit.spec import KernelSpec, Target

MAX_WIDTH = 1 << 30  # kMaxWidth in csrc/elementwise/activation.h
ONCE, HF = ROUNDINGS = ("once", "hf")


@dataclass(eq=False, repr=False)
class Activation(Operator):
    """One of the activations, with a product or without."""

    formula: str  # the class in csrc/include/jitnorm/activation_formulas.h that computes an element of the output
    # Returns the gradients of gate and up from that of the output, gate, up and the parameters; without a product, that
    # of the input from that of the output and the input. In float32.
    gradient: Callable[..., Any]
    operands: int = 2  # the elements of the input for each of the output: gate and up, or one
    is_interleaved: bool = False  # whether gate and up alternate
    parameters: tuple[str, ...] = ()  # the names of the numbers that the formula takes

    size_name: ClassVar[str | None] = "d"
    needs_size: ClassVar[bool] = False

    def spec(self, dtype: torch.dtype, vector_bytes: int, target: Target) -> KernelSpec:
        """Return what to build for rows of whole accesses of `vector_bytes`. A kernel supports every such width."""
        if dtype not in CPP_TYPES:
            raise TypeError(f"{self.op} takes {checks.enumeration(DTYPES)}, got {dtype}")
        name = checks.DTYPE_NAMES[dtype]
        full = vector_bytes == checks.CUDA_ALIGNMENT
        return KernelSpec(
            op=self.op,
            family="activation",
            binding=self.binding,
            name=f"{self.op}_{name}" + ("" if full else f"_by_{vector_bytes}"),
            kernel=f"ActivationKernel<{CPP_TYPES[dtype]}, {self.formula}, {vector_bytes}>",
            target=target,
            warmup=f"--op {self.op} --dtype {name}"
            + ("" if full else f" --hidden-size {vector_bytes // dtype.itemsize}"),
        )

    def warmup_spec(
        self, size: int | None, dtype: torch.dtype, weight_dtype: torch.dtype, target: Target
    ) -> KernelSpec:
        """Return what to build for rows of `size` elements, or of whole 16 bytes if it is None."""
        if size is None:
            return self.spec(dtype, checks.CUDA_ALIGNMENT, target)
        _check_width(self.op, size, dtype)
        return self.spec(dtype, checks.vector_bytes(size * dtype.itemsize), target)

    def run(self, input: torch.Tensor, *arguments: Any) -> None:
        """Run the kernel that supports `input` on it and on `arguments`, which have been checked."""
        if input.shape[-1] == 0:
            return
        key = input.dtype, checks.vector_bytes(input.shape[-1] // self.operands * input.itemsize), target_of(input)
        self.call((input.dtype,), key, input, *arguments)


def _silu_backward(grad: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the gate. Written out, because torch.ops.aten.silu_backward has no derivative."""
    sigmoid = gate.sigmoid()
    return grad * sigmoid * (1 + gate * (1 - sigmoid))


def _gelu_backward(grad: torch.Tensor, gate: torch.Tensor, approximate: str) -> Any:
    # torch.ops.aten is looked up only at the call, because the look-up would slow down the import.
    return torch.ops.aten.gelu_backward(grad, gate, approximate=approximate)


_gelu_tanh = partial(F.gelu, approximate="tanh")
_gelu_tanh_backward = partial(_gelu_backward, approximate="tanh")


def _quick_gelu_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `silu(1.702 x) / 1.702`."""
    return _silu_backward(grad, 1.702 * x)


def _squared_relu_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return grad * 2 * x.relu()


def _and_mul(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the gradient of `forward(gate) * up`."""
    return lambda grad, gate, up: (backward(grad * up, gate), grad * forward(gate))


def _mul_and_silu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return grad * F.silu(up), _silu_backward(grad * gate, up)


def _fatrelu_and_mul_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, threshold: float
) -> tuple[torch.Tensor, ...]:
    is_zero = gate <= threshold
    return torch.where(is_zero, 0.0, grad * up), torch.where(is_zero, 0.0, grad * gate)


def _clamped_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float, beta: float
) -> tuple[torch.Tensor, ...]:
    """Return the gradients of ClampedSiLUAndMul. At a limit they are those of the number itself, as in torch.clamp."""
    clamped, factor = gate.clamp(max=limit), up.clamp(-limit, limit) + beta
    grad_gate = _silu_backward(grad * factor, alpha * clamped)
    grad_up = grad * clamped * (alpha * clamped).sigmoid()
    return torch.where(gate <= limit, grad_gate, 0.0), torch.where(up.abs() <= limit, grad_up, 0.0)


_SILU = _and_mul(F.silu, _silu_backward)
_GELU = _and_mul(F.gelu, partial(_gelu_backward, approximate="none"))
_GELU_TANH = _and_mul(_gelu_tanh, _gelu_tanh_backward)
_CLAMPED_PARAMETERS = ("limit", "alpha", "beta")

SILU_AND_MUL = Activation("silu_and_mul", "activation", "AndMul<SiLU>", _SILU)
SILU_AND_MUL_HF = Activation("silu_and_mul_hf", "activation", "RoundedAndMul<SiLU>", _SILU)
GELU_AND_MUL = Activation("gelu_and_mul", "activation", "AndMul<GELU>", _GELU)
GELU_AND_MUL_HF = Activation("gelu_and_mul_hf", "activation", "RoundedAndMul<GELU>", _GELU)
GELU_TANH_AND_MUL = Activation("gelu_tanh_and_mul", "activation", "AndMul<GELUTanh>", _GELU_TANH)
GELU_TANH_AND_MUL_HF = Activation("gelu_tanh_and_mul_hf", "activation", "RoundedAndMul<GELUTanh>", _GELU_TANH)
MUL_AND_SILU = Activation("mul_and_silu", "activation", "MulAnd<SiLU>", _mul_and_silu_backward)
FATRELU_AND_MUL = Activation(
    "fatrelu_and_mul", "activation", "FATReLUAndMul", _fatrelu_and_mul_backward, parameters=("threshold",)
)
SILU_AND_MUL_WITH_CLAMP = Activation(
    *("silu_and_mul_with_clamp", "activation", "ClampedSiLUAndMul<Operands::kHalves>", _clamped_backward),
    parameters=_CLAMPED_PARAMETERS,
)
SWIGLUOAI_AND_MUL = Activation(
    *("swigluoai_and_mul", "activation", "ClampedSiLUAndMul<Operands::kInterleaved>", _clamped_backward),
    is_interleaved=True,
    parameters=_CLAMPED_PARAMETERS,
)
GELU_NEW = Activation("gelu_new", "activation", "NoMul<GELUTanh>", _gelu_tanh_backward, operands=1)
GELU_FAST = Activation("gelu_fast", "activation", "NoMul<GELUTanh>", _gelu_tanh_backward, operands=1)
QUICK_GELU = Activation("quick_gelu", "activation", "NoMul<QuickGELU>", _quick_gelu_backward, operands=1)
RELU2 = Activation("relu2", "activation", "NoMul<SquaredReLU>", _squared_relu_backward, operands=1)

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_Tensor = torch.Tensor


def silu_and_mul(
    input: torch.Tensor,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,
    num_tokens_per_expert: torch.Tensor | None = None,
    rounding: str = ONCE,
) -> torch.Tensor:
    """Compute `out = silu(input[..., :d]) * input[..., d:]`, as in SwiGLU, in float32 and rounded once.

    `silu(x) = x / (1 + exp(-x))`, as `torch.nn.functional.silu` (Shazeer, 2020, https://arxiv.org/abs/2002.05202). A
    row's result has the same bits alone and in any batch. One kernel supports every d: the first call of a dtype
    compiles it.

    Args:
        input: `[..., 2 * d]`, float16, bfloat16 or float32, on the CPU or a CUDA device. The last stride is 1 and the
            leading dimensions collapse to one row stride. d is any number up to 2^30, zero included; in half precision
            it is even. On CUDA rows are aligned to 16 bytes if d is a multiple of 16 bytes, otherwise to 8 or 4, as d
            is.
        out: `[..., d]`, written; of the input's dtype and device, sharing no memory with it. Allocated if None. A call
            with `out` raises RuntimeError if the input needs a gradient; requires_grad of `out` itself is ignored.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it. The bits are the same.
        expert_ids: for mixture-of-experts, int32 or int64, `[n]`, contiguous, on the input's device: row i belongs to
            expert `expert_ids[i // expert_step]`, and rows of expert -1 are not computed. A given `out` keeps its
            values there; if `out` is None, these rows are zero. There may be more elements than rows need.
        expert_step: how many adjacent rows share an element of expert_ids; 1 or more.
        num_tokens_per_expert: for mixture-of-experts with an input `[experts, max_tokens, 2 * d]`, and instead of
            expert_ids: int32 or int64, `[experts]`, contiguous, on the input's device. The first
            `num_tokens_per_expert[e]` rows of expert e are computed, all of them if it is max_tokens or more, none if
            it is zero or less. The others are neither read nor written, as with expert_ids. As `masked_m` of DeepGEMM
            and `expert_num_tokens` of vLLM.
        rounding: "hf" rounds the activation's result to the input's dtype before the product, as Hugging Face's MLPs
            and vLLM's PyTorch code do, which run two operators; "once" does not. The gradient is the same for both.

    Returns:
        `out`.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype or type.
        ValueError: a shape, stride, device, alignment or overlap is not accepted, expert_step, rounding or a limit is
            invalid, or both expert_ids and num_tokens_per_expert are given.
        RuntimeError: d is not supported (nothing is built then), or the kernel cannot be built or launched.
    """
    if rounding is ONCE and num_tokens_per_expert is None:
        return _gated_activation(SILU_AND_MUL, input, out, enable_pdl, expert_ids, expert_step)
    activation = _rounded(SILU_AND_MUL, SILU_AND_MUL_HF, rounding)
    return _activation(activation, input, out, enable_pdl, expert_ids, expert_step, num_tokens_per_expert)


def gelu_and_mul(
    input: torch.Tensor,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,
    num_tokens_per_expert: torch.Tensor | None = None,
    rounding: str = ONCE,
) -> torch.Tensor:
    """Compute `out = gelu(input[..., :d]) * input[..., d:]`, as in GEGLU, in float32 and rounded once.

    `gelu(x) = x * (1 + erf(x / sqrt(2))) / 2`, as `torch.nn.functional.gelu` (Hendrycks and Gimpel, 2016,
    https://arxiv.org/abs/1606.08415), computed without the cancellation in `1 + erf` for x far below zero.

    Args:
        input: `[..., 2 * d]`. It and the arguments below have dtypes, sizes and strides as for `jitnorm.silu_and_mul`.
        out: `[..., d]`, written. Allocated if None.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        expert_ids: one id for every `expert_step` rows. Rows of expert -1 are not computed.
        expert_step: how many adjacent rows share an element of expert_ids; 1 or more.
        num_tokens_per_expert: how many rows of each expert are computed, for an input `[experts, max_tokens, 2 * d]`.
        rounding: "hf" rounds the activation's result to the input's dtype before the product; "once" does not.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.silu_and_mul`.
    """
    if rounding is ONCE and num_tokens_per_expert is None:
        return _gated_activation(GELU_AND_MUL, input, out, enable_pdl, expert_ids, expert_step)
    activation = _rounded(GELU_AND_MUL, GELU_AND_MUL_HF, rounding)
    return _activation(activation, input, out, enable_pdl, expert_ids, expert_step, num_tokens_per_expert)


def gelu_tanh_and_mul(
    input: torch.Tensor,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,
    num_tokens_per_expert: torch.Tensor | None = None,
    rounding: str = ONCE,
) -> torch.Tensor:
    """Compute `out = gelu(input[..., :d]) * input[..., d:]` with the tanh approximation of GELU, which Gemma uses.

    `gelu(x) = x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2`, as `torch.nn.functional.gelu` with
    `approximate="tanh"`, computed in float32 and rounded once.

    Args:
        input: `[..., 2 * d]`. It and the arguments below have dtypes, sizes and strides as for `jitnorm.silu_and_mul`.
        out: `[..., d]`, written. Allocated if None.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        expert_ids: one id for every `expert_step` rows. Rows of expert -1 are not computed.
        expert_step: how many adjacent rows share an element of expert_ids; 1 or more.
        num_tokens_per_expert: how many rows of each expert are computed, for an input `[experts, max_tokens, 2 * d]`.
        rounding: "hf" rounds the activation's result to the input's dtype before the product; "once" does not.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.silu_and_mul`.
    """
    if rounding is ONCE and num_tokens_per_expert is None:
        return _gated_activation(GELU_TANH_AND_MUL, input, out, enable_pdl, expert_ids, expert_step)
    activation = _rounded(GELU_TANH_AND_MUL, GELU_TANH_AND_MUL_HF, rounding)
    return _activation(activation, input, out, enable_pdl, expert_ids, expert_step, num_tokens_per_expert)


def mul_and_silu(
    input: torch.Tensor,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,
    num_tokens_per_expert: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `out = input[..., :d] * silu(input[..., d:])`, in float32 and rounded once.

    `jitnorm.silu_and_mul` with the halves exchanged. The definition is that of vLLM's `MulAndSilu`
    (vllm/model_executor/layers/activation.py).

    Args:
        input: `[..., 2 * d]`. It and the arguments below have dtypes, sizes and strides as for `jitnorm.silu_and_mul`.
        out: `[..., d]`, written. Allocated if None.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        expert_ids: one id for every `expert_step` rows. Rows of expert -1 are not computed.
        expert_step: how many adjacent rows share an element of expert_ids; 1 or more.
        num_tokens_per_expert: how many rows of each expert are computed, for an input `[experts, max_tokens, ...]`.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.silu_and_mul`.
    """
    return _activation(MUL_AND_SILU, input, out, enable_pdl, expert_ids, expert_step, num_tokens_per_expert)


def fatrelu_and_mul(
    input: torch.Tensor,
    threshold: float = 0.0,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,
    num_tokens_per_expert: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `out = fatrelu(input[..., :d]) * input[..., d:]`, in float32 and rounded once.

    `fatrelu(x) = x if x > threshold else 0`, as `torch.nn.functional.threshold`, which keeps NaN. The definition is
    that of vLLM's `FatreluAndMul.forward_native` (vllm/model_executor/layers/activation.py), for MiniCPM-S.

    Args:
        input: `[..., 2 * d]`. It and the arguments below have dtypes, sizes and strides as for `jitnorm.silu_and_mul`.
        threshold: a number.
        out: `[..., d]`, written. Allocated if None.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        expert_ids: one id for every `expert_step` rows. Rows of expert -1 are not computed.
        expert_step: how many adjacent rows share an element of expert_ids; 1 or more.
        num_tokens_per_expert: how many rows of each expert are computed, for an input `[experts, max_tokens, ...]`.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.silu_and_mul`.
    """
    counts = num_tokens_per_expert
    return _activation(FATRELU_AND_MUL, input, out, enable_pdl, expert_ids, expert_step, counts, threshold)


def silu_and_mul_with_clamp(
    input: torch.Tensor,
    limit: float,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,
    num_tokens_per_expert: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute SwiGLU with clamped operands, in float32 and rounded once.

    `out = g * sigmoid(alpha * g) * (u + beta)`, where `g = min(input[..., :d], limit)` and
    `u = clamp(input[..., d:], -limit, limit)`, which keep NaN, as torch.clamp does. By default it is `silu(g) * u`, as
    in DeepSeek V4. The definition is that of vLLM's `SiluAndMulWithClamp.forward_native`
    (vllm/model_executor/layers/activation.py). Unlike vLLM's CUDA kernel, nothing is rounded before the end.

    Args:
        input: `[..., 2 * d]`. It and the arguments below have dtypes, sizes and strides as for `jitnorm.silu_and_mul`.
        limit: zero or more.
        out: `[..., d]`, written. Allocated if None.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        alpha: the factor of the sigmoid's argument.
        beta: added to the clamped factor.
        expert_ids: one id for every `expert_step` rows. Rows of expert -1 are not computed.
        expert_step: how many adjacent rows share an element of expert_ids; 1 or more.
        num_tokens_per_expert: how many rows of each expert are computed, for an input `[experts, max_tokens, ...]`.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.silu_and_mul`.
    """
    operator, counts = SILU_AND_MUL_WITH_CLAMP, num_tokens_per_expert
    return _activation(operator, input, out, enable_pdl, expert_ids, expert_step, counts, limit, alpha, beta)


def swigluoai_and_mul(
    input: torch.Tensor,
    alpha: float = 1.702,
    limit: float = 7.0,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,
    num_tokens_per_expert: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the clamped SwiGLU of gpt-oss, of interleaved gates and factors, in float32 and rounded once.

    `out = g * sigmoid(alpha * g) * (u + 1)`, where `g = min(input[..., 0::2], limit)` and
    `u = clamp(input[..., 1::2], -limit, limit)`, which keep NaN, as torch.clamp does. The definition is that of vLLM's
    `SwigluOAIAndMul.forward_native` (vllm/model_executor/layers/activation.py) and of transformers'
    `GptOssExperts` (models/gpt_oss/modeling_gpt_oss.py). For gates and factors side by side,
    `jitnorm.silu_and_mul_with_clamp` with `alpha=1.702, beta=1.0` computes the same.

    Args:
        input: `[..., 2 * d]`, a gate and its factor in turn. It and the arguments below have dtypes, sizes and strides
            as for `jitnorm.silu_and_mul`.
        alpha: the factor of the sigmoid's argument.
        limit: zero or more.
        out: `[..., d]`, written. Allocated if None.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        expert_ids: one id for every `expert_step` rows. Rows of expert -1 are not computed.
        expert_step: how many adjacent rows share an element of expert_ids; 1 or more.
        num_tokens_per_expert: how many rows of each expert are computed, for an input `[experts, max_tokens, ...]`.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.silu_and_mul`.
    """
    counts = num_tokens_per_expert
    return _activation(SWIGLUOAI_AND_MUL, input, out, enable_pdl, expert_ids, expert_step, counts, limit, alpha, 1.0)


def gelu_new(
    input: torch.Tensor,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,
    num_tokens_per_expert: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `out = x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2`, GELU's tanh approximation.

    Computed in float32 and rounded once. The definition is that of vLLM's `NewGELU` (vllm/model_executor/layers/
    activation.py) and of transformers' `NewGELUActivation`, which round after each step in half precision.

    Args:
        input: `[..., d]`. It and the arguments below have dtypes, sizes and strides as for `jitnorm.silu_and_mul`.
        out: `[..., d]`, written. Allocated if None.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        expert_ids: one id for every `expert_step` rows. Rows of expert -1 are not computed.
        expert_step: how many adjacent rows share an element of expert_ids; 1 or more.
        num_tokens_per_expert: how many rows of each expert are computed, for an input `[experts, max_tokens, ...]`.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.silu_and_mul`.
    """
    return _activation(GELU_NEW, input, out, enable_pdl, expert_ids, expert_step, num_tokens_per_expert)


def gelu_fast(
    input: torch.Tensor,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,
    num_tokens_per_expert: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `out = x * (1 + tanh(x * 0.7978845608 * (1 + 0.044715 x^2))) / 2`, GELU's tanh approximation.

    Computed in float32 and rounded once, with the bits of `jitnorm.gelu_new`: 0.7978845608 is sqrt(2 / pi). The
    definition is that of vLLM's `FastGELU` (vllm/model_executor/layers/activation.py) and of transformers'
    `FastGELUActivation`.

    Args:
        input: `[..., d]`. It and the arguments below have dtypes, sizes and strides as for `jitnorm.silu_and_mul`.
        out: `[..., d]`, written. Allocated if None.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        expert_ids: one id for every `expert_step` rows. Rows of expert -1 are not computed.
        expert_step: how many adjacent rows share an element of expert_ids; 1 or more.
        num_tokens_per_expert: how many rows of each expert are computed, for an input `[experts, max_tokens, ...]`.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.silu_and_mul`.
    """
    return _activation(GELU_FAST, input, out, enable_pdl, expert_ids, expert_step, num_tokens_per_expert)


def quick_gelu(
    input: torch.Tensor,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,
    num_tokens_per_expert: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `out = x * sigmoid(1.702 x)`, a fast approximation of GELU, as in CLIP.

    Computed in float32 and rounded once. The definition is that of vLLM's `QuickGELU` (vllm/model_executor/layers/
    activation.py) and of transformers' `QuickGELUActivation`.

    Args:
        input: `[..., d]`. It and the arguments below have dtypes, sizes and strides as for `jitnorm.silu_and_mul`.
        out: `[..., d]`, written. Allocated if None.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        expert_ids: one id for every `expert_step` rows. Rows of expert -1 are not computed.
        expert_step: how many adjacent rows share an element of expert_ids; 1 or more.
        num_tokens_per_expert: how many rows of each expert are computed, for an input `[experts, max_tokens, ...]`.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.silu_and_mul`.
    """
    return _activation(QUICK_GELU, input, out, enable_pdl, expert_ids, expert_step, num_tokens_per_expert)


def relu2(
    input: torch.Tensor,
    out: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
    *,
    expert_ids: torch.Tensor | None = None,
    expert_step: int = 1,
    num_tokens_per_expert: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `out = max(x, 0)^2`, the squared ReLU, as in Nemotron.

    Computed in float32 and rounded once (So et al., 2021, https://arxiv.org/abs/2109.08668). A NaN is kept. The
    definition is that of vLLM's `ReLUSquaredActivation` (vllm/model_executor/layers/activation.py).

    Args:
        input: `[..., d]`. It and the arguments below have dtypes, sizes and strides as for `jitnorm.silu_and_mul`.
        out: `[..., d]`, written. Allocated if None.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it.
        expert_ids: one id for every `expert_step` rows. Rows of expert -1 are not computed.
        expert_step: how many adjacent rows share an element of expert_ids; 1 or more.
        num_tokens_per_expert: how many rows of each expert are computed, for an input `[experts, max_tokens, ...]`.

    Returns:
        `out`.

    Raises:
        TypeError, ValueError, RuntimeError: as `jitnorm.silu_and_mul`.
    """
    return _activation(RELU2, input, out, enable_pdl, expert_ids, expert_step, num_tokens_per_expert)


def _gated_activation(
    activation: Activation,
    input: torch.Tensor,
    out: torch.Tensor | None,
    enable_pdl: bool | None,
    expert_ids: torch.Tensor | None,
    expert_step: int,
) -> torch.Tensor:
    if _is_dynamo_compiling():
        return _call_torch_op(activation, input, out, expert_ids, expert_step, enable_pdl)
    try:
        if (
            input.__class__ is _Tensor
            and (out is None or out.__class__ is _Tensor)
            and (expert_ids is None or expert_ids.__class__ is _Tensor)
            and (not input.requires_grad or not torch.is_grad_enabled())
        ):
            result = _new_out(input, expert_ids) if out is None else out
            if not activation.fast_cache[input.dtype](input, result, expert_ids, expert_step, enable_pdl):
                return result
    except Exception:  # no kernel yet, or arguments without such attributes: the slow path raises for these
        pass
    return _activation_slow_path(activation, input, out, expert_ids, expert_step, enable_pdl)


def _activation(
    activation: Activation,
    input: torch.Tensor,
    out: torch.Tensor | None,
    enable_pdl: bool | None,
    expert_ids: torch.Tensor | None,
    expert_step: int,
    num_tokens_per_expert: torch.Tensor | None,
    *parameters: float,
) -> torch.Tensor:
    """Do what `_gated_activation` does, for any activation and with counts. More arguments would slow that down."""
    arguments: tuple[Any, ...] = expert_ids, expert_step, enable_pdl, num_tokens_per_expert, *parameters
    if _is_dynamo_compiling():
        return _call_torch_op(activation, input, out, *arguments)
    try:
        if (
            input.__class__ is _Tensor
            and (out is None or out.__class__ is _Tensor)
            and (expert_ids is None or expert_ids.__class__ is _Tensor)
            and (num_tokens_per_expert is None or num_tokens_per_expert.__class__ is _Tensor)
            and (not input.requires_grad or not torch.is_grad_enabled())
        ):
            experts = num_tokens_per_expert if expert_ids is None else expert_ids
            result = _new_out(input, experts, activation.operands) if out is None else out
            if not activation.fast_cache[input.dtype](input, result, *arguments):
                return result
    except Exception:  # as in _gated_activation
        pass
    return _activation_slow_path(activation, input, out, *arguments)


def _rounded(once: Activation, hf: Activation, rounding: object) -> Activation:
    """Return the activation that rounds as the argument `rounding` says."""
    if not isinstance(rounding, str):
        raise TypeError(f"rounding must be a str, got {type(rounding).__name__}")
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be {checks.enumeration(map(repr, ROUNDINGS), 'or')}, got {rounding!r}")
    return hf if rounding == HF else once


def _activation_slow_path(
    activation: Activation,
    input: torch.Tensor,
    out: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    expert_step: int,
    enable_pdl: bool | None,
    num_tokens_per_expert: torch.Tensor | None = None,
    *parameters: float,
) -> torch.Tensor:
    """Check the arguments, then run the right kernel, which is built and cached if need be."""
    traced = needs_dispatcher(input, out, expert_ids, num_tokens_per_expert)
    arguments: tuple[Any, ...] = expert_ids, expert_step, enable_pdl, num_tokens_per_expert, *parameters
    if traced:
        _check_types(activation, input, out, *arguments)
        refuse_torch_func(activation.op, input)
    else:
        check(activation, input, out, *arguments)
    arguments = expert_ids, int(expert_step), enable_pdl, num_tokens_per_expert, *map(float, parameters)
    if traced or needs_grad(input):
        return _call_torch_op(activation, input, out, *arguments)
    experts = num_tokens_per_expert if expert_ids is None else expert_ids
    result = _new_out(input, experts, activation.operands) if out is None else out
    activation.run(input, result, *arguments)
    return result


def _new_out(input: torch.Tensor, experts: object, operands: int = 2) -> torch.Tensor:
    """Return a new `out`. With `experts`, it is zero, because the kernel may skip rows."""
    shape = (*input.shape[:-1], input.shape[-1] // operands)
    return input.new_empty(shape) if experts is None else input.new_zeros(shape)


def check(
    activation: Activation,
    input: Any,
    out: Any,
    expert_ids: Any,
    expert_step: Any,
    enable_pdl: Any,
    num_tokens_per_expert: Any = None,
    *parameters: Any,
) -> None:
    """Raise for arguments that the bindings function in csrc/elementwise/activation.h refuses."""
    arguments = expert_ids, expert_step, enable_pdl, num_tokens_per_expert, *parameters
    _check_types(activation, input, out, *arguments)
    _check_metadata(activation, input, out, expert_ids, expert_step, num_tokens_per_expert)
    checks.supported_device("input", input)
    alignment = checks.vector_bytes(input.shape[-1] // activation.operands * input.itemsize)
    checks.rows("input", input, alignment)
    if out is not None:
        checks.rows("out", out, alignment)
        checks.no_row_overlap("out", out)
        checks.no_overlap("out", out, "input", input, reject_identical=True)
    for name, experts in (("expert_ids", expert_ids), ("num_tokens_per_expert", num_tokens_per_expert)):
        if experts is not None:
            checks.storage(name, experts)
            checks.address(name, experts, experts.element_size())
    rows = math.prod(input.shape[:-1])
    needed = -(-rows // int(expert_step))
    if expert_ids is not None and expert_ids.shape[0] < needed:
        raise ValueError(
            f"expert_ids must have {needed} element{'s' * (needed != 1)} or more, for {rows} rows "
            f"and an expert_step of {expert_step}, got {expert_ids.shape[0]}"
        )
    for name, experts in (("expert_ids", expert_ids), ("num_tokens_per_expert", num_tokens_per_expert)):
        if out is not None and experts is not None:
            checks.no_shared_memory("out", out, name, experts)


def _check_types(
    activation: Activation,
    input: Any,
    out: Any,
    expert_ids: Any,
    expert_step: Any,
    enable_pdl: Any,
    num_tokens_per_expert: Any,
    *parameters: Any,
) -> None:
    """Raise for bad types and parameters. torch's dispatcher would raise with messages that name no argument."""
    checks.tensor("input", input)
    optional = {"out": out, "expert_ids": expert_ids, "num_tokens_per_expert": num_tokens_per_expert}
    for name, value in optional.items():
        if value is not None:
            checks.tensor(name, value)
    checks.integer("expert_step", expert_step)
    checks.enable_pdl(enable_pdl)
    _check_parameters(activation, *parameters)


def _check_parameters(activation: Activation, *parameters: Any) -> None:
    for name, value in zip(activation.parameters, parameters, strict=True):
        checks.number(name, value)
        if name == "limit" and not float(value) >= 0:
            raise ValueError(f"limit must be zero or more, got {value}")


def _check_metadata(
    activation: Activation, input: torch.Tensor, out: Any, expert_ids: Any, expert_step: Any, num_tokens_per_expert: Any
) -> None:
    """Raise for what is wrong with dtypes, shapes and devices; works on fake and meta tensors too."""
    checks.dtype("input", input, DTYPES)
    width = _width(activation, input)
    if out is not None:
        checks.dtype("out", out, (input.dtype,))
        why = "like input" if activation.operands == 1 else "input with half its last dimension"
        checks.shape("out", out, [*input.shape[:-1], width], why)
        checks.device("out", out, "input", input)
    if expert_step < 1:
        raise ValueError(f"expert_step must be 1 or more, got {expert_step}")
    if expert_ids is not None:
        checks.indices("expert_ids", expert_ids, "input", input)
    if num_tokens_per_expert is None:
        return
    if expert_ids is not None:
        raise ValueError("num_tokens_per_expert must be given without expert_ids, got both")
    checks.indices("num_tokens_per_expert", num_tokens_per_expert, "input", input)
    if input.dim() != 3:
        raise ValueError(
            f"input must have shape [experts, max_tokens, columns] with num_tokens_per_expert, got {list(input.shape)}"
        )
    checks.shape("num_tokens_per_expert", num_tokens_per_expert, input.shape[:1], "one number for each expert")


def _width(activation: Activation, input: torch.Tensor) -> int:
    """Return d of the input. ValueError for an odd dimension of two halves, RuntimeError if no kernel supports d."""
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a scalar")
    columns, operands = int(input.shape[-1]), activation.operands
    if columns % operands:
        raise ValueError(f"input must have an even last dimension, gates and factors, got shape {list(input.shape)}")
    if columns:  # for zero columns, no kernel runs
        _check_width(activation.op, columns // operands, input.dtype)
    return columns // operands


def _check_width(op: str, width: int, dtype: torch.dtype) -> None:
    if width * dtype.itemsize % checks.MIN_ACCESS_BYTES or not 1 <= width <= MAX_WIDTH:
        raise RuntimeError(
            f"{op} does not support d = {width} in {str(dtype).removeprefix('torch.')}: "
            f"supported are multiples of {checks.MIN_ACCESS_BYTES // dtype.itemsize} "
            f"up to {checks.power_of_two(MAX_WIDTH)}, where d is the result's last dimension"
        )


def _call_torch_op(
    activation: Activation,
    input: torch.Tensor,
    out: torch.Tensor | None,
    expert_ids: torch.Tensor | None,
    expert_step: int,
    enable_pdl: bool | None,
    num_tokens_per_expert: torch.Tensor | None = None,
    *parameters: float,
) -> torch.Tensor:
    """Call the operator in torch.ops.jitnorm, for tracers and gradients."""
    arguments = *parameters, expert_ids, expert_step, enable_pdl, num_tokens_per_expert
    if out is None:
        operator = getattr(torch.ops.jitnorm, activation.op)
        result: torch.Tensor = operator(input, *arguments)
        return result
    if needs_grad(input):
        raise RuntimeError(f"{activation.op} with out= has no gradient: call it without, or under torch.no_grad()")
    getattr(torch.ops.jitnorm, f"{activation.op}_out")(input, out, *arguments)
    return out


def _register(activation: Activation) -> None:
    """Define two forms in torch.ops.jitnorm: a functional one, which has a gradient, and one that writes into `out`."""
    count, operands = len(activation.parameters), activation.operands

    def run(
        input: Any,
        expert_ids: Any = None,
        expert_step: int = 1,
        enable_pdl: bool | None = None,
        num_tokens_per_expert: Any = None,
        *parameters: float,
    ) -> torch.Tensor:
        arguments = expert_ids, expert_step, enable_pdl, num_tokens_per_expert, *parameters
        experts = num_tokens_per_expert if expert_ids is None else expert_ids
        if input.dim() and activation.try_cached(
            (input.dtype,), input, out := _new_out(input, experts, operands), *arguments
        ):
            return out
        check(activation, input, None, *arguments)
        activation.run(input, out := _new_out(input, experts, operands), *arguments)
        return out

    def run_out(
        input: Any,
        out: Any,
        expert_ids: Any = None,
        expert_step: int = 1,
        enable_pdl: bool | None = None,
        num_tokens_per_expert: Any = None,
        *parameters: float,
    ) -> None:
        arguments = input, out, expert_ids, expert_step, enable_pdl, num_tokens_per_expert, *parameters
        if not activation.try_cached((input.dtype,), *arguments):
            check(activation, *arguments)
            activation.run(*arguments)
        increment_versions(out)

    def fake(input: Any, *arguments: Any) -> torch.Tensor:
        fake_out(input, None, *arguments)
        return _new_out(input, None, operands)

    def fake_out(
        input: Any,
        out: Any,
        expert_ids: Any = None,
        expert_step: int = 1,
        enable_pdl: bool | None = None,
        num_tokens_per_expert: Any = None,
        *parameters: float,
    ) -> None:
        _check_metadata(activation, input, out, expert_ids, expert_step, num_tokens_per_expert)
        _check_parameters(activation, *parameters)
        if width := int(input.shape[-1]) // operands:
            vector = checks.vector_bytes(width * input.itemsize)
            build_while_tracing(activation, input, input.dtype, vector)

    def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        input, *ctx.parameters = inputs[: 1 + count]
        expert_ids, ctx.expert_step, _, num_tokens_per_expert = inputs[1 + count :]
        ctx.save_for_backward(input, expert_ids, num_tokens_per_expert)

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, expert_ids, num_tokens_per_expert = ctx.saved_tensors
        grad_input = _gradient(activation, input, grad, ctx.parameters)
        if expert_ids is not None or num_tokens_per_expert is not None:
            skipped = _skipped(input, expert_ids, ctx.expert_step, num_tokens_per_expert)
            grad_input = torch.where(skipped, 0.0, grad_input)
        return grad_input.to(input.dtype), *(None,) * (count + 4)

    def parameters_last(function: Callable[..., Any], tensors: int) -> Callable[..., Any]:
        """Return `function` as torch calls it: the last arguments, the parameters, follow the first `tensors`."""
        if not count:
            return function

        def call(*arguments: Any) -> Any:
            rest = arguments[tensors + count :]
            rest += (None, 1, None, None)[len(rest) :]  # torch leaves out defaults
            return function(*arguments[:tensors], *rest, *arguments[tensors : tensors + count])

        return call

    rest = "Tensor? expert_ids=None, int expert_step=1, bool? enable_pdl=None, Tensor? num_tokens_per_expert=None"
    rest = ", ".join((*(f"float {name}" for name in activation.parameters), rest))
    name = register(
        f"{activation.op}(Tensor input, {rest}) -> Tensor", parameters_last(run, 1), parameters_last(fake, 1)
    )
    register_autograd(name, backward, save)
    register(
        f"{activation.op}_out(Tensor input, Tensor(a!) out, {rest}) -> ()",
        *(parameters_last(run_out, 2), parameters_last(fake_out, 2)),
    )


def _gradient(
    activation: Activation, input: torch.Tensor, grad: torch.Tensor, parameters: list[float]
) -> torch.Tensor | Any:
    """Return the gradient of the input, in float32."""
    x, grad = input.float(), grad.float()
    if activation.operands == 1:
        return activation.gradient(grad, x)
    if activation.is_interleaved:
        gradients = activation.gradient(grad, x[..., 0::2], x[..., 1::2], *parameters)
        return torch.stack(gradients, dim=-1).flatten(-2)
    return torch.cat(activation.gradient(grad, *x.chunk(2, dim=-1), *parameters), dim=-1)


def _skipped(
    input: torch.Tensor,
    expert_ids: torch.Tensor | None,
    expert_step: int,
    num_tokens_per_expert: torch.Tensor | None,
) -> torch.Tensor:
    """Return a mask of the rows that are not computed, [..., 1]."""
    if num_tokens_per_expert is not None:
        tokens = torch.arange(input.shape[1], device=input.device)
        return (tokens >= num_tokens_per_expert[:, None])[..., None]
    assert expert_ids is not None
    rows = math.prod(input.shape[:-1])
    expert_of_row = expert_ids[torch.arange(rows, device=input.device) // expert_step]
    return (expert_of_row == -1).reshape(*input.shape[:-1], 1)


def _example(activation: Activation, function: Callable[..., torch.Tensor], **arguments: Any) -> Example:
    return Example(
        function,
        lambda shape: {"input": shape.randn(shape.rows, activation.operands * shape.size), **arguments},
        make_outputs=lambda shape: {"out": shape.zeros()},
    )


for _operator, _function, _arguments in (
    (SILU_AND_MUL, silu_and_mul, {}),
    (SILU_AND_MUL_HF, silu_and_mul, {"rounding": HF}),
    (GELU_AND_MUL, gelu_and_mul, {}),
    (GELU_AND_MUL_HF, gelu_and_mul, {"rounding": HF}),
    (GELU_TANH_AND_MUL, gelu_tanh_and_mul, {}),
    (GELU_TANH_AND_MUL_HF, gelu_tanh_and_mul, {"rounding": HF}),
    (MUL_AND_SILU, mul_and_silu, {}),
    (FATRELU_AND_MUL, fatrelu_and_mul, {"threshold": 0.2}),
    (SILU_AND_MUL_WITH_CLAMP, silu_and_mul_with_clamp, {"limit": 0.9}),  # which clamps a third of the gates
    (SWIGLUOAI_AND_MUL, swigluoai_and_mul, {"limit": 0.9}),
    (GELU_NEW, gelu_new, {}),
    (GELU_FAST, gelu_fast, {}),
    (QUICK_GELU, quick_gelu, {}),
    (RELU2, relu2, {}),
):
    _register(_operator)
    EXAMPLES[_operator.op] = _example(_operator, _function, **_arguments)
