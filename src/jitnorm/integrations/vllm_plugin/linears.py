"""vLLM's linear layers of few columns by engine_gemms, in CUDA graphs, outside of vLLM's batch-invariant mode."""

# No `from __future__ import annotations`: infer_schema reads the annotations of the operator.

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

from jitnorm.integrations import engine_gemms
from jitnorm.integrations.vllm_plugin import batch_invariant_mode, compatibility
from jitnorm.integrations.vllm_plugin.report import Report


class JitnormLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """vLLM's method for linear layers without quantisation, with `engine_gemms.linear`."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return `x @ layer.weight.t() + bias`."""
        if bias is not None:
            return super().apply(layer, x, bias)  # type: ignore[no-any-return]
        return torch.ops.jitnorm_vllm.linear_of_few_rows(x, layer.weight)  # type: ignore[no-any-return]


def replace(model: torch.nn.Module, config: Any, report: Report) -> None:
    """Replace the method of each linear layer for which `engine_gemms` may be faster, and time it.

    Eager mode keeps vLLM's, because the host would take longer for a call. What is replaced does not depend on the
    times, since a compiled graph does.
    """
    compilation = config.compilation_config
    if batch_invariant_mode.is_mode_requested() or config.lora_config is not None:
        return
    if not compilation.mode or not compilation.cudagraph_mode or compatibility.changed("linear layers"):
        return
    weights = []
    for name, module in model.named_modules():
        if isinstance(module, LinearBase) and type(module.quant_method) is UnquantizedLinearMethod:
            weight: Any = getattr(module, "weight", None)
            if engine_gemms.is_candidate(weight):
                weights.append(weight)
                module.quant_method = JitnormLinearMethod()
                report.replaced[name] = f"{type(module).__name__} for up to {engine_gemms.ROWS[-1]} rows"
    report.notes.extend(engine_gemms.select(weights))


def _run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return engine_gemms.linear(x, weight)


def _fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _define() -> torch.library.Library:
    library = torch.library.Library("jitnorm_vllm", "FRAGMENT")
    library.define("linear_of_few_rows" + torch.library.infer_schema(_run, mutates_args=[]))
    library.impl("linear_of_few_rows", _run, "CUDA")
    library._register_fake("linear_of_few_rows", _fake)
    return library


_library = _define()  # its operator exists as long as it does
