"""Find a kernel in the caches, fetch it from the remote cache or build it, and open its library."""

from __future__ import annotations

import os
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch

from jitnorm.jit import locations, toolchain
from jitnorm.jit.cache import Cache, CacheNotWritable
from jitnorm.jit.entry import BadEntry, Entry
from jitnorm.jit.environment import is_on
from jitnorm.jit.launcher import CudaModule
from jitnorm.jit.library import BadLibrary, open_library
from jitnorm.jit.log import logger, warn_once
from jitnorm.jit.spec import LAUNCHER, KernelSpec, launcher_file

_failed: dict[KernelSpec, str] = {}  # failed builds, which are not repeated at every call
_MAX_TRIES = 4


def open_kernel(spec: KernelSpec, load_launcher: Callable[[], Any]) -> Any:
    """Find, fetch or build the entry of `spec` and open its library. Raises as `jitnorm.jit.load.load`.

    An entry that cannot be opened is quarantined, and built once more.

    Args:
        spec: The kernel.
        load_launcher: Returns the launcher, which a CUDA kernel needs once it is found or built.
    """
    rejected: dict[Path, str] = {}
    for _ in range(_MAX_TRIES):
        entry = find(spec, ignore=rejected) or fetch(spec, ignore=rejected) or _build(spec)
        try:
            return _open(spec, entry, load_launcher)
        except (BadEntry, FileNotFoundError):
            continue  # another process removed it after it was published
        except OSError as error:  # too few descriptors or no memory: the entry may be good
            entry.release()
            raise RuntimeError(f"jitnorm cannot load {spec} at this moment: {error}") from error
        except BadLibrary as error:
            entry.release()
            is_second_time = entry.path in rejected
            rejected[entry.path] = str(error)
            if is_second_time:
                break
            cache = Cache(entry.root, entry.prebuilt)
            if not entry.prebuilt and not _is_own(entry, spec, cache):
                # Another machine that shares the cache may have built it, and be able to load it.
                warn_once(f"{entry.path} is not used: it cannot be loaded: {error}")
                continue
            cache.quarantine(entry.path, f"it cannot be loaded: {error}", even_if_valid=True)
            if not entry.prebuilt and entry.path.exists():
                locations.use_temporary(entry.root, f"{entry.path} cannot be loaded, and cannot be moved to quarantine")
    reason = " and ".join(f"{path}: {why}" for path, why in rejected.items()) or "its entry vanishes from the cache"
    raise RuntimeError(f"jitnorm cannot load {spec}: {reason}")


def find(
    spec: KernelSpec, mark_in_use: bool = True, ignore: Container[Path] = (), may_build: bool | None = None
) -> Entry | None:
    """Return the entry that a call of `spec` would load, or None. Nothing is built.

    Args:
        spec: The kernel.
        mark_in_use: Whether this process is going to load the entry.
        ignore: Paths of entries to skip.
        may_build: Whether an entry of this machine's compilers can be built, and is preferred to those of others; by
            default unless JITNORM_DISABLE_JIT forbids it.
    """
    if may_build is None:
        may_build = not is_on("JITNORM_DISABLE_JIT")
    for cache in locations.in_search_order():
        if cache.prebuilt or cache.exists():
            # An entry of the prebuilt layer is used whatever toolchain built it. So is any entry if there is no
            # compiler, or building is forbidden, because nothing newer can be built.
            own = [] if cache.prebuilt else toolchain.keys(spec.target, cache)
            for key in own or (None,):
                if entry := cache.find(spec, key, mark_in_use, accepts_others=not may_build, ignore=ignore):
                    return entry
    return None


def fetch(
    spec: KernelSpec, mark_in_use: bool = True, ignore: Container[Path] = (), may_build: bool | None = None
) -> Entry | None:
    """Add the entry that the remote cache has for `spec` to the cache, and return it; None without one.

    Asked for is the entry that this machine would build; where nothing can be built, any that `find` would return.
    Takes arguments as `find`.
    """
    if not os.environ.get("JITNORM_REMOTE_CACHE"):
        return None
    from jitnorm.jit import remote  # here, as most processes have none, and a hit needs none

    if may_build is None:
        may_build = not is_on("JITNORM_DISABLE_JIT")
    tools = toolchain.identify(spec.target, locations.readable())
    return remote.fetch(spec, tools.key if tools else None, not may_build, mark_in_use, ignore)


def _is_own(entry: Entry, spec: KernelSpec, cache: Cache) -> bool:
    """Return whether the compilers of this machine built an entry, or would."""
    return entry.path.name in toolchain.keys(spec.target, cache)


def _build(spec: KernelSpec) -> Entry:
    if spec in _failed:
        raise RuntimeError(f"{_failed[spec]}\n(It failed earlier in this process, and is not tried again.)")
    if is_on("JITNORM_DISABLE_JIT"):
        folders = " and ".join(str(cache.root) for cache in locations.in_search_order())
        folders += ", and JITNORM_REMOTE_CACHE has none" if os.environ.get("JITNORM_REMOTE_CACHE") else ""
        raise RuntimeError(
            f"{spec} is not in the cache ({folders}), and JITNORM_DISABLE_JIT forbids building it. "
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
        except CacheNotWritable as error:
            if locations.is_temporary():
                raise
            locations.use_temporary(locations.default_root(), str(error))
            return build(spec)
    except BuildError as error:
        _failed[spec] = str(error)
        raise


def _open(spec: KernelSpec, entry: Entry, load_launcher: Callable[[], Any]) -> Any:
    module: Any
    if spec.target.device == "cuda":
        module = CudaModule(load_launcher(), spec.binding, entry.content, spec.symbols)
    else:
        module = open_library(spec.name, entry.content, spec.binding)
    logger.debug("loaded %s from %s", spec, entry.path)
    return module


def open_launcher() -> Any:
    """Return the launcher: that of the installed wheel, or one that is found or built as a kernel is.

    Raises:
        RuntimeError: There is none and it cannot be built, or it cannot be loaded at this moment.
    """
    file = launcher_file()
    try:
        return open_library(LAUNCHER.name, file.read_bytes(), LAUNCHER.binding)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise RuntimeError(f"jitnorm cannot load {file} at this moment: {error}") from error
    except BadLibrary as error:
        logger.warning("the launcher of the installed package is not used: %s: %s", file, error)
    return open_kernel(LAUNCHER, open_launcher)
