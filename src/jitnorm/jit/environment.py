"""Read environment variables and the versions of installed packages."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from collections.abc import Iterable
from importlib import metadata
from types import ModuleType


def is_on(variable: str) -> bool:
    """Return whether an environment variable is set to anything but "", 0, false, no or off."""
    return os.environ.get(variable, "").lower() not in ("", "0", "false", "no", "off")


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each package in `names`, without those that are not installed."""
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@functools.cache
def import_tvm_ffi() -> ModuleType:
    """Import tvm_ffi, which only calls of kernels need, and return it.

    The import creates thousands of objects, which would trigger a full garbage collection. After torch's import, that
    takes longer than the import of tvm_ffi itself. So the collector is disabled during the import, and then collects
    only the youngest generation.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        import tvm_ffi

        gc.collect(0)
    finally:
        if was_enabled:
            gc.enable()
    return tvm_ffi
