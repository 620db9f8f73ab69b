"""Registration of operators with torch, as torch.ops.jitnorm.*: for torch.compile, export, fake tensors and autograd.

Eager calls without gradients do not use torch.ops: through torch's dispatcher a call takes three times as long.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch._library import autograd

from jitnorm.core import torch_modes
from jitnorm.core.operators import Operator
from jitnorm.core.targets import target_of
from jitnorm.jit.load import load

_library = torch.library.Library("jitnorm", "DEF")


def needs_dispatcher(*tensors: object) -> bool:
    """Return whether a call on these arguments has to go through torch's dispatcher.

    It has to under torch.compile and tracers, while a dispatch mode is active, and for tensors whose values are not in
    their storage.
    """
    return (
        torch.compiler.is_compiling()
        or torch_modes.is_active()
        or any(isinstance(t, torch.Tensor) and _has_no_values(t) for t in tensors)
    )


def _has_no_values(tensor: torch.Tensor) -> bool:
    """Return whether it is a meta tensor, a subclass with its own __torch_dispatch__, or torch.func's wrapper."""
    return (
        tensor.is_meta
        or type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def mark_constant(function: Any) -> None:
    """Let torch.compile treat the result of `function` as a constant of the graph.

    Unlike torch.compiler.assume_constant_result, this does not import torch._dynamo, which takes a second.
    """
    function._dynamo_marked_constant = True


def needs_grad(*tensors: object) -> bool:
    """Return whether autograd has to record a call on these arguments."""
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def refuse_gradient(op: str, *tensors: object) -> None:
    """Raise RuntimeError if a call of an operator without a gradient needs one for these tensors."""
    if needs_grad(*tensors):
        raise RuntimeError(f"{op} has no gradient: call it under torch.no_grad()")


def refuse_torch_func(op: str, *tensors: object) -> None:
    """Raise RuntimeError if torch.func would have to differentiate a call on these, which it cannot."""
    if any(
        isinstance(t, torch.Tensor) and torch._C._functorch.is_gradtrackingtensor(t) and needs_grad(t) for t in tensors
    ):
        raise RuntimeError(
            f"{op} has no derivative in torch.func: use backward() or torch.autograd.grad, "
            "or modules of jitnorm.nn, whose norms PyTorch computes inside torch.func"
        )


def refuse_unwritable(op: str, *needed: object, **written: torch.Tensor) -> None:
    """Raise RuntimeError if autograd forbids overwriting one of `written`.

    torch itself raises only during the write, or even after it. So all are checked before the first write.

    Args:
        op: the operator's name, for the message.
        needed: the other tensors from which the new values are computed.
        written: the tensors to overwrite, by argument name.
    """
    for name, tensor in written.items():
        if reason := _reason_not_to_write(tensor, needs_grad(tensor, *needed)):
            raise RuntimeError(f"{name} is {reason}, which {op} cannot overwrite")


def _reason_not_to_write(tensor: torch.Tensor, has_gradient: bool) -> str | None:
    """Return why autograd forbids overwriting `tensor` with values that have a gradient or not, or None."""
    if has_gradient and tensor.requires_grad and tensor.is_leaf:
        return "a leaf that requires grad"
    if torch.compiler.is_compiling():  # a compiled graph writes to no view
        return None
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        return "an inference tensor"
    if not has_gradient or not tensor._is_view():
        return None
    if tensor.requires_grad and tensor._base is not None and tensor._base.is_leaf:
        return "a view of a leaf that requires grad"
    if torch._C._autograd._get_creation_meta(tensor) != torch._C._autograd.CreationMeta.DEFAULT:
        return "a view that autograd guards, as an output of split or unbind or one made under no_grad"
    return None


def increment_versions(*written: torch.Tensor) -> None:
    """Increment the versions of tensors that were written, so that autograd notices if a backward has saved one."""
    for tensor in written:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def build_while_tracing(operator: Operator, like: torch.Tensor, *sizes: Any) -> None:
    """Build `operator.spec(*sizes, target)` for the device of `like`, so that the graph's first run does not."""
    if not like.is_meta:
        load(operator.spec(*sizes, target_of(like)))


def register(schema: str, implementation: Any, fake: Any) -> str:
    """Define an operator in torch.ops.jitnorm.

    `fake` is registered with torch when the operator is first looked up: see `_Namespace`.

    Args:
        schema: the operator's name and arguments, in torch's schema language.
        implementation: what runs on the CPU and on CUDA.
        fake: what runs on fake and meta tensors.

    Returns:
        The operator's qualified name, for `register_autograd`.
    """
    _library.define(schema)
    name = schema.partition("(")[0]

    def run(*arguments: Any, **keywords: Any) -> Any:
        if torch.autograd.forward_ad._current_level >= 0:  # forward-mode tangents would be dropped silently
            raise RuntimeError(f"{name} has no forward-mode derivative")
        return implementation(*arguments, **keywords)

    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    _pending_fakes[name] = fake
    return f"jitnorm::{name}"


def register_autograd(name: str, backward: Any, save: Any) -> None:
    """Register a backward for the operator `name`, which `register` returned; `save` stores what the backward needs.

    Does what torch.library.register_autograd does. That would create three classes for each operator at import; here
    torch creates them at the operator's first call with a gradient.
    """

    @functools.cache
    def operator() -> Any:
        return getattr(torch.ops.jitnorm, name.removeprefix("jitnorm::")).default

    @functools.cache
    def differentiable() -> Any:
        return autograd.make_autograd_impl(operator(), autograd.Info(backward, save))

    def run(keyset: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return differentiable()(keyset, *arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator().redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    _library.impl(name, run, "Autograd", with_keyset=True)


class _Namespace(torch._ops._OpNamespace):
    """torch.ops.jitnorm, which registers an operator's fake implementation when the operator is first looked up.

    Registering all of them would add 6 ms to `import jitnorm`, also in processes that trace nothing. Every tracer looks
    the operator up here first, from C++ too. torch then stores the result as an attribute, so that later calls do not
    reach `__getattr__`. TorchScript and AOTInductor do not look operators up here; `register` defines all they need.
    """

    __module__ = torch._ops.__name__  # torch names operators after it, and torch.fx writes that name into its code

    def __getattr__(self, name: str) -> Any:
        with _lock:  # other threads get the operator only once its fake implementation is registered
            if fake := _pending_fakes.pop(name, None):
                torch.library.register_fake(f"jitnorm::{name}", fake, lib=_library)
            return super().__getattr__(name)


_pending_fakes: dict[str, Any] = {}
_lock = threading.RLock()
torch.ops.jitnorm.__class__ = _Namespace  # changes the existing object, to which others may already refer
