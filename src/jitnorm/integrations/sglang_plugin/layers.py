"""Replace SGLang's norms and activations, one module of a loaded model at a time.

What a module's attributes decide is decided once. A call then reads the weight and runs the operator; arguments that
the operator refuses are passed on to SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from jitnorm.activation import (
    GELU_AND_MUL,
    GELU_TANH_AND_MUL,
    SILU_AND_MUL,
    gelu_and_mul,
    gelu_tanh_and_mul,
    silu_and_mul,
)
from jitnorm.core.operators import DTYPES
from jitnorm.integrations.engine_norms import EngineNorm
from jitnorm.integrations.engine_plugins import reason_to_skip
from jitnorm.integrations.sglang_plugin.replacement import Left, LoadedModel, Replacement
from jitnorm.integrations.sglang_plugin.tested import source_problem
from jitnorm.qknorm import QKNORM, can_use_fused_inplace_qknorm, fused_inplace_qknorm

_MARK = "_jitnorm_report"  # in the __dict__ of a norm that `apply_qk_norm` may compute together with another
_OPERATOR = "_jitnorm_operator"  # in the __dict__ of an activation that was replaced: the name of its operator


def layer_replacements(model: LoadedModel, fused: Collection[torch.nn.Module] = ()) -> Iterator[Replacement | Left]:
    """Yield a replacement of each norm and activation in a model, or why it is left to SGLang.

    Args:
        model: The model.
        fused: Norms that a replacement of their attention computes, and that are therefore skipped.
    """
    makers = {
        ("sglang.srt.layers.layernorm", "RMSNorm"): _replace_rmsnorm,
        ("sglang.srt.layers.layernorm", "GemmaRMSNorm"): _replace_rmsnorm,
        ("sglang.srt.layers.layernorm", "Gemma3RMSNorm"): _replace_gemma3_rmsnorm,
        ("sglang.srt.layers.activation", "SiluAndMul"): _replace_activation,
        ("sglang.srt.layers.activation", "GeluAndMul"): _replace_activation,
    }
    skipped = {id(norm) for norm in fused}
    problems: dict[str, str | None] = {}
    for name, module in model.module.named_modules():
        cls = type(module)
        make = makers.get((cls.__module__, cls.__name__))
        if make is None or id(module) in skipped:
            continue
        if cls.__name__ not in problems:
            part = "activations" if make is _replace_activation else "norms"
            problems[cls.__name__] = reason_to_skip(part) or source_problem(cls.__name__)
        if reason := problems[cls.__name__] or _reason_to_leave(module):
            yield Left(cls.__name__, reason)
        else:
            yield make(module, model, name.rpartition(".")[2] in ("q_norm", "k_norm"))


def norm_problem(norm: Any, dtype: torch.dtype) -> str | None:
    """Return why jitnorm cannot compute an RMSNorm, GemmaRMSNorm or Gemma3RMSNorm of SGLang, or None."""
    weight = norm.weight
    if dtype not in DTYPES or weight.dtype not in (dtype, torch.float32):
        return f"no kernel supports {dtype} with weights of {weight.dtype}"
    if type(norm).__name__ != "RMSNorm":
        return None
    if norm.variance_size_override is not None:
        return "it normalises by a part of a row"
    if norm.fp32_residual or norm.override_orig_dtype is not None:
        return "it keeps its residual in float32"
    if norm.cast_x_before_out_mul and norm.weight.dtype != dtype:
        return f"it returns {norm.weight.dtype} for {dtype}"
    return None


def engine_norm(norm: Any, dtype: torch.dtype) -> EngineNorm:
    """Return what an RMSNorm, GemmaRMSNorm or Gemma3RMSNorm of SGLang computes for inputs of a dtype."""
    is_gemma = type(norm).__name__ != "RMSNorm"
    has_weight = is_gemma or norm.has_weight
    rounding = "once" if is_gemma or not norm.cast_x_before_out_mul else "hf"
    weight_dtype = norm.weight.dtype if has_weight else dtype
    return EngineNorm(norm.weight.shape[-1], dtype, weight_dtype, is_gemma, has_weight, rounding)


def operator_of(activation: torch.nn.Module) -> str | None:
    """Return the name of the operator that has replaced an activation; None if SGLang computes it."""
    return vars(activation).get(_OPERATOR)


def _reason_to_leave(module: Any) -> str | None:
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if module._forward_method != module.dispatch_forward():
        return "SGLang has chosen another of its methods for it"
    return None


def _replace_rmsnorm(norm: Any, model: LoadedModel, is_head_norm: bool) -> Replacement | Left:
    """Replace an RMSNorm or GemmaRMSNorm, which adds a residual if one is given.

    As on CUDA in SGLang, the sum is normalised before it is rounded, and the arguments are overwritten.
    """
    dtype, report = model.dtype, model.report
    computed = engine_norm(norm, dtype)
    what = f"{type(norm).__name__} of {computed.hidden_size}"
    if reason := norm_problem(norm, dtype) or computed.problem:
        return Left(what, reason)
    normalise, add_and_normalise = computed.functions()
    by_head = is_head_norm and not computed.is_gemma and not computed.is_general
    by_head = by_head and can_use_fused_inplace_qknorm(computed.hidden_size, dtype)
    parameters, eps, original = norm._parameters, norm.variance_epsilon, norm._forward_method

    def forward(
        x: torch.Tensor, residual: torch.Tensor | None = None, post_residual_addition: torch.Tensor | None = None
    ) -> Any:
        weight = parameters["weight"].data if "weight" in parameters else None
        try:
            if residual is None:
                return normalise(x if x.dim() == 2 else x.contiguous(), weight, eps)
            if post_residual_addition is None:
                add_and_normalise(x, residual, weight, eps)
                return x, residual
        except (TypeError, ValueError) as error:  # raised before anything is written
            report.leave_call(what, error)
        return original(x, residual, post_residual_addition)

    def first_call() -> None:
        weight = norm.weight.data if computed.has_weight else None
        x, residual = torch.zeros(2, 1, computed.hidden_size, dtype=dtype, device=model.device).unbind()
        normalise(x, weight, eps)
        if not is_head_norm:
            add_and_normalise(x, residual, weight, eps)
        elif by_head:
            fused_inplace_qknorm(x[None], residual[None], norm.weight.data, norm.weight.data, eps)

    def install() -> None:
        norm._forward_method = forward
        if by_head:
            vars(norm)[_MARK] = report

    specs = [computed.spec("rmsnorm", model.target)]
    if by_head:
        specs.append(QKNORM.warmup_spec(computed.hidden_size, dtype, norm.weight.dtype, model.target))
    elif not is_head_norm:
        specs.append(computed.spec("fused_add_rmsnorm", model.target))
    return Replacement(what, " and ".join(spec.op for spec in specs), tuple(specs), first_call, install)


def _replace_gemma3_rmsnorm(norm: Any, model: LoadedModel, is_head_norm: bool) -> Replacement | Left:
    """Replace a Gemma3RMSNorm, which SGLang computes in plain PyTorch on CUDA too."""
    dtype, report = model.dtype, model.report
    computed = engine_norm(norm, dtype)
    what = f"Gemma3RMSNorm of {computed.hidden_size}"
    if reason := norm_problem(norm, dtype) or computed.problem:
        return Left(what, reason)
    normalise, _ = computed.functions()
    parameters, eps, original = norm._parameters, norm.eps, norm._forward_method

    def forward(x: torch.Tensor) -> Any:
        try:
            return normalise(x if x.dim() == 2 else x.contiguous(), parameters["weight"].data, eps)
        except (TypeError, ValueError) as error:
            report.leave_call(what, error)
        return original(x)

    def first_call() -> None:
        normalise(torch.zeros(1, computed.hidden_size, dtype=dtype, device=model.device), norm.weight.data, eps)

    spec = computed.spec("rmsnorm", model.target)
    return Replacement(what, spec.op, (spec,), first_call, lambda: setattr(norm, "_forward_method", forward))


def _replace_activation(module: Any, model: LoadedModel, _: bool) -> Replacement | Left:
    """Replace a SiluAndMul or GeluAndMul."""
    what = type(module).__name__
    function: Callable[[torch.Tensor], torch.Tensor]
    if what == "SiluAndMul":
        function, operator = silu_and_mul, SILU_AND_MUL
    elif module.approximate == "tanh":
        function, operator = gelu_tanh_and_mul, GELU_TANH_AND_MUL
    else:
        function, operator = gelu_and_mul, GELU_AND_MUL
    if model.dtype not in DTYPES:
        return Left(what, f"no kernel supports {model.dtype}")
    original, report = module._forward_method, model.report

    def forward(x: torch.Tensor) -> Any:
        try:
            return function(x)
        except (TypeError, ValueError) as error:
            report.leave_call(what, error)
        return original(x)

    def install() -> None:
        module._forward_method = forward
        vars(module)[_OPERATOR] = operator.op

    return Replacement(
        what,
        operator.op,
        (operator.warmup_spec(None, model.dtype, model.dtype, model.target),),
        lambda: function(torch.zeros(1, 64, dtype=model.dtype, device=model.device)),
        install,
    )


def apply_qk_norm(
    original: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    q: torch.Tensor,
    k: torch.Tensor,
    q_norm: Any,
    k_norm: Any,
    head_dim: int,
    alt_stream: Any = None,
    allow_inplace: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise the heads of q and k in one launch, in models whose attention is not replaced as a whole.

    The hook around `sglang.srt.models.utils.apply_qk_norm`, with its arguments after the first.
    """
    if (
        allow_inplace
        and _MARK in q_norm.__dict__
        and _MARK in k_norm.__dict__
        and q_norm.variance_epsilon == k_norm.variance_epsilon
        and not torch.compiler.is_compiling()
    ):
        heads = q.view(q.shape[0], -1, head_dim), k.view(k.shape[0], -1, head_dim)
        try:
            fused_inplace_qknorm(*heads, q_norm.weight.data, k_norm.weight.data, q_norm.variance_epsilon)
            return q, k
        except (TypeError, ValueError) as error:
            q_norm.__dict__[_MARK].leave_call("apply_qk_norm", error)
    return original(q, k, q_norm, k_norm, head_dim, alt_stream, allow_inplace)
