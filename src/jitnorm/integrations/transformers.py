"""Patch modules of Hugging Face models so that this package's kernels compute them: norms, attention, layers and MLPs.

A patched module keeps its identity, parameters, buffers, hooks and position; only its class changes, to a subclass of
the original one. The subclass's forward calls a kernel, or the original forward if no kernel supports the call. So the
state dict, tied or sharded weights, optimiser state and `isinstance` do not change, and undoing restores the class.
"""

from __future__ import annotations

import warnings
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from jitnorm.core.norm_modules import original_class

if TYPE_CHECKING:
    from jitnorm.integrations.transformers_explain import Explanation, explain

__all__ = ["Explanation", "TransformersPatch", "explain", "patch_transformers", "unpatch_transformers"]

# `import jitnorm` imports this module. The modules that do the work are imported when a model is patched.


def __getattr__(name: str) -> Any:
    if name not in ("Explanation", "explain"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jitnorm.integrations import transformers_explain

    return getattr(transformers_explain, name)


class TransformersPatch:
    """The result of `patch_transformers`, and the means to undo it.

    Attributes:
        replaced: the name in the model of each patched module, with the name of its original class.
        left: the name of each other module of the kinds to patch, with the reason why it was not patched.
    """

    replaced: dict[str, str]
    left: dict[str, str]

    def __init__(self, model: torch.nn.Module, attention: bool, layers: bool, fuse_projections: bool) -> None:
        from jitnorm.integrations.transformers_classes import kind_of, patched_class, reason_to_leave
        from jitnorm.integrations.transformers_projections import fuse_weights

        self.replaced, self.left = {}, {}
        self._originals: list[tuple[torch.nn.Module, type[torch.nn.Module]]] = []
        kinds = {"norm", *(["attention"] if attention else []), *(["layer", "mlp"] if layers else [])}
        for name, module in model.named_modules():
            kind = kind_of(module)
            if kind is None or kind not in kinds:
                continue
            if reason := reason_to_leave(module, kind):
                self.left[name] = reason
                continue
            original = type(module)
            self._originals.append((module, original))
            self.replaced[name] = original.__name__
            module.__class__ = patched_class(original)
        if fuse_projections:
            for module, original in self._originals:
                if linears := _projections(module, original):
                    fuse_weights(linears)

    def undo(self) -> None:
        """Restore the class of each patched module, unless it was changed again since. A second call does nothing."""
        from jitnorm.integrations.transformers_classes import patched_class

        for module, original in self._originals:
            if type(module) is patched_class(original):
                _restore(module, original)
        self._originals.clear()

    def __enter__(self) -> TransformersPatch:
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


def patch_transformers(
    model: torch.nn.Module,
    *,
    strict: bool = False,
    attention: bool = True,
    layers: bool = True,
    fuse_projections: bool = False,
) -> TransformersPatch:
    """Patch modules of a Hugging Face model in place, so that this package's kernels compute them.

    The RMSNorm classes of Llama, Mistral, Mixtral, Qwen 2 and 3, Phi 3 and Gemma 1 to 3 are recognised by their names
    and attributes, wherever they are in the model: layer norms, q and k norms, the final norm. The other classes, of
    Llama, Mistral, Qwen 2, Qwen 3 and Gemma 3 (text), are recognised by the source of their forward. `explain` says
    what each module became.

    - Norms: the kernels normalise in float32 and round once. Llama's class and similar ones also round before they
      multiply by the weight. The original forward runs if the weight and the input of a call have different dtypes.
    - Attention: one launch normalises and rotates q and k, in float32, and rounds once, where transformers rounds up to
      five times. The rotary embedding prepares the cosines and sines once in a forward of the model. The original
      forward of a layer runs where the position embeddings do not come from the model's patched rotary embedding, as
      when accelerate spreads the layers over several devices.
    - Layers: one launch adds the residual and normalises the sum, with the roundings of transformers: of the sum, and
      of the norm as above. An addition is left to PyTorch where anything else may see a tensor that the kernel
      overwrites, such as a hook, and in the first layer.
    - MLPs: one launch computes the activation of the gate and its product with the factor, in float32, and rounds once,
      where transformers also rounds the activation.

    So float16 and bfloat16 logits differ from those of transformers by roundings, and are closer to a float64 model's.
    Norms also run in training. Attention, layers and MLPs run their original forward for calls that need a gradient,
    under autocast and under tracers; layers and MLPs also under torch.compile, which fuses additions and activations
    itself. `generate`, saving and loading work as before.

    Args:
        model: any module that contains such modules. Its parameters, hooks and state dict do not change.
        strict: raise if nothing is replaced, instead of warning.
        attention: patch attention modules and rotary embeddings.
        layers: patch decoder layers, MLPs, and the model around the layers.
        fuse_projections: compute q, k and v by one GEMM, and the gate and its factor, in patched modules whose
            projections are plain linear modules. Their weights are moved into one tensor, of which the parameters
            become slices. Where that does not stay so, as after `model.to`, there are several GEMMs again.

    Returns:
        What was replaced, what was left and why. Its `undo()` restores the model, as does leaving it as a context
        manager: `with patch_transformers(model): ...`. `unpatch_transformers` restores copies of the model too.

    Raises:
        TypeError: `model` is not a module, or an option is not a bool.
        RuntimeError: nothing was replaced, and `strict` is true.
    """
    _check_model(model)
    options = {"strict": strict, "attention": attention, "layers": layers, "fuse_projections": fuse_projections}
    for name, value in options.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    patch = TransformersPatch(model, attention, layers, fuse_projections)
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
    from jitnorm.integrations.transformers_classes import patched_class

    _check_model(model)
    restored = {}
    for name, module in model.named_modules():
        original = original_class(module)
        if original is type(module):
            continue
        if type(module) is not patched_class(original):
            warnings.warn(
                f"unpatch_transformers left {name}: {type(module).__name__} was derived from the patched class",
                RuntimeWarning,
                stacklevel=2,
            )
            continue
        _restore(module, original)
        restored[name] = original.__name__
    return restored


def _projections(module: torch.nn.Module, original: type[torch.nn.Module]) -> list[torch.nn.Linear] | None:
    """Return the projections of a patched attention module or MLP that can be fused, or None."""
    from jitnorm.integrations.transformers_projections import PROJECTIONS, projections_of

    kind = next((kind for kind in PROJECTIONS if original.__name__.endswith(kind)), None)
    return None if kind is None else projections_of(module, kind)


def _restore(module: torch.nn.Module, original: type[torch.nn.Module]) -> None:
    from jitnorm.integrations.transformers_projections import split_weights

    module.__class__ = original
    if linears := _projections(module, original):
        split_weights(linears)


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
