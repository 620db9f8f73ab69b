"""Patch modules of Hugging Face models so that this package's kernels compute them: norms, attention, layers and MLPs.

A patched module keeps its identity, parameters, buffers, hooks and position; only its class changes, to a subclass of
the original one. The subclass's forward calls a kernel, or the original forward if no kernel supports the call. So the
state dict, tied or sharded weights, optimiser state and `isinstance` do not change, and undoing restores the class.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from jitnorm.core import checks
from jitnorm.core.norm_modules import original_class

if TYPE_CHECKING:
    from jitnorm.integrations.transformers_explain import Explanation, explain
    from jitnorm.integrations.transformers_rules import NormRule

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
        rules: the name in the model of each patched norm, with the rule by which its class computes.
        left: the name of each other module of the kinds to patch, with the reason why it was not patched.
        gemms: what `time_gemms` chose for each shape, in words.
    """

    replaced: dict[str, str]
    rules: dict[str, str]
    left: dict[str, str]
    gemms: list[str]

    def __init__(
        self,
        model: torch.nn.Module,
        attention: bool,
        layers: bool,
        fuse_projections: bool,
        time_gemms: bool,
        named: Mapping[type[torch.nn.Module], NormRule],
        rounding: str,
    ) -> None:
        from jitnorm.integrations import transformers_projections
        from jitnorm.integrations.transformers_classes import find_replacement, kind_of

        self.replaced, self.rules, self.left, self.gemms = {}, {}, {}, []
        self._originals: list[tuple[torch.nn.Module, type[torch.nn.Module], type[torch.nn.Module]]] = []
        kinds = {"norm", *(["attention"] if attention else []), *(["layer", "mlp"] if layers else [])}
        for name, module in model.named_modules():
            kind = kind_of(module, named)
            if kind is None or kind not in kinds:
                continue
            replacement = find_replacement(module, kind, named, rounding)
            if replacement.cls is None:
                self.left[name] = replacement.reason or ""
                continue
            original = type(module)
            self._originals.append((module, original, replacement.cls))
            self.replaced[name] = original.__name__
            if replacement.kernels is not None:
                self.rules[name] = replacement.kernels.rule.name
        # After all have been found, since an error in `named` must leave the model as it was.
        for module, _, cls in self._originals:
            module.__class__ = cls
        try:
            if fuse_projections:
                for module, original, _ in self._originals:
                    if linears := _projections(module, original):
                        transformers_projections.fuse_weights(linears)
            if time_gemms:
                self._time_gemms()
        except BaseException:  # the caller would have nothing to undo it with
            self.undo()
            raise

    def _time_gemms(self) -> None:
        from jitnorm.integrations.transformers_mlp import PatchedMLP, operator_name
        from jitnorm.integrations.transformers_projections import is_fused, time_gemms
        from jitnorm.integrations.transformers_state import TIMED_GEMMS

        groups, outputs = [], []
        for module, original, _ in self._originals:
            # The gate and the factor are written into slices of a tensor if they are not fused: torch does that.
            if (linears := _projections(module, original)) and (len(linears) > 2 or is_fused(linears)):
                groups.append((linears, operator_name(module) if isinstance(module, PatchedMLP) else None))
            outputs += [module._modules.get(name) for name in ("o_proj", "down_proj")]
        self.gemms = time_gemms(groups, outputs)
        for module, _, _ in self._originals if self.gemms else ():
            module.__dict__[TIMED_GEMMS] = True
        if not self.gemms:
            warnings.warn(
                "time_gemms found no weight to time: it is for weights of bfloat16 or float16 on a GPU, in patched "
                "modules whose linear layers have no bias and no hook. Patch a model where it will run",
                RuntimeWarning,
                stacklevel=4,
            )

    def undo(self) -> None:
        """Restore the class of each patched module, unless it was changed again since. A second call does nothing."""
        for module, original, cls in self._originals:
            if type(module) is cls:
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
        rules = {name: f" (rule {rule})" for name, rule in self.rules.items()}
        lines += [f"  {name or '(the model)'}: {cls}{rules.get(name, '')}" for name, cls in self.replaced.items()]
        lines += [f"  {name or '(the model)'}: left, {reason}" for name, reason in self.left.items()]
        lines += [f"  GEMMs: {note}" for note in self.gemms]
        return "\n".join(lines)


def patch_transformers(
    model: torch.nn.Module,
    *,
    strict: bool = False,
    attention: bool = True,
    layers: bool = True,
    fuse_projections: bool = False,
    time_gemms: bool = False,
    classes: Mapping[type[torch.nn.Module], str] | None = None,
    rounding: str = "once",
) -> TransformersPatch:
    """Patch modules of a Hugging Face model in place, so that this package's kernels compute them.

    RMSNorm classes are recognised by what they compute, wherever they are in the model: layer norms, q and k norms, the
    final norm. A copy of each norm is called on random input on the CPU, and its results are compared with the rules
    below; this takes milliseconds for each class and size. The other classes, of Llama, Mistral, Qwen 2, Qwen 3 and
    Gemma 3 (text), are recognised by the source of their forward. `explain` says what each module became.

    - Norms: the kernels normalise in float32 and round once. Llama's class and similar ones also round before they
      multiply by the weight. The original forward runs if the weight and the input of a call have different dtypes.
      The rules, of the normalised value n and the weight w, where round() is to the dtype of the input: "once",
      round(n * w), as GPT-OSS and torch.nn.RMSNorm, or round(n) without a weight; "llama", round(round(n) * w);
      "gemma", round(n * (1 + w)); "gemma_weight", round(n * round(1 + w)); "gemma_llama",
      round(round(n) * round(1 + w)).
    - Gated norms, whose forward takes hidden_states and gate, as Qwen3-Next's and Mamba 2's: one launch computes the
      norm, of rows or groups, and the product with the activated gate, in float32, and rounds once. Their rules are
      those of `transformers_gated.GATED_RULES`. The original forward runs if there is no gate, or if input, gate and
      weight have different dtypes.
    - Attention: one launch normalises and rotates q and k, in float32, and rounds once, where transformers rounds up to
      five times. The rotary embedding prepares the cosines and sines once in a forward of the model. The original
      forward of a layer runs where the position embeddings do not come from the model's patched rotary embedding, as
      when accelerate spreads the layers over several devices. In decode steps with a boolean mask, as those with a
      static cache, a kernel computes attention instead of PyTorch's, for heads of 64 or 128 elements in bfloat16 or
      float16 on a GPU: not under torch.compile, with "hf" rounding or in the batch-invariant mode. Its bits depend on
      the number of sequences.
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
        time_gemms: time several GEMMs for each shape of the linear layers of patched attention modules and MLPs, for up
            to 64 rows (tokens), and use the fastest in CUDA graphs that are captured without gradients: torch's, this
            package's and cuBLASLt's. With `fuse_projections`, the GEMM of gate_proj and up_proj may also compute the
            activation and the product, with the same roundings. It builds up to two kernels for each shape, and then
            takes about half a second. Not for layers with a bias, dtypes but bfloat16 and float16, the head, and
            torch.compile. Where times are close, the choice may differ from one call of this function to the next, and
            with it the rounding. A graph must not write the weights: a GEMM may read them before the kernel before it
            has ended.
        classes: the rules of norm classes that are not recognised, such as `{MyNorm: "llama"}`: a class whose forward
            does not run on the CPU, uses attributes that are no plain values, or rounds elsewhere. Subclasses do not
            count. The norms need at most one weight, a float eps, and a forward of the input alone.
        rounding: "once", as described above; or "hf" to round where transformers rounds: norms before they multiply by
            the weight, if their rule does; MLPs after the activation; attention after norm and rotation, in eager mode.
            Then more bits of the logits are those of the unpatched model, and the errors are as large as its errors.

    Returns:
        What was replaced, what was left and why. Its `undo()` restores the model, as does leaving it as a context
        manager: `with patch_transformers(model): ...`. `unpatch_transformers` restores copies of the model too.

    Raises:
        TypeError: `model` is not a module, an option is not a bool, or `classes` has keys that are no module classes.
        ValueError: `rounding` is another word; or `classes` has a value that is no rule, or a rule that its class does
            not compute on random input. No module was changed.
        RuntimeError: nothing was replaced, and `strict` is true.
    """
    _check_model(model)
    options = {"strict": strict, "attention": attention, "layers": layers, "fuse_projections": fuse_projections}
    options["time_gemms"] = time_gemms
    for name, value in options.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    checks.choice("rounding", rounding, ("once", "hf"))
    patch = TransformersPatch(model, attention, layers, fuse_projections, time_gemms, _check_classes(classes), rounding)
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
    from jitnorm.integrations.transformers_classes import is_patched_class

    _check_model(model)
    restored = {}
    for name, module in model.named_modules():
        original = original_class(module)
        if original is type(module):
            continue
        if not is_patched_class(type(module)):
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
    from jitnorm.integrations.transformers_state import TIMED_GEMMS

    module.__class__ = original
    module.__dict__.pop(TIMED_GEMMS, None)
    if linears := _projections(module, original):
        split_weights(linears)


def _check_model(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _check_classes(classes: Mapping[type[torch.nn.Module], str] | None) -> dict[type[torch.nn.Module], NormRule]:
    """Return the rule for each class."""
    from jitnorm.integrations.transformers_rules import RULES

    if classes is None:
        return {}
    if not isinstance(classes, Mapping):
        raise TypeError(f"classes must be a dict from module classes to rules, got {type(classes).__name__}")
    for cls, rule in classes.items():
        if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
            raise TypeError(f"classes must have classes of torch.nn.Module as keys, got {cls!r}")
        if not isinstance(rule, str) or rule not in RULES:
            accepted = ", ".join(map(repr, RULES))
            raise ValueError(f"classes[{cls.__name__}] must be one of {accepted}, got {rule!r}")
    return {cls: RULES[rule] for cls, rule in classes.items()}


def _summarise(left: dict[str, str]) -> str:
    """Return the reasons, each with the number of modules that it applies to."""
    counts = Counter(left.values())
    return (
        "; ".join(f"{reason} ({n} module{'s' * (n != 1)})" for reason, n in counts.items())
        or "it has no RMSNorm modules"
    )
