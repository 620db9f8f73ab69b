"""Read environment variables and the versions of installed packages."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections.abc import Iterable, Iterator
from types import ModuleType

# All that begin with JITNORM_.
VARIABLES = (
    "JITNORM_CACHE_DIR",
    "JITNORM_CUDA_COMPILER",
    "JITNORM_PREBUILT_DIR",
    "JITNORM_DISABLE_JIT",
    "JITNORM_REMOTE_CACHE",
    "JITNORM_REMOTE_TRUST",
    "JITNORM_REMOTE_KEY",
    "JITNORM_REMOTE_TIMEOUT",
    "JITNORM_CHECK_INDICES",
    "JITNORM_BACKEND",
    "JITNORM_SGLANG",
    "JITNORM_PLUGIN_SKIP",
    "JITNORM_LOG",
    "JITNORM_VLLM",
    "JITNORM_BENCH_CI",
    "JITNORM_BENCH_BANDWIDTH",
)


def is_on(variable: str) -> bool:
    """Return whether an environment variable is set to anything but "", 0, false, no or off."""
    return os.environ.get(variable, "").lower() not in ("", "0", "false", "no", "off")


def unknown_variables() -> dict[str, str]:
    """Return the variables JITNORM_* of the environment that jitnorm does not have, each with the one it resembles.

    One that resembles none has "".
    """
    import difflib  # here, because most processes build nothing

    endings = {name.removeprefix("JITNORM_"): name for name in VARIABLES}
    found = {}
    for name in os.environ:
        if name.startswith("JITNORM_") and name not in VARIABLES:
            close = difflib.get_close_matches(name.removeprefix("JITNORM_"), endings, n=1, cutoff=0.75)
            found[name] = endings[close[0]] if close else ""
    return found


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each package in `names`, without those that are not installed."""
    from importlib import metadata  # here, as commands that need no version start a tenth faster without it

    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@contextlib.contextmanager
def collector_disabled() -> Iterator[None]:
    """Disable the garbage collector in the block, and then collect only the youngest generation.

    For imports, which create thousands of objects: those would trigger a full collection, which after torch's import
    takes longer than the import itself, and finds nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        gc.collect(0)
    finally:
        if was_enabled:
            gc.enable()


@functools.cache
def import_tvm_ffi() -> ModuleType:
    """Import tvm_ffi, which only calls of kernels need, and return it."""
    with collector_disabled():
        import tvm_ffi
    return tvm_ffi
