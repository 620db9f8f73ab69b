"""Building one kernel: a private folder, ninja, and the compiler's first real words where it fails."""

from __future__ import annotations

import datetime
import os
import re
import secrets
import shlex
import subprocess
import time
from pathlib import Path

import tvm_ffi
from tvm_ffi import libinfo

from jitnorm._version import __version__
from jitnorm.jit import cache, toolchain
from jitnorm.jit.report import say
from jitnorm.jit.spec import CSRC, CUBIN_ASSEMBLY, KernelSpec


class BuildError(RuntimeError):
    """The compiler ran and failed."""


_QUIET_S = 1.0  # a build that lasts longer says what it is
_LOCK_S = 120.0  # a lock saves work; after this long, doing the work is the better way


def build(spec: KernelSpec, announce: bool = True) -> cache.Entry:
    """Builds `spec` into the cache unless another process does first. RuntimeError if it cannot be built, or kept.

    A build that lasts says so on stderr, unless `announce` is false: the caller shows its own progress.
    """
    place = cache.writable()
    tools = toolchain.require(spec.target.device, place.root / "toolchains")
    if entry := place.find(spec, tools.key):
        return entry
    try:
        with _lock(place, spec, tools.key):
            return place.find(spec, tools.key) or _build(spec, place, tools, announce)
    except OSError as error:  # a full disk, say
        raise RuntimeError(f"jitnorm cannot build {spec} in {place.root}: {error}") from error


def _build(spec: KernelSpec, place: cache.Cache, tools: toolchain.Toolchain, announce: bool) -> cache.Entry:
    started = time.monotonic()
    with place.staging(spec) as staging:
        write_sources(spec, staging, tools)
        _run_ninja(spec, place, staging, announce)
        if not (staging / "library.so").is_file():
            raise BuildError(f"jitnorm cannot build {spec}: the compiler {tools.cxx.path} wrote no library")
        if spec.sources_changed:
            raise RuntimeError("jitnorm's sources changed after this process read them: start it anew")
        for scrap in (".ninja_log", ".ninja_deps", "host.o", "kernel.cubin"):
            (staging / scrap).unlink(missing_ok=True)
        cache.seal(staging, "library.so", manifest(spec, tools, time.monotonic() - started))
        return place.publish(staging, spec, tools.key)


def write_sources(spec: KernelSpec, folder: Path, tools: toolchain.Toolchain) -> None:
    """All that ninja needs to build `spec` in `folder`."""
    ffi_library = Path(libinfo.find_libtvm_ffi())
    paths = {
        "cxx": tools.cxx.path,
        "csrc": str(CSRC),
        "tvm_ffi_include": libinfo.find_include_path(),
        "dlpack_include": libinfo.find_dlpack_include_path(),
        "tvm_ffi_lib": str(ffi_library.parent),
    }
    if tools.nvcc:
        paths |= {"nvcc": tools.nvcc.path, "cuda_include": os.path.join(tools.nvcc.top, "include")}
        (folder / "cubin.s").write_text(CUBIN_ASSEMBLY)
    (folder / spec.source_name).write_text(spec.source)
    (folder / "build.ninja").write_text(spec.ninja)
    (folder / "paths.ninja").write_text("".join(f"{name} = {_ninja_path(path)}\n" for name, path in paths.items()))


def _ninja_path(path: str) -> str:
    """For a shell, by way of ninja."""
    return shlex.quote(path).replace("$", "$$")


def manifest(spec: KernelSpec, tools: toolchain.Toolchain, seconds: float) -> dict[str, object]:
    return {
        "name": spec.name,
        "op": spec.op,
        "kernel": spec.kernel,
        "device": spec.target.device,
        "arch": spec.target.sm,
        "key": spec.key,
        "includes": list(spec.includes),
        "compilers": tools.compilers(),
        "tvm_ffi": tvm_ffi.__version__,
        "jitnorm": __version__,
        "built": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
    }


def _run_ninja(spec: KernelSpec, place: cache.Cache, staging: Path, announce: bool) -> None:
    ninja = toolchain.find_ninja()
    if not ninja:
        raise RuntimeError("jitnorm needs ninja and found none, beside this Python or on the PATH: pip install ninja")
    # Flags that nobody sees are in no key, and errors are looked for in English.
    environment = {k: v for k, v in os.environ.items() if k not in ("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS")}
    environment["LC_ALL"] = "C"
    run = subprocess.Popen(
        [ninja, "-C", str(staging)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    )
    try:
        output, _ = run.communicate(timeout=_QUIET_S if announce else None)
    except subprocess.TimeoutExpired:
        say(f"building {spec} in {place.root} (once; kept for the next time)")
        output, _ = run.communicate()
    except BaseException:  # Ctrl-C, for one
        run.terminate()  # ninja then ends the compilers, which killing it would not
        run.wait()
        raise
    if run.returncode != 0:
        (staging / "build.log").write_text(output)
        kept = place.root / "aside" / f"failed.{spec.name}.{spec.target.sm}.{secrets.token_hex(4)}"
        kept.parent.mkdir(mode=0o700, exist_ok=True)
        staging.rename(kept)
        raise BuildError(f"jitnorm cannot build {spec}: {first_error(output)}\nThe whole log: {kept / 'build.log'}")


# The compilers' own errors; how one of them ended; what the linker and the shell say.
_ERRORS = [
    re.compile(pattern)
    for pattern in (
        r"(^|[:)] )((fatal|internal compiler) )?error\b.*:|^\S+ (fatal|error)\s*:",
        r"died due to signal|^(Killed|Terminated)\b",
        r"undefined reference|cannot find|not found|No space|denied",
    )
]
_NOISE = re.compile(r"^ninja:|^FAILED:|linker command failed|ld returned")


def first_error(log: str) -> str:
    """The compiler's first real error line, without ninja's and the build folder's noise."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    words = [line for line in lines if not _NOISE.search(line)]
    for pattern in _ERRORS:
        for line in words:
            if pattern.search(line):
                return line
    return next(iter(words[-1:] or lines[-1:]), "the compiler said nothing")


class _lock:
    """One builder at a time, where the file system can do that. Nothing but work is lost without."""

    def __init__(self, place: cache.Cache, spec: KernelSpec, key: str) -> None:
        self._place, self._spec = place, spec
        self._path = place.root / "locks" / f"{spec.name}.{spec.target.sm}.{spec.key}.{key}"
        self._held = False

    def __enter__(self) -> None:
        from filelock import FileLock, Timeout

        try:
            self._path.parent.mkdir(mode=0o700, exist_ok=True)
            self._lock = FileLock(self._path, mode=0o600)
            try:
                self._lock.acquire(timeout=_QUIET_S, poll_interval=0.01)
            except Timeout:
                holders = " and ".join(self._place.builders(self._spec)) or "another process"
                say(f"waiting for {holders}, which builds {self._spec} (lock {self._path})")
                self._lock.acquire(timeout=_LOCK_S, poll_interval=0.05)
            self._held = True
        except Timeout:
            say(f"no longer waiting for the lock {self._path}: building {self._spec} as well")
        except (OSError, NotImplementedError):
            pass  # no locks on this file system

    def __exit__(self, *_: object) -> None:
        if self._held:
            self._lock.release()
