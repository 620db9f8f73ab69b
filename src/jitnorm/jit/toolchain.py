"""Find the host compiler, nvcc and ninja, and ask the compilers for their versions.

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

from jitnorm.jit.cache import TOOLCHAINS, Cache
from jitnorm.jit.folder import UntrustedPath

_HOST_COMPILERS = ("c++", "g++", "clang++")
# The variables that a search for compilers depends on: a stored answer is valid for one set of values.
_ENVIRONMENT = ("PATH", "CXX", "NVCC", "CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX")
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
        top: The toolkit's folder; nvcc only.
    """

    path: str
    version: str
    size: int
    mtime_ns: int
    top: str = ""

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
    """The compilers of a build: the host compiler, and nvcc for CUDA."""

    cxx: Compiler
    nvcc: Compiler | None = None

    @property
    def key(self) -> str:
        """Return a hash of the versions, the name of an entry's folder."""
        return key_of(self.versions())

    def versions(self) -> dict[str, str]:
        """Return the version of each compiler by its name."""
        return {name: c.version for name, c in (("c++", self.cxx), ("nvcc", self.nvcc)) if c}


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


def identify(device: str, cache: Cache | None) -> Toolchain | None:
    """Return the compilers that would build for `device` on this machine, or None if one is missing.

    Args:
        device: "cpu" or "cuda".
        cache: Where versions are stored. Without a valid one for this environment, the compilers are started.
    """
    if not find_cxx():
        return None  # nothing can be built, and there is no need to search for nvcc
    if stored := _read_stored(device, cache):
        return stored
    found = _ask(device)
    if found:
        _store(device, cache, found)
    return found


def require(device: str, cache: Cache | None) -> Toolchain:
    """Return the compilers for a build, which are started to ask for their versions.

    Args:
        device: "cpu" or "cuda".
        cache: Where the versions are stored for `identify`.

    Raises:
        RuntimeError: A compiler is missing or does not work. The message says where it was searched for, and how to
            install it.
    """
    # A stored version is not used: a compiler may be a script, which stays the same when the compiler it calls changes.
    cxx = find_cxx()
    toolchain = _ask(device) if cxx else None
    if toolchain:
        _store(device, cache, toolchain)
        return toolchain
    variable = os.environ.get("CXX", "")
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
    variables = ("NVCC", "CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "PATH")
    values = ", ".join(f"{name}={os.environ.get(name, '')!r}" for name in variables)
    raise RuntimeError(
        f"jitnorm needs nvcc and found none that works: looked in NVIDIA's wheels under {sys.prefix}, {values}. "
        "Install it with: pip install 'jitnorm[nvcc]'"
    )


def _ask(device: str) -> Toolchain | None:
    """Start the compilers for `device`, and return them with their versions; None if one is missing or fails."""
    cxx = _identify_cxx(find_cxx())
    if device == "cpu" or not cxx:
        return Toolchain(cxx) if cxx else None
    nvcc = _identify_nvcc(find_nvcc())
    return Toolchain(cxx, nvcc) if nvcc else None


def _identify_cxx(path: str | None) -> Compiler | None:
    output = _output(path, "--version")
    return _compiler(path, output.splitlines()[0]) if path and output.strip() else None


def _identify_nvcc(path: str | None) -> Compiler | None:
    # nvcc may be a script outside of its toolkit: --dryrun prints the toolkit's folder as TOP, and the version.
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
    return Compiler(path, version, stat.st_size, stat.st_mtime_ns, top)


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


def _record_name(device: str) -> str:
    environment = json.dumps([sys.prefix, device, *(os.environ.get(name) for name in _ENVIRONMENT)])
    return f"{device}-{hashlib.sha256(environment.encode()).hexdigest()[:16]}.json"


def _read_stored(device: str, cache: Cache | None) -> Toolchain | None:
    """Return the toolchain that `_store` wrote for this environment, if its compilers have not changed since."""
    if not cache:
        return None
    record = cache.read_record(TOOLCHAINS, _record_name(device))
    try:
        nvcc = Compiler.from_json(record["nvcc"]) if record["nvcc"] else None
        toolchain = Toolchain(Compiler.from_json(record["cxx"]), nvcc)
    except (KeyError, TypeError):
        return None  # there is no record, or it is damaged
    return toolchain if all(c.unchanged() for c in (toolchain.cxx, toolchain.nvcc) if c) else None


def _store(device: str, cache: Cache | None, toolchain: Toolchain) -> None:
    if cache and _read_stored(device, cache) != toolchain:
        record = {name: c._asdict() if c else None for name, c in toolchain._asdict().items()}
        with suppress(OSError, UntrustedPath):  # in a read-only cache nothing is stored: the next process asks again
            cache.write_record(TOOLCHAINS, _record_name(device), record)
