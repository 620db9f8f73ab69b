"""RMSNorm of each head of q and k, rotary embedding and KV-cache store: one kernel, or PyTorch's operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from jitnorm.core import checks
from jitnorm.core.eligibility import can_call_operators
from jitnorm.core.norm_modules import LLAMA_CLASSES, eps_of, original_class, weight_of, weight_offset
from jitnorm.core.operators import DTYPES
from jitnorm.core.torch_library import needs_dispatcher, needs_grad
from jitnorm.layers.compiler import Compiler, resolve_compiler
from jitnorm.qknorm_rope_store import E4M3, HEAD_DIMS, ROTARY_STEP, check_scale, qk_norm_rope_store

E4M3_MAX = torch.finfo(E4M3).max


def apply_qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    q_norm: torch.nn.Module | None,
    k_norm: torch.nn.Module | None,
    head_dim: int,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    *,
    is_neox: bool = True,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    v: torch.Tensor | None = None,
    k_cache: torch.Tensor | None = None,
    v_cache: torch.Tensor | None = None,
    slot_mapping: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    allow_inplace: bool = True,
    compiler: Compiler | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply `q_norm` and `k_norm` to every head, rotate the heads by their positions, and store k and v if asked to.

    One call of `jitnorm.qk_norm_rope_store` does it where the kernel computes what the modules compute: on the CPU or
    an NVIDIA GPU, for supported sizes and dtypes, with one eps for both norms, where no gradient is needed. Otherwise
    the modules are called, and PyTorch rotates and stores. For the compiler "inductor" PyTorch computes too, because
    inductor fuses it with what is around it; with caches the kernel is called, because inductor cannot fuse a store.

    The kernel rounds once, after the rotation, so its results are closer to exact ones than those of modules, which
    also round before it. The kernel's results have the same bits in any batch.

    Args:
        q: `[..., q_heads * head_dim]` or `[..., q_heads, head_dim]`, such as a slice of a fused QKV projection.
            **Overwritten if allowed**, except under torch.compile, where a new tensor saves a copy.
        k: Likewise, with kv_heads.
        q_norm: An RMSNorm module over head_dim; None: q is not normalised. The kernel can replace it if its class is
            named RMSNorm or GemmaRMSNorm (multiplies by 1 + weight) or is one that `jitnorm.patch_transformers`
            supports, and it has no hooks, a `weight`, and its eps as `variance_epsilon` or `eps`.
        k_norm: The same for k.
        head_dim: Elements of a head.
        cos_sin_cache: `[max_position, rotary_dim]`: the cosines of all pairs, then their sines.
        positions: `[tokens]`, int32 or int64; or `[3, tokens]` with `mrope_section`. There are as many tokens as the
            leading dimensions of q have elements.
        is_neox: Whether element i is rotated with i + rotary_dim / 2, and not 2 i with 2 i + 1.
        mrope_section: How many pairs are rotated by a token's first, second and third position.
        mrope_interleaved: Whether these sections alternate, as in `jitnorm.qk_norm_rope_store`.
        v: Like k, never written. Needed to store.
        k_cache: `[slots, kv_heads, head_dim]` or `[blocks, block_size, kv_heads, head_dim]`, written; of q's dtype or
            float8_e4m3fn.
        v_cache: Likewise.
        slot_mapping: `[stored]`, int32 or int64: the slots of the first tokens. A token with slot -1 is not stored.
        k_scale: float32, one element or `[kv_heads]`: a float8 k_cache is k divided by it. None for 1.
        v_scale: Likewise, for v.
        allow_inplace: Whether q and k may be overwritten.
        compiler: What compiles the call, "eager" or "inductor"; None for the setting of
            `jitnorm.layers.set_compiler`.

    Returns:
        q and k, normalised and rotated, in their shapes: the arguments themselves if they were overwritten.

    Raises:
        TypeError: An argument has a wrong type, or dtype for the kernel.
        ValueError: Shapes do not go together, some arguments of the store are missing, there is no such compiler, or
            `torch.fx.symbolic_trace` traces a call that stores.
        RuntimeError: As of `jitnorm.qk_norm_rope_store`.
    """
    compiler = resolve_compiler(compiler)
    if not checks.is_integer(head_dim):
        raise TypeError(f"head_dim must be an int, got {type(head_dim).__name__}")
    rotation: dict[str, Any] = {
        "is_neox": is_neox,
        "mrope_section": mrope_section,
        "mrope_interleaved": mrope_interleaved,
    }
    norms = q_norm, k_norm
    store = {"k_cache": k_cache, "v_cache": v_cache, "slot_mapping": slot_mapping}
    given = [name for name, value in store.items() if value is not None]
    if isinstance(q, torch.fx.Proxy):  # which torch.fx.symbolic_trace records, and which has no shape yet
        if given:
            raise ValueError(f"{given[0]} must be None under torch.fx.symbolic_trace, which cannot trace the store")
        q_heads, k_heads = (x.unflatten(-1, (-1, head_dim)) for x in (q, k))
        q_heads, k_heads = _normalise_and_rotate(q_heads, k_heads, norms, cos_sin_cache, positions, **rotation)
        return q_heads.flatten(-2), k_heads.flatten(-2)
    for name, x in (("q", q), ("k", k), ("cos_sin_cache", cos_sin_cache), ("positions", positions)):
        checks.tensor(name, x)
    _check_positions(positions, mrope_section)
    q_heads, k_heads = _heads("q", q, positions, head_dim), _heads("k", k, positions, head_dim)
    missing = [name for name, value in {"v": v, **store}.items() if value is None]
    if given and missing:
        raise ValueError(f"{given[0]} must be given with {checks.enumeration(missing)}, got None")
    v_heads = _heads("v", v, positions, head_dim) if v is not None and given else None
    heads = q_heads, k_heads, v_heads
    if (given or compiler != "inductor") and _can_fuse(heads, norms, cos_sin_cache, positions, *store.values()):
        q_out = k_out = None
        if not allow_inplace or not _can_overwrite(q, q_heads) or not _can_overwrite(k, k_heads):
            q_out, k_out = q_heads.new_empty(q_heads.shape), k_heads.new_empty(k_heads.shape)
        weights = [None if norm is None else weight_of(norm) for norm in norms]
        norm = q_norm if q_norm is not None else k_norm
        qk_norm_rope_store(
            *(q_heads, k_heads, v_heads, cos_sin_cache, positions, k_cache, v_cache, slot_mapping),
            q_weight=weights[0],
            k_weight=weights[1],
            eps=1e-6 if norm is None else eps_of(norm),
            weight_offset=0.0 if norm is None else weight_offset(norm) or 0.0,
            q_out=q_out,
            k_out=k_out,
            k_scale=k_scale,
            v_scale=v_scale,
            **rotation,
        )
        return (q, k) if q_out is None or k_out is None else (q_out.view(q.shape), k_out.view(k.shape))
    _check_options(k_heads, cos_sin_cache, mrope_section, store, {"k_scale": k_scale, "v_scale": v_scale})
    q_heads, k_heads = _normalise_and_rotate(q_heads, k_heads, norms, cos_sin_cache, positions, **rotation)
    if v_heads is not None and slot_mapping is not None:
        _store(k_heads, k_cache, slot_mapping, k_scale)
        _store(v_heads, v_cache, slot_mapping, v_scale)
    return q_heads.reshape(q.shape), k_heads.reshape(k.shape)


def _check_positions(positions: torch.Tensor, mrope_section: Sequence[int] | None) -> None:
    if positions.dim() != 1 and (mrope_section is None or positions.dim() != 2 or positions.shape[0] != 3):
        raise ValueError(
            f"positions must have shape [tokens], or [3, tokens] with mrope_section, got {list(positions.shape)}"
        )


def _check_options(
    k: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    mrope_section: Sequence[int] | None,
    store: dict[str, torch.Tensor | None],
    scales: dict[str, torch.Tensor | None],
) -> None:
    """Raise what the operator raises for options that PyTorch would ignore, or refuse without naming the argument."""
    if mrope_section is not None and 2 * sum(mrope_section) != cos_sin_cache.shape[-1]:
        raise ValueError(
            f"mrope_section must add up to {cos_sin_cache.shape[-1] // 2}, half of cos_sin_cache's last dimension, "
            f"got {list(mrope_section)}"
        )
    for name, scale in scales.items():
        if scale is not None:
            checks.tensor(name, scale)
            cache = name.replace("scale", "cache")
            check_scale(name, scale, cache, store[cache], k.shape[1])
    slots = store["slot_mapping"]
    if slots is not None and slots.shape[0] > k.shape[0]:
        raise ValueError(f"slot_mapping must have at most {k.shape[0]} elements like k's tokens, got {len(slots)}")


def _heads(name: str, x: Any, positions: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return `x` as `[tokens, heads, head_dim]`: a view, or a copy where its strides do not allow one."""
    checks.tensor(name, x)
    tokens = positions.shape[-1]
    is_split = x.dim() >= 2 and x.shape[-1] == head_dim and math.prod(x.shape[:-2]) == tokens  # into heads
    if head_dim < 1 or x.dim() < 2 or x.shape[-1] % head_dim or not (is_split or math.prod(x.shape[:-1]) == tokens):
        raise ValueError(
            f"{name} must have whole heads of {head_dim} for each of {tokens} positions, got {list(x.shape)}"
        )
    heads: torch.Tensor = x.reshape(tokens, x.shape[-2] if is_split else x.shape[-1] // head_dim, head_dim)
    return heads


def _can_fuse(
    heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    norms: tuple[torch.nn.Module | None, torch.nn.Module | None],
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    *store: torch.Tensor | None,
) -> bool:
    """Return whether the kernel takes these tensors and computes what the modules compute.

    What no implementation could compute, such as a cache of other heads, is left to the operator to refuse.
    """
    q, k, _ = heads
    used = [norm for norm in norms if norm is not None]
    weights = [weight_of(norm) for norm in used]
    if not all(isinstance(weight, torch.Tensor) for weight in weights):
        return False
    tensors = [x for x in (*heads, cos_sin_cache, positions, *store, *weights) if x is not None]
    return (
        (not q.is_cuda or torch.version.hip is None)
        and q.device.type in ("cpu", "cuda")
        and all(can_call_operators(x, x) and x.device == q.device for x in tensors)
        and q.dtype in DTYPES
        and k.dtype == q.dtype
        and cos_sin_cache.dtype in (q.dtype, torch.float32)
        and is_supported_size(q.shape[-1], cos_sin_cache.shape[-1])
        and all(_can_replace(norm, q) for norm in used)
        and len({(eps_of(norm), weight_offset(norm), weight_of(norm).dtype) for norm in used}) <= 1
        and not needs_grad(*tensors)
        and all(_has_kernel_layout(x) for x in heads if x is not None)
        and _has_kernel_layout(cos_sin_cache)
    )


def is_supported_size(head_dim: int, rotary_dim: int) -> bool:
    """Return whether there is a kernel for head_dim, and for a rotation of rotary_dim elements of a head."""
    return head_dim in HEAD_DIMS and rotary_dim % ROTARY_STEP == 0 and 0 < rotary_dim <= head_dim


def _can_replace(norm: torch.nn.Module, heads: torch.Tensor) -> bool:
    """Return whether the kernel computes what `norm` computes, and in the same dtype."""
    weight = weight_of(norm)
    is_promoted = original_class(norm).__name__ in LLAMA_CLASSES  # the result, to the weight's dtype
    return (
        weight_offset(norm) is not None
        and eps_of(norm) is not None
        and weight.dim() == 1
        and weight.shape[0] == heads.shape[-1]
        and (weight.dtype == heads.dtype or (weight.dtype == torch.float32 and not is_promoted))
        and _has_kernel_layout(weight)
    )


def _has_kernel_layout(x: torch.Tensor) -> bool:
    """Return whether the kernel accepts the strides of `x`, and on CUDA its alignment."""
    if x.stride(-1) != 1 or 0 in x.stride():
        return False
    if not x.is_cuda:
        return True
    step = checks.CUDA_ALIGNMENT // x.element_size()
    strides = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    is_aligned = needs_dispatcher(x) or x.data_ptr() % checks.CUDA_ALIGNMENT == 0  # a traced tensor has no address yet
    return is_aligned and all(stride % step == 0 for stride in strides)


def _can_overwrite(x: torch.Tensor, heads: torch.Tensor) -> bool:
    """Return whether to write the heads of `x` in place: not if they are a copy, nor in a compiled graph."""
    return not needs_dispatcher(x) and heads.data_ptr() == x.data_ptr()


def _normalise_and_rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    norms: tuple[torch.nn.Module | None, torch.nn.Module | None],
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    is_neox: bool,
    mrope_section: Sequence[int] | None,
    mrope_interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the norms on `[tokens, heads, head_dim]` and rotate the results, with PyTorch's operators."""
    cos, sin = cos_sin_cache[positions].unsqueeze(-2).chunk(2, dim=-1)
    if mrope_section is not None and positions.dim() == 2:
        section = _sections(mrope_section, mrope_interleaved, cos.device)
        cos, sin = (torch.where(section == 0, x[0], torch.where(section == 1, x[1], x[2])) for x in (cos, sin))
    out = [_rotate(x if norm is None else norm(x), cos, sin, is_neox) for x, norm in zip((q, k), norms, strict=True)]
    return out[0], out[1]


def _sections(sizes: Sequence[int], interleaved: bool, device: torch.device) -> torch.Tensor:
    """Return which of a token's three positions rotates each pair, `[rotary_dim / 2]`."""
    if not interleaved:
        sections = [i for i, size in enumerate(sizes) for _ in range(size)]
    else:
        sections = [i % 3 if i < 3 * sizes[i % 3] else 0 for i in range(sum(sizes))]
    return torch.tensor(sections, device=device)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """Rotate pairs of elements of each head, in float32 or wider, and round once."""
    wide = torch.float64 if not isinstance(x, torch.fx.Proxy) and x.dtype == torch.float64 else torch.float32
    rotary_dim = 2 * cos.shape[-1]
    pairs, rest = x[..., :rotary_dim].to(wide), x[..., rotary_dim:]
    cos, sin = cos.to(wide), sin.to(wide)
    a, b = pairs.chunk(2, dim=-1) if is_neox else (pairs[..., ::2], pairs[..., 1::2])
    rotated = a * cos - b * sin, b * cos + a * sin
    joined = torch.cat(rotated, dim=-1) if is_neox else torch.stack(rotated, dim=-1).flatten(-2)
    return torch.cat([joined.to(x.dtype), rest], dim=-1)


@torch.no_grad()
def _store(heads: torch.Tensor, cache: Any, slot_mapping: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Write the heads of the first tokens to their slots. Slots of -1 are skipped."""
    values = heads[: slot_mapping.shape[0]]
    if cache.dtype == E4M3:
        values = values.float() if scale is None else values.float() / scale.view(-1, 1)
        values = values.clamp(-E4M3_MAX, E4M3_MAX)
        values, cache = values.to(E4M3).view(torch.uint8), cache.view(torch.uint8)  # no float8 is indexed everywhere
    is_stored = slot_mapping >= 0
    slots, values = slot_mapping[is_stored].long(), values[is_stored].to(cache.dtype)
    if cache.dim() == 4:
        cache[slots // cache.shape[1], slots % cache.shape[1]] = values
    else:
        cache[slots] = values
