"""vLLM's MLPs with the projection to gate and up and the activation in one operator, in CUDA graphs.

Without it Inductor generates the activation, as a kernel between two GEMMs that neither overlaps.
"""

# No `from __future__ import annotations`: infer_schema reads the annotations of the operator.

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from jitnorm.activation import GELU_AND_MUL, GELU_TANH_AND_MUL, SILU_AND_MUL
from jitnorm.integrations import engine_gemms
from jitnorm.integrations.engine_plugins import reason_to_skip
from jitnorm.integrations.vllm_plugin import compatibility
from jitnorm.integrations.vllm_plugin.classes import replace_class
from jitnorm.integrations.vllm_plugin.layers import JitnormGeluAndMul, JitnormSiluAndMul
from jitnorm.integrations.vllm_plugin.operators import define

# The part of `compatibility.FINGERPRINTS` of each forward that is known. Classes that inherit one are replaced too.
_FORWARDS = {
    "vllm.model_executor.models.qwen2:Qwen2MLP.forward": "Qwen2MLP",
    "vllm.model_executor.models.llama:LlamaMLP.forward": "LlamaMLP",
    "vllm.model_executor.models.mistral:MistralMLP.forward": "MistralMLP",
    "vllm.model_executor.models.gemma3:Gemma3MLP.forward": "Gemma3MLP",
}


class GatedMLP(NamedTuple):
    """An MLP whose gate_up_proj and act_fn one operator can compute.

    Attributes:
        name: Its name in the model.
        module: The MLP.
        activation: A key of `engine_gemms.ACTIVATIONS`.
    """

    name: str
    module: Any
    activation: str


def find(
    model: torch.nn.Module, candidates: Collection[torch.nn.Module], config: Any
) -> tuple[list[GatedMLP], list[str]]:
    """Return the MLPs of a model that the operator can compute, and why others with a known forward are left.

    Args:
        model: A loaded model.
        candidates: Linear layers that the plugin may replace.
        config: vLLM's configuration.
    """
    found: list[GatedMLP] = []
    problems: dict[str, None] = {}  # in order, and each once
    for name, module in model.named_modules():
        part = _FORWARDS.get(compatibility.name_of_forward(module))
        if part is None:
            continue
        projection: Any = module.gate_up_proj
        act_fn: Any = module.act_fn
        down_proj: Any = module.down_proj
        activation = _activation_of(act_fn)
        if (
            activation is None
            or projection not in candidates
            or projection.output_sizes[0] != projection.output_sizes[1]
            or (projection.gather_output and projection.tp_size > 1)
            or type(down_proj.quant_method) is not UnquantizedLinearMethod  # Inductor may quantise the activation
            or f"-{act_fn.name}" in config.compilation_config.custom_ops
            or not engine_gemms.is_candidate(projection.weight, activation)
        ):
            continue
        if problem := (
            reason_to_skip("activations")
            or compatibility.changed("activations")
            or compatibility.changed("MLPs")
            or compatibility.changed(part)
            or ("their layers have hooks" if _has_hooks(projection) or _has_hooks(act_fn) else None)
        ):
            problems[problem] = None
        else:
            found.append(GatedMLP(name, module, activation))
    return found, [*problems]


def _activation_of(act_fn: Any) -> str | None:
    """Return the key of `engine_gemms.ACTIVATIONS` for a module of vLLM's classes or this package's, or None."""
    if type(act_fn) in (SiluAndMul, JitnormSiluAndMul):
        return SILU_AND_MUL.op
    if type(act_fn) in (GeluAndMul, JitnormGeluAndMul):
        return GELU_TANH_AND_MUL.op if act_fn.approximate == "tanh" else GELU_AND_MUL.op
    return None


def _has_hooks(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class _FusedMLP(torch.nn.Module):
    """The base class that a replaced MLP has before vLLM's."""

    gate_up_proj: Any
    down_proj: Any
    _jitnorm_activation: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute what vLLM's forward computes, with one operator for gate_up_proj and act_fn."""
        x = torch.ops.jitnorm_vllm.gated_linear_of_few_rows(x, self.gate_up_proj.weight, self._jitnorm_activation)
        x, _ = self.down_proj(x)
        return x


def replace(mlp: GatedMLP) -> None:
    """Change an MLP's class to one that calls the operator."""
    mlp.module._jitnorm_activation = mlp.activation
    replace_class(mlp.module, _FusedMLP)


def _run(x: torch.Tensor, weight: torch.Tensor, activation: str) -> torch.Tensor:
    return engine_gemms.gated_linear(x, weight, activation)


def _fake(x: torch.Tensor, weight: torch.Tensor, activation: str) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] // 2)


define("gated_linear_of_few_rows", _run, _fake)
