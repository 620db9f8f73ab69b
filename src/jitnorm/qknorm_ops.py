"""The kernels of `fused_inplace_qknorm`, what it refuses, and its place in torch.ops.jitnorm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from jitnorm.core import checks, norms
from jitnorm.core.operators import DTYPES
from jitnorm.core.torch_library import (
    build_while_tracing,
    count_version,
    is_traced,
    needs_grad,
    refuse_torch_func,
    refuse_unwritable,
    register,
)
from jitnorm.norm_ops import dispatch_rmsnorm

HEAD_DIMS = (64, 128, 256, 512, 1024)
_MOST_ROWS = 2**31 - 1  # kMaxRows in csrc/elementwise/qknorm.h


@dataclass(frozen=True)
class QKNorm(norms.Norm):
    """The operator: a norm like the others but for its sizes, and for where its rows lie."""

    def kernel_class(self, hidden_size: int) -> str:
        if hidden_size not in HEAD_DIMS:
            raise RuntimeError(
                f"{self.op} does not support head_dim {hidden_size}: supported are 64, 128, 256, 512 and 1024"
            )
        return "QKNormKernel"


QKNORM = QKNorm("fused_inplace_qknorm", "fused_inplace_qknorm", "Plain", family="qknorm")


def check(q: Any, k: Any, q_weight: Any, k_weight: Any, eps: Any, head_dim: Any, enable_pdl: Any) -> None:
    """Raises for what the glue in csrc/elementwise/qknorm.h refuses."""
    for name, value in (("q", q), ("k", k), ("q_weight", q_weight), ("k_weight", k_weight)):
        checks.tensor(name, value)
    check_kinds(q, k, q_weight, k_weight, head_dim)
    checks.supported_device("q", q)
    checks.eps(eps)
    checks.enable_pdl(enable_pdl)
    _check_heads("q", q)
    _check_heads("k", k)
    checks.rows("q_weight", q_weight)
    checks.rows("k_weight", k_weight)
    if (rows := q.shape[0] * (q.shape[1] + k.shape[1])) > _MOST_ROWS:
        raise RuntimeError(f"{QKNORM.op} does not support more than {_MOST_ROWS} heads in all tokens, got {rows}")
    _check_overlap(q, k)
    for name, value in (("q", q), ("k", k)):
        for weight_name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
            if checks.extents_meet(value, weight):
                raise ValueError(f"{name} must share no memory with {weight_name}, got a view that overlaps it")


def check_kinds(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, head_dim: Any
) -> None:
    """What can be said of tensors without storage: RuntimeError for a size, errors for dtypes, shapes and devices."""
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
    checks.written(name, value)
    checks.aligned(name, value, *(value.stride(dim) for dim in (0, 1) if value.shape[dim] > 1))


def _check_overlap(q: torch.Tensor, k: torch.Tensor) -> None:
    if not checks.extents_meet(q, k):
        return
    # The tokens of one may lie between those of the other, as in a fused projection.
    step = q.stride(0) * q.element_size()
    if q.shape[0] > 1 and q.stride(0) == k.stride(0):
        offset = (k.data_ptr() - q.data_ptr()) % step
        if checks.extent(q[0]) <= offset <= step - checks.extent(k[0]):
            return
    raise ValueError("k must share no memory with q, got a view that overlaps it")


def first_qknorm(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    head_dim: int,
    enable_pdl: bool | None,
) -> None:
    """The way of a call that finds no kernel or is refused by it: says what is wrong, or gets the right kernel."""
    tensors = q, k, q_weight, k_weight
    traced = is_traced(*tensors)
    if traced:
        checks.types(eps, enable_pdl, q=q, k=k, q_weight=q_weight, k_weight=k_weight)
        refuse_torch_func(QKNORM.op, *tensors)
    else:
        check(*tensors, eps, head_dim, enable_pdl)
    if traced or needs_grad(*tensors):
        return dispatch_qknorm(*tensors, float(eps), checks.integer("head_dim", head_dim), enable_pdl)
    return QKNORM.run(q, q_weight, q, k, q_weight, k_weight, eps, head_dim, enable_pdl)


def dispatch_qknorm(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    head_dim: int,
    enable_pdl: bool | None,
) -> None:
    """A call by way of torch's dispatcher; with gradients, what it writes is copied from the norm that has them."""
    if not needs_grad(q, k, q_weight, k_weight):
        torch.ops.jitnorm.fused_inplace_qknorm(q, k, q_weight, k_weight, eps, head_dim, enable_pdl)
        return
    check_kinds(q, k, q_weight, k_weight, head_dim)
    refuse_unwritable(QKNORM.op, q_weight, q=q)
    refuse_unwritable(QKNORM.op, k_weight, k=k)
    # Of copies, as the backward needs what is overwritten; and both before either is, as the second may fail.
    results = [
        dispatch_rmsnorm(
            norms.RMSNORM, heads.clone(memory_format=torch.contiguous_format), weight, eps, None, enable_pdl
        )
        for heads, weight in ((q, q_weight), (k, k_weight))
    ]
    for written, result in zip((q, k), results, strict=True):
        written.copy_(result)


def _run(
    q: Any, k: Any, q_weight: Any, k_weight: Any, eps: float = 1e-6, head_dim: int = 0, enable_pdl: bool | None = None
) -> None:
    arguments = q, k, q_weight, k_weight, eps, head_dim, enable_pdl
    if not QKNORM.call_last((q.dtype, q_weight.nbytes), *arguments):
        check(*arguments)
        QKNORM.run(q, q_weight, *arguments)
    count_version(q, k)


def _fake(
    q: Any, k: Any, q_weight: Any, k_weight: Any, eps: float = 1e-6, head_dim: int = 0, enable_pdl: bool | None = None
) -> None:
    check_kinds(q, k, q_weight, k_weight, head_dim)
    build_while_tracing(QKNORM, q, int(q.shape[-1]), q.dtype, q_weight.dtype)


register(
    "fused_inplace_qknorm(Tensor(a!) q, Tensor(b!) k, Tensor q_weight, Tensor k_weight, float eps=1e-6, "
    "int head_dim=0, bool? enable_pdl=None) -> ()",
    _run,
    _fake,
)
