"""SGLang's MLPs with the projection to gate and up and the activation in one launch, where graphs are captured."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch

from jitnorm.integrations import engine_gemms
from jitnorm.integrations.sglang_plugin.layers import operator_of
from jitnorm.integrations.sglang_plugin.tested import source_problem

# Their forward calls gate_up_proj, act_fn and down_proj, and reads nothing else of the module. Qwen3 has Qwen2's.
MLP_CLASSES = (
    ("sglang.srt.models.llama", "LlamaMLP"),
    ("sglang.srt.models.qwen2", "Qwen2MLP"),
    ("sglang.srt.models.gemma3_causal", "Gemma3MLP"),
)


class FusedLayers:
    """The layers of an MLP as its forward calls them, with the activation computed by the projection to gate and up.

    SGLang's forward runs with this object as `self`, so that its other steps and its arguments stay SGLang's.
    """

    def __init__(self, mlp: Any, activation: str) -> None:
        """Take the module, and the name of the operator that computes its activation."""
        self._mlp, self._activation = mlp, activation

    def gate_up_proj(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the activated product, and None in place of a bias."""
        return engine_gemms.gated_linear(x, self._mlp.gate_up_proj.weight, self._activation), None

    def act_fn(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`, which `gate_up_proj` has activated."""
        return x

    @property
    def down_proj(self) -> Any:
        """Return the module's own layer."""
        return self._mlp.down_proj


def find(model: torch.nn.Module, linears: Sequence[Any]) -> tuple[list[tuple[Any, str]], list[tuple[str, str]]]:
    """Find the MLPs whose activation can be computed together with one of `linears`.

    Returns:
        The MLPs with the names of the operators of their activations, and the classes of others with the reasons.
    """
    suitable = {id(linear) for linear in linears}
    found, problems = [], []
    for module in model.modules():
        mlp: Any = module
        name = type(mlp).__name__
        if (type(mlp).__module__, name) not in MLP_CLASSES or id(getattr(mlp, "gate_up_proj", None)) not in suitable:
            continue
        if problem := source_problem(name) or _problem(mlp):
            problems.append((name, problem))
        elif (activation := operator_of(mlp.act_fn)) is None:
            problems.append((name, "SGLang computes the activation"))
        elif engine_gemms.is_candidate(mlp.gate_up_proj.weight, activation):
            found.append((mlp, activation))
    return found, problems


def _problem(mlp: Any) -> str | None:
    """Return why two layers of an MLP must be called one after another, or None.

    The hooks of --forward-hooks do not count: SGLang adds them after the graphs were captured.
    """
    if "forward" in vars(mlp) or "forward" in vars(mlp.gate_up_proj):
        return "its forward was replaced on the instance"
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in (mlp.gate_up_proj, mlp.act_fn)):
        return "its layers have hooks"
    return None


def replace(mlp: Any, activation: str) -> None:
    """Let the forward of an MLP call FusedLayers where graphs are captured."""
    mlp.jitnorm_activation = activation
    mlp.forward = types.MethodType(_forward, mlp)  # a copy of the module gets its own


def _forward(mlp: Any, *args: Any, **kwargs: Any) -> Any:
    layers = FusedLayers(mlp, mlp.jitnorm_activation) if is_capturing() else mlp
    return type(mlp).forward(layers, *args, **kwargs)


def is_capturing() -> bool:
    """Return whether a call becomes part of a CUDA graph, and not of a compiled one."""
    return not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
