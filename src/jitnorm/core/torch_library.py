"""What operators need to be torch's as well, for torch.compile, export, fake tensors and autograd: torch.ops.jitnorm.*

Eager calls without gradients do not pass there: a dispatched call costs three times what the kernel's own entry does.
"""

from __future__ import annotations

from typing import Any

import torch

from jitnorm.core import torch_modes
from jitnorm.core.operators import Operator
from jitnorm.core.targets import target_of
from jitnorm.jit.load import load

_library = torch.library.Library("jitnorm", "DEF")


def is_traced(*tensors: object) -> bool:
    """Whether one of these has no storage of its own, so that only torch's dispatcher can tell what a call means."""
    return (
        torch.compiler.is_compiling()
        or torch_modes.is_active()
        or any(isinstance(t, torch.Tensor) and _is_stand_in(t) for t in tensors)
    )


def _is_stand_in(tensor: torch.Tensor) -> bool:
    """A FakeTensor, a meta tensor, another subclass that interprets operators itself, or torch.func's wrapper."""
    return (
        tensor.is_meta
        or type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def mark_constant(function: Any) -> None:
    """Makes what `function` returns while torch.compile traces a constant of the graph.

    As torch.compiler.assume_constant_result, which would import torch._dynamo, and that takes a second.
    """
    function._dynamo_marked_constant = True


def needs_grad(*tensors: object) -> bool:
    """Whether autograd has to know of a call on these."""
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def refuse_gradient(op: str, *tensors: object) -> None:
    """Raise RuntimeError if a call of an operator without a gradient needs one for these tensors."""
    if needs_grad(*tensors):
        raise RuntimeError(f"{op} has no gradient: call it under torch.no_grad()")


def refuse_torch_func(op: str, *tensors: object) -> None:
    """RuntimeError where torch.func is to differentiate a call on these, which it cannot."""
    if any(
        isinstance(t, torch.Tensor) and torch._C._functorch.is_gradtrackingtensor(t) and needs_grad(t) for t in tensors
    ):
        raise RuntimeError(
            f"{op} has no derivative in torch.func: use backward() or torch.autograd.grad, "
            "or modules of jitnorm.nn, whose norms PyTorch computes inside torch.func"
        )


def refuse_unwritable(op: str, *needed: object, **written: torch.Tensor) -> None:
    """RuntimeError where torch would not let one of these be overwritten by what is computed from it and from `needed`.

    torch says so in the middle of its own writing, for some of these after it: so all are asked before the first write.
    """
    for name, tensor in written.items():
        if reason := _reason_not_to_write(tensor, needs_grad(tensor, *needed)):
            raise RuntimeError(f"{name} is {reason}, which {op} cannot overwrite")


def _reason_not_to_write(tensor: torch.Tensor, of_gradient: bool) -> str | None:
    if of_gradient and tensor.requires_grad and tensor.is_leaf:
        return "a leaf that requires grad"
    if torch.compiler.is_compiling():  # what is compiled writes to no view
        return None
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "an inference tensor"
    if not of_gradient or not tensor._is_view():
        return None
    if tensor.requires_grad and tensor._base is not None and tensor._base.is_leaf:
        return "a view of a leaf that requires grad"
    if torch._C._autograd._get_creation_meta(tensor) != torch._C._autograd.CreationMeta.DEFAULT:
        return "a view that autograd guards, as an output of split or unbind or one made under no_grad"
    return None


def count_version(*written: torch.Tensor) -> None:
    """So that autograd notices if one of these was saved for a backward."""
    for tensor in written:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def build_while_tracing(operator: Operator, like: torch.Tensor, *sizes: Any) -> None:
    """Builds `operator.spec(*sizes, target)` for the device of `like`: now, not in a graph's first run."""
    if not like.is_meta:
        load(operator.spec(*sizes, target_of(like)))


def register(schema: str, implementation: Any, fake: Any) -> str:
    """Makes torch.ops.jitnorm.<name> of a schema, what runs on either device, and what traces."""
    _library.define(schema)
    name = schema.partition("(")[0]

    def run(*arguments: Any, **keywords: Any) -> Any:
        if torch.autograd.forward_ad._current_level >= 0:  # tangents would be lost, and not be missed
            raise RuntimeError(f"{name} has no forward-mode derivative")
        return implementation(*arguments, **keywords)

    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"jitnorm::{name}", fake, lib=_library)
    return f"jitnorm::{name}"


def register_autograd(name: str, backward: Any, save: Any) -> None:
    """Gives the operator that `register` named a backward; `save` keeps what that needs."""
    torch.library.register_autograd(name, backward, setup_context=save, lib=_library)
