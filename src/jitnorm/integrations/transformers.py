"""`jitnorm.patch_transformers(model)`: a Hugging Face model's RMSNorm modules, computed by this package's kernels.

A module keeps its identity, parameters, buffers, hooks and place, and gets another class: a subclass of its own whose
forward calls a kernel, and the original forward where no kernel serves. So the state dict, tied or sharded weights,
optimiser state and `isinstance` all stay as they were, and undoing is giving the class back.
"""

# No `from __future__ import annotations`: torch.fx writes the annotations of forward into its code, as types, not text.

import warnings
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

import torch

from jitnorm.core.norms import is_supported_hidden_size
from jitnorm.nn import KERNELS, Kernels, normalise, refuse_script, serves


@dataclass(frozen=True)
class _Kind:
    """What a family of classes computes, and the attribute that holds its eps."""

    kernels: Kernels
    eps: str


# Exact names: Gemma3n's and Gemma 4's classes, for one, multiply by the weight alone.
LLAMA_CLASSES = (
    "LlamaRMSNorm",
    "MistralRMSNorm",
    "MixtralRMSNorm",
    "Qwen2RMSNorm",
    "Qwen2MoeRMSNorm",
    "Qwen2_5_VLRMSNorm",
    "Qwen3RMSNorm",
    "Qwen3MoeRMSNorm",
    "Qwen3VLTextRMSNorm",
    "Phi3RMSNorm",
)
_GEMMA_CLASSES = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "Qwen3NextRMSNorm")  # whose factor is 1 + weight
_KINDS = {
    **dict.fromkeys(LLAMA_CLASSES, _Kind(KERNELS["rmsnorm"], "variance_epsilon")),
    **dict.fromkeys(_GEMMA_CLASSES, _Kind(KERNELS["gemma_rmsnorm"], "eps")),
}


def replaces_norms_of(family: str) -> bool:
    """Return whether the models of a family, a model_type without "_" and a final "text", have a known class."""
    return family in {name.removesuffix("RMSNorm").replace("_", "").lower().removesuffix("text") for name in _KINDS}


class _Patched(torch.nn.Module):
    """Goes before the original class in the bases of what a module becomes."""

    _jitnorm_kind: _Kind
    weight: torch.nn.Parameter

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        kind, weight = self._jitnorm_kind, self.weight
        # A weight of another dtype is left alone: Llama's class promotes the result to it.
        if serves(hidden_states, weight) and weight.dtype == hidden_states.dtype:
            return normalise(kind.kernels.norm, hidden_states, weight, getattr(self, kind.eps))
        return super().forward(hidden_states)  # type: ignore[no-any-return]

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickle finds classes by name, and this one is made at run time.
        return _rebuild, (original_class(self),), self.__dict__


def original_class(module: torch.nn.Module) -> type[torch.nn.Module]:
    """What the module's class is, or was before it was patched."""
    return _original(type(module)) if isinstance(module, _Patched) else type(module)


def _original(patched: type[torch.nn.Module]) -> type[torch.nn.Module]:
    mro = patched.__mro__
    return mro[mro.index(_Patched) + 1]


_classes: dict[type[torch.nn.Module], type[torch.nn.Module]] = {}


def _patched_class(original: type[torch.nn.Module]) -> type[torch.nn.Module]:
    if original not in _classes:
        attributes = {"_jitnorm_kind": _KINDS[original.__name__], "__module__": __name__, "__doc__": original.__doc__}
        _classes[original] = type(f"Jitnorm{original.__name__}", (_Patched, original), attributes)
    return _classes[original]


def _rebuild(original: type[torch.nn.Module]) -> torch.nn.Module:
    cls = _patched_class(original)
    return cls.__new__(cls)


class TransformersPatch:
    """What `patch_transformers` did, and how to undo it.

    Attributes:
        replaced: the name in the model of every module that was replaced, with its original class's name.
        left: the name of every other RMSNorm module, with the reason it was left.
    """

    replaced: dict[str, str]
    left: dict[str, str]

    def __init__(self, model: torch.nn.Module) -> None:
        self.replaced, self.left = {}, {}
        self._originals: list[tuple[torch.nn.Module, type[torch.nn.Module]]] = []
        for name, module in model.named_modules():
            if "rmsnorm" not in type(module).__name__.lower():
                continue
            reason = _reason_to_leave(module)
            if reason:
                self.left[name] = reason
                continue
            original = type(module)
            self._originals.append((module, original))
            self.replaced[name] = original.__name__
            module.__class__ = _patched_class(original)

    def undo(self) -> None:
        """Gives every module its class back, if it still has the one it got. Does nothing the second time."""
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
    name = type(module).__name__
    if isinstance(module, _Patched):
        return "already replaced"
    if name not in _KINDS:
        return f"{name} is not a class that this package knows"
    eps, weight = getattr(module, _KINDS[name].eps, None), getattr(module, "weight", None)
    if not isinstance(eps, float) or type(weight) is not torch.nn.Parameter or weight.dim() != 1:
        return f"{name} is not the one that transformers has: no {_KINDS[name].eps}, or no plain one-dimensional weight"
    if "forward" in vars(module):
        return "its forward has been replaced on the instance"
    if not is_supported_hidden_size(weight.shape[0]):
        return f"no kernel serves hidden_size {weight.shape[0]}"
    return None


def patch_transformers(model: torch.nn.Module, *, strict: bool = False) -> TransformersPatch:
    """Have this package's kernels compute the RMSNorm modules of a Hugging Face model, in place.

    Llama's, Mistral's, Mixtral's, Qwen 2's and 3's, Phi 3's and Gemma 1 to 3's classes are known, by their names
    and attributes, wherever they are in the model: layer norms, q and k norms, the final norm. Training, `generate`,
    `torch.compile`, tracing, saving and loading work as before; torch.jit.trace, torch.fx.symbolic_trace, the ONNX
    exporter and torch.func get the original forward.

    The result is the kernels': normalised in float32 and rounded once. Llama's class and its likes round before they
    multiply by the weight as well, so float16 and bfloat16 logits differ by that rounding, the kernels' being the
    nearer to a float32 model's. Where a call's weight and input have different dtypes, or no kernel takes the call, the
    module's original forward runs.

    Args:
        model: any module that has such modules in it. Its parameters, hooks and state dict are not touched.
        strict: raise where nothing is replaced, instead of warning.

    Returns:
        What was replaced, what was left and why. Its `undo()` restores the model; as a context manager it does so at
        the end: `with patch_transformers(model): ...`. `unpatch_transformers` restores copies of the model too.

    Raises:
        TypeError: `model` is no module.
        RuntimeError: nothing was replaced, and `strict` is true.
    """
    _check_model(model)
    patch = TransformersPatch(model)
    if not patch.replaced:
        message = f"patch_transformers replaced nothing in {type(model).__name__}: {_summary(patch.left)}"
        if strict:
            raise RuntimeError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return patch


def unpatch_transformers(model: torch.nn.Module) -> dict[str, str]:
    """Give every RMSNorm module that `patch_transformers` replaced its own class back.

    Unlike `undo()` of the patch it needs nothing but the model, which may be a deep copy of the one that was patched,
    or one that was unpickled.

    Args:
        model: any module.

    Returns:
        The name in the model of every module that was restored, with its class's name; none the second time.

    Raises:
        TypeError: `model` is no module.
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


def _summary(left: dict[str, str]) -> str:
    """Why each of these was left, the same reason once."""
    counts = Counter(left.values())
    return (
        "; ".join(f"{reason} ({n} module{'s' * (n != 1)})" for reason, n in counts.items())
        or "it has no RMSNorm modules"
    )
