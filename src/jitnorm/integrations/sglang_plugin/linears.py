"""SGLang's linear layers of few columns by engine_gemms, in CUDA graphs, outside of its deterministic mode."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from jitnorm.integrations import engine_gemms
from jitnorm.integrations.sglang_plugin.replacement import Report
from jitnorm.integrations.sglang_plugin.tested import source_problem


class JitnormLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """SGLang's method for linear layers without quantisation, with `engine_gemms.linear` where graphs are captured."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return `x @ layer.weight.t() + bias`."""
        if bias is not None or torch.compiler.is_compiling() or not torch.cuda.is_current_stream_capturing():
            return super().apply(layer, x, bias)  # type: ignore[no-any-return]
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        return engine_gemms.linear(x, weight)


def replace(model: torch.nn.Module, report: Report) -> None:
    """Replace the method of each linear layer for which `engine_gemms` may be faster, and time it."""
    modules: list[Any] = [
        module
        for module in model.modules()
        if type(getattr(module, "quant_method", None)) is UnquantizedLinearMethod
        and engine_gemms.is_candidate(getattr(module, "weight", None))
    ]
    if not modules:
        return
    if reason := source_problem("linear layers"):
        report.left["linear layers", reason] += len(modules)
        return
    chosen = engine_gemms.select([module.weight for module in modules])
    for module in modules:
        module.quant_method = JitnormLinearMethod()
    report.replaced["linear layer for up to 64 rows", "; ".join(chosen) or "torch"] += len(modules)
