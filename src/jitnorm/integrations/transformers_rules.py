"""Recognise the rule by which an RMSNorm module computes, from what its forward returns for random input.

A probe is a copy of the module on the CPU with a random weight, if the module has one. Its results are compared with
each rule in float64: those in float32 tell what is computed, those in bfloat16 and float16 where it is rounded. The
module is not called.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any, NoReturn

import torch
from torch.utils._python_dispatch import _disable_current_modes

from jitnorm.core import checks
from jitnorm.nn import is_module_of_jitnorm, resolve_eps

# A value in float64, rounded to the dtype of the input.
_Round = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class NormRule:
    """How a class of RMSNorm modules computes its result from the normalised value n and the weight w.

    Attributes:
        name: its name in `classes` of `patch_transformers`.
        formula: for people. round() is to the dtype of the input.
        weight_offset: added to the weight before it multiplies.
        compute: the formula in float64, of n, w and the rounding.
    """

    name: str
    formula: str
    weight_offset: float
    compute: Callable[[torch.Tensor, torch.Tensor, _Round], torch.Tensor]

    @property
    def rounds_twice(self) -> bool:
        """Return whether the normalised value is rounded before the weight multiplies it."""
        return self.name.endswith("llama")


RULES = {
    rule.name: rule
    for rule in (
        NormRule("once", "round(n * w)", 0.0, lambda n, w, to: to(n * w)),
        NormRule("llama", "round(round(n) * w)", 0.0, lambda n, w, to: to(to(n) * w)),
        NormRule("gemma", "round(n * (1 + w))", 1.0, lambda n, w, to: to(n * (1 + w))),
        NormRule("gemma_weight", "round(n * round(1 + w))", 1.0, lambda n, w, to: to(n * to(1 + w))),
        NormRule("gemma_llama", "round(round(n) * round(1 + w))", 1.0, lambda n, w, to: to(to(n) * to(1 + w))),
    )
}

# Names of attributes for eps, the most frequent first. Others count if "eps" is a part of them.
_EPS_NAMES = ("variance_epsilon", "eps")
# float32 results differ from float64 by a few roundings, of 2^-24 each. A rounding to bfloat16 is 2^-9.
_TOLERANCE = 2.0**-20
FACTORS = (1 - _TOLERANCE, 1 + _TOLERANCE)
PROBE_EPS = 0.0371  # and multiples, large enough to change all but the last bits of a result
_MIN_ELEMENTS, _MAX_COLUMNS = 4096, 512
_ANY_SIZES = (128, 96)  # with which a norm is probed that takes rows of any size
_PLAIN_TYPES = (
    *(type(None), bool, int, float, str, bytes, type, torch.dtype, torch.device, torch.Size),
    *(FunctionType, BuiltinFunctionType),
)
_MODULE_ATTRIBUTES = frozenset(vars(torch.nn.Module()))


@dataclass(frozen=True)
class Recognition:
    """What a probe has found out.

    Attributes:
        rule: the rule by which the module computes, or None.
        eps_attribute: the name of the attribute that has its eps; "" without a rule.
        reason: why there is no rule, or None.
        same_values: the rules, each with the name of the eps, whose values agree in float32, whatever is rounded; none
            if the forward does more than a norm; None if it could not be called.
    """

    rule: NormRule | None = None
    eps_attribute: str = ""
    reason: str | None = None
    same_values: tuple[tuple[NormRule, str], ...] | None = None


def recognise(module: torch.nn.Module, named: NormRule | None = None) -> Recognition:
    """Return by which rule a norm computes, or why it is not known.

    Args:
        module: any module. It is not called and does not change.
        named: the rule that the user gives to its class, for a class that the probe refuses.

    Raises:
        ValueError: the module computes other values than the named rule.
    """
    if reason := reason_of_structure(module):
        return Recognition(reason=reason)
    found = _probe_cached(module)
    if named is None:
        return found
    name = type(module).__name__
    if weight_of(module) is None:
        if named.weight_offset:
            return Recognition(reason=f"{name} has no weight, to which the rule {named.name} adds")
        named = RULES["once"]  # all rules without an offset are the same
    if found.same_values is None:
        names_of_eps = eps_names(module)
        if len(names_of_eps) > 1 and names_of_eps[0] not in _EPS_NAMES:
            return Recognition(reason=f"{name} has several attributes for eps: {', '.join(names_of_eps)}")
        return Recognition(named, names_of_eps[0])
    for rule, eps_attribute in found.same_values:
        if rule is named:
            return Recognition(rule, eps_attribute)
    raise ValueError(
        f"classes[{name}] must be a rule that {name} computes, got {named.name!r}: "
        f"on random input it does not compute {named.formula}"
    )


def reason_of_structure(module: torch.nn.Module, has_gate: bool = False) -> str | None:
    """Return why a module is no RMSNorm with one input and at most one weight, or None.

    With `has_gate` it has a gate too, and must have a weight.
    """
    name = type(module).__name__
    if is_module_of_jitnorm(module):
        return f"{name} is a module of jitnorm, which calls the kernels"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if any(child is not None for child in module._modules.values()):
        return f"{name} has child modules"
    if buffers := [key for key, buffer in module._buffers.items() if buffer is not None]:
        return f"{name} has buffers: {', '.join(buffers)}"
    parameters = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
    if others := [key for key in parameters if key != "weight"]:
        return f"{name} has other parameters than a weight: {', '.join(others)}"
    if has_gate and not parameters:
        return f"{name} has no weight"
    weight = parameters.get("weight")
    if parameters and (type(weight) is not torch.nn.Parameter or weight.dim() != 1 or not weight.shape[0]):
        return f"{name} has no one-dimensional torch.nn.Parameter weight"
    shape = vars(module).get("normalized_shape")  # of torch.nn.RMSNorm
    if isinstance(shape, tuple) and len(shape) != 1:
        return f"{name} normalises {len(shape)} dimensions"
    if not eps_names(module):
        return f"{name} has no float attribute for eps"
    if not has_gate and (others := _further_parameters(type(module))):
        return f"the forward of {name} takes more than the input: {', '.join(others)}"
    return None


def eps_names(module: torch.nn.Module) -> list[str]:
    """Return the names of attributes that may be the eps. It may be None, which torch.nn.RMSNorm takes."""
    attributes = vars(module)
    names = [key for key, value in attributes.items() if "eps" in key.lower() and type(value) is float]
    if not names and attributes.get("eps", 0) is None:
        return ["eps"]
    return sorted(names, key=lambda key: _EPS_NAMES.index(key) if key in _EPS_NAMES else len(_EPS_NAMES))


def _further_parameters(cls: type[torch.nn.Module]) -> list[str]:
    """Return the names of the parameters of a forward after its input."""
    return [p.name for p in _parameters(cls)[1:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def takes_gate(cls: type[torch.nn.Module]) -> bool:
    """Return whether the forward of a class takes hidden states and a gate, by the names of transformers."""
    return [p.name for p in _parameters(cls)] == ["hidden_states", "gate"]


def input_name(cls: type[torch.nn.Module]) -> str:
    """Return the name of the input in the forward of a class, or "" if it is not known."""
    return next((p.name for p in _parameters(cls)), "")


def _parameters(cls: type[torch.nn.Module]) -> list[inspect.Parameter]:
    """Return the parameters of a forward after self, or none if they are not known."""
    try:
        return [*inspect.signature(cls.forward).parameters.values()][1:]
    except (TypeError, ValueError):
        return []


_recognised: dict[Any, Recognition] = {}


def _probe_cached(module: torch.nn.Module) -> Recognition:
    """Probe a module, unless one with the same class, forward, size and attributes was probed."""
    attributes = plain_attributes(module)
    if reason := reason_of_compiled(type(module)):
        return Recognition(reason=reason)
    size = size_of(module)
    key = probe_key(module, attributes, size)
    if key not in _recognised:
        for any_size in _ANY_SIZES if size == 0 else (size,):
            _recognised[key] = _probe(module, attributes, any_size)
            if _recognised[key].rule is None:
                break
    return _recognised[key]


def weight_of(module: torch.nn.Module) -> torch.nn.Parameter | None:
    """Return the weight of a norm, or None if it has none."""
    return module._parameters.get("weight")


def size_of(module: torch.nn.Module) -> int:
    """Return how many elements the rows of a norm have, or 0 for a norm without a weight that takes any."""
    if (weight := weight_of(module)) is not None:
        return int(weight.shape[0])
    shape = vars(module).get("normalized_shape")
    return int(shape[0]) if isinstance(shape, tuple) else 0


def reason_of_compiled(cls: type[torch.nn.Module]) -> str | None:
    """Return why a class is not probed whose forward would be compiled for each probe, or None."""
    return f"the forward of {cls.__name__} is compiled" if hasattr(cls.forward, "_torchdynamo_orig_callable") else None


def probe_key(module: torch.nn.Module, attributes: dict[str, Any], size: int) -> tuple[Any, ...]:
    """Return what is the same for all modules for which one probe suffices."""
    cls = type(module)
    has_weight = weight_of(module) is not None
    return cls, cls.forward, size, has_weight, frozen(attributes), tuple(module._parameters), tuple(module._buffers)


class UnknownAttributeError(Exception):
    """The forward of a probe uses an attribute of which the probe has no copy."""


class _Unknown:
    """Stands for an attribute that is no plain value, such as a config, which a probe must not share with the norm."""

    def __getattr__(self, name: str) -> NoReturn:
        raise UnknownAttributeError

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnknownAttributeError

    def __bool__(self) -> NoReturn:
        raise UnknownAttributeError

    def __getitem__(self, key: Any) -> NoReturn:
        raise UnknownAttributeError

    def __deepcopy__(self, memo: Any) -> _Unknown:
        return self


_UNKNOWN = _Unknown()


def plain_attributes(module: torch.nn.Module) -> dict[str, Any]:
    """Return the attributes that a module has besides those of every module, with `_UNKNOWN` for no plain values."""
    own = {key: value for key, value in vars(module).items() if key not in _MODULE_ATTRIBUTES}
    return {key: value if value is _UNKNOWN or _is_plain(value) else _UNKNOWN for key, value in own.items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(part) for pair in value.items() for part in pair)
    return isinstance(value, _PLAIN_TYPES) or (isinstance(value, (tuple, list, set)) and all(map(_is_plain, value)))


def frozen(value: Any) -> Any:
    """Return a plain value as one that can be a key and differs from every other value."""
    if isinstance(value, dict):
        return dict, tuple((frozen(key), frozen(part)) for key, part in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(frozen, value))
    return (set, frozenset(map(frozen, value))) if isinstance(value, set) else (type(value), value)


def _probe(module: torch.nn.Module, attributes: dict[str, Any], size: int) -> Recognition:
    name, names_of_eps = type(module).__name__, eps_names(module)
    rules = [RULES["once"]] if weight_of(module) is None else RULES.values()
    candidates = [(rule, key) for rule in rules for key in names_of_eps]
    known_eps = {key: PROBE_EPS * (i + 1) for i, key in enumerate(names_of_eps)}
    values: tuple[tuple[NormRule, str], ...] | None = None
    try:
        with isolated():
            # Each with the number of dimensions of the input, and what is set on the copy.
            for dtype, dimensions, changes, training in (
                (torch.float32, 3, known_eps, False),
                (torch.float32, 2, {}, False),
                (torch.float32, 4, {}, True),
                (torch.bfloat16, 3, {}, False),
                (torch.float16, 3, {}, False),
            ):
                case = run_probe(module, {**attributes, **changes}, training, size, names_of_eps[0], dtype, dimensions)
                if isinstance(case, str):
                    return Recognition(reason=f"the forward of {name} {case}", same_values=())
                candidates = [(rule, key) for rule, key in candidates if case.agrees(rule, key)]
                if dtype == torch.float32:
                    values = tuple(candidates)
                if not candidates:
                    return Recognition(reason=f"{name} {case.difference()}", same_values=values)
    except UnknownAttributeError:
        return Recognition(reason=f"the forward of {name} uses an attribute that is no plain value", same_values=values)
    except Exception as error:  # whatever the forward of another library raises
        raised = f"the forward of {name} raised {type(error).__name__} on random input"
        return Recognition(reason=raised, same_values=values)
    return Recognition(*candidates[0], same_values=values)


@contextmanager
def isolated() -> Iterator[None]:
    """Let nothing of the caller's modes and devices into a probe, and nothing of a probe into the random numbers."""
    with ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast("cpu", enabled=False))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        yield


@dataclass(frozen=True)
class Case:
    """A call of a probe.

    Attributes:
        attributes: of the probe, among them its eps.
        x: the input.
        weight: the weight, of the input's dtype; ones if there is none.
        out: the result, of the input's shape and dtype.
        gate: the gate, of the input's shape and dtype, or None.
    """

    attributes: dict[str, Any]
    x: torch.Tensor
    weight: torch.Tensor
    out: torch.Tensor
    gate: torch.Tensor | None = None

    def agrees(self, rule: NormRule, eps_attribute: str) -> bool:
        """Return whether the result is that of a rule, with any roundings in float32 before those of the rule.

        A step of a rule does not change the order of two values. So the results for an n that is a little smaller, and
        one that is a little larger, bound the result: they are apart only where n is next to a tie.
        """
        columns, dtype = self._columns(), self.x.dtype
        w = self.weight[columns].double()
        n = self._normalise(self.x.double(), eps_attribute)[..., columns]
        low, high = (rule.compute(n * factor, w, lambda t: t.to(dtype).double()) for factor in FACTORS)
        return self.is_within(low, high, columns)

    def is_within(self, low: torch.Tensor, high: torch.Tensor, columns: Any = slice(None)) -> bool:
        """Return whether the result is between two bounds in some columns, in float32 but for a few roundings."""
        result = self.out[..., columns].double()
        slack = _TOLERANCE * high.abs() if self.x.dtype == torch.float32 else 0
        return bool(((result >= torch.minimum(low, high) - slack) & (result <= torch.maximum(low, high) + slack)).all())

    def difference(self) -> str:
        """Return how the result differs from those of all rules."""
        if self.x.dtype != torch.float32:
            return f"rounds elsewhere than the rules that jitnorm knows, in {checks.DTYPE_NAMES[self.x.dtype]}"
        eps_attribute = next(key for key in self.attributes if "eps" in key.lower())
        wide, weight = self.x.double(), self.weight.double()
        n = self._normalise(wide - wide.mean(-1, keepdim=True), eps_attribute)
        # Subtracting the mean cancels digits.
        if any(torch.allclose(self.out.double(), n * (weight + offset), 1e-4, 1e-4) for offset in (0, 1)):
            return "subtracts the mean, as a LayerNorm does"
        return "computes none of the rules that jitnorm knows"

    def _normalise(self, wide: torch.Tensor, eps_attribute: str) -> torch.Tensor:
        eps = resolve_eps(self.attributes[eps_attribute], self.x)
        return wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()

    def _columns(self) -> torch.Tensor:
        """Return indices of columns, enough of them to tell the rules apart."""
        size = self.x.shape[-1]
        return torch.arange(0, size, -(-size // _MAX_COLUMNS))


def run_probe(
    module: torch.nn.Module,
    attributes: dict[str, Any],
    training: bool,
    size: int,
    eps_attribute: str,
    dtype: torch.dtype,
    dimensions: int,
    has_gate: bool = False,
) -> Case | str:
    """Return what a copy of a module computes for random input, or how it behaves unlike a norm.

    Args:
        module: the original.
        attributes: of the copy.
        training: the mode of the copy.
        size: the size of a row, and of the weight if the module has one.
        eps_attribute: the eps, for the size of the input.
        dtype: of the input and the weight.
        dimensions: of the input.
        has_gate: whether the forward takes a gate.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    has_weight = weight_of(module) is not None
    weight = torch.ones(size, dtype=dtype)
    if has_weight:
        weight = (1 + 0.5 * torch.randn(size, generator=generator, dtype=torch.float32)).to(dtype)
    x = _input(size, dtype, dimensions, resolve_eps(attributes[eps_attribute], weight), generator)
    probe = _copy(module, attributes, training)
    if has_weight:
        probe._parameters["weight"] = torch.nn.Parameter(weight.clone(), requires_grad=False)
    gate = 2 * torch.randn(x.shape, generator=generator, dtype=torch.float32) if has_gate else None
    given, before = [x.clone()], frozen(plain_attributes(probe))
    if gate is not None:
        gate = gate.to(dtype)
        given.append(gate.clone())
    out = probe.forward(*given)
    if type(out) is not torch.Tensor or out.shape != x.shape or out.dtype != dtype:
        return "does not return a tensor of its input's shape and dtype"
    if not torch.equal(given[0], x) or (gate is not None and not torch.equal(given[1], gate)):
        return "changes its input"
    if (
        frozen(plain_attributes(probe)) != before
        or not _has_only(probe, weight if has_weight else None)
        or probe.training is not training
    ):
        return "changes the module"
    return Case(attributes, x, weight, out, gate)


def _has_only(probe: torch.nn.Module, weight: torch.Tensor | None) -> bool:
    """Return whether the one tensor or child of a probe is still its weight, with the same values, or it has none."""
    parts = *probe._parameters.values(), *probe._buffers.values(), *probe._modules.values()
    kept = [part for part in parts if part is not None]
    if weight is None:
        return not kept
    return len(kept) == 1 and kept[0] is weight_of(probe) and torch.equal(kept[0], weight)


def _copy(module: torch.nn.Module, attributes: dict[str, Any], training: bool) -> torch.nn.Module:
    """Return a module of the same class and attributes on the CPU, without parameters, buffers or hooks."""
    probe = object.__new__(type(module))
    torch.nn.Module.__init__(probe)
    vars(probe).update(copy.deepcopy(attributes))
    vars(probe)["training"] = training
    probe._parameters.update(dict.fromkeys(module._parameters))
    probe._buffers.update(dict.fromkeys(module._buffers))
    probe._modules.update(dict.fromkeys(module._modules))
    return probe


def _input(size: int, dtype: torch.dtype, dimensions: int, eps: float, generator: torch.Generator) -> torch.Tensor:
    """Return random rows with a mean: of size 1, large, zero, and so small that eps decides the result."""
    rows = -(-_MIN_ELEMENTS // (6 * min(size, _MAX_COLUMNS))) * 6
    x = (0.5 + torch.randn(rows, size, generator=generator, dtype=torch.float32)).double()
    root = abs(eps) ** 0.5
    scales = (1.0, root or 0.5, 0.3 * root or 0.1, 300.0, 0.02, 0.0 if eps else 0.01)
    x *= torch.tensor(scales, dtype=torch.float64).repeat(rows // 6)[:, None]
    shapes = {2: (rows, size), 3: (2, rows // 2, size), 4: (2, rows // 6, 3, size)}
    return x.to(dtype).reshape(shapes[dimensions])
