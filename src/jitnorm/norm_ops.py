"""The RMSNorm family in torch.ops.jitnorm.

For every operator there is a functional form, which has a backward, and one that writes into its arguments.
"""

from __future__ import annotations

from typing import Any

import torch

from jitnorm.core.norms import (
    FUSED_ADD_RMSNORM,
    FUSED_ADD_RMSNORM_ROUND_SUM,
    GEMMA_FUSED_ADD_RMSNORM,
    GEMMA_FUSED_ADD_RMSNORM_ROUND_SUM,
    GEMMA_RMSNORM,
    RMSNORM,
    Norm,
    check_fused_add_rmsnorm,
    check_kinds,
    check_rmsnorm,
    new_like,
)
from jitnorm.core.torch_library import (
    build_while_tracing,
    count_version,
    needs_grad,
    refuse_unwritable,
    register,
    register_autograd,
)


def dispatch_rmsnorm(
    norm: Norm,
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | None,
    enable_pdl: bool | None,
) -> torch.Tensor:
    """A call by way of torch's dispatcher."""
    if out is None:
        result: torch.Tensor = getattr(torch.ops.jitnorm, norm.op)(input, weight, eps, enable_pdl)
        return result
    if needs_grad(input, weight):
        raise RuntimeError(f"{norm.op} with out= has no gradient: call it without, or under torch.no_grad()")
    getattr(torch.ops.jitnorm, f"{norm.op}_out")(input, weight, out, eps, enable_pdl)
    return out


def dispatch_fused_add_rmsnorm(
    norm: Norm,
    input: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    enable_pdl: bool | None,
) -> None:
    """A call by way of torch's dispatcher; with gradients, what it writes is copied from the functional form."""
    if needs_grad(input, residual, weight):
        refuse_unwritable(norm.op, input, residual, weight, input=input, residual=residual)
        functional = getattr(torch.ops.jitnorm, f"{norm.op}_functional")
        normalised, total = functional(input, residual, weight, eps, enable_pdl)
        input.copy_(normalised)
        residual.copy_(total)
    else:
        getattr(torch.ops.jitnorm, norm.op)(input, residual, weight, eps, enable_pdl)


def _trace(norm: Norm, input: torch.Tensor, weight: torch.Tensor, **like_input: torch.Tensor) -> None:
    """Refuses what a kernel would, as far as it shows, and builds now, not in the middle of the graph's first run."""
    check_kinds(norm, input, weight, **like_input)
    build_while_tracing(norm, input, int(input.shape[-1]), input.dtype, weight.dtype)


def _gradients(
    norm: Norm, x: torch.Tensor, weight: torch.Tensor, eps: float, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of x and the weight, in float32, by the formula."""
    x, g, w = x.float(), grad.float(), weight.float() + norm.weight_offset
    scale = torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + eps)
    normalised, gw = x * scale, g * w
    of_x = scale * (gw - normalised * (gw * normalised).mean(dim=-1, keepdim=True))
    of_weight = (g * normalised).reshape(-1, x.shape[-1]).sum(dim=0)
    return of_x, of_weight


def _register_rmsnorm(norm: Norm) -> None:
    def run(input: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None) -> torch.Tensor:
        out = new_like(input)
        arguments = input, weight, out, eps, enable_pdl
        if not norm.call_last((input.dtype, weight.nbytes), *arguments):
            check_rmsnorm(norm, input, weight, eps, None, enable_pdl)
            norm.run(input, weight, *arguments)
        return out

    def run_out(input: Any, weight: Any, out: Any, eps: float = 1e-6, enable_pdl: bool | None = None) -> None:
        arguments = input, weight, out, eps, enable_pdl
        if not norm.call_last((input.dtype, weight.nbytes), *arguments):
            check_rmsnorm(norm, input, weight, eps, out, enable_pdl)
            norm.run(input, weight, *arguments)
        count_version(out)

    def fake(input: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None) -> torch.Tensor:
        _trace(norm, input, weight)
        return new_like(input)

    def fake_out(input: Any, weight: Any, out: Any, eps: float = 1e-6, enable_pdl: bool | None = None) -> None:
        _trace(norm, input, weight, out=out)

    def save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.eps = inputs[2]

    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight = _gradients(norm, x, weight, ctx.eps, grad)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None, None

    rest = "float eps=1e-6, bool? enable_pdl=None"
    name = register(f"{norm.op}(Tensor input, Tensor weight, {rest}) -> Tensor", run, fake)
    register_autograd(name, backward, save)
    register(f"{norm.op}_out(Tensor input, Tensor weight, Tensor(a!) out, {rest}) -> ()", run_out, fake_out)


def _register_fused_add_rmsnorm(norm: Norm) -> None:
    def run(input: Any, residual: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None) -> None:
        arguments = input, residual, weight, eps, enable_pdl
        if not norm.call_last((input.dtype, weight.nbytes), *arguments):
            check_fused_add_rmsnorm(norm, input, residual, weight, eps, enable_pdl)
            norm.run(input, weight, *arguments)
        count_version(input, residual)

    def run_functional(
        input: Any, residual: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check_fused_add_rmsnorm(norm, input, residual, weight, eps, enable_pdl)
        normalised, total = input.clone(), residual.clone()
        norm.run(normalised, weight, normalised, total, weight, eps, enable_pdl)
        return normalised, total

    def fake(input: Any, residual: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None) -> None:
        _trace(norm, input, weight, residual=residual)

    def fake_functional(
        input: Any, residual: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        _trace(norm, input, weight, residual=residual)
        return torch.empty_like(input), torch.empty_like(residual)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        # The sum as it was rounded, not its terms: these are what the operator in place overwrites.
        ctx.save_for_backward(output[1], inputs[2])
        ctx.eps = inputs[3]

    def backward(ctx: Any, grad: torch.Tensor, grad_total: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total, weight = ctx.saved_tensors
        of_x, of_weight = _gradients(norm, total, weight, ctx.eps, grad)
        of_both = (of_x + grad_total.float()).to(total.dtype)
        return of_both, of_both, of_weight.to(weight.dtype), None, None

    tensors, rest = "Tensor{} input, Tensor{} residual, Tensor weight", "float eps=1e-6, bool? enable_pdl=None"
    register(f"{norm.op}({tensors.format('(a!)', '(b!)')}, {rest}) -> ()", run, fake)
    name = register(
        f"{norm.op}_functional({tensors.format('', '')}, {rest}) -> (Tensor, Tensor)", run_functional, fake_functional
    )
    register_autograd(name, backward, save)


for _norm in (RMSNORM, GEMMA_RMSNORM):
    _register_rmsnorm(_norm)
for _norm in (
    FUSED_ADD_RMSNORM,
    FUSED_ADD_RMSNORM_ROUND_SUM,
    GEMMA_FUSED_ADD_RMSNORM,
    GEMMA_FUSED_ADD_RMSNORM_ROUND_SUM,
):
    _register_fused_add_rmsnorm(_norm)
