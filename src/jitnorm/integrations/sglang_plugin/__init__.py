"""A plugin of SGLang, which puts jitnorm's operators in place of its own.

    JITNORM_SGLANG=1 python -m sglang.launch_server --model-path Qwen/Qwen3-0.6B

SGLang calls `register`, the entry point `jitnorm` of the group `sglang.srt.plugins`, in each of its processes. That
registers hooks. The replacements are installed when a model, its caches and its attention backend exist, before CUDA
graphs are captured. docs/guides/sglang.md says what is replaced. SGLang is imported by `register` only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from jitnorm.core.targets import target_of
from jitnorm.integrations.engine_plugins import is_requested, reason_to_skip, skipped_parts
from jitnorm.integrations.sglang_plugin import deterministic
from jitnorm.integrations.sglang_plugin.attention import attention_replacements, head_norms
from jitnorm.integrations.sglang_plugin.layers import apply_qk_norm, layer_replacements
from jitnorm.integrations.sglang_plugin.replacement import LoadedModel, Replacement, Report, install
from jitnorm.integrations.sglang_plugin.tested import source_problem, version_problem
from jitnorm.jit.log import logger

__all__ = ["Report", "explain", "register"]

_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
_reports: list[Report] = []
_status: str | None = "`register` has not been called"  # why there are no hooks; None if there are
_parts_left: dict[str, str] = {}  # what was left to SGLang before any model was loaded, and why


def register() -> None:
    """Register jitnorm's hooks with SGLang: the entry point that SGLang calls.

    It does nothing unless JITNORM_SGLANG is on, or SGLANG_PLUGINS names `jitnorm` and JITNORM_SGLANG is not set; nor
    with a version of SGLang that jitnorm does not support. A second call changes nothing.

    Raises:
        ValueError: JITNORM_PLUGIN_SKIP names an unknown part.
    """
    global _status
    if _status is None:
        return
    if not is_requested("JITNORM_SGLANG", "SGLANG_PLUGINS"):
        _status = "the plugin is off: set JITNORM_SGLANG=1, or name jitnorm in SGLANG_PLUGINS"
        return
    skipped_parts()
    import sglang

    problem = version_problem(sglang.__version__) or source_problem("ModelRunner")
    if problem:
        _status = f"nothing was replaced: {problem}"
        logger.warning("%s", _status)
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(f"{_RUNNER}.init_cuda_graphs", _replace, HookType.BEFORE)
    hooks: list[tuple[str, str, Callable[..., Any]]] = [
        ("deterministic mode", f"{deterministic.MODULE}.enable_batch_invariant_mode", _enable_mode),
        ("apply_qk_norm", "sglang.srt.models.utils.apply_qk_norm", apply_qk_norm),
    ]
    for part, target, hook in hooks:  # their sources are read now, as the hooks wrap these functions
        if reason := source_problem(part):
            _parts_left[part] = reason
        else:
            HookRegistry.register(target, hook, HookType.AROUND)
    _status = None


def explain() -> list[Report]:
    """Return what was replaced in each model that this process has loaded, and what was left to SGLang and why.

    SGLang loads models in its worker processes, and the log of a worker has the same text.

    Returns:
        One report for each model, in the order of loading. If there are no hooks, a report whose title says why.
    """
    return [Report(f"jitnorm in SGLang: {_status}")] if _status else list(_reports)


def _enable_mode(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Put jitnorm's operators in place before SGLang enables its deterministic mode."""
    no_kernels = "jitnorm has no kernels for ROCm" if torch.version.hip else None
    if reason := reason_to_skip("batch_invariant") or _rl_problem() or no_kernels:
        _parts_left["deterministic mode"] = reason
    else:
        deterministic.replace_operators()
    return original(*args, **kwargs)


def _replace(runner: Any, *args: Any, **kwargs: Any) -> None:
    """Replace what can be replaced in a runner's model: the hook before `ModelRunner.init_cuda_graphs`."""
    if "_jitnorm_report" in vars(runner):
        return
    import sglang

    kind = " (draft)" if runner.is_draft_worker else ""
    created = Report(f"jitnorm in SGLang {sglang.__version__}, {type(runner.model).__name__}{kind}:")
    runner._jitnorm_report = created
    _reports.append(created)
    if reason := _device_problem(runner.device) or _rl_problem():
        created.left["all", reason] += 1
    else:
        _replace_in(runner, created)
    (logger.info if runner.ps.tp_rank == 0 else logger.debug)("%s", created)


def _replace_in(runner: Any, created: Report) -> None:
    device = torch.device("cpu") if runner.device == "cpu" else torch.device("cuda", torch.cuda.current_device())
    target = target_of(torch.empty(0, device=device))
    model = LoadedModel(runner.model, runner.dtype, device, target, created)
    attention = list(attention_replacements(runner, model))
    replaced = [layer for layer, candidate in attention if isinstance(candidate, Replacement)]
    fused = [norm for layer in replaced for norm in head_norms(layer) or ()]
    candidates = [candidate for _, candidate in attention]
    install([*candidates, *layer_replacements(model, fused)], created)
    prefill = runner.server_args.cuda_graph_config.prefill
    is_traced = prefill.backend == "tc_piecewise"
    if runner.server_args.enable_torch_compile or (is_traced and prefill.tc_compiler == "inductor"):
        created.left["graph of torch.compile", "Inductor fuses SGLang's norms, rotations and activations there"] += 1
    elif is_traced:
        created.left["attention in prefill graphs of torch.compile", "their slots change after the tracing"] += 1
    for part, reason in _parts_left.items():
        created.left[part, reason] += 1
    if runner.server_args.enable_deterministic_inference and "deterministic mode" not in _parts_left:
        if replaced_names := deterministic.replaced_names():
            created.replaced["operator of the deterministic mode", "jitnorm.batch_invariant"] += len(replaced_names)
            deterministic.select_gemms(runner.model, runner.dtype, created)
        else:
            created.left["deterministic mode", "SGLang did not apply the hook"] += 1
    if device.type == "cuda":
        from jitnorm.integrations.sglang_plugin import linears  # it imports SGLang

        linears.replace(runner, created)


def _device_problem(device: str) -> str | None:
    if device == "cpu" or (device == "cuda" and torch.version.cuda):
        return None
    return "jitnorm has no kernels for " + ("ROCm" if torch.version.hip else f"the device {device}")


def _rl_problem() -> str | None:
    """Return a reason if the process must compute what a trainer computes, bit for bit."""
    from sglang.srt.runtime_context import get_server_args

    try:
        target = get_server_args().rl_on_policy_target
    except ValueError:  # there are none
        return "the process is not a server's"
    return f"rl_on_policy_target is {target}, which requires the bits of a trainer" if target else None
