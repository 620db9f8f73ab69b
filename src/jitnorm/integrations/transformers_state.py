"""What the patched modules of a Hugging Face model share: whether a call may use kernels, and the state of one forward.

A layer may overwrite its input only if nothing else can read it. This is so for the output of the layer before, in the
forward of a known model, if no hook sees it. The model's patched forward creates a `ForwardState`, in which the
layers note such tensors.
"""

# No `from __future__ import annotations`: torch.fx writes the annotations of forward into its code, as types, not text.

from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch

from jitnorm.core.eligibility import can_call_operators
from jitnorm.core.operators import DTYPES


class ForwardState:
    """What the layers of a model note for the next layer in one call of its forward.

    Attributes:
        following: the layer after each layer that the model calls, or None after the last one.
        final_norm: the model's norm of the last layer's output.
        total: the output of the last layer, which nothing but the next layer or the final norm reads.
        normalised: `total`, normalised by `norm`; None if it was taken.
        norm: the first norm of the next layer, or the final norm.
    """

    __slots__ = ("final_norm", "following", "norm", "normalised", "total")

    def __init__(self, model: torch.nn.Module) -> None:
        config: Any = model.config
        stack: Any = model._modules["layers"]
        layers = list(stack._modules.values())[: config.num_hidden_layers]
        self.following: dict[torch.nn.Module, torch.nn.Module | None] = dict(pairwise(layers))
        self.following |= dict.fromkeys(layers[-1:])
        self.final_norm = model._modules["norm"]
        self.total: torch.Tensor | None = None
        self.normalised: torch.Tensor | None = None
        self.norm: torch.nn.Module | None = None

    def take(self, norm: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return what `norm(hidden_states)` returns if the layer before has computed it, or None."""
        if self.total is not hidden_states or self.norm is not norm:
            return None
        normalised, self.normalised = self.normalised, None
        return normalised


_has_any_global_hook = torch.nn.modules.module._has_any_global_hook
current_state: ContextVar[ForwardState | None] = ContextVar("jitnorm_transformers", default=None)


TIMED_GEMMS = "_jitnorm_timed_gemms"  # an attribute of patched modules that use what time_gemms chose


def uses_timed_gemms(module: torch.nn.Module) -> bool:
    """Return whether a patched module was patched with `time_gemms=True`, which torch.compile does not use."""
    return not torch.compiler.is_compiling() and TIMED_GEMMS in module.__dict__


def is_plain(module: torch.nn.Module) -> bool:
    """Return whether a call of `module` runs the forward of its class and nothing else, such as a hook."""
    attributes = module.__dict__  # faster than attributes of a module
    return not (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "forward" in attributes
        or attributes.get("_compiled_call_impl") is not None
    )


def is_plain_linear(module: object) -> bool:
    """Return whether `module` is a torch.nn.Linear itself, not a subclass such as PEFT's, and has no hooks.

    Its weight and bias must be parameters, not other attributes, as FSDP makes of them.
    """
    if type(module) is not torch.nn.Linear or not is_plain(module):
        return False
    return "weight" in module._parameters and "bias" in module._parameters


def can_fuse(module: torch.nn.Module, hidden_states: torch.Tensor) -> bool:
    """Return whether operators without a gradient may compute a call of a patched `module`.

    Under torch.compile the original forward runs: the compiler fuses additions and activations itself. With an input
    that requires a gradient it runs under torch.no_grad too: gradient checkpointing calls layers in this way, and
    keeps their inputs.
    """
    return (
        not torch.compiler.is_compiling()
        and not _has_any_global_hook()
        and can_call_operators(hidden_states, hidden_states)
        and hidden_states.dtype in DTYPES
        and hidden_states.device.type in ("cpu", "cuda")
        and not torch.is_autocast_enabled(hidden_states.device.type)
        and not hidden_states.requires_grad
        and not (torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()))
    )
