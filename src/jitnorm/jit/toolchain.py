"""Find the host compiler, NVRTC, nvcc and ninja, and ask the compilers for their versions.

A compiler is identified by its version and recognised by path, size and modification time. Its answer is stored in the
cache, so that only the first process that finds the compiler has to start it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from jitnorm.jit import nvrtc
from jitnorm.jit.cache import TOOLCHAINS, Cache
from jitnorm.jit.folder import UntrustedPath
from jitnorm.jit.log import logger
from jitnorm.jit.spec import Target

_HOST_COMPILERS = ("c++", "g++", "clang++")
_CUDA_COMPILER = "JITNORM_CUDA_COMPILER"
# The compilers that a build needs, by the name of their record. For CUDA the first that is found compiles.
_CPU, _NVRTC, _NVCC = "cpu", "nvrtc", "nvcc"
# The variables that a search for compilers depends on: a stored answer is valid for one set of values.
_ENVIRONMENT = {
    _CPU: ("PATH", "CXX"),
    _NVRTC: ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "LD_LIBRARY_PATH"),
    _NVCC: ("PATH", "CXX", "NVCC", "CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"),
}
_CUDA_COMPILERS = {"auto": (_NVRTC, _NVCC), "nvrtc": (_NVRTC,), "nvcc": (_NVCC,)}
_ANSWER_LIMIT_S = 20.0  # for a compiler on a slow file system
_ANSWER_LIMIT_BYTES = 1 << 20
_KILL_LIMIT_S = 5.0


class Compiler(NamedTuple):
    """A compiler, its version, and the file that gave this version.

    Attributes:
        path: Its path, links unresolved, because some compilers find their parts beside argv[0].
        version: The version that it printed.
        size: Size of the file in bytes, links resolved.
        mtime_ns: Modification time of the file, links resolved.
        archs: The architectures that it compiles for, such as "75 80 90", or "" for those that it does not tell.
    """

    path: str
    version: str
    size: int
    mtime_ns: int
    archs: str = ""

    @classmethod
    def from_json(cls, value: Any) -> Compiler:
        """Return the compiler that `_asdict` turned into `value`. Raises TypeError for any other value."""
        compiler = cls(**value)
        if [*map(type, compiler)] != [str, str, int, int, str]:
            raise TypeError("a field has another type")
        return compiler

    def unchanged(self) -> bool:
        """Return whether the file still has the size and time that it had when the version was read."""
        try:
            stat = os.stat(self.path)
        except (OSError, ValueError):
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)


class Toolchain(NamedTuple):
    """The compilers of a build: the host compiler for the CPU; NVRTC for CUDA, or nvcc and the host compiler."""

    cxx: Compiler | None = None
    nvcc: Compiler | None = None
    nvrtc: Compiler | None = None

    @property
    def key(self) -> str:
        """Return a hash of the versions, the name of an entry's folder."""
        return key_of(self.versions())

    def versions(self) -> dict[str, str]:
        """Return the version of each compiler by its name."""
        named = (("c++", self.cxx), ("nvcc", self.nvcc), ("nvrtc", self.nvrtc))
        return {name: compiler.version for name, compiler in named if compiler}

    def supports(self, target: Target) -> bool:
        """Return whether the compilers know the architecture, as far as they tell."""
        archs = self.nvrtc.archs.split() if self.nvrtc else []
        return not archs or target.arch.replace(".", "").rstrip("af") in archs

    def unchanged(self) -> bool:
        """Return whether the compilers' files are those whose versions were read."""
        return any(self) and all(compiler.unchanged() for compiler in self if compiler)


def key_of(versions: dict[str, str]) -> str:
    """Return the key of the toolchain with these versions, as `Toolchain.versions` returns them."""
    return hashlib.sha256("\0".join(versions.values()).encode()).hexdigest()[:12]


def find_cxx() -> str | None:
    """Return the path of the host compiler, $CXX or the first of the usual names on the PATH, or None."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else _HOST_COMPILERS
    return next((os.path.abspath(path) for name in names if (path := _which(name))), None)


def find_nvcc() -> str | None:
    """Return the path of nvcc, or None.

    It is $NVCC, or what cuda-pathfinder finds in NVIDIA's wheels, conda, CUDA_HOME, CUDA_PATH and the PATH.
    """
    if os.environ.get("NVCC"):
        path = _which(os.environ["NVCC"])
        return os.path.abspath(path) if path else None
    from cuda import pathfinder

    return pathfinder.find_nvidia_binary_utility("nvcc") or _which("nvcc")


def find_nvrtc() -> str | None:
    """Return the path of NVRTC's library, or None."""
    try:
        return nvrtc.find()
    except nvrtc.NvrtcError:
        return None


def compiler_versions() -> dict[str, str]:
    """Return the version of each compiler that is found and works, by the names of `Toolchain.versions`."""
    found = [toolchain for kind in (_CPU, _NVCC, _NVRTC) if (toolchain := _ask(kind))]
    return {name: version for toolchain in found for name, version in toolchain.versions().items()}


def find_ninja() -> str | None:
    """Return the path of the ninja package's program, or of the one on the PATH, or None."""
    try:
        import ninja

        bundled = Path(ninja.BIN_DIR) / "ninja"
        if bundled.is_file():
            return str(bundled)
    except ImportError:
        pass
    return _which("ninja")


def _which(name: str) -> str | None:
    """Return the path of a program on the PATH. If PATH is not set, return None, unlike `shutil.which`."""
    return shutil.which(name, path=os.environ.get("PATH", ""))


def _kinds(target: Target) -> tuple[str, ...]:
    """Return the kinds of compilers that may build for a target, the preferred one first."""
    if target.device == "cpu":
        return (_CPU,)
    name = os.environ.get(_CUDA_COMPILER, "").lower() or "auto"
    if name not in _CUDA_COMPILERS:
        raise RuntimeError(f"{_CUDA_COMPILER} must be one of {', '.join(_CUDA_COMPILERS)}, got {name!r}")
    return _CUDA_COMPILERS[name]


def identify(target: Target, cache: Cache | None) -> Toolchain | None:
    """Return the compilers that would build for `target` on this machine, or None if there are none.

    Args:
        target: What is built for.
        cache: Where versions are stored. Without a valid one for this environment, the compilers are started.
    """
    kinds = _kinds(target)
    for kind in kinds:
        if (stored := _read_stored(kind, cache)) and stored.supports(target):
            return stored
    for kind in kinds:
        found = _ask(kind)
        if found:
            _store(kind, cache, found)
            if found.supports(target):
                return found
    return None


def keys(target: Target, cache: Cache | None) -> list[str]:
    """Return the keys of the compilers that would build for `target`, and of others that were found here before.

    What one CUDA compiler has built need not be built again by another.
    """
    first = identify(target, cache)
    stored = [_read_stored(kind, cache) for kind in _kinds(target)]
    found = [first, *(toolchain for toolchain in stored if toolchain and toolchain.supports(target))]
    return [*dict.fromkeys(toolchain.key for toolchain in found if toolchain)]


def require(target: Target, cache: Cache | None, without_nvrtc: bool = False) -> Toolchain:
    """Return the compilers for a build, which are started to ask for their versions.

    Args:
        target: What is built for.
        cache: Where the versions are stored for `identify`.
        without_nvrtc: Whether NVRTC has failed, so that only nvcc is left.

    Raises:
        RuntimeError: A compiler is missing or does not work. The message says where it was searched for, and how to
            install it.
    """
    # A stored version is not used: a compiler may be a script, which stays the same when the compiler it calls changes.
    kinds = [kind for kind in _kinds(target) if not (without_nvrtc and kind == _NVRTC)]
    if not kinds:
        raise RuntimeError(f"{_CUDA_COMPILER} is {_NVRTC}, so nvcc is not tried: unset it")
    for kind in kinds:
        if toolchain := _ask(kind):
            _store(kind, cache, toolchain)
            if toolchain.supports(target):
                return toolchain
            if toolchain.nvrtc:
                logger.info("NVRTC is not used for %s: it supports %s", target.sm, toolchain.nvrtc.archs)
    if kinds == [_CPU] or (_NVCC in kinds and find_nvcc()):
        _require_cxx()
    searched = []
    if _NVRTC in kinds:
        searched.append(f"NVRTC where torch searches for it ({_nvrtc_problem(target)})")
    if _NVCC in kinds:
        variables = ("NVCC", "CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "PATH")
        values = ", ".join(f"{name}={os.environ.get(name, '')!r}" for name in variables)
        searched.append(f"an nvcc that works in NVIDIA's wheels under {sys.prefix}, {values}")
    package = "nvrtc" if _NVRTC in kinds else "nvcc"
    raise RuntimeError(
        f"jitnorm needs a CUDA compiler for {target.sm} and found none: looked for {' and for '.join(searched)}. "
        f"Install it with: pip install 'jitnorm[{package}]'"
    )


def _require_cxx() -> None:
    """Raise a RuntimeError that says what is wrong with the host compiler, if anything."""
    cxx, variable = find_cxx(), os.environ.get("CXX", "")
    if not cxx:
        if len(variable.split()) > 1:
            raise RuntimeError(f"CXX must be a compiler's name or path, without arguments, got {variable!r}")
        searched = f"$CXX ({variable})" if variable else " and ".join(_HOST_COMPILERS)
        raise RuntimeError(
            f"jitnorm needs a C++ compiler and found none: looked for {searched} on "
            f"PATH={os.environ.get('PATH', '')!r}. "
            "Install one (Debian, Ubuntu: apt-get install g++; conda: conda install cxx-compiler) or set CXX."
        )
    if not _identify_cxx(cxx):
        raise RuntimeError(
            f"{'CXX' if variable else 'the C++ compiler'} is {variable or cxx}, which does not work "
            f"({_run(cxx, '--version')[1]}). Install one that works, or set CXX"
        )


def _ask(kind: str) -> Toolchain | None:
    """Start the compilers of a kind, and return them with their versions; None if one is missing or fails."""
    if kind == _NVRTC:
        found = _identify_nvrtc()
        return Toolchain(nvrtc=found) if isinstance(found, Compiler) else None
    cxx = _identify_cxx(find_cxx())
    if kind == _CPU or not cxx:
        return Toolchain(cxx) if cxx else None
    nvcc = _identify_nvcc(find_nvcc())
    return Toolchain(cxx, nvcc) if nvcc else None


def _identify_nvrtc() -> Compiler | str:
    """Return NVRTC, or why there is none."""
    try:
        path = nvrtc.find()
        library = nvrtc.load(path)
    except nvrtc.NvrtcError as error:
        return str(error)
    compiler = _compiler(path, library.version, " ".join(map(str, library.archs)))
    if not compiler:
        return f"{path} was removed"
    return compiler._replace(version=f"{library.version}, build {_build_of(path)}")


def _build_of(path: str) -> str:
    """Return a hash of NVRTC's build, of which it tells only the release: of its size, first and last bytes.

    Those have the linker's build id and the tables of sections. All of it, 100 MB, would take longer than a build.
    """
    with open(path, "rb") as file:
        start = file.read(1 << 16)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 16)))
        return hashlib.sha256(b"%d" % size + start + file.read()).hexdigest()[:12]


def _nvrtc_problem(target: Target) -> str:
    found = _identify_nvrtc()
    return found if isinstance(found, str) else f"{found.path} does not support {target.sm}"


def _identify_cxx(path: str | None) -> Compiler | None:
    output = _output(path, "--version")
    return _compiler(path, output.splitlines()[0]) if path and output.strip() else None


def _identify_nvcc(path: str | None) -> Compiler | None:
    output = _output(path, "--dryrun", "-cubin", "x.cu")
    version = [re.search(rf"__CUDACC_VER_{part}__=(\d+)", output) for part in ("MAJOR", "MINOR", "BUILD")]
    if not path or not all(version):
        return None
    return _compiler(path, ".".join(v[1] for v in version if v))


def _compiler(path: str, version: str, archs: str = "") -> Compiler | None:
    try:
        stat = os.stat(os.path.realpath(path))
    except OSError:
        return None  # it was removed after it answered
    return Compiler(path, version, stat.st_size, stat.st_mtime_ns, archs)


def _output(path: str | None, *arguments: str) -> str:
    """Return what the program prints, or an empty string if it fails."""
    return _run(path, *arguments)[0] if path else ""


# Why a program did not answer, by its path, arguments, size and time, so that the time limit is spent only once.
_unresponsive: dict[tuple[object, ...], str] = {}


def _run(path: str, *arguments: str) -> tuple[str, str]:
    """Return what the program prints, or an empty string if it fails; and the reason for an empty string."""
    command = " ".join(arguments)
    try:
        stat = os.stat(path)
        key = (path, arguments, stat.st_size, stat.st_mtime_ns)
        if reason := _unresponsive.get(key):
            return "", f"{command}: {reason}"
        process = subprocess.Popen(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return "", f"{command}: {error}"
    try:
        output, reason = _read_output(process)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # its children too, which may hold the pipe open
        with suppress(subprocess.TimeoutExpired):  # a process in a system call that never returns cannot be killed
            process.wait(_KILL_LIMIT_S)
        assert process.stdout
        process.stdout.close()
    if reason:
        _unresponsive[key] = reason
        return "", f"{command}: {reason}"
    if process.returncode:
        return "", f"{command} exited {process.returncode}"
    return output, f"{command} printed nothing"


def _read_output(process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """Return what `process` prints until it ends, or an empty string and the reason why it was not waited for."""
    assert process.stdout
    content = b""
    poll = select.poll()  # unlike select(), it accepts descriptors above 1023
    poll.register(process.stdout, select.POLLIN)
    deadline = time.monotonic() + _ANSWER_LIMIT_S
    while len(content) <= _ANSWER_LIMIT_BYTES:
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return "", f"it did not answer within {_ANSWER_LIMIT_S:.0f} s"
        if not (part := os.read(process.stdout.fileno(), 1 << 16)):
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
                return content.decode(errors="replace"), ""
            return "", f"it did not end within {_ANSWER_LIMIT_S:.0f} s"
        content += part
    return "", f"it printed more than {_ANSWER_LIMIT_BYTES} bytes"


def _record_name(kind: str) -> str:
    environment = json.dumps([sys.prefix, kind, *(os.environ.get(name) for name in _ENVIRONMENT[kind])])
    return f"{kind}-{hashlib.sha256(environment.encode()).hexdigest()[:16]}.json"


def _read_stored(kind: str, cache: Cache | None) -> Toolchain | None:
    """Return the toolchain that `_store` wrote for this environment, if its compilers have not changed since."""
    if not cache:
        return None
    record = cache.read_record(TOOLCHAINS, _record_name(kind))
    try:
        toolchain = Toolchain(**{name: Compiler.from_json(value) if value else None for name, value in record.items()})
    except (AttributeError, TypeError):
        return None  # there is no record, or it is damaged
    return toolchain if toolchain.unchanged() else None


def _store(kind: str, cache: Cache | None, toolchain: Toolchain) -> None:
    if cache and _read_stored(kind, cache) != toolchain:
        record = {name: c._asdict() if c else None for name, c in toolchain._asdict().items()}
        with suppress(OSError, UntrustedPath):  # in a read-only cache nothing is stored: the next process asks again
            cache.write_record(TOOLCHAINS, _record_name(kind), record)
