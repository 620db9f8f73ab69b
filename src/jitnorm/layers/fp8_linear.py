"""A float8 linear layer: the quantisation of its input and the GEMM."""

from __future__ import annotations

import torch
import torch.fx
from torch.autograd import forward_ad

from jitnorm.core import checks
from jitnorm.core.eligibility import can_call_operators, has_kernel_layout
from jitnorm.core.operators import DTYPES
from jitnorm.core.torch_library import mark_constant, needs_grad
from jitnorm.layers.compiler import Compiler, resolve_compiler
from jitnorm.quant_fp8 import per_tensor_quant_fp8, per_token_quant_fp8

_E4M3 = torch.float8_e4m3fn
_E4M3_MAX = 448.0
_MIN_SCALE_PER_TENSOR = 2.0**-90  # as in the kernels: kMinTensorScale and kMinTokenScale in quantise.h
_MIN_SCALE_PER_TOKEN = 1 / (_E4M3_MAX * 512)
_FEATURES_MULTIPLE = 16  # what torch._scaled_mm requires of both sides of a weight


def apply_fp8_linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    compressed_tensor_quant: bool = False,
    use_per_token_if_dynamic: bool = False,
    compiler: Compiler | None = None,
) -> torch.Tensor:
    """Compute `input @ (weight * weight_scale) + bias`, with the input quantised to float8_e4m3fn as well.

    The signature and the choice of the input's scale are those of SGLang's apply_fp8_linear:

    | input_scale | compressed_tensor_quant | use_per_token_if_dynamic | the input's scale |
    |---|---|---|---|
    | given | either | either | `input_scale` |
    | None | False | either | dynamic, per token |
    | None | True | True | dynamic, per token |
    | None | True | False | dynamic, per tensor |

    The input is quantised by this package's kernels, with one exception: with a given scale, compressed_tensor_quant
    and the compiler "inductor", it is quantised in plain PyTorch, as a multiplication by the scale's reciprocal, a
    clamp and a cast. Inductor fuses these into one kernel with the norm and the residual addition before them. On a
    tie, the float8 value may differ by one step from the kernels', which divide. If no kernel may be called, as under
    torch.jit.trace and torch.func, PyTorch computes the same values as the kernels. An input that is already quantised,
    as by `jitnorm.rmsnorm_quant_fp8`, is used as it is.

    torch._scaled_mm computes the GEMM on GPUs with float8 tensor cores (sm_89 and later), if out_features is a
    multiple of 16. Elsewhere, on the CPU too, input and weight are dequantised and multiplied in float32.
    torch._scaled_mm accepts scales per token and per channel for bfloat16 outputs only; for other dtypes it returns
    float32, which is scaled afterwards.

    Args:
        input: `[..., in_features]`, float16, bfloat16 or float32 of any strides; or float8_e4m3fn with its
            `input_scale`. in_features is a multiple of 16.
        weight: `[in_features, out_features]`, float8_e4m3fn, the transpose of a contiguous matrix, as torch._scaled_mm
            takes it.
        weight_scale: float32, one element or out_features of them.
        input_scale: float32, one element; for an input that is already quantised, also one for each token.
        bias: `[out_features]`, of any floating-point dtype.
        compressed_tensor_quant: see above.
        use_per_token_if_dynamic: see above.
        compiler: what compiles the call, "eager" or "inductor"; None for the setting of
            `jitnorm.layers.set_compiler`.

    Returns:
        `[..., out_features]`, of the input's dtype; bfloat16 for an input that is already quantised.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: a shape, stride or device is not accepted, or there is no such compiler.
        RuntimeError: in_features is not supported, or a gradient is needed, which this function does not have.
    """
    if isinstance(input, torch.fx.Proxy):  # torch.fx.symbolic_trace records the call as it is
        arguments = input, weight, weight_scale, input_scale, bias
        options = compressed_tensor_quant, use_per_token_if_dynamic, compiler
        return torch.overrides.handle_torch_function(apply_fp8_linear, (input,), *arguments, *options)
    compiler = resolve_compiler(compiler)
    _check(input, weight, weight_scale, input_scale, bias)
    x = input.reshape(-1, input.shape[-1])
    if input.dtype == _E4M3 and input_scale is not None:
        q, scale = x.contiguous(), input_scale
    elif input_scale is not None:
        quantise = _quantise_fusible if compressed_tensor_quant and compiler == "inductor" else _quantise_static
        q, scale = quantise(x, input_scale), input_scale
    elif use_per_token_if_dynamic or not compressed_tensor_quant:
        q, scale = _quantise_per_token(x)
    else:
        q, scale = _quantise_per_tensor(x)
    dtype = torch.bfloat16 if input.dtype == _E4M3 else input.dtype
    out = _multiply(q, weight, scale, weight_scale, bias, dtype)
    return out.reshape(*input.shape[:-1], weight.shape[1])


def _quantise_fusible(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the float8 values of `x / scale`, by operations that inductor fuses with those before them."""
    return (x.float() * scale.reciprocal()).clamp(-_E4M3_MAX, _E4M3_MAX).to(_E4M3).contiguous()


def _quantise_static(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the float8 values of `x / scale`."""
    if not can_call_operators(x, scale):
        return _quantise_in_torch(x, scale)
    return _call_per_tensor_kernel(x, scale, is_static=True)


def _quantise_per_tensor(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the float8 values, and the scale of the whole tensor."""
    if not can_call_operators(x, x):
        with_zero = torch.cat((_max_magnitude(x).flatten(), x.new_zeros(1).float()))  # amax needs an element
        scale = (with_zero.amax() / _E4M3_MAX).clamp(min=_MIN_SCALE_PER_TENSOR)
        return _quantise_in_torch(x, scale), scale
    scale = x.new_empty((), dtype=torch.float32)
    return _call_per_tensor_kernel(x, scale, is_static=False), scale


def _quantise_per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the float8 values, and the scale of each row, `[tokens, 1]`."""
    if not can_call_operators(x, x):
        scale = (_max_magnitude(x) / _E4M3_MAX).clamp(min=_MIN_SCALE_PER_TOKEN)
        return _quantise_in_torch(x, scale), scale
    scale = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    q = torch.empty(x.shape, dtype=_E4M3, device=x.device)
    per_token_quant_fp8(x if has_kernel_layout(x) else _contiguous_copy(x), q, scale)
    return q, scale


def _call_per_tensor_kernel(x: torch.Tensor, scale: torch.Tensor, is_static: bool) -> torch.Tensor:
    q = torch.empty(x.shape, dtype=_E4M3, device=x.device)
    x = x if x.is_contiguous() and has_kernel_layout(x) else _contiguous_copy(x)
    per_tensor_quant_fp8(x, q, scale, is_static)
    return q


def _quantise_in_torch(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the same float8 values as the kernels, for calls that may not call one."""
    return (x.float() / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(_E4M3).contiguous()


def _max_magnitude(x: torch.Tensor) -> torch.Tensor:
    """Return each row's largest magnitude in float32, ignoring NaNs."""
    return x.float().abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=-1, keepdim=True)


def _contiguous_copy(x: torch.Tensor) -> torch.Tensor:
    """Return a copy with strides and an alignment that every kernel accepts."""
    return x.clone(memory_format=torch.contiguous_format)


def _multiply(
    q: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return `(q * scale) @ (weight * weight_scale) + bias`, rounded to `dtype`."""
    is_per_tensor = scale.numel() == 1 and scale.dim() < 2 and weight_scale.numel() == 1
    rows, columns = scale.reshape(-1, 1), weight_scale.reshape(1, -1)
    if q.numel() == 0 or not _has_float8_gemm(q.device, weight.shape[1]):
        out = (q.float() * rows) @ (weight.float() * columns)
    elif dtype == torch.float32 or (dtype == torch.float16 and not is_per_tensor):
        one = torch.ones((), dtype=torch.float32, device=q.device)
        out = torch._scaled_mm(q, weight, scale_a=one, scale_b=one, out_dtype=torch.float32) * rows * columns
    else:
        if is_per_tensor:
            scales = scale.reshape(()), weight_scale.reshape(())
        else:
            scales = rows.expand(q.shape[0], 1).contiguous(), columns.expand(1, weight.shape[1]).contiguous()
        fused = bias if bias is not None and bias.dtype == dtype else None
        out = torch._scaled_mm(q, weight, scale_a=scales[0], scale_b=scales[1], bias=fused, out_dtype=dtype)
        bias = bias if fused is None else None
    return (out if bias is None else out + bias).to(dtype)


def _has_float8_gemm(device: torch.device, out_features: int) -> bool:
    """Return whether torch._scaled_mm can compute the GEMM."""
    return device.type == "cuda" and out_features % _FEATURES_MULTIPLE == 0 and _has_float8_cores(device.index)


def _has_float8_cores(device: int | None) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


mark_constant(_has_float8_cores)


def _check(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Raise for arguments that are not accepted, naming them as the caller did."""
    checks.tensor("input", input)
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a scalar")
    checks.dtype("input", input, (*DTYPES, _E4M3))
    others = {"weight": weight, "weight_scale": weight_scale}
    others |= {name: t for name, t in (("input_scale", input_scale), ("bias", bias)) if t is not None}
    for name, value in others.items():
        checks.tensor(name, value)
        checks.device(name, value, "input", input)
    checks.dtype("weight", weight, (_E4M3,))
    in_features = input.shape[-1]
    if weight.dim() != 2 or weight.shape[0] != in_features:
        raise ValueError(f"weight must have shape [{in_features}, out_features], got {list(weight.shape)}")
    if in_features % _FEATURES_MULTIPLE or in_features == 0:
        raise RuntimeError(
            f"apply_fp8_linear does not support in_features {in_features}: supported are multiples of "
            f"{_FEATURES_MULTIPLE}"
        )
    if not weight.t().is_contiguous():
        raise ValueError(
            "weight must be the transpose of a contiguous [out_features, in_features], "
            f"got shape {list(weight.shape)} and strides {list(weight.stride())}"
        )
    _check_scale("weight_scale", weight_scale, weight.shape[1], "out_features")
    if input_scale is not None:
        tokens = input.numel() // in_features
        _check_scale("input_scale", input_scale, tokens if input.dtype == _E4M3 else 1, "tokens")
    elif input.dtype == _E4M3:
        raise ValueError("input_scale must be given for an input that is already quantised, got None")
    if bias is not None:
        checks.shape("bias", bias, [weight.shape[1]], "one for each of out_features")
    if needs_grad(input, bias, weight_scale, input_scale) or forward_ad._current_level >= 0:
        raise RuntimeError("apply_fp8_linear has no gradient: call it under torch.no_grad()")


def _check_scale(name: str, scale: torch.Tensor, max_elements: int, dimension: str) -> None:
    checks.dtype(name, scale, (torch.float32,))
    if scale.numel() not in (1, max_elements):
        accepted = "one element"
        if max_elements != 1:
            accepted += f" or {max_elements}, one for each of {dimension}"
        raise ValueError(f"{name} must have {accepted}, got shape {list(scale.shape)}")
