"""Finding the host compiler, nvcc and ninja, and asking for their versions.

A compiler is known by its version, and recognised by real path, size and modification time, so that only the first
process that meets it has to start it: what it said is remembered in the cache's folder.
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
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from jitnorm.jit.cache import TOOLCHAINS, Cache
from jitnorm.jit.folder import Unfit

_HOST_COMPILERS = ("c++", "g++", "clang++")
# Where a search for compilers looks; a change of one of these makes it look again.
_ENVIRONMENT = ("PATH", "CXX", "NVCC", "CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX")
_ANSWER_LIMIT_S = 20.0  # for the version of a compiler, which may lie on a slow file system
_ANSWER_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Compiler:
    path: str
    version: str
    size: int
    mtime_ns: int
    top: str = ""  # nvcc: the toolkit's folder

    @classmethod
    def of_json(cls, value: Any) -> Compiler:
        """Return the compiler that `asdict` made `value` of. Raises TypeError for anything else."""
        compiler = cls(**value)
        if any(type(getattr(compiler, f.name)).__name__ != f.type for f in fields(cls)):
            raise TypeError("a field has another type")
        return compiler

    def unchanged(self) -> bool:
        try:
            stat = os.stat(self.path)
        except (OSError, ValueError):
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.mtime_ns)


@dataclass(frozen=True)
class Toolchain:
    cxx: Compiler
    nvcc: Compiler | None = None

    @property
    def key(self) -> str:
        versions = [c.version for c in (self.cxx, self.nvcc) if c]
        return hashlib.sha256("\0".join(versions).encode()).hexdigest()[:12]

    def compilers(self) -> dict[str, str]:
        return {name: c.version for name, c in (("c++", self.cxx), ("nvcc", self.nvcc)) if c}


def find_cxx() -> str | None:
    """Return the host compiler's path: $CXX, or the first of the usual names on the PATH; None without any."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else _HOST_COMPILERS
    return next((os.path.abspath(path) for name in names if (path := _which(name))), None)


def find_nvcc() -> str | None:
    """nvcc's path: $NVCC, or as cuda-pathfinder finds it: NVIDIA's wheels, conda, CUDA_HOME or CUDA_PATH, the PATH."""
    if os.environ.get("NVCC"):
        path = _which(os.environ["NVCC"])
        return os.path.abspath(path) if path else None
    from cuda import pathfinder

    return pathfinder.find_nvidia_binary_utility("nvcc") or _which("nvcc")


def find_ninja() -> str | None:
    """Return the path of the ninja that was installed beside this package, or of the one on the PATH."""
    try:
        import ninja

        bundled = Path(ninja.BIN_DIR) / "ninja"
        if bundled.is_file():
            return str(bundled)
    except ImportError:
        pass
    return _which("ninja")


def _which(name: str) -> str | None:
    """Return the path of a program on the PATH; shutil would use a default one where PATH is not set."""
    return shutil.which(name, path=os.environ.get("PATH", ""))


def identify(device: str, memory: Cache | None) -> Toolchain | None:
    """Return the compilers that would build for `device` here, or None where something is missing.

    `memory` is a cache that keeps the versions of compilers; where it has none of this environment, they are started.
    """
    if not find_cxx():
        return None  # without it nothing can be built, and nvcc need not be looked for
    remembered = _recall(device, memory)
    if remembered:
        return remembered
    found = _ask(device)
    if found:
        _remember(device, memory, found)
    return found


def require(device: str, memory: Cache | None) -> Toolchain:
    """Return the compilers for a build, or raise a RuntimeError that says what is missing and what to do about it."""
    # Asked anew: what stands for a compiler may be a script, which stays as it is when the compiler changes.
    cxx = find_cxx()
    toolchain = _ask(device) if cxx else None
    if toolchain:
        _remember(device, memory, toolchain)
        return toolchain
    own = os.environ.get("CXX", "")
    if not cxx:
        if len(own.split()) > 1:
            raise RuntimeError(f"CXX must be a compiler's name or path, without arguments, got {own!r}")
        looked = f"$CXX ({own})" if own else " and ".join(_HOST_COMPILERS)
        raise RuntimeError(
            f"jitnorm needs a C++ compiler and found none: looked for {looked} on PATH={os.environ.get('PATH', '')!r}. "
            "Install one (Debian, Ubuntu: apt-get install g++; conda: conda install cxx-compiler) or set CXX."
        )
    if not _identify_cxx(cxx):
        raise RuntimeError(
            f"{'CXX' if own else 'the C++ compiler'} is {own or cxx}, which does not work "
            f"({_run(cxx, '--version')[1]}). Install one that works, or set CXX"
        )
    variables = ("NVCC", "CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "PATH")
    places = ", ".join(f"{name}={os.environ.get(name, '')!r}" for name in variables)
    raise RuntimeError(
        f"jitnorm needs nvcc and found none that works: looked in NVIDIA's wheels under {sys.prefix}, {places}. "
        "Install it with: pip install 'jitnorm[nvcc]'"
    )


def _ask(device: str) -> Toolchain | None:
    cxx = _identify_cxx(find_cxx())
    if device == "cpu" or not cxx:
        return Toolchain(cxx) if cxx else None
    nvcc = _identify_nvcc(find_nvcc())
    return Toolchain(cxx, nvcc) if nvcc else None


def _identify_cxx(path: str | None) -> Compiler | None:
    output = _output(path, "--version")
    return _compiler(path, output.splitlines()[0]) if path and output.strip() else None


def _identify_nvcc(path: str | None) -> Compiler | None:
    """nvcc may be a script far from its toolkit, so it is asked where that is: --dryrun prints TOP and the version."""
    output = _output(path, "--dryrun", "-cubin", "x.cu")
    top = re.search(r"^#\$ TOP=(.*)$", output, re.MULTILINE)
    version = [re.search(rf"__CUDACC_VER_{part}__=(\d+)", output) for part in ("MAJOR", "MINOR", "BUILD")]
    if not path or not top or not all(version):
        return None
    return _compiler(path, ".".join(v[1] for v in version if v), os.path.realpath(top[1].strip()))


def _compiler(path: str, version: str, top: str = "") -> Compiler | None:
    try:
        stat = os.stat(os.path.realpath(path))
    except OSError:
        return None  # it was removed after it answered
    # Some compilers look for their parts beside argv[0], so the path is kept as found; its target's size and time tell.
    return Compiler(path, version, stat.st_size, stat.st_mtime_ns, top)


def _output(path: str | None, *arguments: str) -> str:
    """Return what the program prints; nothing where it fails."""
    return _run(path, *arguments)[0] if path else ""


# Why a program was given up, by its path, arguments, size and time: so that it costs its time limit only once.
_given_up: dict[tuple[object, ...], str] = {}


def _run(path: str, *arguments: str) -> tuple[str, str]:
    """Return what the program prints if it succeeds, and else why it did not."""
    words = " ".join(arguments)
    try:
        stat = os.stat(path)
        key = (path, arguments, stat.st_size, stat.st_mtime_ns)
        if why := _given_up.get(key):
            return "", f"{words}: {why}"
        process = subprocess.Popen(
            [path, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except (OSError, ValueError) as error:
        return "", f"{words}: {error}"
    try:
        output, why = _read_answer(process)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started too, which may hold the pipe open
        process.wait()
        assert process.stdout
        process.stdout.close()
    if why:
        _given_up[key] = why
        return "", f"{words}: {why}"
    return (
        (output, f"{words} said nothing") if process.returncode == 0 else ("", f"{words} exited {process.returncode}")
    )


def _read_answer(process: subprocess.Popen[bytes]) -> tuple[str, str]:
    """Return what `process` prints until it ends, and why it was given up, if it was."""
    assert process.stdout
    content = b""
    poll = select.poll()  # unlike select(), it takes descriptors above 1023
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


def _memory_file(device: str) -> str:
    environment = json.dumps([sys.prefix, device, *(os.environ.get(name) for name in _ENVIRONMENT)])
    return f"{device}-{hashlib.sha256(environment.encode()).hexdigest()[:16]}.json"


def _recall(device: str, memory: Cache | None) -> Toolchain | None:
    if not memory:
        return None
    said = memory.recall(TOOLCHAINS, _memory_file(device))
    try:
        toolchain = Toolchain(Compiler.of_json(said["cxx"]), Compiler.of_json(said["nvcc"]) if said["nvcc"] else None)
    except (KeyError, TypeError):
        return None  # nothing is remembered, or something else lies there
    return toolchain if all(c.unchanged() for c in (toolchain.cxx, toolchain.nvcc) if c) else None


def _remember(device: str, memory: Cache | None, toolchain: Toolchain) -> None:
    if memory and _recall(device, memory) != toolchain:
        with suppress(OSError, Unfit):  # a read-only cache: the next process asks again
            memory.remember(TOOLCHAINS, _memory_file(device), asdict(toolchain))
