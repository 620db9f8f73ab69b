"""Layers for `use_kernels=True` of transformers: this package's kernels in the mapping of the package `kernels`.

`kernels.kernelize` replaces the forward of each module whose class has a name in the mapping, by that of a class
without a state. The module keeps its class, parameters and attributes, so the forward methods below are called with
modules of other classes.
"""

# No `from __future__ import annotations`: torch.fx writes the annotations of forward into its code, as types, not text.

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from jitnorm.core.eligibility import can_normalise
from jitnorm.core.norm_modules import eps_of
from jitnorm.integrations.transformers_mlp import can_fuse_mlp, fused_mlp
from jitnorm.nn import normalise
from jitnorm.rmsnorm import gemma_rmsnorm, rmsnorm


class RMSNorm(torch.nn.Module):
    """RMSNorm, which multiplies by the weight, rounded once."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension.

        Args:
            hidden_states: `[..., hidden_size]`. The original forward runs for sizes without a kernel, and if its dtype
                is not the weight's.
        """
        return _normalised(self, hidden_states, rmsnorm)


class RMSNormZeroCentered(torch.nn.Module):
    """RMSNorm, which multiplies by `1 + weight`, rounded once."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise the last dimension, as `RMSNorm`."""
        return _normalised(self, hidden_states, gemma_rmsnorm)


class GatedMLP(torch.nn.Module):
    """The MLP `down_proj(act_fn(gate_proj(x)) * up_proj(x))`, with one kernel for the activation and the product."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the MLP.

        Args:
            x: `[..., hidden_size]`. The original forward runs for other activations than SiLU and GELU, for calls that
                need a gradient, and under torch.compile, which fuses the activation and the product itself.
        """
        return fused_mlp(self, x) if can_fuse_mlp(self, x) else _original(self, x)


def _normalised(module: Any, hidden_states: torch.Tensor, norm: Callable[..., torch.Tensor]) -> torch.Tensor:
    weight = module.weight
    if can_normalise(hidden_states, weight) and weight.dtype == hidden_states.dtype:
        return normalise(norm, hidden_states, weight, eps_of(module))
    return _original(module, hidden_states)


def _original(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Call the forward of the module's class, which the mapping has replaced on the module."""
    result: torch.Tensor = type(module).forward(module, x)
    return result


@dataclass(frozen=True)
class LayerRepository:
    """What stands in the mapping of the package `kernels` for a layer of the Hub.

    Attributes:
        layer: the class whose forward replaces that of a module.
    """

    layer: type[torch.nn.Module]

    def load(self) -> type[torch.nn.Module]:
        """Return the class. Nothing is downloaded."""
        return self.layer


# The names of layers in transformers' mapping, with their replacements.
LAYERS: dict[str, type[torch.nn.Module]] = {
    "RMSNorm": RMSNorm,
    "RMSNormZeroCentered": RMSNormZeroCentered,
    "SwiGLUMLP": GatedMLP,
    "GeGLUMLP": GatedMLP,
}
_DEVICES = ("cuda", "cpu")
# What transformers' mapping had before `register_hub_kernels`, by the layer's name and device.
_replaced: dict[tuple[str, str], Any] = {}


def hub_kernel_mapping() -> dict[str, dict[str, Any]]:
    """Return the mapping for `kernels.register_kernel_mapping` and `kernels.use_kernel_mapping`.

    Returns:
        For each name in `LAYERS`, for CUDA and CPU devices and for all modes, an object whose `load()` returns the
        layer.

    Raises:
        ImportError: the package `kernels` is not installed.
    """
    mode = _import_kernels().Mode
    modes = (mode.INFERENCE, mode.TRAINING, mode.INFERENCE | mode.TORCH_COMPILE, mode.TRAINING | mode.TORCH_COMPILE)
    return {
        name: {device: dict.fromkeys(modes, LayerRepository(layer)) for device in _DEVICES}
        for name, layer in LAYERS.items()
    }


def register_hub_kernels() -> None:
    """Let `use_kernels=True` of transformers, and `kernels.kernelize`, choose this package's layers.

    Call it before the model is created. transformers registers its own mapping each time that `use_kernels` is set, so
    its mapping is changed too. A second call changes nothing.

    Raises:
        ImportError: the package `kernels` is not installed, or not in a version that the installed transformers takes.
    """
    kernels, mapping, of_transformers = _import_kernels(), hub_kernel_mapping(), _mapping_of_transformers()
    for name, devices in mapping.items():
        for device, repositories in devices.items():
            layers = of_transformers.setdefault(name, {})
            _replaced.setdefault((name, device), layers.get(device))
            layers[device] = repositories
    kernels.register_kernel_mapping(mapping)


def unregister_hub_kernels() -> None:
    """Undo `register_hub_kernels`: models whose `use_kernels` is set later take the kernels of the Hub again."""
    if not _replaced:
        return
    kernels, of_transformers = _import_kernels(), _mapping_of_transformers()
    for (name, device), before in _replaced.items():
        if before is None:
            del of_transformers[name][device]
        else:
            of_transformers[name][device] = before
    # Layers without a mapping of their own run the original forward for an empty one.
    kernels.register_kernel_mapping(
        {name: {device: {} if before is None else before} for (name, device), before in _replaced.items()}
    )
    _replaced.clear()


def _import_kernels() -> Any:
    try:
        return importlib.import_module("kernels")
    except ImportError as error:
        raise ImportError(f"jitnorm's Hub layers need the package kernels (pip install kernels): {error}") from None


def _mapping_of_transformers() -> Any:
    """Return transformers' own mapping, which it registers with the package `kernels`."""
    hub_kernels: Any = importlib.import_module("transformers.integrations.hub_kernels")
    if not hub_kernels.is_kernels_available():
        raise ImportError(
            f"the installed transformers does not take version {_import_kernels().__version__} of the package kernels: "
            "install the version that it asks for when use_kernels=True is set"
        )
    if hasattr(hub_kernels, "get_kernel_mapping_transformers"):
        return hub_kernels.get_kernel_mapping_transformers()
    return hub_kernels._KERNEL_MAPPING
