"""A reference implementation of every operator, in float64 and from its definition, by its name in the registry.

Each takes the arguments of the operator's example call, and returns what `Example.run` returns: the function's results,
then the arguments that it writes. Of float8 results it returns what they approximate, before their rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from helpers import rmsnorm_reference

E4M3_MAX = 448.0
MIN_ROW_SCALE, MIN_TENSOR_SCALE = 1 / (E4M3_MAX * 512), 2.0**-90

Arguments = dict[str, Any]
Results = tuple[torch.Tensor, ...]


def _norm(a: Arguments, x: torch.Tensor, offset: float = 0.0) -> torch.Tensor:
    return rmsnorm_reference(x, a["weight"].double() + offset, 1e-6)


def _sum(a: Arguments) -> torch.Tensor:
    return a["input"].double() + a["residual"].double()


def _rounded_sum(a: Arguments) -> torch.Tensor:
    return _sum(a).to(a["residual"].dtype)


def _row_scales(y: torch.Tensor) -> torch.Tensor:
    return (y.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=MIN_ROW_SCALE)


def _static(y: torch.Tensor, scale: torch.Tensor) -> Results:
    return (y / scale.double()).clamp(-E4M3_MAX, E4M3_MAX), scale


def _dynamic(y: torch.Tensor) -> Results:
    scales = _row_scales(y)
    return y / scales, scales


def _per_tensor_dynamic(a: Arguments) -> Results:
    x = a["input"].double()
    scale = (x.abs().amax() / E4M3_MAX).clamp(min=MIN_TENSOR_SCALE).reshape(1)
    return x / scale, scale


def _qknorm(a: Arguments) -> Results:
    return tuple(rmsnorm_reference(a[name], a[f"{name}_weight"], 1e-6) for name in ("q", "k"))


def _gated(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Arguments], Results]:
    def reference(a: Arguments) -> Results:
        gate, up = a["input"].double().chunk(2, -1)
        return (activation(gate) * up,)

    return reference


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


def _store_cache(a: Arguments) -> Results:
    caches = []
    for name in ("k", "v"):
        cache = a[f"{name}_cache"].double()
        cache[a["indices"]] = a[name].double()
        caches.append(cache)
    return tuple(caches)


REFERENCES: dict[str, Callable[[Arguments], Results]] = {
    "rmsnorm": lambda a: (_norm(a, a["input"]),),
    "gemma_rmsnorm": lambda a: (_norm(a, a["input"], 1.0),),
    "fused_add_rmsnorm": lambda a: (_norm(a, _sum(a)), _sum(a)),
    "fused_add_rmsnorm_round_sum": lambda a: (_norm(a, _rounded_sum(a)), _rounded_sum(a)),
    "gemma_fused_add_rmsnorm": lambda a: (_norm(a, _sum(a), 1.0), _sum(a)),
    "gemma_fused_add_rmsnorm_round_sum": lambda a: (_norm(a, _rounded_sum(a), 1.0), _rounded_sum(a)),
    "rmsnorm_quant_fp8": lambda a: _static(_norm(a, a["input"]), a["scale"]),
    "rmsnorm_quant_fp8_dynamic": lambda a: _dynamic(_norm(a, a["input"])),
    "fused_add_rmsnorm_quant_fp8": lambda a: (*_static(_norm(a, _sum(a)), a["scale"]), _sum(a)),
    "fused_add_rmsnorm_quant_fp8_dynamic": lambda a: (*_dynamic(_norm(a, _sum(a))), _sum(a)),
    "per_tensor_quant_fp8": lambda a: _static(a["input"].double(), a["output_s"])[:1],
    "per_tensor_quant_fp8_dynamic": _per_tensor_dynamic,
    "per_token_quant_fp8": lambda a: _dynamic(a["input"].double()),
    "fused_inplace_qknorm": _qknorm,
    "silu_and_mul": _gated(lambda x: x / (1 + torch.exp(-x))),
    "gelu_and_mul": _gated(_gelu),
    "gelu_tanh_and_mul": _gated(_gelu_tanh),
    "store_cache": _store_cache,
}
