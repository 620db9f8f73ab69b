"""Patch modules of Hugging Face models so that this package's kernels compute them: RMSNorm and, on request, attention.

A patched module keeps its identity, parameters, buffers, hooks and position; only its class changes, to a subclass of
the original one. The subclass's forward calls a kernel, or the original forward if no kernel supports the call. So the
state dict, tied or sharded weights, optimiser state and `isinstance` do not change, and undoing restores the class.
"""

# No `from __future__ import annotations`: torch.fx writes the annotations of forward into its code, as types, not text.

import warnings
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from jitnorm.core.eligibility import can_normalise
from jitnorm.core.norm_modules import GEMMA_CLASSES, LLAMA_CLASSES, original_class
from jitnorm.core.norms import is_supported_hidden_size
from jitnorm.integrations.transformers_attention import (
    ATTENTION_CLASSES,
    ROTARY_CLASSES,
    PatchedAttention,
    PatchedRotaryEmbedding,
    attention_attributes,
    reason_to_leave_attention,
)
from jitnorm.nn import NORM_VARIANTS, NormOperators, normalise, refuse_script


@dataclass(frozen=True, eq=False, repr=False)
class _NormClass:
    """A class of RMSNorm modules in transformers.

    Attributes:
        operators: what computes the same.
        eps_attribute: the name of the attribute that has its eps.
    """

    operators: NormOperators
    eps_attribute: str


_SUPPORTED_CLASSES = {
    **dict.fromkeys(LLAMA_CLASSES, _NormClass(NORM_VARIANTS["rmsnorm"], "variance_epsilon")),
    **dict.fromkeys(GEMMA_CLASSES, _NormClass(NORM_VARIANTS["gemma_rmsnorm"], "eps")),
}


class _Patched(torch.nn.Module):
    """The base class that a patched norm class has before the original one."""

    _jitnorm_class: _NormClass
    weight: torch.nn.Parameter

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        norm_class, weight = self._jitnorm_class, self.weight
        # With a weight of another dtype the original runs: Llama's class promotes the result to that dtype.
        if can_normalise(hidden_states, weight) and weight.dtype == hidden_states.dtype:
            eps = getattr(self, norm_class.eps_attribute)
            return normalise(norm_class.operators.norm, hidden_states, weight, eps)
        return super().forward(hidden_states)  # type: ignore[no-any-return]


_classes: dict[type[torch.nn.Module], type[torch.nn.Module]] = {}


def _patched_class(original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    if original not in _classes:
        name = original.__name__
        base, attributes = _base_and_attributes(original)
        attributes |= {"_jitnorm_original": original, "__module__": __name__, "__doc__": original.__doc__}
        attributes |= {"__prepare_scriptable__": refuse_script, "__reduce_ex__": _reduce}
        _classes[original] = type(f"Jitnorm{name}", (base, original), attributes)
    return _classes[original]


def _base_and_attributes(original: type[torch.nn.Module]) -> tuple[type[torch.nn.Module], dict[str, Any]]:
    if original.__name__ in ATTENTION_CLASSES:
        return PatchedAttention, attention_attributes(original)
    if original.__name__ in ROTARY_CLASSES:
        return PatchedRotaryEmbedding, {}
    return _Patched, {"_jitnorm_class": _SUPPORTED_CLASSES[original.__name__]}


def _reduce(module: torch.nn.Module, protocol: Any) -> Any:
    # Pickle looks classes up by name, and a patched class is created at run time.
    return _rebuild, (original_class(module),), module.__dict__


def _rebuild(original: type[torch.nn.Module]) -> torch.nn.Module:
    cls = _patched_class(original)
    return cls.__new__(cls)


class TransformersPatch:
    """The result of `patch_transformers`, and the means to undo it.

    Attributes:
        replaced: the name in the model of each patched module, with the name of its original class.
        left: the name of each other RMSNorm module, with the reason why it was not patched; with attention=True of
            each other attention module and rotary embedding too.
    """

    replaced: dict[str, str]
    left: dict[str, str]

    def __init__(self, model: torch.nn.Module, attention: bool = False) -> None:
        self.replaced, self.left = {}, {}
        self._originals: list[tuple[torch.nn.Module, type[torch.nn.Module]]] = []
        for name, module in model.named_modules():
            kind = type(module).__name__
            if "rmsnorm" in kind.lower():
                reason = _reason_to_leave(module)
            elif attention and kind.endswith(("Attention", "RotaryEmbedding")):
                reason = _reason_to_leave_attention(module)
            else:
                continue
            if reason:
                self.left[name] = reason
                continue
            original = type(module)
            self._originals.append((module, original))
            self.replaced[name] = original.__name__
            module.__class__ = _patched_class(original)

    def undo(self) -> None:
        """Restore the class of each patched module, unless it was changed again since. A second call does nothing."""
        for module, original in self._originals:
            if type(module) is _patched_class(original):
                module.__class__ = original
        self._originals.clear()

    def __enter__(self) -> "TransformersPatch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        lines = [f"replaced {len(self.replaced)} modules, left {len(self.left)}"]
        lines += [f"  {name or '(the model)'}: {cls}" for name, cls in self.replaced.items()]
        lines += [f"  {name or '(the model)'}: left, {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def _reason_to_leave(module: torch.nn.Module) -> str | None:
    """Return why the module cannot be patched, or None if it can."""
    name = type(module).__name__
    if original_class(module) is not type(module):
        return "already replaced"
    if name not in _SUPPORTED_CLASSES:
        return f"{name} is not a class that jitnorm supports"
    eps_attribute, weight = _SUPPORTED_CLASSES[name].eps_attribute, getattr(module, "weight", None)
    if not isinstance(getattr(module, eps_attribute, None), float):
        return f"{name} is not the class of transformers: it has no float {eps_attribute}"
    if type(weight) is not torch.nn.Parameter or weight.dim() != 1:
        return f"{name} is not the class of transformers: it has no one-dimensional torch.nn.Parameter weight"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if not is_supported_hidden_size(weight.shape[0]):
        return f"no kernel supports hidden_size {weight.shape[0]}"
    return None


def _reason_to_leave_attention(module: torch.nn.Module) -> str | None:
    return "already replaced" if original_class(module) is not type(module) else reason_to_leave_attention(module)


def patch_transformers(model: torch.nn.Module, *, strict: bool = False, attention: bool = False) -> TransformersPatch:
    """Patch the RMSNorm modules of a Hugging Face model in place, so that this package's kernels compute them.

    The classes of Llama, Mistral, Mixtral, Qwen 2 and 3, Phi 3 and Gemma 1 to 3 are recognised by their names and
    attributes, wherever they are in the model: layer norms, q and k norms, the final norm. Training, `generate`,
    `torch.compile`, tracing, saving and loading work as before; torch.jit.trace, torch.fx.symbolic_trace, the ONNX
    exporter and torch.func run the original forward.

    The kernels normalise in float32 and round once. Llama's class and similar ones also round before they multiply by
    the weight, so float16 and bfloat16 logits differ by that rounding; the kernels' are closer to a float32 model's.
    The module's original forward runs if the weight and the input of a call have different dtypes, or if no kernel
    supports the call.

    With attention=True, one launch normalises and rotates q and k of a layer, in the attention of Llama, Qwen 2, Qwen 3
    and Gemma 3 (text). It computes in float32 and rounds once, after the rotation, where transformers rounds up to
    five times; float16 and bfloat16 results differ by that and are closer to a float64 model's. The rotary embedding
    prepares the cosines and sines once in a forward of the model. Cache update and attention are those of transformers.
    The original forward of a layer runs for calls that need a gradient, under autocast, under the tracers above, and
    where the position embeddings do not come from the model's patched rotary embedding, as when accelerate spreads the
    layers over several devices. An attention class whose forward is not the known one of transformers 5 is left.

    Args:
        model: any module that contains such modules. Its parameters, hooks and state dict do not change.
        strict: raise if nothing is replaced, instead of warning.
        attention: patch attention modules and rotary embeddings too.

    Returns:
        What was replaced, what was left and why. Its `undo()` restores the model, as does leaving it as a context
        manager: `with patch_transformers(model): ...`. `unpatch_transformers` restores copies of the model too.

    Raises:
        TypeError: `model` is not a module.
        RuntimeError: nothing was replaced, and `strict` is true.
    """
    _check_model(model)
    patch = TransformersPatch(model, attention)
    if not patch.replaced:
        message = f"patch_transformers replaced nothing in {type(model).__name__}: {_summarise(patch.left)}"
        if strict:
            raise RuntimeError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return patch


def unpatch_transformers(model: torch.nn.Module) -> dict[str, str]:
    """Restore the original class of each module that `patch_transformers` replaced.

    Unlike `undo()` of the patch, this needs only the model, which may be a deep copy of the patched one, or unpickled.

    Args:
        model: any module.

    Returns:
        The name in the model of each restored module, with the name of its class. A second call returns none.

    Raises:
        TypeError: `model` is not a module.
    """
    _check_model(model)
    restored = {}
    for name, module in model.named_modules():
        original = original_class(module)
        if original is type(module):
            continue
        if type(module) is not _patched_class(original):
            warnings.warn(
                f"unpatch_transformers left {name}: {type(module).__name__} was derived from the patched class",
                RuntimeWarning,
                stacklevel=2,
            )
            continue
        module.__class__ = original
        restored[name] = original.__name__
    return restored


def _check_model(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _summarise(left: dict[str, str]) -> str:
    """Return the reasons, each with the number of modules that it applies to."""
    counts = Counter(left.values())
    return (
        "; ".join(f"{reason} ({n} module{'s' * (n != 1)})" for reason, n in counts.items())
        or "it has no RMSNorm modules"
    )
