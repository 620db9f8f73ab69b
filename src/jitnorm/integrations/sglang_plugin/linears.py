"""SGLang's linear layers by engine_gemms, in CUDA graphs, outside of its deterministic mode."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod, get_bf16_gemm_backend

from jitnorm.integrations import engine_gemms
from jitnorm.integrations.sglang_plugin.replacement import Report
from jitnorm.integrations.sglang_plugin.tested import source_problem

# Those around attention and of an MLP. No rank of tensor parallelism has the same columns, or summands, as another.
_CLASSES = (QKVParallelLinear, MergedColumnParallelLinear, RowParallelLinear)


class JitnormLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """SGLang's method for linear layers without quantisation, with `engine_gemms.linear` where graphs are captured."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return `x @ layer.weight.t() + bias`."""
        if bias is not None or torch.compiler.is_compiling() or not torch.cuda.is_current_stream_capturing():
            return super().apply(layer, x, bias)  # type: ignore[no-any-return]
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        return engine_gemms.linear(x, weight)


def replace(runner: Any, report: Report) -> None:
    """Replace the method of each linear layer for which `engine_gemms` may be faster, and time it.

    Nothing is timed for the draft of speculative decoding, because the target may have graphs already, nor without
    graphs.
    """
    decode = runner.server_args.cuda_graph_config.decode
    if runner.is_draft_worker or decode.backend == "disabled" or runner.server_args.enable_deterministic_inference:
        return
    if get_bf16_gemm_backend().is_cutedsl():
        return
    modules: list[Any] = [
        module
        for module in runner.model.modules()
        if type(module) in _CLASSES
        and type(module.quant_method) is UnquantizedLinearMethod
        and module.bias is None
        and engine_gemms.is_candidate(module.weight)
    ]
    if not modules:
        return
    if reason := source_problem("linear layers"):
        report.left["linear layers", reason] += len(modules)
        return
    chosen = engine_gemms.select([module.weight for module in modules])
    for module in modules:
        module.quant_method = JitnormLinearMethod()
    by = "; ".join(chosen) or "torch"
    report.replaced[f"linear layer for up to {engine_gemms.ROWS[-1]} rows", by] += len(modules)
