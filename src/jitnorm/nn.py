"""RMSNorm modules: `torch.nn.RMSNorm`'s drop-in, and Gemma's, both with an optional residual.

What the kernels do not serve (a size, a dtype, several normalised dimensions) is PyTorch's to compute, with the same
meaning: a module never refuses an input that `torch.nn.RMSNorm` accepts. Nor does it matter what traces or transforms
the call.
"""

# No `from __future__ import annotations`: torch.fx writes the annotations of forward into its code, as types, not text.

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, overload

import torch
import torch.fx
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

from jitnorm.core import checks
from jitnorm.core.norms import is_supported_hidden_size
from jitnorm.core.operators import DTYPES
from jitnorm.core.torch_library import is_traced, mark_constant, needs_grad
from jitnorm.fused_add_rmsnorm import fused_add_rmsnorm, gemma_fused_add_rmsnorm
from jitnorm.rmsnorm import gemma_rmsnorm, rmsnorm

_HALF = (torch.float16, torch.bfloat16)

# Where eps is None, F.rms_norm takes the epsilon of the dtype it computes in; before 2.7, of the input's.
_EPS_OF_FLOAT32 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)

_ORDINARY = torch.Tensor.__torch_dispatch__
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_jit_tracing_state = torch._C._get_tracing_state
_functorch_level = torch._C._functorch.peek_interpreter_stack


def serves(input: Any, weight: Any) -> bool:
    """Return whether a kernel normalises `input`, whatever its strides, with `weight`."""
    return (
        may_call_kernels(input, weight)
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


def may_call_kernels(input: Any, weight: Any) -> bool:
    """Return whether this package's operators mean the same as PyTorch's own to whatever interprets this call.

    They do in eager mode, and to torch.compile, torch.export, make_fx, FakeTensors and dispatch modes, which see them
    as operators of torch.ops. PyTorch's own are needed by torch.func and forward-mode derivatives, which have rules for
    these alone, by other tensor subclasses, which may have, by torch.fx's proxies, which have no dtype, and by
    torch.jit.trace and the ONNX exporter, whose results run without this package.
    """
    if _is_dynamo_compiling():  # first: dynamo must not trace into the rest
        return not _needs_torch()
    return (
        (getattr(type(input), "__torch_dispatch__", None) is _ORDINARY or _is_fake(input))
        and (getattr(type(weight), "__torch_dispatch__", None) is _ORDINARY or _is_fake(weight))
        and _jit_tracing_state() is None
        and _functorch_level() is None
        and forward_ad._current_level < 0
        and not input.is_nested
    )


def _is_fake(tensor: Any) -> bool:
    """Return whether this stands for an ordinary tensor while a graph is traced that may hold kernels."""
    return isinstance(tensor, (FakeTensor, FunctionalTensor)) and not _needs_torch()


def _needs_torch() -> bool:
    onnx = sys.modules.get("torch.onnx")  # not imported here, as that takes 0.1 s
    return (
        _functorch_level() is not None
        or forward_ad._current_level >= 0
        or (onnx is not None and onnx.is_in_onnx_export())
    )


mark_constant(_needs_torch)


@dataclass(frozen=True)
class Kernels:
    """The operators that a kind of module calls."""

    norm: Callable[..., torch.Tensor]
    fused_add: Callable[..., None]
    functional: Callable[..., tuple[torch.Tensor, torch.Tensor]]  # fused_add, with nothing overwritten
    weight_offset: float


KERNELS = {
    "rmsnorm": Kernels(rmsnorm, fused_add_rmsnorm, torch.ops.jitnorm.fused_add_rmsnorm_functional, 0.0),
    "gemma_rmsnorm": Kernels(
        gemma_rmsnorm, gemma_fused_add_rmsnorm, torch.ops.jitnorm.gemma_fused_add_rmsnorm_functional, 1.0
    ),
}


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
    if tensor.is_cuda and _has_address(tensor) and tensor.data_ptr() % checks.CUDA_ALIGNMENT:
        return False
    if tensor.is_contiguous():
        return True
    stride = checks.row_stride(tensor) if tensor.stride(-1) == 1 else None
    return stride is not None and not (tensor.is_cuda and stride * tensor.element_size() % checks.CUDA_ALIGNMENT)


def _has_address(tensor: torch.Tensor) -> bool:
    """What a compiler traces has none yet; it allocates aligned, and the kernel refuses what is not."""
    return not _is_dynamo_compiling() and type(tensor).__torch_dispatch__ is _ORDINARY


def rms_norm(
    kind: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    ones: torch.Tensor | None,
    normalized_shape: tuple[int, ...],
    eps: float | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute what the forward methods of the modules document. A call of this is what torch.fx.symbolic_trace records.

    Args:
        kind: a key of `KERNELS`.
        x, residual: the module's arguments.
        weight: the module's parameter.
        ones: what a kernel multiplies by where there is no weight.
        normalized_shape, eps: the module's.
    """
    kernels, factor = KERNELS[kind], ones if weight is None else weight
    if residual is not None:
        _check_residual(x, residual)
        if factor is not None and _takes_residual(x, residual, factor):
            return _fused_add(kernels, x, residual, factor, _eps(eps, x))
        total = _wide(x) + _wide(residual)
        normalised = _in_torch(kernels, total, weight, normalized_shape, _eps(eps, x))
        return normalised.to(x.dtype), total.to(x.dtype)
    if factor is not None and serves(x, factor):
        return normalise(kernels.norm, x, factor, _eps(eps, x))
    if kernels.weight_offset:
        return _in_torch(kernels, _wide(x), weight, normalized_shape, eps).to(x.dtype)
    return F.rms_norm(x, normalized_shape, weight, eps)


torch.fx.wrap("rms_norm")


def _fused_add(
    kernels: Kernels, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place, except where autograd needs what would be overwritten."""
    if needs_grad(x, residual, weight):
        return kernels.functional(x, residual, weight, eps)
    kernels.fused_add(x, residual, weight, eps)
    return x, residual


def _takes_residual(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a fused kernel takes these as they are; what it overwrites cannot be a copy or an expanded view."""
    return (
        serves(x, weight)
        and may_call_kernels(residual, weight)
        and all(is_rows(written) and _is_separate(written) for written in (x, residual))
    )


def _is_separate(rows: torch.Tensor) -> bool:
    """Whether each has memory of its own."""
    return rows.is_contiguous() or (checks.row_stride(rows) or 0) >= rows.shape[-1]


def _in_torch(
    kernels: Kernels,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    normalized_shape: tuple[int, ...],
    eps: float | None,
) -> torch.Tensor:
    """Of an `x` that is wide already."""
    factor = None if weight is None else _wide(weight)
    if factor is not None and kernels.weight_offset:
        factor = factor + kernels.weight_offset
    return F.rms_norm(x, normalized_shape, factor, eps)


def _eps(eps: float | None, x: torch.Tensor) -> float:
    if eps is not None:
        return eps
    return torch.finfo(torch.float32 if x.dtype in _HALF and _EPS_OF_FLOAT32 else x.dtype).eps


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

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "RMSNorm":
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
        return rms_norm("rmsnorm", x, residual, self.weight, self._ones, self.normalized_shape, self.eps)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)


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
        return rms_norm("gemma_rmsnorm", x, residual, self.weight, None, self.normalized_shape, self.eps)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)


def refuse_script(module: torch.nn.Module) -> NoReturn:
    """Raise for torch.jit.script, which compiles Python and cannot compile the choice between kernels and PyTorch."""
    raise RuntimeError(
        f"torch.jit.script cannot compile jitnorm's {type(module).__name__}: use torch.jit.trace, torch.export or "
        "torch.compile"
    )


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
