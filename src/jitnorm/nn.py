"""Norms as modules: drop-ins for `torch.nn.RMSNorm` and `torch.nn.LayerNorm`, Gemma's RMSNorm, and a gated one.

A module accepts every input that torch's module accepts, under every tracer and transform: PyTorch computes what
the kernels do not support, such as other sizes and dtypes or several normalised dimensions, with the same meaning. The
gated norm normalises the last dimension.
"""

# No `from __future__ import annotations`: torch.fx writes the annotations of forward into its code, as types, not text.

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, overload

import torch
import torch.fx
import torch.nn.functional as F

from jitnorm.core import checks
from jitnorm.core.eligibility import (
    can_call_layernorm,
    can_call_operators,
    can_normalise_any_size,
    has_general_layout,
    has_kernel_layout,
    is_plain_weight,
)
from jitnorm.core.operators import DTYPES
from jitnorm.core.torch_library import needs_dispatcher, needs_grad
from jitnorm.fused_add_rmsnorm import fused_add_rmsnorm, gemma_fused_add_rmsnorm
from jitnorm.gated_rmsnorm import check_options, gated_rmsnorm, gated_rmsnorm_in_torch, has_kernel
from jitnorm.general_rmsnorm import general_fused_add_rmsnorm, general_rmsnorm
from jitnorm.layernorm import layernorm
from jitnorm.rmsnorm import gemma_rmsnorm, rmsnorm

_HALF_DTYPES = (torch.float16, torch.bfloat16)

# Where eps is None, F.rms_norm takes the epsilon of the dtype it computes in; before 2.7, of the input's.
_DEFAULT_EPS_IS_FLOAT32 = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)


@dataclass(eq=False, repr=False)
class NormOperators:
    """The operators that one variant of RMSNorm calls.

    Attributes:
        norm: the norm without a residual.
        fused_add: adds the residual and normalises the sum, in place.
        fused_add_functional: the same, returning new tensors.
        weight_offset: added to the weight before it multiplies.
    """

    norm: Callable[..., torch.Tensor]
    fused_add: Callable[..., None]
    fused_add_functional: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    weight_offset: float


NORM_VARIANTS = {
    # torch.ops.jitnorm is looked up only at the call: looking an operator up registers its fake implementation.
    "rmsnorm": NormOperators(
        rmsnorm, fused_add_rmsnorm, lambda *args: torch.ops.jitnorm.fused_add_rmsnorm_functional(*args), 0.0
    ),
    "gemma_rmsnorm": NormOperators(
        gemma_rmsnorm,
        gemma_fused_add_rmsnorm,
        lambda *args: torch.ops.jitnorm.gemma_fused_add_rmsnorm_functional(*args),
        1.0,
    ),
}


class _ResidualNorm(torch.nn.Module):
    """The forward method that the modules share."""

    _variant: ClassVar[str]  # a key of NORM_VARIANTS
    _ones: torch.Tensor | None  # the weight for the kernels if the module has none
    weight: Any  # torch.nn.Parameter or None
    normalized_shape: tuple[int, ...]
    eps: float | None

    @overload
    def forward(self, x: torch.Tensor, residual: None = None) -> torch.Tensor: ...
    @overload
    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Normalise `x`, or the sum of `x` and `residual`.

        Without a residual nothing is overwritten, and the result is a new tensor. With a residual, **both tensors are
        consumed**: use what is returned and never the arguments again. If no gradient is needed and a kernel supports
        these tensors, the normalised tensor is written into `x` and the sum into `residual`, and these two are
        returned, as in vLLM: at inference, new tensors for every layer would cost more than the kernel. Otherwise new
        tensors are returned.

        Args:
            x: `[..., *normalized_shape]`, of any dtype and strides that `F.rms_norm` takes.
            residual: of `x`'s shape, dtype and device, sharing no memory with it.

        Returns:
            The normalised tensor; with a residual, the normalised sum and the sum. The sum is normalised before it is
            rounded, as by `jitnorm.fused_add_rmsnorm`.

        Raises:
            ValueError: `x` and `residual` share memory, or differ in shape, dtype or device.
            RuntimeError: as `F.rms_norm`; or a kernel cannot be built.
        """
        return rms_norm(self._variant, x, residual, self.weight, self._ones, self.normalized_shape, self.eps)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)


class RMSNorm(_ResidualNorm, torch.nn.RMSNorm):
    """`torch.nn.RMSNorm`, computed by this package's kernels wherever they support the call.

    The constructor, the state dict and the repr are torch's own. With a residual, the sum is normalised.

    Args:
        normalized_shape: the size of the last dimension, or the sizes of several (which PyTorch computes).
        eps: added to the mean of the squares. None means torch's default: the epsilon of float32 for float16,
            bfloat16 and float32 (before torch 2.7, of the input's dtype).
        elementwise_affine: False for no weight.
        device: of the weight, which is initialised with ones.
        dtype: of the weight.

    Raises:
        TypeError: eps is not a number.
        ValueError: eps is negative.
    """

    _variant = "rmsnorm"

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
        # The kernels always multiply by a weight. float32 weights are accepted with inputs of every dtype.
        ones = None if elementwise_affine else torch.ones(self.normalized_shape, device=device, dtype=torch.float32)
        self.register_buffer("_ones", ones, persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "RMSNorm":
        super()._apply(fn, recurse)
        if self._ones is not None:  # half() changes its dtype, and to_empty() leaves it uninitialised
            self._ones = torch.ones_like(self._ones, dtype=torch.float32)
        return self


class GemmaRMSNorm(_ResidualNorm):
    """Gemma's RMSNorm: multiplies by `1 + weight`, added in float32; the weight is initialised with zeros.

    Not a subclass of `torch.nn.RMSNorm`, because code for that class would multiply by the weight alone.

    Args:
        normalized_shape: the size of the last dimension, or the sizes of several (which PyTorch computes).
        eps: added to the mean of the squares.
        device: of the weight.
        dtype: of the weight.

    Raises:
        TypeError: eps is not a number.
        ValueError: eps is negative.
    """

    _variant = "gemma_rmsnorm"
    _ones = None
    weight: torch.nn.Parameter

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
        self.normalized_shape = shape
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to zeros, so that the module multiplies by one."""
        torch.nn.init.zeros_(self.weight)

    def extra_repr(self) -> str:
        """Return the arguments that the module's repr shows."""
        return f"{self.normalized_shape}, eps={self.eps}"


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm`, computed by this package's kernels wherever they support the call.

    The constructor, the state dict and the repr are torch's own.

    Args:
        normalized_shape: the size of the last dimension, or the sizes of several (which PyTorch computes).
        eps: added to the variance.
        elementwise_affine: False for neither a weight nor a bias.
        bias: False for no bias.
        device: of weight and bias, which are initialised with ones and zeros.
        dtype: of weight and bias.

    Raises:
        TypeError: eps is not a number.
        ValueError: eps is negative.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        checks.eps(eps)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise `input` into a new tensor.

        Args:
            input: `[..., *normalized_shape]`, of any dtype and strides that `F.layer_norm` takes.

        Returns:
            The normalised tensor.

        Raises:
            RuntimeError: as `F.layer_norm`; or a kernel cannot be built.
        """
        return layer_norm(input, self.weight, self.bias, self.normalized_shape, self.eps)

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)


def layer_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    normalized_shape: tuple[int, ...],
    eps: float,
) -> torch.Tensor:
    """Compute what `LayerNorm` documents. torch.fx.symbolic_trace records calls of this function.

    Args:
        input: argument of forward.
        weight: the module's parameter, or None.
        bias: the module's parameter, or None.
        normalized_shape: the module's.
        eps: the module's.

    Returns:
        The normalised tensor.

    Raises:
        RuntimeError: as the module's forward method.
    """
    if (
        len(normalized_shape) == 1
        and can_call_layernorm(input, weight, bias, normalized_shape[0])
        and not torch.is_autocast_enabled(input.device.type)  # where F.layer_norm returns float32 on CUDA
    ):
        if not has_general_layout(input):
            input = input.clone(memory_format=torch.contiguous_format)
        return layernorm(input, weight, bias, eps)  # type: ignore[return-value]
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


torch.fx.wrap("layer_norm")


class RMSNormGated(torch.nn.Module):
    """RMSNorm beside a gate, as in Mamba 2 and Qwen3-Next: `jitnorm.gated_rmsnorm` with the weight of a module.

    The arguments are those of mamba_ssm's RMSNorm in ops/triton/layernorm_gated.py, and `activation`.

    Args:
        hidden_size: the size of the last dimension.
        eps: added to the mean of the squares.
        group_size: how many adjacent elements are normalised together; it divides hidden_size. None for all.
        norm_before_gate: whether the gate multiplies the result, or the input before it is normalised.
        device: of the weight, which is initialised with ones.
        dtype: of the weight.
        activation: of the gate: "silu" or "sigmoid".

    Raises:
        TypeError: eps is not a number, group_size no int, or norm_before_gate no bool.
        ValueError: eps is negative, group_size does not divide hidden_size, or there is no such activation.
    """

    weight: torch.nn.Parameter

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "silu",
    ) -> None:
        checks.eps(eps)
        check_options(group_size, norm_before_gate, activation, "once")
        if group_size is not None and (group_size < 1 or hidden_size % group_size):
            raise ValueError(f"group_size must divide hidden_size {hidden_size}, got {group_size}")
        super().__init__()
        self.eps, self.group_size = eps, group_size
        self.norm_before_gate, self.activation = norm_before_gate, activation
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones."""
        torch.nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Normalise `x` and multiply by the activation of `gate`.

        Args:
            x: `[..., hidden_size]`, of any floating-point dtype and any strides.
            gate: of `x`'s shape.

        Returns:
            A new tensor like `x`.

        Raises:
            RuntimeError: as PyTorch's operators, for tensors that do not fit each other; or a kernel cannot be built.
        """
        options = self.eps, self.group_size, self.norm_before_gate, self.activation
        return gated_rms_norm(x, gate, self.weight, *options)

    def extra_repr(self) -> str:
        """Return the arguments that the module's repr shows."""
        return (
            f"{self.weight.shape[0]}, eps={self.eps}, group_size={self.group_size}, "
            f"norm_before_gate={self.norm_before_gate}, activation={self.activation!r}"
        )

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group_size: int | None,
    norm_before_gate: bool,
    activation: str,
) -> torch.Tensor:
    """Compute what RMSNormGated documents. torch.fx.symbolic_trace records calls of this function.

    Args:
        x: argument of forward.
        gate: argument of forward.
        weight: the module's parameter.
        eps: the module's.
        group_size: the module's.
        norm_before_gate: the module's.
        activation: the module's.

    Returns:
        A new tensor like `x`.

    Raises:
        RuntimeError: as the module's forward method.
    """
    if x.shape[-1:] != weight.shape or gate.shape != x.shape:
        raise RuntimeError(
            f"x and gate must have one shape [..., {weight.shape[0]}], got {list(x.shape)} and {list(gate.shape)}"
        )
    if not can_normalise_gated(x, gate, weight, group_size):
        return gated_rmsnorm_in_torch(x, gate, weight, eps, group_size, norm_before_gate, activation)
    return gated_rmsnorm(
        *(x, gate, weight, eps),
        group_size=group_size,
        norm_before_gate=norm_before_gate,
        activation=activation,
    )


torch.fx.wrap("gated_rms_norm")


def can_normalise_gated(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, group_size: int | None) -> bool:
    """Return whether `jitnorm.gated_rmsnorm` can compute a call with these tensors.

    Args:
        x: the input.
        gate: the gate.
        weight: `[hidden_size]`.
        group_size: as for `jitnorm.gated_rmsnorm`.

    Returns:
        Whether it can, without a copy.
    """
    return (
        can_call_operators(x, weight)
        and can_call_operators(gate, weight)
        and x.dim() > 0
        and gate.shape == x.shape
        and weight.shape == x.shape[-1:]
        and x.shape[-1] > 0
        and x.shape[-1] % (group_size or x.shape[-1]) == 0
        and x.dtype in DTYPES
        and gate.dtype in (x.dtype, torch.float32)
        and weight.dtype in DTYPES
        and x.device == gate.device == weight.device
        and x.device.type in ("cpu", "cuda")
        and has_kernel(x, group_size, gate, weight)
    )


def rms_norm(
    variant: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    ones: torch.Tensor | None,
    normalized_shape: tuple[int, ...],
    eps: float | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute what the modules' forward method documents. torch.fx.symbolic_trace records calls of this function.

    Args:
        variant: a key of `NORM_VARIANTS`.
        x: argument of forward.
        residual: argument of forward.
        weight: the module's parameter, or None.
        ones: the weight for the kernels if `weight` is None.
        normalized_shape: the module's.
        eps: the module's.

    Returns:
        As the modules' forward method.

    Raises:
        ValueError, RuntimeError: as the modules' forward method.
    """
    operators, factor = NORM_VARIANTS[variant], ones if weight is None else weight
    if residual is not None:
        _check_residual(x, residual)
        if factor is not None and _can_fuse_residual(x, residual, factor):
            return _fused_add(operators, x, residual, factor, resolve_eps(eps, x))
        total = _at_least_float32(x) + _at_least_float32(residual)
        normalised = _torch_rms_norm(operators, total, weight, normalized_shape, resolve_eps(eps, x))
        return normalised.to(x.dtype), total.to(x.dtype)
    if factor is not None and can_normalise_any_size(x, factor):
        return normalise(operators.norm, x, factor, resolve_eps(eps, x))
    if operators.weight_offset:
        return _torch_rms_norm(operators, _at_least_float32(x), weight, normalized_shape, eps).to(x.dtype)
    return F.rms_norm(x, normalized_shape, weight, eps)


torch.fx.wrap("rms_norm")


def normalise(
    norm: Callable[..., torch.Tensor],
    input: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    rounding: str = "once",
) -> torch.Tensor:
    """Return `norm(input, weight, eps)` for an input of any strides.

    Args:
        norm: `rmsnorm` or `gemma_rmsnorm` of this package.
        input: accepted by `can_normalise_any_size`, with `weight`, or by `can_normalise_without_weight`. It is copied
            only if no kernel can take its strides.
        weight: `[hidden_size]`, or None.
        eps: added to the mean of the squares.
        rounding: "once" or "hf", as for `general_rmsnorm`.

    Returns:
        A new tensor, in the order of the input's dimensions if the input was not copied.
    """
    if weight is not None and rounding == "once" and is_plain_weight(input, weight):
        if has_kernel_layout(input):
            return norm(input, weight, eps)
        # Heads before tokens, as in q.view(b, s, h, d).transpose(1, 2): the same rows in another order.
        if input.dim() >= 3 and has_kernel_layout(rows := input.transpose(-3, -2)):
            return norm(rows, weight, eps).transpose(-3, -2)
    if not has_general_layout(input):
        input = input.clone(memory_format=torch.contiguous_format)
    offset = 1.0 if norm is gemma_rmsnorm else 0.0
    return general_rmsnorm(input, weight, eps, weight_offset=offset, rounding=rounding)  # type: ignore[return-value]


def _fused_add(
    operators: NormOperators, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add and normalise in place, or into new tensors if a gradient is needed."""
    if not is_plain_weight(x, weight) or not (has_kernel_layout(x) and has_kernel_layout(residual)):
        if needs_grad(x, residual, weight):
            functional = torch.ops.jitnorm.general_fused_add_rmsnorm_functional
            normalised, total, _ = functional(x, residual, weight, None, eps, operators.weight_offset, "once", False)
            return normalised, total
        general_fused_add_rmsnorm(x, residual, weight, eps, weight_offset=operators.weight_offset)
        return x, residual
    if needs_grad(x, residual, weight):
        return operators.fused_add_functional(x, residual, weight, eps)
    operators.fused_add(x, residual, weight, eps)
    return x, residual


def _can_fuse_residual(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether a fused kernel supports these tensors without a copy, since it overwrites two of them."""
    return (
        can_normalise_any_size(x, weight)
        and can_call_operators(residual, weight)
        and all(has_general_layout(written) and _has_disjoint_rows(written) for written in (x, residual))
    )


def _has_disjoint_rows(tensor: torch.Tensor) -> bool:
    """Return whether rows collapse to one stride and no two share memory, unlike the rows of an expanded tensor."""
    return tensor.is_contiguous() or (checks.row_stride(tensor) or 0) >= tensor.shape[-1]


def _check_residual(x: torch.Tensor, residual: torch.Tensor) -> None:
    """Raise for a residual that the kernels refuse, and that PyTorch's addition would broadcast or promote."""
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(
            "residual must have the shape, dtype and device of x: "
            f"{list(x.shape)} {x.dtype} on {x.device}, "
            f"got {list(residual.shape)} {residual.dtype} on {residual.device}"
        )
    if not needs_dispatcher(x, residual):
        checks.no_overlap("residual", residual, "x", x, reject_identical=True)


def _torch_rms_norm(
    operators: NormOperators,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    normalized_shape: tuple[int, ...],
    eps: float | None,
) -> torch.Tensor:
    """Normalise an `x` of float32 or float64 by PyTorch's operator."""
    factor = None if weight is None else _at_least_float32(weight)
    if factor is not None and operators.weight_offset:
        factor = factor + operators.weight_offset
    return F.rms_norm(x, normalized_shape, factor, eps)


def resolve_eps(eps: float | None, x: torch.Tensor) -> float:
    """Return `eps`, or what torch.nn.RMSNorm adds for an input `x` if it is None."""
    if eps is not None:
        return eps
    return torch.finfo(torch.float32 if x.dtype in _HALF_DTYPES and _DEFAULT_EPS_IS_FLOAT32 else x.dtype).eps


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` in the dtype in which sums are accumulated."""
    return tensor.float() if tensor.dtype in _HALF_DTYPES else tensor


def is_module_of_jitnorm(module: object) -> bool:
    """Return whether `module` is one of this file's modules."""
    return isinstance(module, (_ResidualNorm, RMSNormGated))


def refuse_script(module: torch.nn.Module) -> NoReturn:
    """Raise for torch.jit.script, which compiles Python and cannot compile the choice between kernels and PyTorch.

    Args:
        module: what torch.jit.script was called with.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"torch.jit.script cannot compile jitnorm's {type(module).__name__}: use torch.jit.trace, torch.export or "
        "torch.compile"
    )
