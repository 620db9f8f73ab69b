"""Check a shared library that was just built, and load one from bytes that were verified.

Loading a damaged library can end the process: by SIGBUS where its pages are missing, by SIGSEGV where its tables are
wrong. A compiler whose disk is full, or whose linker was killed, may write such a file and still exit 0.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import itertools
import os
import platform
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from jitnorm.jit.environment import import_tvm_ffi
from jitnorm.jit.files import close, write_all

if TYPE_CHECKING:
    import tvm_ffi

EM_CUDA = 190
KERNEL_INFO = "jitnorm_info"  # the variable that describes a cubin to the launcher: csrc/include/jitnorm/kernel_info.h
_EM_HOST = {"x86_64": 62, "aarch64": 183}
_ET_DYN = 3
_SHT_SYMTAB, _SHT_DYNAMIC, _SHT_NOBITS, _SHT_DYNSYM = 2, 6, 8, 11
_SHF_EXECINSTR = 4
_DT_NEEDED = 1
_ZEROS = bytes(256)  # machine code has no run of so many zeros; a hole in a file is read as zeros
_CHECK_LIMIT_S = 60.0
_KILL_LIMIT_S = 5.0
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class BadLibrary(RuntimeError):
    """The library cannot be loaded; the message says why."""


class _Section(NamedTuple):
    kind: int
    flags: int
    offset: int
    size: int
    link: int


class Elf:
    """A 64-bit ELF file, read with every offset checked."""

    def __init__(self, content: bytes) -> None:
        """Read the tables. Raises BadLibrary if the file is truncated or damaged."""
        self._content = content
        if content[:6] != b"\x7fELF\x02\x01":
            problem = "it is not a 64-bit ELF file" if content.strip(b"\0") else f"it is {len(content)} zero bytes"
            raise BadLibrary(problem)
        self.type, self.machine, _, _, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum = self._unpack(
            "<HHIQQQIHHHHH", 16
        )
        for i in range(phnum):
            _, _, offset, _, _, filesz, _, _ = self._unpack("<IIQQQQQQ", phoff + i * phentsize)
            self._slice(offset, filesz)
        if not shoff or not shnum:
            raise BadLibrary("it has no sections")
        self.sections = []
        for i in range(shnum):
            _, kind, flags, _, offset, size, link, _, _, _ = self._unpack("<IIQQQQIIQQ", shoff + i * shentsize)
            section = _Section(kind, flags, offset, size, link)
            if kind != _SHT_NOBITS:
                part = self._slice(offset, size)
                if flags & _SHF_EXECINSTR and _ZEROS in part:
                    raise BadLibrary("a part of its code is missing: there are zeros")
            self.sections.append(section)

    def _slice(self, offset: int, size: int) -> bytes:
        if offset + size > len(self._content):
            raise BadLibrary(f"it is truncated: {len(self._content)} of at least {offset + size} bytes are there")
        return self._content[offset : offset + size]

    def _unpack(self, form: str, offset: int) -> tuple[int, ...]:
        return struct.unpack(form, self._slice(offset, struct.calcsize(form)))

    def _linked(self, section: _Section) -> bytes:
        if section.link >= len(self.sections):
            raise BadLibrary("a section's string table is missing")
        table = self.sections[section.link]
        return self._slice(table.offset, table.size)

    def _records(self, kind: int, form: str) -> Iterator[tuple[tuple[int, ...], bytes]]:
        """Yield the records of all sections of one kind, each with the string table that its names are in."""
        for section in self.sections:
            if section.kind == kind:
                part = self._slice(section.offset, section.size)
                whole = len(part) - len(part) % struct.calcsize(form)
                names = self._linked(section)
                yield from ((record, names) for record in struct.iter_unpack(form, part[:whole]))

    def symbols(self) -> set[str]:
        """Return the names of the symbols that the file defines."""
        found = set()
        for kind in (_SHT_DYNSYM, _SHT_SYMTAB):
            for (name, _, _, section, _, _), names in self._records(kind, "<IBBHQQ"):
                if section:
                    found.add(_string(names, name))
        return found

    def variable(self, name: str) -> bytes:
        """Return the initial value of a variable. Raises BadLibrary if there is none of this name."""
        for (at, _, _, section, value, size), names in self._records(_SHT_SYMTAB, "<IBBHQQ"):
            if 0 < section < len(self.sections) and _string(names, at) == name:
                if self.sections[section].kind == _SHT_NOBITS:
                    return bytes(size)
                return self._slice(self.sections[section].offset + value, size)
        raise BadLibrary(f"it does not define {name}")

    def needed(self) -> list[str]:
        """Return the names of the libraries that this one depends on (DT_NEEDED)."""
        return [
            _string(names, value) for (tag, value), names in self._records(_SHT_DYNAMIC, "<qQ") if tag == _DT_NEEDED
        ]


def _string(table: bytes, offset: int) -> str:
    return table[offset : table.find(b"\0", offset)].decode(errors="replace")


def check_library(content: bytes, exports: Sequence[str]) -> Elf:
    """Check that `content` is a shared library with the tvm-ffi functions `exports`, and return its tables.

    Raises:
        BadLibrary: It is damaged, incomplete, for another machine, or lacks one of the functions.
    """
    library = Elf(content)
    machine = _EM_HOST.get(platform.machine(), library.machine)
    if library.type != _ET_DYN or library.machine != machine:
        raise BadLibrary(f"it is not a shared library for {platform.machine()}")
    _require(library, [_symbol(name) for name in exports])
    return library


def check_cubin(content: bytes, kernels: Sequence[str]) -> Elf:
    """Check that `content` is an undamaged cubin with the functions `kernels`, and return its tables.

    Raises:
        BadLibrary: It is damaged, contains no CUDA code, or lacks one of the functions or their description.
    """
    cubin = Elf(content)
    if cubin.machine != EM_CUDA:
        raise BadLibrary("it contains no CUDA code")
    _require(cubin, [*kernels, KERNEL_INFO])
    return cubin


def _require(file: Elf, symbols: Sequence[str]) -> None:
    defined = file.symbols()
    if missing := [symbol for symbol in symbols if symbol not in defined]:
        raise BadLibrary(f"it does not define {', '.join(missing)}")


def _symbol(function: str) -> str:
    return f"__tvm_ffi_{function}"


# The program of the child process. Its input is a line with the size of each part in bytes, then the parts: the paths
# of the dependencies that the parent has loaded, and the library. Like `open_library`, it loads the library from
# memory.
_CHILD = """
import _ctypes, os, sys
sys.stdout.write("ready")
sys.stdout.flush()
sizes = [int(size) for size in sys.stdin.buffer.readline().split()]
*loaded, content = [sys.stdin.buffer.read(size) for size in sizes]
try:
    for path in loaded:
        _ctypes.dlopen(path, os.RTLD_NOW | os.RTLD_GLOBAL)
    fd = os.memfd_create("checked")
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    _ctypes.dlopen(f"/proc/self/fd/{fd}", os.RTLD_NOW)
except (OSError, AttributeError) as error:
    sys.exit(str(error))
"""


class ChildCheck:
    """A child process that tries to load a library: a library that crashes when it is loaded crashes only the child.

    It is created before the build, so that it is ready when the library is built. Use it in a `with` statement.
    """

    def __init__(self) -> None:
        """Start the child. Nothing is checked in a program that embeds Python, which has no interpreter to start."""
        self._process: subprocess.Popen[bytes] | None = None
        if os.path.basename(sys.executable or "").startswith("python") and _can_load_from_memory():
            with suppress(OSError):
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", "-c", _CHILD],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C is for this process
                )

    def check(self, content: bytes, library: Elf) -> None:
        """Raise BadLibrary if loading the library in `content` fails or crashes the child."""
        if not self._process:
            return
        parts = [*map(os.fsencode, _loaded_paths(library)), content]
        message = " ".join(str(len(part)) for part in parts).encode() + b"\n" + b"".join(parts)
        try:
            ready, errors = self._process.communicate(message, timeout=_CHECK_LIMIT_S)
        except subprocess.TimeoutExpired:
            return  # a busy machine, or a process that was forked meanwhile and holds a pipe: there is no result
        code = self._process.returncode
        if ready != b"ready" or not code:
            return  # Python could not be started in this way, or the library was loaded
        if code < 0:
            raise BadLibrary(f"opening it ends a process by signal {-code}")
        lines = errors.decode(errors="replace").strip().splitlines()
        raise BadLibrary(lines[-1] if lines else f"opening it fails ({code})")

    def __enter__(self) -> ChildCheck:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        if not self._process:
            return
        if self._process.poll() is None:
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            with suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        with suppress(subprocess.TimeoutExpired):  # a process in a system call that never returns cannot be killed
            self._process.wait(_KILL_LIMIT_S)


@functools.cache
def _can_load_from_memory() -> bool:
    """Return whether memfd_create works on this machine, and /proc has paths to its files."""
    try:
        fd = os.memfd_create("jitnorm", os.MFD_CLOEXEC)
    except (OSError, AttributeError):  # a kernel or a sandbox without them
        return False
    try:
        return os.path.exists(f"/proc/self/fd/{fd}")
    finally:
        close(fd)


class _LinkMap(ctypes.Structure):
    _fields_ = [("l_addr", ctypes.c_void_p), ("l_name", ctypes.c_char_p)]


def _loaded_paths(library: Elf) -> Iterator[str]:
    """Yield the paths of the dependencies that this process has loaded already, such as torch's own libgomp."""
    for name in library.needed():
        try:
            handle = ctypes.CDLL(name, mode=os.RTLD_NOW | os.RTLD_NOLOAD)._handle
            found = ctypes.POINTER(_LinkMap)()
            if ctypes.CDLL(None).dlinfo(ctypes.c_void_p(handle), 2, ctypes.byref(found)) == 0:  # RTLD_DI_LINKMAP
                path = os.fsdecode(found.contents.l_name or b"")
                if os.path.isabs(path):
                    yield path
        except (OSError, AttributeError):
            continue  # it is not loaded: the child's loader searches for it as this process's would


_path_numbers = itertools.count(1)


def open_library(name: str, content: bytes, export: str) -> tvm_ffi.Module:
    """Load the shared library in `content`, which are exactly the bytes that the caller has verified.

    They are loaded from a sealed file in memory: later changes to the file in the cache have no effect.

    Args:
        name: Its name in /proc/self/maps and in profilers.
        content: The library.
        export: A tvm-ffi function that it must have.

    Raises:
        BadLibrary: The loader rejects it, or the function is missing.
        OSError: This process has too few descriptors, or no memory or disk space left.
    """
    # Importing tvm_ffi also loads the runtime that the libraries link to.
    load_module = import_tvm_ffi().get_global_func("ffi.Module.load_from_file.so")
    problem = ""
    for loadable_path in (_in_memory, _in_private_file):  # a security policy may forbid loading from one of them
        with loadable_path(name, content) as path:
            if not path:
                continue
            try:
                library = ctypes.CDLL(path)  # never unloaded: its functions may be called until the process ends
            except OSError as error:
                problem = str(error).replace(path, name)
                continue
            if not hasattr(library, _symbol(export)):
                raise BadLibrary(f"it does not define {_symbol(export)}")
            module: tvm_ffi.Module = load_module(path, "so")
            return module
    raise BadLibrary(problem)


@contextmanager
def _in_memory(name: str, content: bytes) -> Iterator[str]:
    """Yield the path of a sealed memory file, or an empty string if memfd_create does not work."""
    if not _can_load_from_memory():
        yield ""
        return
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        write_all(fd, content)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        # dlopen returns the library that it loaded earlier from the same path, and descriptors are reused. So no two
        # loads use the same string: the binary digits of a counter are written as "/" and "./".
        digits = f"{next(_path_numbers):b}"
        yield f"/proc/self/fd/{''.join('./' if digit == '1' else '/' for digit in digits)}{fd}"
    finally:
        close(fd)


@contextmanager
def _in_private_file(_: str, content: bytes) -> Iterator[str]:
    """Yield the path of a temporary file that only this user can write."""
    fd, path = tempfile.mkstemp(prefix="jitnorm-", suffix=".so")
    try:
        try:
            write_all(fd, content)
        finally:
            close(fd)
        yield path
    finally:
        with suppress(OSError):
            os.unlink(path)
