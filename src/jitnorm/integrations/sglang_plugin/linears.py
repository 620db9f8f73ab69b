"""SGLang's linear layers by engine_gemms, in CUDA graphs, outside of its deterministic mode.

In an MLP whose forward is known, the projection to gate and up is computed together with the activation.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod, get_bf16_gemm_backend

from jitnorm.integrations import engine_gemms
from jitnorm.integrations.engine_plugins import reason_to_skip
from jitnorm.integrations.sglang_plugin.layers import operator_of
from jitnorm.integrations.sglang_plugin.replacement import Report
from jitnorm.integrations.sglang_plugin.tested import source_problem

# Those around attention and of an MLP. Ranks of tensor parallelism have different columns or summands of them, except
# for columns of k and v where there are more ranks than heads, each of which a rank keeps for itself.
_AFTER_NORM = (QKVParallelLinear, MergedColumnParallelLinear)
_CLASSES = (*_AFTER_NORM, RowParallelLinear)
# Their forward calls gate_up_proj, act_fn and down_proj, and reads nothing else of the module. Qwen3 has Qwen2's.
MLP_CLASSES = (
    ("sglang.srt.models.llama", "LlamaMLP"),
    ("sglang.srt.models.qwen2", "Qwen2MLP"),
    ("sglang.srt.models.gemma3_causal", "Gemma3MLP"),
)


class JitnormLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """SGLang's method for linear layers without quantisation, with `engine_gemms.linear` where graphs are captured."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return `x @ layer.weight.t() + bias`."""
        if bias is not None or not _is_capturing():
            return super().apply(layer, x, bias)  # type: ignore[no-any-return]
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        return engine_gemms.linear(x, weight)


class GatedMLP:
    """The layers of an MLP as its forward calls them, with the activation computed by the projection to gate and up.

    SGLang's forward runs with this object as `self`, so that its other steps and its arguments stay SGLang's.
    """

    def __init__(self, mlp: Any, activation: str) -> None:
        """Take the module, and the name of the operator that computes its activation."""
        self._mlp, self._activation = mlp, activation

    def gate_up_proj(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the activated product, and no bias."""
        return engine_gemms.gated_linear(x, self._mlp.gate_up_proj.weight, self._activation), None

    def act_fn(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x`, which `gate_up_proj` has activated."""
        return x

    @property
    def down_proj(self) -> Any:
        """Return the module's own layer."""
        return self._mlp.down_proj


def replace(runner: Any, report: Report) -> None:
    """Replace each linear layer, and each activation after one, for which `engine_gemms` may be faster, and time them.

    Nothing is timed for the draft of speculative decoding, because the target may have graphs already, nor without
    graphs. With LoRA nothing is replaced: a kernel of SGLang's LoRA may end before the GEMM that it was launched after.
    """
    args = runner.server_args
    if runner.is_draft_worker or args.cuda_graph_config.decode.backend == "disabled":
        return
    if args.enable_deterministic_inference or args.enable_lora or args.lora_paths:
        return
    if get_bf16_gemm_backend().is_cutedsl():
        return
    suitable: list[Any] = [
        module
        for module in runner.model.modules()
        if type(module) in _CLASSES
        and type(module.quant_method) is UnquantizedLinearMethod
        and module.bias is None
        and module.tp_size == runner.ps.tp_size
    ]
    mlps, problems = _find_mlps(runner.model, suitable)
    in_mlps = {id(mlp.gate_up_proj) for mlp, _ in mlps}
    modules = [each for each in suitable if engine_gemms.is_candidate(each.weight)]
    if not modules and not mlps:
        return
    if reason := reason_to_skip("linear_layers") or source_problem("linear layers"):
        report.left["linear layers", reason] += len(modules)
        return
    for name, problem in problems:
        report.left[f"gate_up_proj of {name} with its activation", problem] += 1
    others = [module for module in modules if id(module) not in in_mlps]
    selection = engine_gemms.select(
        [module.weight for module in others if type(module) in _AFTER_NORM],
        [module.weight for module in others if type(module) not in _AFTER_NORM],
        [(mlp.gate_up_proj.weight, activation) for mlp, activation in mlps],
    )
    by = "; ".join(selection.notes)
    rows = f"for up to {engine_gemms.ROWS[-1]} rows"
    gated = set()
    for mlp, activation in mlps:
        if engine_gemms.shape_of(mlp.gate_up_proj.weight, activation) in selection.shapes:
            _replace_forward(mlp, activation)
            gated.add(id(mlp.gate_up_proj))
            report.replaced[f"linear layer with its activation {rows}", by] += 1
    for module in modules:
        if id(module) in gated:
            continue
        if engine_gemms.shape_of(module.weight) in selection.shapes:
            module.quant_method = JitnormLinearMethod()
            report.replaced[f"linear layer {rows}", by] += 1
    if by and not selection.shapes:  # no kernel could be built
        report.left["linear layers", by] += len(modules)


def _find_mlps(model: torch.nn.Module, linears: Sequence[Any]) -> tuple[list[tuple[Any, str]], list[tuple[str, str]]]:
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


def _replace_forward(mlp: Any, activation: str) -> None:
    """Let the forward of an MLP call the layers of GatedMLP where graphs are captured."""
    mlp.jitnorm_activation = activation
    mlp.forward = types.MethodType(_forward, mlp)  # a copy of the module gets its own


def _forward(mlp: Any, *args: Any, **kwargs: Any) -> Any:
    layers = GatedMLP(mlp, mlp.jitnorm_activation) if _is_capturing() else mlp
    return type(mlp).forward(layers, *args, **kwargs)


def _is_capturing() -> bool:
    return not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
