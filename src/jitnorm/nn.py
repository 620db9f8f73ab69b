"""RMSNorm modules: `torch.nn.RMSNorm`'s drop-in, and Gemma's, both with an optional residual.

What the kernels do not serve (a size, a dtype, several normalised dimensions) is PyTorch's to compute, with the same
meaning: a module never refuses an input that `torch.nn.RMSNorm` accepts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import torch
import torch.nn.functional as F

from jitnorm import checks
from jitnorm.fused_add_rmsnorm import fused_add_rmsnorm
from jitnorm.gemma_fused_add_rmsnorm import gemma_fused_add_rmsnorm
from jitnorm.gemma_rmsnorm import gemma_rmsnorm
from jitnorm.norms import is_supported_hidden_size
from jitnorm.operators import DTYPES
from jitnorm.rmsnorm import rmsnorm
from jitnorm.torch_library import is_traced, needs_grad

_HALF = (torch.float16, torch.bfloat16)

# Where eps is None, F.rms_norm takes the epsilon of the dtype it computes in; before 2.7, of the input's.
_EPS_OF_FLOAT32 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)


def serves(input: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a kernel normalises `input`, whatever its strides, with `weight`."""
    return (
        not _is_interpreted(input, weight)
        and weight.dim() == 1
        and input.dim() > 0
        and input.shape[-1] == weight.shape[0]
        and is_supported_hidden_size(weight.shape[0])
        and input.dtype in DTYPES
        and weight.dtype in (input.dtype, torch.float32)
        and weight.device == input.device
        and input.device.type in ("cpu", "cuda")
        and is_rows(weight)
    )


def _is_interpreted(input: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether what these mean is known to torch's own operators alone: nested, sharded, inside torch.func."""
    return not torch.compiler.is_compiling() and (
        input.is_nested
        or torch._C._functorch.peek_interpreter_stack() is not None
        or "DTensor" in (type(input).__name__, type(weight).__name__)
    )


def normalise(norm: Callable[..., torch.Tensor], input: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`norm(input, weight, eps)`, one of this package's, for an input of any strides, which the result has too where
    the kernel takes them."""
    if is_rows(input):
        return norm(input, weight, eps)
    # Heads before tokens, as in q.view(b, s, h, d).transpose(1, 2): rows still, in another order.
    if input.dim() >= 3 and is_rows(rows := input.transpose(-3, -2)):
        return norm(rows, weight, eps).transpose(-3, -2)
    return norm(input.clone(memory_format=torch.contiguous_format), weight, eps)


def is_rows(tensor: torch.Tensor) -> bool:
    """Whether a kernel takes these strides."""
    # What a compiler traces has no address yet; it allocates aligned, and the kernel refuses what is not.
    if tensor.is_cuda and not torch.compiler.is_compiling() and tensor.data_ptr() % checks.CUDA_ALIGNMENT:
        return False
    if tensor.is_contiguous():
        return True
    stride = checks.row_stride(tensor) if tensor.stride(-1) == 1 else None
    return stride is not None and not (tensor.is_cuda and stride * tensor.element_size() % checks.CUDA_ALIGNMENT)


def _fused_add(
    op: Callable[..., None],
    functional: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place, except where autograd needs what would be overwritten."""
    if needs_grad(input, residual, weight):
        return functional(input, residual, weight, eps)
    op(input, residual, weight, eps)
    return input, residual


def _takes_sum(input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a fused kernel takes these as they are; what it overwrites cannot be a copy or an expanded view."""
    return (
        serves(input, weight)
        and residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
        and all(is_rows(written) and _is_separate(written) for written in (input, residual))
    )


def _is_separate(rows: torch.Tensor) -> bool:
    """Whether each has memory of its own."""
    return rows.is_contiguous() or (checks.row_stride(rows) or 0) >= rows.shape[-1]


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm`, computed by this package's kernels wherever they serve.

    The constructor, the state dict and the text are torch's own. With a residual it adds first and normalises the sum.

    Args:
        normalized_shape: the last dimension's size, or several dimensions' (PyTorch computes those).
        eps: added to the mean of the squares. None stands for what torch takes: the epsilon of float32 for float16,
            bfloat16 and float32 (before torch 2.7, of the input's dtype).
        elementwise_affine: False for no weight.
        device, dtype: of the weight, which starts as ones.

    Raises:
        TypeError, ValueError: eps is no number, or below zero.
    """

    _ones: torch.Tensor | None

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if eps is not None:
            checks.eps(eps)
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        # The kernels always multiply. float32 goes with an input of every dtype.
        ones = None if elementwise_affine else torch.ones(self.normalized_shape, device=device, dtype=torch.float32)
        self.register_buffer("_ones", ones, persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> RMSNorm:
        super()._apply(fn, recurse)
        if self._ones is not None:  # half() rounds its dtype, to_empty() leaves it unwritten
            self._ones = torch.ones_like(self._ones, dtype=torch.float32)
        return self

    @overload
    def forward(self, x: torch.Tensor, residual: None = None) -> torch.Tensor: ...
    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalises `x`, or the sum of `x` and `residual`.

        Without a residual nothing is written, and the result is a new tensor. With one, **both tensors are consumed**:
        use what is returned and never the arguments again. Where no gradient is needed the sum and the result are
        written into the arguments themselves, which are then what is returned, as in vLLM: at inference, new tensors
        for every layer would cost more than the kernel. Where a gradient is needed, or the kernels do not serve these
        tensors, the arguments stay as they are and new tensors are returned.

        Args:
            x: `[..., *normalized_shape]`, of any dtype and strides that `F.rms_norm` takes.
            residual: of `x`'s shape, dtype and device, sharing no memory with it.

        Returns:
            The normalised tensor; with a residual, that of the sum, and the sum. The sum is normalised before it is
            rounded, as by `jitnorm.fused_add_rmsnorm`.

        Raises:
            ValueError: `x` and `residual` share memory, or have other shapes, dtypes or devices.
            RuntimeError: as `F.rms_norm`; or a kernel cannot be built.
        """
        weight = self._ones if self.weight is None else self.weight
        if residual is None:
            if weight is None or not serves(x, weight):
                return super().forward(x)
            return normalise(rmsnorm, x, weight, self._eps(x))
        _check_residual(x, residual)
        if weight is not None and _takes_sum(x, residual, weight):
            functional = torch.ops.jitnorm.fused_add_rmsnorm_functional
            return _fused_add(fused_add_rmsnorm, functional, x, residual, weight, self._eps(x))
        total, to = _wide(x) + _wide(residual), None if self.weight is None else _wide(self.weight)
        out = F.rms_norm(total, self.normalized_shape, to, self._eps(x))
        return out.to(x.dtype), total.to(x.dtype)

    def _eps(self, x: torch.Tensor) -> float:
        if self.eps is not None:
            return self.eps
        return torch.finfo(torch.float32 if x.dtype in _HALF and _EPS_OF_FLOAT32 else x.dtype).eps


class GemmaRMSNorm(torch.nn.Module):
    """Gemma's RMSNorm: the factor is `1 + weight`, added in float32, and the weight starts as zeros.

    Not a `torch.nn.RMSNorm`, because code that knows that class would multiply by the weight alone.

    Args:
        normalized_shape: the last dimension's size, or several dimensions' (PyTorch computes those).
        eps: added to the mean of the squares.
        device, dtype: of the weight.

    Raises:
        TypeError, ValueError: eps is no number, or below zero.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-6,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.eps(eps)
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.normalized_shape: tuple[int, ...] = shape
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}"

    @overload
    def forward(self, x: torch.Tensor, residual: None = None) -> torch.Tensor: ...
    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """As `RMSNorm.forward`, and as there **a residual and its `x` are consumed**."""
        if residual is None:
            if serves(x, self.weight):
                return normalise(gemma_rmsnorm, x, self.weight, self.eps)
            return self._norm(_wide(x)).to(x.dtype)
        _check_residual(x, residual)
        if _takes_sum(x, residual, self.weight):
            functional = torch.ops.jitnorm.gemma_fused_add_rmsnorm_functional
            return _fused_add(gemma_fused_add_rmsnorm, functional, x, residual, self.weight, self.eps)
        total = _wide(x) + _wide(residual)
        return self._norm(total).to(x.dtype), total.to(x.dtype)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, 1 + _wide(self.weight), self.eps)


def _check_residual(x: torch.Tensor, residual: torch.Tensor) -> None:
    """Addition would broadcast and promote, and the kernels do not: the same call is right or wrong at every size."""
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(
            f"residual must be like x, {list(x.shape)} {x.dtype} on {x.device}, "
            f"got {list(residual.shape)} {residual.dtype} on {residual.device}"
        )
    if not is_traced(x, residual):
        checks.no_overlap("residual", residual, "x", x, even_exactly=True)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In the dtype that sums are kept in."""
    return tensor.float() if tensor.dtype in _HALF else tensor
