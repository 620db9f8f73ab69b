"""The changes that the plugin makes to vLLM's classes, once in a process, and their undoing."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

from jitnorm._version import __version__
from jitnorm.integrations.vllm_plugin import compatibility
from jitnorm.integrations.vllm_plugin.report import publish
from jitnorm.jit.log import logger

_OPERATOR = "jitnorm_vllm::qk_norm_rope_store"  # not imported from attention.py, which imports vLLM's layers
_undo: list[Callable[[], None]] = []


def install() -> None:
    """Make all changes whose classes in vLLM are those that were tested; log the reason for each of the others."""
    for part, change in (("loading", _replace_after_loading), ("configuration", _change_configuration)):
        if problem := compatibility.changed(part):
            logger.warning("jitnorm's plugin replaces nothing in vLLM: %s", problem)
            uninstall()
            return
        change()
    _register_layers()
    from jitnorm.integrations.vllm_plugin import products

    if problem := products.reason_to_leave():
        logger.debug("jitnorm's plugin leaves vLLM's products: %s", problem)
    else:
        products.install(set_attribute)


def uninstall() -> None:
    """Undo all changes. Models that were loaded keep theirs."""
    while _undo:
        _undo.pop()()


def set_attribute(owner: Any, name: str, value: Any) -> None:
    """Set an attribute of a class or module of vLLM until `uninstall`."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, before))


def _replace_after_loading() -> None:
    """Replace the operators of each model that vLLM loads, when its weights are complete."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    original = BaseModelLoader.load_model

    @functools.wraps(original)
    def load_model(self: Any, vllm_config: Any, *arguments: Any, **keywords: Any) -> Any:
        from jitnorm.integrations.vllm_plugin.models import replace_operators

        model = original(self, vllm_config, *arguments, **keywords)
        publish(replace_operators(model, vllm_config))
        return model

    set_attribute(BaseModelLoader, "load_model", load_model)


def _change_configuration() -> None:
    """Let vLLM split graphs at the operator, and keep compiled graphs with it apart from those without."""
    from vllm.config import CompilationConfig, VllmConfig

    set_splitting_ops, compute_hash = CompilationConfig.set_splitting_ops_for_v1, VllmConfig.compute_hash

    @functools.wraps(set_splitting_ops)
    def set_splitting_ops_for_v1(self: Any, *arguments: Any, **keywords: Any) -> None:
        set_splitting_ops(self, *arguments, **keywords)
        # Where vLLM's own store into the cache is not a part of the compiled graph, this one is not either.
        if "vllm::unified_kv_cache_update" in self.splitting_ops and _OPERATOR not in self.splitting_ops:
            self.splitting_ops.append(_OPERATOR)

    @functools.wraps(compute_hash)
    def compute_hash_with_plugin(self: Any) -> str:
        factors = f"{compute_hash(self)} jitnorm {__version__}"
        return hashlib.sha256(factors.encode()).hexdigest()[:10]

    set_attribute(CompilationConfig, "set_splitting_ops_for_v1", set_splitting_ops_for_v1)
    set_attribute(VllmConfig, "compute_hash", compute_hash_with_plugin)


def _register_layers() -> None:
    """Let vLLM make this package's subclasses of its norms and activations."""
    from vllm.model_executor import custom_op

    from jitnorm.integrations.vllm_plugin.layers import REPLACEMENTS

    for part, pairs in REPLACEMENTS.items():
        problem = compatibility.changed(part)
        for original, replacement in pairs:
            name = original.__name__
            if problem or name in custom_op.op_registry_oot:
                reason = problem or f"{custom_op.op_registry_oot[name].__name__} of another plugin replaces it"
                logger.warning("jitnorm's plugin leaves vLLM's %s: %s", name, reason)
                continue
            name_in_custom_ops = original.name
            original.register_oot(replacement)
            replacement.name = name_in_custom_ops  # register_oot changes it, and with it what custom_ops enables
            _undo.append(functools.partial(custom_op.op_registry_oot.pop, name))
