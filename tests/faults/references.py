"""What the operators should compute, in float64 from their definitions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fp8_reference import codes, encode, quotient
from references import qk_norm_rope

# Relative, of one rounding to the dtype and float32's own on the way.
_TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
_LEAST_SCALE = torch.tensor(1.0) / (448 * 512)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: Any, offset: float = 0.0) -> torch.Tensor:
    x = x.double()
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + float(eps)) * (weight.double() + offset)


def _differs(name: str, out: torch.Tensor, expected: torch.Tensor, error: torch.Tensor | float = 0.0) -> Iterator[str]:
    """Yield where a result is too far from its reference, NaNs and infinities included."""
    if out.shape != expected.shape:
        yield f"{name} has shape {list(out.shape)}, not {list(expected.shape)}"
        return
    rounded = expected.to(out.dtype).double()
    got = out.detach().double()
    same = (got == rounded) | (got.isnan() & rounded.isnan())
    # Beside its own size: what is lost where terms of a row cancel, and what float32 and float16 flush.
    room = expected.abs() * _TOLERANCE[out.dtype] + 1e-7 + error
    bad = ~(same | ((got - expected).abs() <= room))
    if bool(bad.any()):
        at = bad.nonzero()[0].tolist()
        yield f"{name}{at} is {float(got[tuple(at)])}, and should be {float(expected[tuple(at)])}"


def _bytes(value: torch.Tensor) -> torch.Tensor:
    """Return what a tensor means, byte by byte. `contiguous` would keep odd strides of dimensions of one element."""
    copied = torch.empty(value.shape, dtype=value.dtype)
    return copied.copy_(value.detach()).flatten().view(torch.uint8)


def _differs_exactly(name: str, out: torch.Tensor, expected: torch.Tensor) -> Iterator[str]:
    if out.shape != expected.shape or not torch.equal(_bytes(out), _bytes(expected)):
        yield f"{name} differs in its bytes"


def _differs_in_codes(name: str, out: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> Iterator[str]:
    """Of a norm's float8 output: a code next to a tie may be either."""
    exact = values / scale.double()
    got = codes(out).reshape(exact.shape)
    accepted = [encode(exact * (1 + slack)) for slack in (0.0, -1e-5, 1e-5)]
    ok = exact.isnan() | (exact.abs() < 1e-9)
    for code in accepted:
        ok |= got == code
    if bool((~ok).any()):
        at = (~ok).nonzero()[0].tolist()
        yield f"{name}{at} is code {int(got[tuple(at)])}, of {float(exact[tuple(at)])}"


def compare(operator: str, before: dict[str, Any], after: dict[str, Any], result: Any) -> Iterator[str]:
    """Yield what is wrong with an accepted call's results, from its arguments before and after."""
    if operator != "store_cache" and any(_is_beyond_float32(value) for value in before.values()):
        return
    yield from _COMPARE[operator](operator, before, after, result)


def _is_beyond_float32(value: Any) -> bool:
    """Whether squares of a tensor's numbers, of which the memory may hold other things too, overflow in float32."""
    if not isinstance(value, torch.Tensor) or value.dtype not in _TOLERANCE:
        return False
    return bool(((value.abs() > 1e15) & value.isfinite()).any())


def _compare_norm(operator: str, before: dict[str, Any], after: dict[str, Any], result: Any) -> Iterator[str]:
    offset = 1.0 if operator.startswith("gemma") else 0.0
    expected = _norm(before["input"], before["weight"], before["eps"], offset)
    if after["out"] is not None and result is not after["out"]:
        yield "out is not what is returned"
    yield from _differs("out", result, expected)


def _compare_fused(operator: str, before: dict[str, Any], after: dict[str, Any], result: Any) -> Iterator[str]:
    total = before["input"].float() + before["residual"].float()
    rounded = total.to(before["residual"].dtype)
    offset = 1.0 if operator.startswith("gemma") else 0.0
    source = rounded if before["round_sum"] else total
    yield from _differs_exactly("residual", after["residual"], rounded)
    yield from _differs("input", after["input"], _norm(source, before["weight"], before["eps"], offset))


def _compare_quant_norm(operator: str, before: dict[str, Any], after: dict[str, Any], result: Any) -> Iterator[str]:
    source = before["input"].float()
    if "residual" in before:
        source = source + before["residual"].float()
        yield from _differs_exactly("residual", after["residual"], source.to(before["residual"].dtype))
    y = _norm(source, before["weight"], before["eps"])
    out, scale = result
    if before["scale"] is None:
        expected = torch.maximum(y.abs().amax(dim=-1, keepdim=True) / 448, _LEAST_SCALE.double())
        got = scale.reshape(expected.shape)
        near = (got.double() - expected).abs() <= expected * 1e-5
        if not bool((near | expected.isnan()).all()):
            yield f"scales are {got.flatten()[:4].tolist()}, and should be {expected.flatten()[:4].tolist()}"
        yield from _differs_in_codes("out", out, y, got)
    else:
        yield from _differs_in_codes("out", out, y, before["scale"].reshape(()))


def _compare_qknorm(operator: str, before: dict[str, Any], after: dict[str, Any], result: Any) -> Iterator[str]:
    for name in ("q", "k"):
        yield from _differs(name, after[name], _norm(before[name], before[f"{name}_weight"], before["eps"]))


_ACTIVATIONS = {
    "silu_and_mul": lambda x: x / (1 + torch.exp(-x)),
    "gelu_and_mul": lambda x: x * torch.special.erfc(-x * 0.5**0.5) / 2,
    "gelu_tanh_and_mul": lambda x: x / (1 + torch.exp(-2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
}


def _compare_activation(operator: str, before: dict[str, Any], after: dict[str, Any], result: Any) -> Iterator[str]:
    gate, up = before["input"].double().chunk(2, dim=-1)
    expected = _ACTIVATIONS[operator](gate) * up
    if after["out"] is not None and result is not after["out"]:
        yield "out is not what is returned"
    ids = before["expert_ids"]
    if ids is not None and expected.numel():
        rows = expected.numel() // expected.shape[-1]
        numbers = ids.to(torch.int64)
        each = torch.tensor([int(numbers[i // int(before["expert_step"])]) for i in range(rows)])
        skipped = (each == -1).reshape(*expected.shape[:-1], 1)
        kept = torch.zeros_like(expected) if before["out"] is None else before["out"].double()
        expected = torch.where(skipped, kept, expected)
    yield from _differs("out", result, expected)


def _compare_store(operator: str, before: dict[str, Any], after: dict[str, Any], result: Any) -> Iterator[str]:
    for name in ("k", "v"):
        expected = before[f"{name}_cache"].clone()
        flat = expected.reshape(expected.shape[0], -1)
        rows = before[name].reshape(before[name].shape[0], -1) if before[name].numel() else before[name]
        for row, slot in enumerate(before["indices"].tolist()):
            if slot != before["skip_index"]:
                flat[slot] = rows[row]
        yield from _differs_exactly(f"{name}_cache", after[f"{name}_cache"], flat.reshape(expected.shape))


def _compare_heads(operator: str, before: dict[str, Any], after: dict[str, Any], result: Any) -> Iterator[str]:
    a = before | {"eps": float(before.get("eps", 0.0)), "weight_offset": float(before.get("weight_offset", 0.0))}
    if not abs(a["weight_offset"]) < 1e6 or (a["rounding"] != "once" and a["k"].dtype != torch.float32):
        return
    exact = dict(zip(("q", "k"), qk_norm_rope(a), strict=True))
    for name in ("q", "k"):
        out = after[f"{name}_out"]
        if out is None:
            out = after[name]
        elif out.data_ptr() != after[name].data_ptr():
            yield from _differs_exactly(name, after[name], a[name])
        if out.dtype == torch.float8_e4m3fn:
            yield from _differs_in_codes_of_heads(f"{name}_out", out, exact[name], a[f"{name}_scale"])
        else:
            yield from _differs(name, out, exact[name], _error_of_head(exact[name]))
    slots = [(token, slot) for token, slot in enumerate(a["slot_mapping"].tolist()) if slot != a["skip_index"]]
    for name in ("k", "v"):
        cache, expected = after[f"{name}_cache"], a[f"{name}_cache"].clone()
        places = [(slot,) if cache.dim() == 3 else (slot // cache.shape[1], slot % cache.shape[1]) for _, slot in slots]
        for place in places:
            expected[place] = cache[place]
        yield from _differs_exactly(f"what {name}_cache has beside the slots", cache, expected)
        if not slots or not cache.numel():
            continue
        tokens, stored = [token for token, _ in slots], torch.stack([cache[place] for place in places])
        if cache.dtype == torch.float8_e4m3fn:
            values = exact["k"][tokens] if name == "k" else a["v"][tokens].double()
            yield from _differs_in_codes_of_heads(f"{name}_cache", stored, values, a[f"{name}_scale"])
        else:
            rows = a["v"] if name == "v" else after["k"] if after["k_out"] is None else after["k_out"]
            yield from _differs_exactly(f"{name}_cache", stored, rows[tokens])


def _error_of_head(exact: torch.Tensor) -> torch.Tensor:
    """Return float32's error of a head whose pairs are rotated: where terms cancel, more than of the result."""
    finite = torch.where(exact.isfinite(), exact.abs(), 0.0)
    return finite.amax(-1, keepdim=True) * 4e-6 if exact.numel() else finite


def _differs_in_codes_of_heads(name: str, out: torch.Tensor, exact: torch.Tensor, scale: Any) -> Iterator[str]:
    divisor = torch.ones(()) if scale is None else scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())
    exact, error = exact / divisor.double(), _error_of_head(exact) / divisor.double()
    got = codes(out).reshape(exact.shape)
    ok = exact.isnan() | (exact.abs() < 1e-9)
    for sign in (-1.0, 0.0, 1.0):
        ok |= got == encode(exact + sign * (error + exact.abs() * 1e-5)).reshape(exact.shape)
    if bool((~ok).any()):
        at = (~ok).nonzero()[0].tolist()
        yield f"{name}{at} is code {int(got[tuple(at)])}, of {float(exact[tuple(at)])}"


def _compare_per_tensor(operator: str, before: dict[str, Any], after: dict[str, Any], result: Any) -> Iterator[str]:
    x = before["input"].float()
    scale = before["output_s"].float().reshape(())
    if not before["is_static"]:
        largest = x.nan_to_num(0.0, torch.inf, torch.inf).abs().max() if x.numel() else torch.tensor(0.0)
        scale = torch.maximum(largest / 448, torch.tensor(2.0**-90))
        yield from _differs_exactly("output_s", after["output_s"].reshape(()), scale)
    yield from _compare_codes(x, scale, after["output_q"])


def _compare_per_token(operator: str, before: dict[str, Any], after: dict[str, Any], result: Any) -> Iterator[str]:
    x = before["input"].float()
    if not x.numel():
        return
    largest = x.nan_to_num(0.0, torch.inf, torch.inf).abs().amax(dim=-1, keepdim=True)
    scale = torch.maximum(largest / 448, _LEAST_SCALE)
    yield from _differs_exactly("output_s", after["output_s"].reshape(scale.shape), scale)
    yield from _compare_codes(x, scale, after["output_q"])


def _compare_codes(x: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> Iterator[str]:
    if x.numel() and not torch.equal(codes(out), encode(quotient(x, scale)).reshape(out.shape)):
        yield "output_q has other codes"


_COMPARE = {
    "rmsnorm": _compare_norm,
    "gemma_rmsnorm": _compare_norm,
    "fused_add_rmsnorm": _compare_fused,
    "gemma_fused_add_rmsnorm": _compare_fused,
    "rmsnorm_quant_fp8": _compare_quant_norm,
    "fused_add_rmsnorm_quant_fp8": _compare_quant_norm,
    "fused_inplace_qknorm": _compare_qknorm,
    **dict.fromkeys(_ACTIVATIONS, _compare_activation),
    "store_cache": _compare_store,
    "qk_norm_rope_store": _compare_heads,
    "rope_and_store": _compare_heads,
    "per_tensor_quant_fp8": _compare_per_tensor,
    "per_token_quant_fp8": _compare_per_token,
}
