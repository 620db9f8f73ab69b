"""A linear layer of float8 numbers: how its input is quantised, and how it is multiplied."""

from __future__ import annotations

import torch
import torch.fx
from torch.autograd import forward_ad

from jitnorm.core import checks
from jitnorm.core.operators import DTYPES
from jitnorm.core.torch_library import mark_constant, needs_grad
from jitnorm.layers.compiler import Compiler, resolve_compiler
from jitnorm.nn import is_rows, may_call_kernels
from jitnorm.quant_fp8 import per_tensor_quant_fp8, per_token_quant_fp8

_E4M3 = torch.float8_e4m3fn
_LARGEST = 448.0
_MULTIPLE = 16  # what torch._scaled_mm asks of both sides of a weight


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
    """`input @ (weight * weight_scale) + bias`, with the input quantised to float8_e4m3fn as well.

    The signature, and which scale the input gets, are those of SGLang's apply_fp8_linear:

    | input_scale | compressed_tensor_quant | use_per_token_if_dynamic | the input's scale |
    |---|---|---|---|
    | given | either | either | that one |
    | None | False | either | found for each token |
    | None | True | True | found for each token |
    | None | True | False | found for the whole tensor |

    With a given scale, compressed_tensor_quant and the compiler "inductor", the input is quantised in plain PyTorch: a
    product with the scale's reciprocal, a clamp and a cast, which inductor fuses with the norm and the residual's
    addition before them into one kernel. Where the product meets a tie the code may differ by one from the kernels',
    which divide. In every other case one of this package's kernels does it, or PyTorch with the same codes where no
    kernel may be called, as under torch.jit.trace and torch.func. An input that is quantised already, as by
    `jitnorm.rmsnorm_quant_fp8`, is taken as it is.

    The product is torch._scaled_mm's on GPUs that multiply float8 (sm_89 and later), for an out_features that is a
    multiple of 16. Elsewhere, on the CPU too, input and weight are dequantised, and multiplied in float32. Scales for
    tokens or channels go into the product for bfloat16 inputs alone, which torch asks for; for others the product is
    float32's and is scaled afterwards.

    Args:
        input: `[..., in_features]`, float16, bfloat16 or float32 of any strides; or float8_e4m3fn with its
            `input_scale`. in_features is a multiple of 16.
        weight: `[in_features, out_features]`, float8_e4m3fn, the transpose of a contiguous matrix, as torch._scaled_mm
            takes it.
        weight_scale: float32, one element or out_features of them.
        input_scale: float32, one element; for an input that is quantised already also one for each token.
        bias: `[out_features]`, of any floating-point dtype.
        compressed_tensor_quant, use_per_token_if_dynamic: see above.
        compiler: what the call is compiled with, "eager" or "inductor"; None for the setting of
            `jitnorm.layers.set_compiler`.

    Returns:
        `[..., out_features]`, of the input's dtype; bfloat16 for one that is quantised already.

    Raises:
        TypeError, ValueError: a dtype, shape or stride that is not accepted; ValueError too for an unknown compiler.
        RuntimeError: in_features is not supported; a gradient is needed, which this has none of.
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
        in_graph = compressed_tensor_quant and compiler == "inductor"
        q, scale = _times_reciprocal(x, input_scale) if in_graph else _per_tensor(x, input_scale), input_scale
    elif use_per_token_if_dynamic or not compressed_tensor_quant:
        q, scale = _per_token(x)
    elif may_call_kernels(x, weight):
        scale = x.new_empty((), dtype=torch.float32)
        q = _per_tensor(x, scale, is_static=False)
    else:
        scale = (torch.cat((_largest(x).flatten(), x.new_zeros(1).float())).amax() / _LARGEST).clamp(min=2.0**-90)
        q = _quotient(x, scale)
    dtype = torch.bfloat16 if input.dtype == _E4M3 else input.dtype
    out = _product(q, weight, scale, weight_scale, bias, dtype)
    return out.reshape(*input.shape[:-1], weight.shape[1])


def _times_reciprocal(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() * scale.reciprocal()).clamp(-_LARGEST, _LARGEST).to(_E4M3).contiguous()


def _quotient(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The kernels' codes in plain PyTorch, for what cannot call a kernel."""
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(_E4M3).contiguous()


def _largest(x: torch.Tensor) -> torch.Tensor:
    """Of each row the largest magnitude, NaNs not counted, in float32."""
    return x.float().abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=-1, keepdim=True)


def _per_tensor(x: torch.Tensor, scale: torch.Tensor, is_static: bool = True) -> torch.Tensor:
    if is_static and not may_call_kernels(x, scale):
        return _quotient(x, scale)
    q = torch.empty(x.shape, dtype=_E4M3, device=x.device)
    per_tensor_quant_fp8(x if is_rows(x) and x.is_contiguous() else _copy(x), q, scale, is_static)
    return q


def _per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes and each row's scale."""
    if not may_call_kernels(x, x):
        scale = (_largest(x) / _LARGEST).clamp(min=1 / (_LARGEST * 512))
        return _quotient(x, scale), scale
    scale = x.new_empty((x.shape[0], 1), dtype=torch.float32)
    q = torch.empty(x.shape, dtype=_E4M3, device=x.device)
    per_token_quant_fp8(x if is_rows(x) else _copy(x), q, scale)
    return q, scale


def _copy(x: torch.Tensor) -> torch.Tensor:
    """In strides and at an address that every kernel takes."""
    return x.clone(memory_format=torch.contiguous_format)


def _product(
    q: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`(q * scale) @ (weight * weight_scale) + bias`, rounded to `dtype`."""
    whole = scale.numel() == 1 and scale.dim() < 2 and weight_scale.numel() == 1
    rows, columns = scale.reshape(-1, 1), weight_scale.reshape(1, -1)
    if q.numel() == 0 or not _multiplies_float8(q.device, weight.shape[1]):
        out = (q.float() * rows) @ (weight.float() * columns)
    elif whole and dtype != torch.float32:
        fused = bias if bias is not None and bias.dtype == dtype else None
        out = _scaled_mm(q, weight, scale.reshape(()), weight_scale.reshape(()), fused, dtype)
        bias = bias if fused is None else None
    elif dtype == torch.bfloat16 and not whole:
        fused = bias if bias is not None and bias.dtype == dtype else None
        rows = rows.expand(q.shape[0], 1).contiguous()
        columns = columns.expand(1, weight.shape[1]).contiguous()
        out = _scaled_mm(q, weight, rows, columns, fused, dtype)
        bias = bias if fused is None else None
    else:
        one = torch.ones((), dtype=torch.float32, device=q.device)
        out = _scaled_mm(q, weight, one, one, None, torch.float32) * rows * columns
    return (out if bias is None else out + bias).to(dtype)


def _scaled_mm(
    q: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    out: torch.Tensor = torch._scaled_mm(q, weight, scale_a=scale, scale_b=weight_scale, bias=bias, out_dtype=dtype)
    return out


def _multiplies_float8(device: torch.device, out_features: int) -> bool:
    return device.type == "cuda" and out_features % _MULTIPLE == 0 and _has_float8_products(device.index)


def _has_float8_products(device: int | None) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


mark_constant(_has_float8_products)


def _check(
    input: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """What the kernels and torch do not say in one line."""
    tensors = {"weight": weight, "weight_scale": weight_scale}
    tensors |= {name: t for name, t in (("input_scale", input_scale), ("bias", bias)) if t is not None}
    checks.tensor("input", input)
    if input.dim() == 0:
        raise ValueError("input must have at least one dimension, got a scalar")
    checks.dtype("input", input, (*DTYPES, _E4M3))
    for name, value in tensors.items():
        checks.tensor(name, value)
        checks.device(name, value, "input", input)
    checks.dtype("weight", weight, (_E4M3,))
    in_features = input.shape[-1]
    if weight.dim() != 2 or weight.shape[0] != in_features:
        raise ValueError(f"weight must have shape [{in_features}, out_features], got {list(weight.shape)}")
    if in_features % _MULTIPLE or in_features == 0:
        raise RuntimeError(
            f"apply_fp8_linear does not support in_features {in_features}: supported are multiples of {_MULTIPLE}"
        )
    if not weight.t().is_contiguous():
        raise ValueError(
            "weight must be the transpose of a contiguous [out_features, in_features], "
            f"got shape {list(weight.shape)} and strides {list(weight.stride())}"
        )
    tokens = input.numel() // in_features
    _check_scale("weight_scale", weight_scale, weight.shape[1], "out_features")
    if input_scale is not None:
        _check_scale("input_scale", input_scale, tokens if input.dtype == _E4M3 else 1, "tokens")
    elif input.dtype == _E4M3:
        raise ValueError("input_scale must be given for an input that is quantised already, got None")
    if bias is not None:
        checks.shape("bias", bias, [weight.shape[1]], "one for each of out_features")
    if needs_grad(input, bias, weight_scale, input_scale) or forward_ad._current_level >= 0:
        raise RuntimeError("apply_fp8_linear has no gradient: call it under torch.no_grad()")


def _check_scale(name: str, scale: torch.Tensor, many: int, what: str) -> None:
    checks.dtype(name, scale, (torch.float32,))
    if scale.numel() not in (1, many):
        accepted = "one element" if many == 1 else f"one element or {many}, one for each of {what}"
        raise ValueError(f"{name} must have {accepted}, got shape {list(scale.shape)}")
