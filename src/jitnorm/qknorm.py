"""RMSNorm of the heads of queries and keys, both in one launch, in place."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from jitnorm.core import checks
from jitnorm.core.norms import Norm
from jitnorm.core.operators import DTYPES, EXAMPLES, Example, Shape
from jitnorm.core.torch_library import (
    build_while_tracing,
    increment_versions,
    needs_dispatcher,
    needs_grad,
    refuse_torch_func,
    refuse_unwritable,
    register,
)
from jitnorm.rmsnorm import RMSNORM, call_rmsnorm_torch_op

HEAD_DIMS = (64, 128, 256, 512, 1024)
MAX_ROWS = 2**31 - 1  # kMaxRows in csrc/elementwise/qknorm.h


class QKNorm(Norm):
    """A norm whose rows are the heads of two tensors. Its sizes differ from those of the other norms."""

    size_name: ClassVar[str | None] = "head_dim"

    def kernel_class(self, hidden_size: int) -> str:
        """Return the class in csrc/elementwise that supports heads of this size. RuntimeError if there is none."""
        if hidden_size not in HEAD_DIMS:
            supported = checks.enumeration(HEAD_DIMS)
            raise RuntimeError(f"{self.op} does not support head_dim {hidden_size}: supported are {supported}")
        return "QKNormKernel"


QKNORM = QKNorm("fused_inplace_qknorm", "fused_inplace_qknorm", "Plain", family="qknorm")

_kernels = QKNORM.fast_cache
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


def can_use_fused_inplace_qknorm(head_dim: int, dtype: torch.dtype) -> bool:
    """Return whether `fused_inplace_qknorm` supports heads of this size and dtype.

    Nothing is built, and under torch.compile the result is a constant.

    Raises:
        TypeError: head_dim is not an int, or dtype is not a torch.dtype.
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
    """Normalise every head of `q` and of `k`, in place: `x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    Qwen3 and other models do this before rotary embedding (Henry et al., 2020, https://arxiv.org/abs/2010.04245, with
    RMSNorm in place of the l2 norm). Accumulated in float32 and rounded once. A head's result has the same bits alone
    and in any batch, so batch-invariant modes need no other kernel. The first call of a size compiles its kernel.

    If a gradient is needed, q and k are overwritten with the results of `jitnorm.rmsnorm`, which has one.

    Args:
        q: `[tokens, q_heads, head_dim]`, float16, bfloat16 or float32, on the CPU or a CUDA device; written. The last
            stride is 1; the other strides are arbitrary as long as no two heads share memory, so that slices of a fused
            QKV projection need no copy. On CUDA every head is aligned to 16 bytes. head_dim is 64, 128, 256, 512 or
            1024.
        k: `[tokens, kv_heads, head_dim]`, likewise, of q's dtype and device; written. Shares no memory with q, but
            tokens of q and k may alternate in one buffer, at the same stride. kv_heads need not divide q_heads.
        q_weight: `[head_dim]`, of q's dtype or float32, on the same device.
        k_weight: `[head_dim]`, of q_weight's dtype.
        eps: added to the mean of the squares; zero or more.
        head_dim: q's last dimension, or 0 for that.
        enable_pdl: programmatic dependent launch. None turns it on where the GPU supports it. The bits are the same.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype.
        ValueError: a shape, stride, device, alignment or overlap is not accepted, or eps or head_dim is invalid.
        RuntimeError: head_dim is not supported (nothing is built then), q or k is a leaf that requires grad, all tokens
            together have 2^31 heads or more, or the kernel cannot be built or launched.
    """
    if _is_dynamo_compiling():
        return _call_torch_op(q, k, q_weight, k_weight, eps, head_dim, enable_pdl)
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
    except Exception:  # no kernel yet, or arguments without such attributes: the slow path raises for these
        pass
    return _qknorm_slow_path(q, k, q_weight, k_weight, eps, head_dim, enable_pdl)


def _qknorm_slow_path(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    head_dim: int,
    enable_pdl: bool | None,
) -> None:
    """Check the arguments, then run the right kernel, which is built and cached if need be."""
    tensors = q, k, q_weight, k_weight
    traced = needs_dispatcher(*tensors)
    if traced:
        checks.types(eps, enable_pdl, q=q, k=k, q_weight=q_weight, k_weight=k_weight)
        refuse_torch_func(QKNORM.op, *tensors)
    else:
        check(*tensors, eps, head_dim, enable_pdl)
    if traced or needs_grad(*tensors):
        return _call_torch_op(*tensors, float(eps), checks.integer("head_dim", head_dim), enable_pdl)
    return QKNORM.run(q, q_weight, q, k, q_weight, k_weight, eps, head_dim, enable_pdl)


def check(q: Any, k: Any, q_weight: Any, k_weight: Any, eps: Any, head_dim: Any, enable_pdl: Any) -> None:
    """Raise for arguments that the bindings function in csrc/elementwise/qknorm.h refuses."""
    for name, value in (("q", q), ("k", k), ("q_weight", q_weight), ("k_weight", k_weight)):
        checks.tensor(name, value)
    _check_metadata(q, k, q_weight, k_weight, head_dim)
    checks.supported_device("q", q)
    checks.eps(eps)
    checks.enable_pdl(enable_pdl)
    _check_heads("q", q)
    _check_heads("k", k)
    checks.rows("q_weight", q_weight)
    checks.rows("k_weight", k_weight)
    if (rows := q.shape[0] * (q.shape[1] + k.shape[1])) > MAX_ROWS:
        raise RuntimeError(f"{QKNORM.op} does not support more than {MAX_ROWS} heads in all tokens, got {rows}")
    _check_overlap(q, k)
    for name, value in (("q", q), ("k", k)):
        for weight_name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
            if checks.extents_overlap(value, weight):
                raise ValueError(f"{name} must share no memory with {weight_name}, got a view that overlaps it")


def _check_metadata(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, head_dim: Any
) -> None:
    """Raise for what is wrong with dtypes, shapes and devices; works on fake and meta tensors too."""
    for name, value in (("q", q), ("k", k)):
        if value.dim() != 3:
            raise ValueError(f"{name} must have shape [tokens, heads, head_dim], got {list(value.shape)}")
    checks.dtype("q", q, DTYPES)
    checks.dtype("k", k, (q.dtype,))
    checks.dtype("q_weight", q_weight, (q.dtype, torch.float32))
    checks.dtype("k_weight", k_weight, (q_weight.dtype,))
    size = int(q.shape[-1])
    if checks.integer("head_dim", head_dim) not in (0, size):
        raise ValueError(f"head_dim must be q's last dimension, {size}, or 0 for that, got {head_dim}")
    QKNORM.kernel_class(size)
    checks.shape("k", k, [q.shape[0], k.shape[1], size], "q's tokens and head_dim, with any number of heads")
    checks.device("k", k, "q", q)
    for name, value in (("q_weight", q_weight), ("k_weight", k_weight)):
        checks.shape(name, value, [size], "one factor for each element of a head")
        checks.device(name, value, "q", q)


def _check_heads(name: str, value: torch.Tensor) -> None:
    layout = f"shape {list(value.shape)} and strides {list(value.stride())}"
    if value.stride(-1) != 1:
        raise ValueError(f"{name} must have a last stride of 1, got {layout}")
    if value.numel() == 0:
        return
    checks.storage(name, value)
    checks.no_internal_overlap(name, value)
    checks.aligned(name, value, *(value.stride(dim) for dim in (0, 1) if value.shape[dim] > 1))


def _check_overlap(q: torch.Tensor, k: torch.Tensor) -> None:
    if not checks.extents_overlap(q, k):
        return
    # Tokens of q and k may alternate, as in a fused projection.
    step = q.stride(0) * q.element_size()
    if q.shape[0] > 1 and q.stride(0) == k.stride(0):
        offset = (k.data_ptr() - q.data_ptr()) % step
        if checks.extent(q[0]) <= offset <= step - checks.extent(k[0]):
            return
    raise ValueError("k must share no memory with q, got a view that overlaps it")


def _call_torch_op(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    head_dim: int,
    enable_pdl: bool | None,
) -> None:
    """Call the operator in torch.ops.jitnorm, for tracers; with gradients, copy the results of rmsnorm into q and k."""
    if not needs_grad(q, k, q_weight, k_weight):
        torch.ops.jitnorm.fused_inplace_qknorm(q, k, q_weight, k_weight, eps, head_dim, enable_pdl)
        return
    _check_metadata(q, k, q_weight, k_weight, head_dim)
    refuse_unwritable(QKNORM.op, q_weight, q=q)
    refuse_unwritable(QKNORM.op, k_weight, k=k)
    # The norm reads copies, because its backward needs the values that are overwritten here. Both results are computed
    # before q or k is overwritten, because the second computation may fail.
    results = [
        call_rmsnorm_torch_op(
            RMSNORM, heads.clone(memory_format=torch.contiguous_format), weight, eps, None, enable_pdl
        )
        for heads, weight in ((q, q_weight), (k, k_weight))
    ]
    for written, result in zip((q, k), results, strict=True):
        written.copy_(result)


def _run(
    q: Any, k: Any, q_weight: Any, k_weight: Any, eps: float = 1e-6, head_dim: int = 0, enable_pdl: bool | None = None
) -> None:
    arguments = q, k, q_weight, k_weight, eps, head_dim, enable_pdl
    if not QKNORM.try_cached((q.dtype, q_weight.nbytes), *arguments):
        check(*arguments)
        QKNORM.run(q, q_weight, *arguments)
    increment_versions(q, k)


def _fake(
    q: Any, k: Any, q_weight: Any, k_weight: Any, eps: float = 1e-6, head_dim: int = 0, enable_pdl: bool | None = None
) -> None:
    _check_metadata(q, k, q_weight, k_weight, head_dim)
    build_while_tracing(QKNORM, q, int(q.shape[-1]), q.dtype, q_weight.dtype)


register(
    "fused_inplace_qknorm(Tensor(a!) q, Tensor(b!) k, Tensor q_weight, Tensor k_weight, float eps=1e-6, "
    "int head_dim=0, bool? enable_pdl=None) -> ()",
    _run,
    _fake,
)


def _arguments(shape: Shape) -> dict[str, Any]:
    heads = {"q": shape.randn(shape.rows, 2, shape.size), "k": shape.randn(shape.rows, 1, shape.size)}
    return heads | {"q_weight": shape.randn(shape.size), "k_weight": shape.randn(shape.size)}


EXAMPLES[QKNORM.op] = Example(fused_inplace_qknorm, _arguments, written=("q", "k"), per_row=("q", "k"), sizes=(64, 128))
