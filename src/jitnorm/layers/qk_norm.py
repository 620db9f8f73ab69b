"""RMSNorm of each head of queries and keys: one fused kernel, or two calls of the model's modules."""

from __future__ import annotations

import torch
import torch.fx

from jitnorm.core import checks
from jitnorm.core.eligibility import can_normalise, has_kernel_layout
from jitnorm.core.norm_modules import eps_of, weight_of, weight_offset
from jitnorm.core.torch_library import needs_grad
from jitnorm.layers.compiler import Compiler, resolve_compiler
from jitnorm.qknorm import can_use_fused_inplace_qknorm, fused_inplace_qknorm


def apply_qk_norm(
    q: torch.Tensor,
    k: torch.Tensor,
    q_norm: torch.nn.Module,
    k_norm: torch.nn.Module,
    head_dim: int,
    alt_stream: torch.cuda.Stream | None = None,
    allow_inplace: bool = True,
    compiler: Compiler | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply `q_norm` to every head of `q`, and `k_norm` to every head of `k`.

    One call of `jitnorm.fused_inplace_qknorm` replaces the two modules if q and k may be overwritten and it computes
    what the modules compute: on the CPU or an NVIDIA GPU, for a supported head_dim and dtype, with the same eps for
    both, if no gradient is needed. Its results have the same bits in any batch, so batch-invariant mode does not change
    the choice. Otherwise the modules are called. They are always called under inductor, which fuses the modules' own
    code with the operations around it.

    Args:
        q: `[..., q_heads * head_dim]`, such as a slice of a fused QKV projection. **Overwritten if allowed.**
        k: `[..., kv_heads * head_dim]`. **Overwritten if allowed.**
        q_norm: an RMSNorm module over head_dim, called with a tensor. The kernel can replace it if its class is named
            RMSNorm or is one of the Llama-like classes that `jitnorm.patch_transformers` supports, and if it has no
            hooks, a `weight` to multiply by, and its eps as `variance_epsilon` or `eps`.
        k_norm: the same for k.
        head_dim: elements of a head.
        alt_stream: a stream for k's norm, to run concurrently with q's. Used if the modules are called while a CUDA
            graph is being captured.
        allow_inplace: whether q and k may be overwritten.
        compiler: what compiles the call, "eager" or "inductor"; None for the setting of
            `jitnorm.layers.set_compiler`.

    Returns:
        q and k, normalised, in their shapes: the arguments themselves if they were overwritten.

    Raises:
        TypeError: q or k is not a tensor, or head_dim is not an int.
        ValueError: head_dim does not divide the last dimension of q or k, a norm has another size, or there is no such
            compiler.
    """
    if not checks.is_integer(head_dim):
        raise TypeError(f"head_dim must be an int, got {type(head_dim).__name__}")
    for name, x in (("q", q), ("k", k)):
        if isinstance(x, torch.fx.Proxy):  # which torch.fx.symbolic_trace records, and which has no shape yet
            continue
        checks.tensor(name, x)
        if head_dim < 1 or x.dim() == 0 or x.shape[-1] % head_dim:
            raise ValueError(f"{name} must have whole heads of {head_dim} in its last dimension, got {list(x.shape)}")
    compiler = resolve_compiler(compiler)
    if isinstance(q, torch.fx.Proxy):
        return _normalise_proxy(q, q_norm, head_dim), _normalise_proxy(k, k_norm, head_dim)
    if allow_inplace and compiler != "inductor" and _can_fuse(q, k, q_norm, k_norm, head_dim):
        q_heads, k_heads = (x.view(-1, x.shape[-1] // head_dim, head_dim) for x in (q, k))
        fused_inplace_qknorm(q_heads, k_heads, weight_of(q_norm), weight_of(k_norm), eps_of(q_norm), head_dim=head_dim)
        return q, k
    _check_size("q_norm", q_norm, head_dim)
    _check_size("k_norm", k_norm, head_dim)
    if alt_stream is None or not _is_capturing(q):
        return _normalise(q, q_norm, head_dim, compiler), _normalise(k, k_norm, head_dim, compiler)
    current = torch.cuda.current_stream(q.device)
    alt_stream.wait_stream(current)
    q = _normalise(q, q_norm, head_dim, compiler)
    with torch.cuda.stream(alt_stream):
        k = _normalise(k, k_norm, head_dim, compiler)
    current.wait_stream(alt_stream)
    return q, k


def _reshape_for_qk_norm(x: torch.Tensor, head_dim: int, compiler: Compiler | None = None) -> torch.Tensor:
    """Return `x`, `[..., heads * head_dim]`, with head_dim as its last dimension.

    For inductor on CUDA this is a view that keeps the leading dimensions, so that inductor fuses reshape, norm and the
    next operations into one kernel. Otherwise it is a matrix with one head per row. That copies a slice of a QKV
    projection, but with the view's strides the norms of ROCm fail with a memory access fault.
    """
    if x.is_cuda and torch.version.hip is None and resolve_compiler(compiler) == "inductor":
        return x.view(*x.shape[:-1], -1, head_dim)
    return x.reshape(x.numel() // head_dim, head_dim)


def _normalise(x: torch.Tensor, norm: torch.nn.Module, head_dim: int, compiler: Compiler) -> torch.Tensor:
    out: torch.Tensor = norm(_reshape_for_qk_norm(x, head_dim, compiler))
    return out.reshape(x.shape)


def _normalise_proxy(x: torch.Tensor, norm: torch.nn.Module, head_dim: int) -> torch.Tensor:
    """Do what `_normalise` does without asking for the shape or the device."""
    out: torch.Tensor = norm(x.unflatten(-1, (-1, head_dim)))
    return out.flatten(-2)


def _can_fuse(
    q: torch.Tensor, k: torch.Tensor, q_norm: torch.nn.Module, k_norm: torch.nn.Module, head_dim: int
) -> bool:
    """Return whether the fused kernel takes these tensors and computes what the modules compute."""
    q_weight, k_weight = weight_of(q_norm), weight_of(k_norm)
    return (
        (not q.is_cuda or torch.version.hip is None)
        and can_use_fused_inplace_qknorm(head_dim, q.dtype)
        and weight_offset(q_norm) == 0
        and weight_offset(k_norm) == 0
        and eps_of(q_norm) is not None
        and eps_of(q_norm) == eps_of(k_norm)
        and isinstance(q_weight, torch.Tensor)
        and isinstance(k_weight, torch.Tensor)
        and q_weight.dtype == k_weight.dtype
        and q.dtype == k.dtype
        and q.device == k.device
        and q.shape[:-1] == k.shape[:-1]
        and not needs_grad(q, k, q_weight, k_weight)
        and _has_writable_heads(q, q_weight, head_dim)
        and _has_writable_heads(k, k_weight, head_dim)
    )


def _has_writable_heads(x: torch.Tensor, weight: torch.Tensor, head_dim: int) -> bool:
    """Return whether the heads of `x` can be normalised in place."""
    heads = x.unflatten(-1, (x.shape[-1] // head_dim, head_dim))
    return has_kernel_layout(x) and 0 not in x.stride() and can_normalise(heads, weight)


def _check_size(name: str, norm: torch.nn.Module, head_dim: int) -> None:
    """Raise for a norm over another size.

    A weight of one element may be broadcast, and an empty one may be gathered when the module is called.
    """
    weight = weight_of(norm)
    if isinstance(weight, torch.Tensor) and weight.dim() == 1 and weight.shape[0] not in (0, 1, head_dim):
        raise ValueError(f"{name} must be over head_dim {head_dim}, got {weight.shape[0]}")


def _is_capturing(x: torch.Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
