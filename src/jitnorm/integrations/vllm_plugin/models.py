"""Replace the operators of a model that vLLM has loaded, build the kernels that it calls, and report what was done."""

from __future__ import annotations

from typing import Any

import torch

from jitnorm.core.operators import DTYPES
from jitnorm.core.targets import target_of
from jitnorm.integrations.engine_plugins import build_and_load, reason_to_skip
from jitnorm.integrations.vllm_plugin import (
    attention,
    compatibility,
    decode_attention,
    decode_steps,
    fusion,
    layers,
    linears,
    residuals,
)
from jitnorm.integrations.vllm_plugin.report import Report
from jitnorm.jit.spec import KernelSpec, Target

_LAUNCH = "norm, rotation and cache store in one launch"


def replace_operators(model: torch.nn.Module, config: Any) -> Report:
    """Replace what this package's kernels compute in a model, before its first forward pass.

    Their kernels are built, all at a time, and loaded, so that no later call builds one. A module whose kernel cannot
    be built stays as it is.

    Args:
        model: A loaded model of vLLM.
        config: vLLM's configuration, whose `model_config.dtype` is that of the activations.

    Returns:
        What was replaced, what was left and why.
    """
    report = Report(type(model).__name__)
    dtype, device = config.model_config.dtype, torch.device(config.device_config.device)
    reason = _reason_of_model(dtype, device)
    target = Target("cpu") if reason else target_of(torch.empty(0, device=device))
    planned: list[tuple[str, Any, Any, list[KernelSpec]]] = []  # name, module, fusion of an attention layer, kernels
    of_attention: set[int] = set()  # norms of q and k: the launch computes them, or they have strided rows
    for name, module in model.named_modules():
        if part := fusion.part_of(module):
            of_attention |= {id(getattr(module, norm, None)) for norm in ("q_norm", "k_norm")}
            found: Any = reason or reason_to_skip("attention")
            found = found or compatibility.changed(part) or compatibility.changed("attention")
            found = found or fusion.find_fusion(module, dtype, config)
            if isinstance(found, str):
                report.left[name] = f"{type(module).__name__}: {found}"
            else:
                planned.append((name, module, found, fusion.specs(module, found, dtype, target)))
        elif fusion.has_attention(module):
            report.left[name] = f"{type(module).__name__}: attention layers of this class are not supported"
    with_float32_residual: set[int] = set()
    if not reason and dtype != torch.float32:
        with_float32_residual = residuals.norms_of_float32_residuals(model, config)
    for name, module in model.named_modules():
        if isinstance(module, layers.CLASSES) and id(module) not in of_attention:
            is_of_heads = name.rpartition(".")[2] in ("q_norm", "k_norm")
            if why := (
                reason
                or ("its rows are heads in a slice of the projection" if is_of_heads else None)
                or _reason_of_config(module, config)
                or layers.reason_to_leave(module, dtype)
            ):
                report.left[name] = f"{_base_name(module)}: {why}"
            else:
                planned.append((name, module, None, layers.specs(module, dtype, target)))
    float32_specs = [
        layers.spec_with_float32_residual(module, dtype, target)
        for _, module, _, _ in planned
        if id(module) in with_float32_residual
    ]
    failures = build_and_load([*(spec for _, _, _, specs in planned for spec in specs), *float32_specs])
    active = {id(module) for _, module, _, specs in planned if not failures.keys() & {*specs}}
    if failed := next((failures[spec] for spec in float32_specs if spec in failures), None):
        report.notes.append(f"residual in {dtype}, not in float32: {failed}")
        with_float32_residual = set()
    elif not with_float32_residual <= active:  # a norm of vLLM's would return the residual in half precision
        with_float32_residual = set()
    for name, module, found, specs in planned:
        if failed := next((failures[spec] for spec in specs if spec in failures), None):
            report.left[name] = f"{_base_name(module)}: {failed}"
        elif found is None:
            module.jitnorm_is_active = True
            module.jitnorm_float32_residual = id(module) in with_float32_residual
            if isinstance(module, layers.NORM_CLASSES):
                module.jitnorm_is_general = layers.engine_norm(module, dtype).is_general
            report.replaced[name] = _base_name(module) + ", residual in float32" * module.jitnorm_float32_residual
        else:
            report.replaced[name] = f"{type(module).__name__} ({_LAUNCH})"
            attention.replace(module, found)
    if not reason and device.type == "cuda":
        decode_attention.replace(model, config, report)
        linears.replace(model, config, report)
        decode_steps.replace(model, config, report)
    return report


def _reason_of_model(dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why no kernel serves a model of this dtype on this device, or None."""
    if device.type not in ("cpu", "cuda") or torch.version.hip is not None:
        return "this is no NVIDIA GPU"
    return None if dtype in DTYPES else f"the model is {dtype}"


def _base_name(module: Any) -> str:
    """Return vLLM's name of a module's class."""
    return type(module).__name__.removeprefix("Jitnorm")


def _reason_of_config(module: Any, config: Any) -> str | None:
    """Return why vLLM's configuration asks for its own norms and activations, or None."""
    compilation = config.compilation_config
    if f"-{module.name}" in compilation.custom_ops:
        return f"custom_ops has -{module.name}"
    if isinstance(module, layers.JitnormGemmaRMSNorm) and config.speculative_config is not None:
        return "speculative decoding may keep its residual, which the kernel overwrites"
    if not isinstance(module, layers.NORM_CLASSES) or not compilation.mode:  # not compiled
        return None
    passes = compilation.pass_config
    if passes.fuse_allreduce_rms:
        return "vLLM fuses it with the all-reduce (fuse_allreduce_rms)"
    if passes.enable_sp:
        return "vLLM distributes it by sequence parallelism (enable_sp)"
    if config.quant_config is not None:
        return "the model is quantised, and Inductor fuses it with the quantisation of its result"
    return None
