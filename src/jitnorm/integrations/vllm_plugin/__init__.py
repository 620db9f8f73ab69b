"""The plugin for vLLM: this package's kernels in place of vLLM's operators, by the entry point `vllm.general_plugins`.

    JITNORM_VLLM=1 vllm serve Qwen/Qwen3-0.6B

vLLM calls `register` in each of its processes. Nothing of vLLM is imported before. docs/guides/vllm.md says what is
replaced, and what is not and why.
"""

from __future__ import annotations

import threading

from jitnorm.integrations.engine_plugins import is_requested
from jitnorm.integrations.vllm_plugin.report import REPORTS, Report
from jitnorm.jit.log import logger

__all__ = ["Report", "explain", "register"]

_lock = threading.Lock()
_is_registered = False


def register() -> None:
    """Replace vLLM's operators in this process, if the environment asks for it.

    It does if `JITNORM_VLLM` is `1`, or if `JITNORM_VLLM` is not set and `VLLM_PLUGINS` names `jitnorm`. Otherwise the
    call does nothing, as does every later call. With another version of vLLM than those that were tested, and for
    classes whose code is not the tested one, vLLM's own operators stay, and the log says why.
    """
    global _is_registered
    if not is_requested("JITNORM_VLLM", "VLLM_PLUGINS"):
        return
    with _lock:
        if _is_registered:
            return
        _is_registered = True
        from jitnorm.integrations.vllm_plugin import compatibility

        if problem := compatibility.version_problem():
            logger.warning("jitnorm's plugin replaces nothing in vLLM: %s", problem)
            return
        from jitnorm.integrations.vllm_plugin import installation

        installation.install()


def explain() -> list[Report]:
    """Return what the plugin replaced in each model that this process has loaded, and what it left and why.

    vLLM loads models in its worker processes, and the log of a worker has the same text. With
    `VLLM_ENABLE_V1_MULTIPROCESSING=0` the worker is this process.

    Returns:
        One report for each model, in the order of loading.
    """
    return list(REPORTS)
