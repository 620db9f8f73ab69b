"""RMSNorm of the heads of queries and keys, both in one launch, in place."""

from __future__ import annotations

import torch

from jitnorm.core.operators import DTYPES
from jitnorm.qknorm_ops import HEAD_DIMS, QKNORM, dispatch_qknorm, first_qknorm

_kernels = QKNORM.kernels
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


def can_use_fused_inplace_qknorm(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether `fused_inplace_qknorm` serves heads of this size and dtype.

    Nothing is built to answer, and under torch.compile the answer is a constant.

    Raises:
        TypeError: head_dim is no int, or dtype no torch.dtype.
    """
    if isinstance(head_dim, bool) or not isinstance(head_dim, (int, torch.SymInt)):
        raise TypeError(f"head_dim must be an int, got {type(head_dim).__name__}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {type(dtype).__name__}")
    return head_dim in HEAD_DIMS and dtype in DTYPES


def fused_inplace_qknorm(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    head_dim: int = 0,
    enable_pdl: bool | None = None,
) -> None:
    """Normalises every head of `q` and of `k`, in place: `x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    What Qwen3 and others do before rotary embedding (Henry et al., 2020, https://arxiv.org/abs/2010.04245, with RMSNorm
    in place of the l2 norm). Accumulated in float32 and rounded once. A head's result has the same bits alone and in
    any batch, so that batch-invariant modes need no other path. The first call of a size compiles its kernel.

    Where a gradient is needed, q and k are overwritten by what `jitnorm.rmsnorm` gives, which has one.

    Args:
        q: `[tokens, q_heads, head_dim]`, float16, bfloat16 or float32, on the CPU or a CUDA device; written. The last
            stride is 1; the others are free as long as no two heads share memory, so that slices of a fused QKV
            projection need no copy. On CUDA every head is aligned to 16 bytes. head_dim is 64, 128, 256, 512 or 1024.
        k: `[tokens, kv_heads, head_dim]`, likewise, of q's dtype and device; written. Shares no memory with q: its
            tokens may lie between q's in one buffer, at the same stride. kv_heads need not divide q_heads.
        q_weight: `[head_dim]`, of q's dtype or float32, on the same device.
        k_weight: `[head_dim]`, of q_weight's dtype.
        eps: added to the mean of the squares; zero or more.
        head_dim: q's last dimension, or 0 for that.
        enable_pdl: programmatic dependent launch; None means on where the GPU has it. The bits are the same.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype.
        ValueError: a shape, stride, device, alignment or overlap that is not accepted, or a bad eps or head_dim.
        RuntimeError: head_dim is not supported (nothing is built then), q or k is a leaf that requires grad, there are
            2^31 heads or more in all tokens, or the kernel cannot be built or launched.
    """
    if _is_dynamo_compiling():
        return dispatch_qknorm(q, k, q_weight, k_weight, eps, head_dim, enable_pdl)
    try:
        if (
            q.__class__ is k.__class__ is _Tensor
            and (
                q_weight.__class__ is k_weight.__class__ is _Parameter
                or q_weight.__class__ is k_weight.__class__ is _Tensor
            )
            and (
                not (q.requires_grad or k.requires_grad or q_weight.requires_grad or k_weight.requires_grad)
                or not torch.is_grad_enabled()
            )
            and not _kernels[q.dtype][q_weight.nbytes](q, k, q_weight, k_weight, eps, head_dim, enable_pdl)
        ):
            return None
    except Exception:  # no kernel yet, or arguments that have no such attributes: the way below says what it was
        pass
    return first_qknorm(q, k, q_weight, k_weight, eps, head_dim, enable_pdl)
