"""Compute the projections of patched modules: q, k and v, or the gate and the factor of an MLP, into one tensor.

With `fuse_weights` the weights of these projections become slices of one tensor, and one GEMM computes all of them.
The parameters stay the same objects, with the same values, so that the state dict and updates in place work as before.
With `time_gemms` several GEMMs are timed for few rows, and the fastest of each shape is used in CUDA graphs. For the
gate and the factor of an MLP, these include GEMMs whose epilogue computes the activation and the product.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

from jitnorm.batch_invariant.mode import is_batch_invariant_mode_enabled
from jitnorm.integrations.transformers_state import is_plain_linear

_has_any_global_hook = torch.nn.modules.module._has_any_global_hook

# The projections of one input, by the end of the name of the class of modules that have them.
PROJECTIONS = {"Attention": ("q_proj", "k_proj", "v_proj"), "MLP": ("gate_proj", "up_proj")}


def projections_of(module: torch.nn.Module, kind: str) -> list[torch.nn.Linear] | None:
    """Return the projections of an attention module or MLP if all are plain linear modules.

    Args:
        module: the attention module or MLP.
        kind: a key of `PROJECTIONS`.
    """
    if _has_any_global_hook():
        return None
    found: list[torch.nn.Linear] = []
    for name in PROJECTIONS[kind]:
        linear = module._modules.get(name)
        if not is_plain_linear(linear):
            return None
        found.append(linear)  # type: ignore[arg-type]
    return found


def fused_linear(x: torch.Tensor, linears: Sequence[torch.nn.Linear], uses_timed: bool = False) -> torch.Tensor | None:
    """Return the results of all `linears` side by side from one GEMM, or None if their weights are not one tensor.

    Args:
        x: `[..., in_features]`, of the weights' dtype.
        linears: plain linear modules.
        uses_timed: whether to use what `time_gemms` chose; see `project`.
    """
    weights = [linear._parameters["weight"] for linear in linears]
    weight = _joined(weights)
    if weight is None:
        return None
    biases = [linear._parameters["bias"] for linear in linears]
    if all(bias is None for bias in biases):
        if uses_timed and _is_captured(x) and all(map(_is_plain_parameter, weights)):
            return _timed_linear(x, weight)
        return F.linear(x, weight)
    bias = _joined(biases)
    return None if bias is None else F.linear(x, weight, bias)


def gated_linear(x: torch.Tensor, linears: Sequence[torch.nn.Linear], activation: str) -> torch.Tensor | None:
    """Return the activated gate times the factor, as `time_gemms` chose, or None where `side_by_side` is to be used.

    Args:
        x: `[..., in_features]`, of the weights' dtype.
        linears: the plain linear modules of the gate and the factor, of one shape.
        activation: the name of the operator that computes the activation and the product.

    Returns:
        `[..., out_features]` where the result becomes part of a CUDA graph, the modules are without biases, their
        weights are plain parameters and slices of one tensor, and that operator can be the epilogue of the GEMM.
    """
    if not _is_captured(x) or any(linear._parameters["bias"] is not None for linear in linears):
        return None
    weights = [linear._parameters["weight"] for linear in linears]
    weight = _joined(weights) if all(map(_is_plain_parameter, weights)) else None
    if weight is None:
        return None
    from jitnorm.integrations import engine_gemms

    if not _has_gated_gemm(weight, activation):
        return None
    return engine_gemms.gated_linear(x, weight, activation)


def project(x: torch.Tensor, linear: torch.nn.Module, uses_timed: bool) -> torch.Tensor:
    """Return `linear(x)`.

    Args:
        x: `[..., in_features]`.
        linear: any module.
        uses_timed: whether to use what `time_gemms` chose for a plain linear module without a bias, where its result
            becomes part of a CUDA graph.
    """
    if uses_timed and _is_captured(x) and is_plain_linear(linear) and not _has_any_global_hook():
        weight, bias = (linear._parameters[name] for name in ("weight", "bias"))
        if bias is None and _is_plain_parameter(weight):
            return _timed_linear(x, weight)  # type: ignore[arg-type]
    return linear(x)  # type: ignore[no-any-return]


def _timed_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from jitnorm.integrations import engine_gemms

    return engine_gemms.linear(x, weight)


def _is_captured(x: torch.Tensor) -> bool:
    """Return whether an operator becomes part of a CUDA graph that the caller captures, and another may replace it."""
    return (
        x.is_cuda
        and not torch.is_grad_enabled()
        and torch.cuda.is_current_stream_capturing()
        and not is_batch_invariant_mode_enabled()
    )


def _is_plain_parameter(weight: object) -> bool:
    """Return whether a weight has no other class, as quantised and sharded ones have."""
    return type(weight) is torch.nn.Parameter and type(weight.data) is torch.Tensor


def _has_gated_gemm(weight: torch.Tensor, activation: str) -> bool:
    """Return whether there is a GEMM of the joined weights of gate and factor with an operator as its epilogue."""
    from jitnorm.integrations import engine_gemms

    return activation in engine_gemms.ACTIVATIONS and engine_gemms.is_candidate(weight, activation)


def time_gemms(groups: Iterable[tuple[Sequence[torch.nn.Linear], str | None]], outputs: Iterable[object]) -> list[str]:
    """Time GEMMs with few rows on the weights of patched modules, for `project`, `fused_linear` and `gated_linear`.

    Args:
        groups: the projections of one input, which follow a norm. If their weights are one tensor, it is timed. With
            each group, the name of the operator that computes the activation and the product of an MLP's projections,
            or None: if the weights are one tensor, GEMMs with that operator as their epilogue are timed.
        outputs: modules whose output a norm follows. Only plain linear modules are timed.

    Returns:
        What was chosen, and what could not be built, in words; none if there is no weight to time.
    """
    from jitnorm.integrations import engine_gemms

    def candidates(linears: Iterable[torch.nn.Linear]) -> list[torch.Tensor]:
        weights = [linear.weight for linear in linears if linear.bias is None]
        return [weight for weight in weights if _is_plain_parameter(weight) and engine_gemms.is_candidate(weight)]

    after_norm: list[torch.Tensor] = []
    gated: list[tuple[torch.Tensor, str]] = []
    for linears, activation in groups:
        weights = candidates(linears)
        joined = _joined([linear.weight for linear in linears]) if len(weights) == len(linears) else None
        if joined is None:
            after_norm += weights
        elif activation is not None and _has_gated_gemm(joined, activation):
            gated.append((joined, activation))
        else:
            after_norm.append(joined)
    others = candidates(linear for linear in outputs if is_plain_linear(linear))  # type: ignore[misc]
    return engine_gemms.select(after_norm, others, gated).notes if after_norm or others or gated else []


def side_by_side(x: torch.Tensor, linears: Sequence[torch.nn.Linear], uses_timed: bool = False) -> torch.Tensor:
    """Return the results of all `linears` side by side: one GEMM where `fused_linear` can, or else one for each.

    Args:
        x: `[..., in_features]`, of the weights' dtype.
        linears: without a gradient.
        uses_timed: as for `fused_linear`.
    """
    fused = fused_linear(x, linears, uses_timed)
    if fused is not None:
        return fused
    rows = x.reshape(-1, x.shape[-1])
    out = rows.new_empty(rows.shape[0], sum(linear.out_features for linear in linears))
    start = 0
    for linear in linears:  # a GEMM writes its result into a slice of rows as well as into a tensor of its own
        part = out[:, start : start + linear.out_features]
        if linear.bias is None:
            torch.mm(rows, linear.weight.t(), out=part)
        else:
            torch.addmm(linear.bias, rows, linear.weight.t(), out=part)
        start += linear.out_features
    return out.view(*x.shape[:-1], start)


def fuse_weights(linears: Sequence[torch.nn.Linear]) -> bool:
    """Move the weights and biases of `linears` into one tensor each, of which they become slices.

    Returns:
        Whether they are slices of one tensor now. Weights that share their memory with others are left.
    """
    groups: list[list[torch.Tensor]] = [[linear.weight for linear in linears]]
    biases: list[torch.Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    if biases:
        groups.append(biases)
    if len(biases) not in (0, len(linears)):
        return False
    if all(_joined(group) is not None for group in groups):
        return True
    if not all(map(_can_move, (parameter for group in groups for parameter in group))):
        return False
    if len({(parameter.dtype, parameter.device) for group in groups for parameter in group}) > 1:
        return False
    with torch.no_grad():
        for group in groups:
            joined = torch.cat([parameter.data for parameter in group])
            for parameter, part in zip(group, joined.split([len(p) for p in group]), strict=True):
                parameter.data = part
    return True


def split_weights(linears: Sequence[torch.nn.Linear]) -> None:
    """Give each weight and bias of `linears` memory of its own again, if `fuse_weights` has joined them."""
    for group in ([linear.weight for linear in linears], [linear.bias for linear in linears]):
        if all(isinstance(parameter, torch.nn.Parameter) for parameter in group) and _joined(group) is not None:
            for parameter in group:
                parameter.data = parameter.data.clone()


def _can_move(parameter: torch.Tensor) -> bool:
    """Return whether a parameter is an ordinary one whose memory no other tensor has a part of."""
    return (
        type(parameter) is torch.nn.Parameter
        and type(parameter.data) is torch.Tensor
        and not parameter.is_meta
        and parameter.is_contiguous()
        and parameter.untyped_storage().nbytes() == parameter.nbytes
    )


def _joined(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Return the tensor whose slices `parts` are, one after another, or None if they are not."""
    first, second = parts[:2]
    if first is None or second is None:
        return None
    end = first.data_ptr()
    if second.data_ptr() != end + first.nbytes:  # the most frequent reason, checked first
        return None
    storage = first.untyped_storage().data_ptr()
    rows = 0
    for part in parts:
        if part is None or part.data_ptr() != end or not part.is_contiguous():
            return None
        if part.untyped_storage().data_ptr() != storage:
            return None
        if part.shape[1:] != first.shape[1:] or part.dtype != first.dtype:
            return None
        end += part.nbytes
        rows += part.shape[0]
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def is_fused(linears: Sequence[torch.nn.Linear]) -> bool:
    """Return whether the weights of `linears` are slices of one tensor."""
    return _joined([linear.weight for linear in linears]) is not None
