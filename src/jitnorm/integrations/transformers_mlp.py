"""Patch the MLPs of Hugging Face models: the activation of the gate and the product with the factor in one launch."""

# No `from __future__ import annotations`: torch.fx writes the annotations of forward into its code, as types, not text.

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from jitnorm.activation import gelu_and_mul, gelu_tanh_and_mul, silu_and_mul
from jitnorm.core.checks import CUDA_ALIGNMENT
from jitnorm.integrations.transformers_projections import gated_linear, project, projections_of, side_by_side
from jitnorm.integrations.transformers_sources import reason_if_unknown
from jitnorm.integrations.transformers_state import can_fuse, is_plain, uses_timed_gemms

MLP_CLASSES = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "Gemma3MLP")


class PatchedMLP(torch.nn.Module):
    """The base class that a patched MLP has before the original one."""

    _jitnorm_original: type[torch.nn.Module]

    def forward(self, x: torch.Tensor) -> Any:
        return fused_mlp(self, x) if can_fuse_mlp(self, x) else super().forward(x)


def can_fuse_mlp(module: torch.nn.Module, x: torch.Tensor) -> bool:
    """Return whether `fused_mlp` computes a call of an MLP."""
    if not can_fuse(module, x):
        return False
    projections = projections_of(module, "MLP")
    return (
        projections is not None
        and gated_activation(module._modules.get("act_fn")) is not None
        and _is_supported(x, projections)
    )


def fused_mlp(module: torch.nn.Module, x: torch.Tensor) -> Any:
    """Return `down_proj(act_fn(gate_proj(x)) * up_proj(x))` of an MLP: the activation and the product in one launch.

    With `time_gemms` and `fuse_projections`, the GEMM of the gate and the factor may compute them in its epilogue.
    """
    modules: Any = module._modules
    projections, operator = [modules["gate_proj"], modules["up_proj"]], gated_activation(modules["act_fn"])
    uses_timed = uses_timed_gemms(module)
    activated = gated_linear(x, projections, operator_name(module)) if uses_timed else None  # type: ignore[arg-type]
    if activated is None:
        activated = operator(side_by_side(x, projections, uses_timed), rounding=_rounding(module))  # type: ignore[misc]
    return project(activated, modules["down_proj"], uses_timed)


def operator_name(module: torch.nn.Module) -> str | None:
    """Return the name of the operator that computes `act_fn(gate) * up` of a patched MLP, or None if there is none.

    The operator that rounds where transformers rounds has a name of its own, which ends in "_hf".
    """
    operator = gated_activation(module._modules.get("act_fn"))
    if operator is None:
        return None
    return operator.__name__ + ("_hf" if _rounding(module) == "hf" else "")


def _rounding(module: torch.nn.Module) -> str:
    return getattr(module, "_jitnorm_rounding", "once")


def _is_supported(x: torch.Tensor, projections: list[torch.nn.Linear]) -> bool:
    """Return whether the kernel supports the results of the projections, at its full speed."""
    gate, up = (linear._parameters["weight"] for linear in projections)
    return (
        type(gate) is type(up) is torch.nn.Parameter
        and gate.dtype == up.dtype == x.dtype
        and gate.device == up.device == x.device
        and gate.shape == up.shape
        and gate.shape[0] * x.itemsize % CUDA_ALIGNMENT == 0
    )


def gated_activation(act_fn: object) -> Callable[..., torch.Tensor] | None:
    """Return the operator that computes `act_fn(gate) * up` of `[gate, up]`, or None if there is none for it."""
    if not isinstance(act_fn, torch.nn.Module) or not is_plain(act_fn):
        return None
    if type(act_fn) is torch.nn.SiLU:
        return silu_and_mul
    if not type(act_fn).__module__.startswith("transformers."):
        return None
    kind, act = type(act_fn).__name__, getattr(act_fn, "act", None)
    if kind == "SiLUActivation":
        return silu_and_mul
    if kind == "GELUActivation" and act is F.gelu:
        return gelu_and_mul
    is_tanh = isinstance(act, functools.partial) and act.func is F.gelu and act.keywords == {"approximate": "tanh"}
    return gelu_tanh_and_mul if kind == "GELUTanh" and is_tanh else None


def reason_to_leave_mlp(module: torch.nn.Module) -> str | None:
    """Return why an MLP cannot be patched, or None if it can."""
    name = type(module).__name__
    if name not in MLP_CLASSES:
        return f"{name} is not a class that jitnorm supports"
    if reason := reason_if_unknown(module):
        return reason
    act_fn = module._modules.get("act_fn")
    return None if gated_activation(act_fn) else f"no kernel computes the product with {type(act_fn).__name__}"
