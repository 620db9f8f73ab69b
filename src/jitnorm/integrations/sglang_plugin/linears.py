"""SGLang's linear layers by engine_gemms, in CUDA graphs, outside of its deterministic mode."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod, get_bf16_gemm_backend

from jitnorm.integrations import engine_gemms
from jitnorm.integrations.engine_plugins import reason_to_skip
from jitnorm.integrations.sglang_plugin import mlps
from jitnorm.integrations.sglang_plugin.replacement import Report
from jitnorm.integrations.sglang_plugin.tested import source_problem

# Those around attention and of an MLP. Ranks of tensor parallelism have different columns or summands of them, except
# for columns of k and v where there are more ranks than heads, each of which a rank keeps for itself.
_AFTER_NORM = (QKVParallelLinear, MergedColumnParallelLinear)
_CLASSES = (*_AFTER_NORM, RowParallelLinear)


class JitnormLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """SGLang's method for linear layers without quantisation, with `engine_gemms.linear` where graphs are captured."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return `x @ layer.weight.t() + bias`."""
        if bias is not None or not mlps.is_capturing():
            return super().apply(layer, x, bias)  # type: ignore[no-any-return]
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        return engine_gemms.linear(x, weight)


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
    found, problems = mlps.find(runner.model, suitable)
    in_mlps = {id(mlp.gate_up_proj) for mlp, _ in found}
    modules = [each for each in suitable if engine_gemms.is_candidate(each.weight)]
    if not modules and not found:
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
        [(mlp.gate_up_proj.weight, activation) for mlp, activation in found],
    )
    by = "; ".join(selection.notes)
    rows = f"for up to {engine_gemms.ROWS[-1]} rows"
    gated = set()
    for mlp, activation in found:
        if engine_gemms.shape_of(mlp.gate_up_proj.weight, activation) in selection.shapes:
            mlps.replace(mlp, activation)
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
