"""Keep the modules of the kernels that this process has loaded."""

from __future__ import annotations

import os
import sys
import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from jitnorm.jit.spec import LAUNCHER, KernelSpec

if TYPE_CHECKING:
    import tvm_ffi  # importing it here would double the time of `import jitnorm`: open_library does so

    from jitnorm.jit.launcher import CudaModule

_loaded: dict[KernelSpec, tvm_ffi.Module | CudaModule] = {}
_locks: defaultdict[KernelSpec, threading.RLock] = defaultdict(threading.RLock)
_forked = False


def load(spec: KernelSpec) -> Any:
    """Return the module of `spec`, which is built if no cache has it, and loaded once in a process.

    Raises:
        RuntimeError: It cannot be built or loaded: no compiler, a failed build, a library that the loader rejects,
            JITNORM_DISABLE_JIT, or a CUDA graph that is being captured.
    """
    if module := _loaded.get(spec):
        return module
    from jitnorm.jit import find  # here, as it imports most of the engine: a quarter of `import jitnorm`

    with _locks[spec]:
        if spec not in _loaded:
            module = find.open_launcher() if spec is LAUNCHER else find.open_kernel(spec, lambda: load(LAUNCHER))
            if _has_threads(spec) and _forked:
                module.disable_threads()
            _loaded[spec] = module
        return _loaded[spec]


def _has_threads(spec: KernelSpec) -> bool:
    return spec.target.device == "cpu" and spec is not LAUNCHER


def _after_fork() -> None:
    # A forked child has none of its parent's OpenMP threads. A lock that another thread held stays locked in it.
    global _forked
    _forked = True
    _locks.clear()
    for spec, module in _loaded.items():
        if _has_threads(spec):
            module.disable_threads()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)
