"""vLLM's linear layers by engine_gemms, in CUDA graphs, outside of vLLM's batch-invariant mode."""

# No `from __future__ import annotations`: infer_schema reads the annotations of the operator.

import functools
from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from jitnorm.integrations import engine_gemms
from jitnorm.integrations.vllm_plugin import batch_invariant_mode, compatibility
from jitnorm.integrations.vllm_plugin.report import Report
from jitnorm.jit.log import logger

# Those around attention and of an MLP. No rank of tensor parallelism has the same columns, or summands, as another.
_CLASSES = (QKVParallelLinear, MergedColumnParallelLinear, RowParallelLinear)


class JitnormLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """vLLM's method for linear layers without quantisation, with `engine_gemms.linear`."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return `x @ layer.weight.t() + bias`."""
        if bias is not None:
            return super().apply(layer, x, bias)  # type: ignore[no-any-return]
        return torch.ops.jitnorm_vllm.linear_of_few_rows(x, layer.weight)  # type: ignore[no-any-return]


def replace(model: torch.nn.Module, config: Any, report: Report) -> None:
    """Replace the method of each linear layer for which `engine_gemms` may be faster, and time it.

    What is replaced does not depend on the times, since a compiled graph does.
    """
    if not _may_replace(config) or compatibility.changed("linear layers"):
        return
    _let_inductor_call()
    weights = []
    for name, module in model.named_modules():
        if type(module) in _CLASSES and type(module.quant_method) is UnquantizedLinearMethod:
            weight: Any = module.weight
            if module.bias is None and engine_gemms.is_candidate(weight):
                weights.append(weight)
                module.quant_method = JitnormLinearMethod()
                report.replaced[name] = f"{type(module).__name__} for up to {engine_gemms.ROWS[-1]} rows"
    report.notes.extend(engine_gemms.select(weights))


def _may_replace(config: Any) -> bool:
    """Return whether the GEMMs of a configuration are those of CUDA graphs, and may be replaced.

    In eager mode the host would take longer for a call. With speculative decoding, another model may have graphs
    already.
    """
    compilation = config.compilation_config
    return (
        bool(compilation.mode and compilation.cudagraph_mode)
        and not compilation.pass_config.fuse_gemm_comms  # vLLM looks for aten.mm
        and not batch_invariant_mode.is_mode_requested()
        and config.lora_config is None
        and config.speculative_config is None
    )


@functools.cache
def _let_inductor_call() -> None:
    """Register a lowering of the operator to a call of `engine_gemms.linear`, into memory that Inductor plans.

    Otherwise compiled code would call the operator by torch's dispatcher, which takes the host 10 us or more, a hundred
    times in the prefill of a small model. The lowering is made of parts of Inductor that may change: without them the
    dispatcher is used.
    """
    try:
        from torch._inductor.ir import ExternKernel, FixedLayout
        from torch._inductor.lowering import register_lowering
        from torch._inductor.select_algorithm import ExternKernelChoice

        choice = ExternKernelChoice(engine_gemms.linear, name="jitnorm_linear_of_few_rows")
    except (ImportError, TypeError) as error:
        logger.debug("compiled code calls linear layers by torch's dispatcher: %s", error)
        return

    def lower(x: Any, weight: Any) -> Any:
        x, weight = ExternKernel.require_contiguous(ExternKernel.realize_input(x)), ExternKernel.realize_input(weight)
        layout = FixedLayout(x.get_device(), x.get_dtype(), [*x.get_size()[:-1], weight.get_size()[0]])
        return choice.bind([x, weight], layout).output_node()

    register_lowering(torch.ops.jitnorm_vllm.linear_of_few_rows.default, type_promotion_kind=None)(lower)


def _run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return engine_gemms.linear(x, weight)


def _fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _define() -> torch.library.Library:
    library = torch.library.Library("jitnorm_vllm", "FRAGMENT")
    library.define("linear_of_few_rows" + torch.library.infer_schema(_run, mutates_args=[]))
    for key in ("CUDA", "CPU"):
        library.impl("linear_of_few_rows", _run, key)
    library._register_fake("linear_of_few_rows", _fake)
    return library


_library = _define()  # its operator exists as long as it does
