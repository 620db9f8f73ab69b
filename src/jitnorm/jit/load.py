"""Loading a kernel's library: from this process's memory, from the cache, or from the compiler."""

from __future__ import annotations

import os
import sys
import threading
from collections import defaultdict
from collections.abc import Container
from pathlib import Path

import torch
import tvm_ffi

from jitnorm.jit import cache, toolchain
from jitnorm.jit.environment import is_on
from jitnorm.jit.library import BadLibrary, open_library
from jitnorm.jit.spec import KernelSpec

_loaded: dict[KernelSpec, tvm_ffi.Module] = {}
_failed: dict[KernelSpec, str] = {}  # so that a size that failed does not start the compiler at every call
_locks: defaultdict[KernelSpec, threading.RLock] = defaultdict(threading.RLock)
_forked = False
_MAX_TRIES = 4


def load(spec: KernelSpec) -> tvm_ffi.Module:
    """Return the loaded module of `spec`, built if this is the first time anywhere.

    Raises:
        RuntimeError: it cannot be: no compiler, a failed build, a library that the loader refuses, JITNORM_DISABLE_JIT,
            or a CUDA graph being captured.
    """
    if module := _loaded.get(spec):
        return module
    with _locks[spec]:
        if spec not in _loaded:
            _loaded[spec] = _load(spec)
        return _loaded[spec]


def _load(spec: KernelSpec) -> tvm_ffi.Module:
    """Find or build an entry and load it. One that cannot be loaded is moved to quarantine and built once more."""
    refused: dict[Path, str] = {}
    for _ in range(_MAX_TRIES):
        entry = find(spec, ignore=refused) or _build(spec)
        try:
            return _open(spec, entry)
        except (cache.BadEntry, FileNotFoundError):
            continue  # it vanished after it was published: another process is clearing the cache
        except OSError as error:  # no descriptors or no room, which is no fault of the entry's
            entry.release()
            raise RuntimeError(f"jitnorm cannot load {spec} at this moment: {error}") from error
        except BadLibrary as error:
            entry.release()
            again = entry.path in refused
            refused[entry.path] = str(error)
            if again:
                break
            place = cache.Cache(entry.root, entry.prebuilt)
            place.quarantine(entry.path, f"it cannot be loaded: {error}", even_if_sound=True)
            if not entry.prebuilt and entry.path.exists():
                cache.replace(entry.root, f"{entry.path} cannot be loaded, nor moved out of the way")
    why = " and ".join(f"{path}: {why}" for path, why in refused.items()) or "its entry vanishes from the cache"
    raise RuntimeError(f"jitnorm cannot load {spec}: {why}")


def find(spec: KernelSpec, hold: bool = True, ignore: Container[Path] = ()) -> cache.Entry | None:
    """Return the entry that serves `spec`, without building anything.

    It is in use from now on, unless `hold` is false. An entry whose path is in `ignore` is passed over.
    """
    for place in (cache.prebuilt(), *cache.own()):
        if place and (place.prebuilt or place.exists()):
            # The prebuilt layer is used whatever the toolchain. Where nothing can be built there is nothing to be newer
            # than: what is there is good.
            tools = None if place.prebuilt else toolchain.identify(spec.target.device, place)
            if entry := place.find(spec, tools.key if tools else None, hold):
                if entry.path not in ignore:
                    return entry
                entry.release()
    return None


def _build(spec: KernelSpec) -> cache.Entry:
    if spec in _failed:
        raise RuntimeError(f"{_failed[spec]}\n(It failed earlier in this process, and is not tried again.)")
    if is_on("JITNORM_DISABLE_JIT"):
        raise RuntimeError(
            f"{spec} is not in the cache ({_folders()}), and JITNORM_DISABLE_JIT forbids building it. "
            f"Build it ahead of time: {spec.warmup_command}"
        )
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{spec} is not built yet, and a CUDA graph is being captured. "
            f"Build it before: {spec.warmup_command}, or call it once outside the graph"
        )
    from jitnorm.jit.build import BuildError, build

    try:
        try:
            return build(spec)
        except cache.CannotKeep as error:
            if cache.is_replaced():
                raise
            cache.replace(cache.default_root(), str(error))
            return build(spec)
    except BuildError as error:
        _failed[spec] = str(error)
        raise


def _open(spec: KernelSpec, entry: cache.Entry) -> tvm_ffi.Module:
    module = open_library(spec.name, entry.content, spec.entry)
    if spec.target.device == "cpu" and _forked:
        module.run_serially()
    return module


def _folders() -> str:
    places = [p for p in (cache.prebuilt(), *cache.own()) if p]
    return " and ".join(str(p.root) for p in places)


def _after_fork() -> None:
    """OpenMP's threads stayed in the parent, and a lock may have been held there."""
    global _forked
    _forked = True
    _locks.clear()
    for spec, module in _loaded.items():
        if spec.target.device == "cpu":
            module.run_serially()


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_after_fork)
