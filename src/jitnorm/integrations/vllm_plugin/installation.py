"""The changes that the plugin makes to vLLM's classes, once in a process, and their undoing.

When vLLM calls its plugins, it has imported its configuration and little else, and a process that only serves requests
never imports the layers. So the configuration is changed at once, and the rest when a model is about to be loaded.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from jitnorm._version import __version__
from jitnorm.integrations.engine_plugins import reason_to_skip, skipped_parts
from jitnorm.integrations.vllm_plugin import compatibility
from jitnorm.integrations.vllm_plugin.report import REPORTS, publish
from jitnorm.jit.log import logger

_LOADER = "vllm.model_executor.model_loader.base_loader"
_RUNNER = "vllm.v1.worker.gpu.model_runner"  # the second version; all workers on GPUs import it
_OPERATOR = "jitnorm_vllm::qk_norm_rope_store"  # not imported from attention.py, which imports vLLM's layers
_undo: list[Callable[[], None]] = []
_notes: list[str] = []  # what concerns all models, for their reports
_are_layers_replaced = False


def install() -> None:
    """Change what a compiled graph depends on now, and the rest as soon as vLLM loads a model.

    Raises:
        ValueError: JITNORM_PLUGIN_SKIP names an unknown part.
    """
    skipped_parts()
    if problem := compatibility.changed("configuration"):
        logger.warning("jitnorm's plugin replaces nothing in vLLM: %s", problem)
        return
    _change_configuration()
    _after_import(_LOADER, _replace_after_loading)


def uninstall() -> None:
    """Undo all changes. Models that were loaded keep theirs, and so does vLLM's batch-invariant mode."""
    global _are_layers_replaced
    while _undo:
        _undo.pop()()
    _notes.clear()
    _are_layers_replaced = False


def set_attribute(owner: Any, name: str, value: Any) -> None:
    """Set an attribute of a class or module until `uninstall`."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, before))


def replace_layers() -> None:
    """Replace vLLM's norms, activations and batch-invariant operators, as models will make or call them."""
    global _are_layers_replaced
    if _are_layers_replaced:
        return
    _are_layers_replaced = True
    _notes.extend(_register_layers())
    from jitnorm.integrations.vllm_plugin import batch_invariant_mode, decode_steps

    if _RUNNER in sys.modules and not (reason_to_skip("decode_steps") or compatibility.changed("decode steps")):
        decode_steps.install(set_attribute)
    if not batch_invariant_mode.is_mode_requested():
        return
    if problem := reason_to_skip("batch_invariant") or compatibility.changed("batch-invariant mode"):
        _notes.append(f"left the operators of vLLM's batch-invariant mode: {problem}")
    else:
        batch_invariant_mode.install(set_attribute)
        _notes.append("replaced the GEMMs, softmax, means and norms of vLLM's batch-invariant mode")


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
        # vLLM asks when it is about to compile a model, which is loaded then. What was replaced may depend on the
        # machine: a module is left if its kernel cannot be built. A model that is loaded again adds nothing.
        replaced = list(dict.fromkeys(str(report.replaced) for report in REPORTS))
        factors = f"{compute_hash(self)} jitnorm {__version__} {replaced}"
        return hashlib.sha256(factors.encode()).hexdigest()[:10]

    set_attribute(CompilationConfig, "set_splitting_ops_for_v1", set_splitting_ops_for_v1)
    set_attribute(VllmConfig, "compute_hash", compute_hash_with_plugin)


def _replace_after_loading(loader: ModuleType) -> None:
    """Replace the operators of each model that vLLM loads, when its weights are complete."""
    if problem := compatibility.changed("loading"):
        logger.warning("jitnorm's plugin replaces nothing in vLLM: %s", problem)
        return
    original = loader.BaseModelLoader.load_model

    @functools.wraps(original)
    def load_model(self: Any, vllm_config: Any, *arguments: Any, **keywords: Any) -> Any:
        replace_layers()
        model = original(self, vllm_config, *arguments, **keywords)
        from jitnorm.integrations.vllm_plugin.models import replace_operators

        report = replace_operators(model, vllm_config)
        report.notes.extend(_notes)
        publish(report)
        return model

    set_attribute(loader.BaseModelLoader, "load_model", load_model)


def _register_layers() -> list[str]:
    """Let vLLM make this package's subclasses of its norms and activations. Return what is left, and why."""
    from vllm.model_executor import custom_op

    from jitnorm.integrations.vllm_plugin.layers import REPLACEMENTS

    left = []
    for part, pairs in REPLACEMENTS.items():
        problem = reason_to_skip(part) or compatibility.changed(part)
        for original, replacement in pairs:
            name = original.__name__
            if problem or name in custom_op.op_registry_oot:
                reason = problem or f"{custom_op.op_registry_oot[name].__name__} of another plugin replaces it"
                left.append(f"left {name}: {reason}")
                continue
            name_in_custom_ops = original.name
            original.register_oot(replacement)
            replacement.name = name_in_custom_ops  # register_oot changes it, and with it what custom_ops enables
            _undo.append(functools.partial(custom_op.op_registry_oot.pop, name))
    return left


class _ImportHook(importlib.abc.MetaPathFinder):
    """Calls a function with a module when it has been imported, and then is gone."""

    def __init__(self, name: str, function: Callable[[ModuleType], None]) -> None:
        self.name, self.function = name, function
        self._search = threading.local()  # whether this thread asks the other finders

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find the module as the other finders do, with a loader that calls the function afterwards."""
        if fullname != self.name or getattr(self._search, "is_under_way", False):
            return None
        self._search.is_under_way = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._search.is_under_way = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)  # may raise, and be tried again
                self.remove()
                self.function(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def remove(self) -> None:
        """Remove the hook, unless it was removed."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)


def _after_import(name: str, function: Callable[[ModuleType], None]) -> None:
    """Call a function with a module now, if it is imported, or else when it will be."""
    if name in sys.modules:
        function(sys.modules[name])
        return
    hook = _ImportHook(name, function)
    sys.meta_path.insert(0, hook)
    _undo.append(hook.remove)
