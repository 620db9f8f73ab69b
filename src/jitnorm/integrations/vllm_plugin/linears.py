"""vLLM's linear layers by engine_gemms, in CUDA graphs, outside of vLLM's batch-invariant mode."""

# No `from __future__ import annotations`: infer_schema reads the annotations of the operator.

import functools
from typing import Any

import torch
from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from jitnorm.integrations import engine_gemms
from jitnorm.integrations.engine_plugins import reason_to_skip
from jitnorm.integrations.vllm_plugin import batch_invariant_mode, compatibility, mlps
from jitnorm.integrations.vllm_plugin.operators import define
from jitnorm.integrations.vllm_plugin.report import Report
from jitnorm.jit.log import logger

# Those around attention and of an MLP. Ranks of tensor parallelism have different columns or summands of them, except
# for columns of k and v where there are more ranks than heads, each of which a rank keeps for itself.
_AFTER_NORM = (QKVParallelLinear, MergedColumnParallelLinear)
_CLASSES = (*_AFTER_NORM, RowParallelLinear)


class JitnormLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """vLLM's method for linear layers without quantisation, with `engine_gemms.linear`."""

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Return `x @ layer.weight.t() + bias`."""
        if bias is not None:
            return super().apply(layer, x, bias)  # type: ignore[no-any-return]
        return torch.ops.jitnorm_vllm.linear_of_few_rows(x, layer.weight)  # type: ignore[no-any-return]


def replace(model: torch.nn.Module, config: Any, report: Report) -> None:
    """Replace the method of each linear layer for which `engine_gemms` may be faster, and time it.

    Those before the activation of an MLP are replaced together with it. What is replaced does not depend on the times,
    since a compiled graph does.
    """
    if not _may_replace(config):
        return
    if problem := reason_to_skip("linear_layers") or compatibility.changed("linear layers"):
        report.notes.append(f"left linear layers: {problem}")
        return
    ranks = config.parallel_config.tensor_parallel_size
    compiled = _modules_of_compiled_code(model)
    candidates = {
        name: module
        for name, module in model.named_modules()
        if module in compiled and type(module) in _CLASSES and _is_candidate(module, ranks)
    }
    gated, problems = mlps.find(model, {*candidates.values()}, config)
    report.notes.extend(f"left the activations of MLPs: {problem}" for problem in problems)
    in_mlps = {mlp.module.gate_up_proj for mlp in gated}
    others = [module for module in candidates.values() if module not in in_mlps]
    selection = engine_gemms.select(
        [module.weight for module in others if type(module) in _AFTER_NORM],
        [module.weight for module in others if type(module) not in _AFTER_NORM],
        [(mlp.module.gate_up_proj.weight, mlp.activation) for mlp in gated],
    )
    for mlp in gated:
        projection, act_fn = mlp.module.gate_up_proj, mlp.module.act_fn
        if engine_gemms.shape_of(projection.weight, mlp.activation) in selection.shapes:
            mlps.replace(mlp)
            del candidates[f"{mlp.name}.gate_up_proj"]
            what = f"{type(projection).__name__} with {mlp.activation} for up to {engine_gemms.ROWS[-1]} rows"
            report.replaced[f"{mlp.name}.gate_up_proj"] = what
            report.left.pop(f"{mlp.name}.act_fn", None)
            name = type(act_fn).__name__.removeprefix("Jitnorm")
            report.replaced[f"{mlp.name}.act_fn"] = f"{name} with the linear layer before it"
    for name, module in candidates.items():
        if engine_gemms.shape_of(module.weight) in selection.shapes:
            module.quant_method = JitnormLinearMethod()
            report.replaced[name] = f"{type(module).__name__} for up to {engine_gemms.ROWS[-1]} rows"
    report.notes.extend(selection.notes)
    if selection.shapes:
        _register_lowering()


def _modules_of_compiled_code(model: torch.nn.Module) -> set[torch.nn.Module]:
    """Return the modules that vLLM compiles. Others, such as an encoder of images, run as in eager mode."""
    roots = (m for m in model.modules() if isinstance(m, TorchCompileWithNoGuardsWrapper) and not m.do_not_compile)
    return {module for root in roots for module in root.modules()}


def _is_candidate(module: Any, ranks: int) -> bool:
    """Return whether a layer is neither quantised, biased, nor offloaded, and has a part of the weight on each rank."""
    return (
        type(module.quant_method) is UnquantizedLinearMethod
        and module.bias is None
        and module.tp_size == ranks
        and not getattr(module.weight, "_vllm_is_uva_offloaded", False)
        and engine_gemms.is_candidate(module.weight)
    )


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
def _register_lowering() -> None:
    """Register lowerings of the operators to calls of `engine_gemms`, into memory that Inductor plans.

    Otherwise compiled code would call the operators by torch's dispatcher, which takes the host 10 us or more, a
    hundred times in the prefill of a small model. The lowerings are made of parts of Inductor that may change: where
    they have, and for C++ wrappers, the dispatcher is used.
    """
    operator = torch.ops.jitnorm_vllm.linear_of_few_rows.default
    gated_operator = torch.ops.jitnorm_vllm.gated_linear_of_few_rows.default
    try:
        from torch._inductor.ir import ExternKernel, FixedLayout
        from torch._inductor.lowering import fallback_handler, register_lowering
        from torch._inductor.select_algorithm import ExternKernelChoice
        from torch._inductor.virtualized import V

        choice = ExternKernelChoice(engine_gemms.linear, name="jitnorm_linear_of_few_rows")
        gated_choices = {
            activation: ExternKernelChoice(
                functools.partial(engine_gemms.gated_linear, activation=activation),
                name=f"jitnorm_linear_of_few_rows_and_{activation}",
            )
            for activation in engine_gemms.ACTIVATIONS
        }
        by_dispatcher, gated_by_dispatcher = (
            fallback_handler(each, add_to_fallback_set=False) for each in (operator, gated_operator)
        )
    except (ImportError, TypeError, AssertionError) as error:
        logger.debug("compiled code calls linear layers by torch's dispatcher: %s", error)
        return

    def call(choice: Any, x: Any, weight: Any, columns: Any) -> Any:
        x, weight = ExternKernel.require_contiguous(ExternKernel.realize_input(x)), ExternKernel.realize_input(weight)
        layout = FixedLayout(x.get_device(), x.get_dtype(), [*x.get_size()[:-1], columns])
        return choice.bind([x, weight], layout).output_node()

    def lower(x: Any, weight: Any) -> Any:
        if V.graph.cpp_wrapper:
            return by_dispatcher(x, weight)
        return call(choice, x, weight, weight.get_size()[0])

    def lower_gated(x: Any, weight: Any, activation: str) -> Any:
        if V.graph.cpp_wrapper:
            return gated_by_dispatcher(x, weight, activation)
        return call(gated_choices[activation], x, weight, weight.get_size()[0] // 2)

    register_lowering(operator, type_promotion_kind=None)(lower)
    register_lowering(gated_operator, type_promotion_kind=None)(lower_gated)


def _run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return engine_gemms.linear(x, weight)


def _fake(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


define("linear_of_few_rows", _run, _fake)
