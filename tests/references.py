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


def _layernorm(a: Arguments) -> torch.Tensor:
    """Return LayerNorm in float64, from its definition."""
    x = a["input"].double()
    differences = x - x.mean(-1, keepdim=True)
    y = differences / torch.sqrt((differences**2).mean(-1, keepdim=True) + 1e-6)
    return y * a["weight"].double() + a["bias"].double()


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


def _dual(a: Arguments) -> Results:
    return tuple(rmsnorm_reference(a[f"input{i}"], a[f"weight{i}"], 1e-6) for i in (1, 2))


def mrope_axes(section: Any, is_interleaved: bool) -> torch.Tensor:
    """Return which of a token's three positions rotates each pair, as vLLM's MRotaryEmbedding chooses them."""
    if not is_interleaved:
        return torch.repeat_interleave(torch.arange(3), torch.tensor(section))
    axes = torch.zeros(sum(section), dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : section[axis] * 3 : 3] = axis
    return axes


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """Return `[tokens, heads, head_dim]`, float64, rotated by `[tokens, rotary_dim / 2]` cosines and sines."""
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    rotary, rest = x.split((2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]), dim=-1)
    a, b = rotary.chunk(2, -1) if is_neox else (rotary[..., ::2], rotary[..., 1::2])
    pairs = (a * cos - b * sin, b * cos + a * sin)
    together = torch.cat(pairs, -1) if is_neox else torch.stack(pairs, -1).flatten(-2)
    return torch.cat((together, rest), -1)


def qk_norm_rope(a: Arguments) -> Results:
    """Return q and k in float64; with rounding="each_step" after each step rounded to their dtype."""
    rows = a["cos_sin_cache"][a["positions"].long()]
    if a["positions"].dim() == 2:
        axes = mrope_axes(a["mrope_section"], a.get("mrope_interleaved", False)).to(rows.device).repeat(2)
        rows = rows.gather(0, axes.expand(1, *rows.shape[1:]))[0]
    cos, sin = rows.chunk(2, -1)

    def step(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return x.to(dtype).double() if a.get("rounding") == "each_step" else x

    results = []
    for name in ("q", "k"):
        x, weight = a[name].double(), a.get(f"{name}_weight")
        if weight is not None:
            x = rmsnorm_reference(x, weight.double() + a.get("weight_offset", 0.0), a.get("eps", 1e-6))
            x = step(x, a[name].dtype)
        results.append(step(rotated(x, cos, sin, a.get("is_neox", True)), a[name].dtype))
    return tuple(results)


def _store_heads(a: Arguments) -> Results:
    caches = []
    for name in ("k", "v"):
        cache, slots = a[f"{name}_cache"].double(), a["indices"]
        cache[slots // cache.shape[1], slots % cache.shape[1]] = a[name].double()
        caches.append(cache)
    return tuple(caches)


def _qk_norm_rope_store(a: Arguments) -> Results:
    q, k = qk_norm_rope(a)
    caches = []
    for name, rows in (("k_cache", k), ("v_cache", a["v"].double())):
        cache = a[name].double()
        cache[a["slot_mapping"]] = rows
        caches.append(cache)
    return q, k, *caches


def _gated(activation: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Arguments], Results]:
    """Return the reference of an activation with a product, which with rounding="hf" rounds the activation's result."""

    def reference(a: Arguments) -> Results:
        gate, up = a["input"].double().chunk(2, -1)
        activated = activation(gate)
        if a.get("rounding") == "hf":
            activated = activated.to(a["input"].dtype).double()
        return (activated * up,)

    return reference


def _clamped(a: Arguments, gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float) -> Results:
    gate, up = gate.double().clamp(max=a["limit"]), up.double().clamp(-a["limit"], a["limit"])
    return (gate * torch.sigmoid(alpha * gate) * (up + beta),)


def _mul_and_silu(a: Arguments) -> Results:
    gate, up = a["input"].double().chunk(2, -1)
    return (gate * up / (1 + torch.exp(-up)),)


def gated_norm(a: Arguments) -> Results:
    """Return a norm beside a gate in float64; with rounding="hf" after each step in which transformers rounds."""
    x, gate, weight = a["input"].double(), a["gate"].double(), a.get("weight")
    sigmoid = 1 / (1 + torch.exp(-gate))
    activated = sigmoid if a.get("activation") == "sigmoid" else gate * sigmoid
    norm_before_gate, dtype = a.get("norm_before_gate", True), a["input"].dtype
    groups = (x if norm_before_gate else x * activated).unflatten(-1, (-1, a.get("group_size") or x.shape[-1]))
    y = (groups / torch.sqrt((groups * groups).mean(-1, keepdim=True) + a.get("eps", 1e-6))).flatten(-2)

    def step(y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return y.to(dtype).double() if a.get("rounding") == "hf" else y

    y = step(y, dtype)
    if weight is not None:
        y = y * weight.double().repeat(x.shape[-1] // weight.shape[-1])
        y = step(y, dtype) if weight.dtype == dtype else y
    return (y * activated if norm_before_gate else y,)


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
    "fused_add_rmsnorm_fp32_residual": lambda a: (_norm(a, _sum(a)), _sum(a)),
    "gemma_fused_add_rmsnorm": lambda a: (_norm(a, _sum(a), 1.0), _sum(a)),
    "gemma_fused_add_rmsnorm_round_sum": lambda a: (_norm(a, _rounded_sum(a), 1.0), _rounded_sum(a)),
    "gemma_fused_add_rmsnorm_fp32_residual": lambda a: (_norm(a, _sum(a), 1.0), _sum(a)),
    "gated_rmsnorm": gated_norm,
    "gated_rmsnorm_gate_first": gated_norm,
    "rmsnorm_quant_fp8": lambda a: _static(_norm(a, a["input"]), a["scale"]),
    "rmsnorm_quant_fp8_dynamic": lambda a: _dynamic(_norm(a, a["input"])),
    "fused_add_rmsnorm_quant_fp8": lambda a: (*_static(_norm(a, _sum(a)), a["scale"]), _sum(a)),
    "fused_add_rmsnorm_quant_fp8_dynamic": lambda a: (*_dynamic(_norm(a, _sum(a))), _sum(a)),
    "layernorm": lambda a: (_layernorm(a),),
    "layernorm_quant_fp8": lambda a: _static(_layernorm(a), a["scale"]),
    "per_tensor_quant_fp8": lambda a: _static(a["input"].double(), a["output_s"])[:1],
    "per_tensor_quant_fp8_dynamic": _per_tensor_dynamic,
    "per_token_quant_fp8": lambda a: _dynamic(a["input"].double()),
    "fused_inplace_qknorm": _qknorm,
    "dual_rmsnorm": _dual,
    "qk_norm_rope_store": _qk_norm_rope_store,
    "rope": _qk_norm_rope_store,
    "silu_and_mul": _gated(lambda x: x / (1 + torch.exp(-x))),
    "gelu_and_mul": _gated(_gelu),
    "gelu_tanh_and_mul": _gated(_gelu_tanh),
    "silu_and_mul_hf": _gated(lambda x: x / (1 + torch.exp(-x))),
    "gelu_and_mul_hf": _gated(_gelu),
    "gelu_tanh_and_mul_hf": _gated(_gelu_tanh),
    "mul_and_silu": _mul_and_silu,
    "fatrelu_and_mul": lambda a: _gated(lambda x: torch.where(x > a["threshold"], x, 0.0))(a),
    "silu_and_mul_with_clamp": lambda a: _clamped(a, *a["input"].chunk(2, -1), 1.0, 0.0),
    "swigluoai_and_mul": lambda a: _clamped(a, a["input"][..., ::2], a["input"][..., 1::2], 1.702, 1.0),
    "gelu_new": lambda a: (_gelu_tanh(a["input"].double()),),
    "gelu_fast": lambda a: (_gelu_tanh(a["input"].double()),),
    "quick_gelu": lambda a: (a["input"].double() / (1 + torch.exp(-1.702 * a["input"].double())),),
    "relu2": lambda a: (a["input"].double().clamp(min=0) ** 2,),
    "store_cache": _store_cache,
    "store_cache_heads": _store_heads,
}


def _general(of: Callable[[Arguments], Results]) -> Callable[[Arguments], Results]:
    """Return the reference of a general norm: that of the norm which it is general for."""
    return lambda a: of({name: value for name, value in a.items() if name != "weight_offset"})


REFERENCES |= {
    f"general_{op}": _general(reference)
    for op, reference in list(REFERENCES.items())
    if op.endswith(("rmsnorm", "rmsnorm_round_sum", "rmsnorm_fp32_residual"))
}
