"""Shared libraries: whether one that was just built is whole, and loading one from its verified bytes.

Loading a damaged library can kill the process: its pages are missing (SIGBUS), or its tables lead nowhere (SIGSEGV). A
compiler whose disk was full, or whose linker was killed, may write one and still exit 0.
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
from dataclasses import dataclass
from types import TracebackType

import tvm_ffi

from jitnorm.jit.folder import close

EM_CUDA = 190
_EM_HOST = {"x86_64": 62, "aarch64": 183}
_ET_DYN = 3
_SHT_SYMTAB, _SHT_DYNAMIC, _SHT_NOBITS, _SHT_DYNSYM = 2, 6, 8, 11
_SHF_EXECINSTR = 4
_DT_NEEDED = 1
_ZEROS = bytes(256)  # no code has as many; a hole in a file, which reads as zeros, is larger
_CHECK_LIMIT_S = 60.0
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class BadLibrary(RuntimeError):
    """Why a library cannot be loaded."""


@dataclass(frozen=True)
class _Section:
    kind: int
    flags: int
    offset: int
    size: int
    link: int


class Elf:
    """A 64-bit ELF file, read with every offset checked."""

    def __init__(self, content: bytes) -> None:
        """Read the tables. Raises BadLibrary where the file is not whole."""
        self._content = content
        if content[:6] != b"\x7fELF\x02\x01":
            raise BadLibrary("it is no 64-bit ELF file" if content.strip(b"\0") else f"it is {len(content)} zero bytes")
        self.type, self.machine, _, _, phoff, shoff, _, _, phentsize, phnum, shentsize, shnum = self._unpack(
            "<HHIQQQIHHHHH", 16
        )
        for i in range(phnum):
            _, _, offset, _, _, filesz, _, _ = self._unpack("<IIQQQQQQ", phoff + i * phentsize)
            self._part(offset, filesz)
        if not shoff or not shnum:
            raise BadLibrary("it has no sections")
        self.sections = []
        for i in range(shnum):
            _, kind, flags, _, offset, size, link, _, _, _ = self._unpack("<IIQQQQIIQQ", shoff + i * shentsize)
            section = _Section(kind, flags, offset, size, link)
            if kind != _SHT_NOBITS:
                part = self._part(offset, size)
                if flags & _SHF_EXECINSTR and _ZEROS in part:
                    raise BadLibrary("a part of its code is missing: there are zeros")
            self.sections.append(section)

    def _part(self, offset: int, size: int) -> bytes:
        if offset + size > len(self._content):
            raise BadLibrary(f"it is truncated: {len(self._content)} of at least {offset + size} bytes are there")
        return self._content[offset : offset + size]

    def _unpack(self, form: str, offset: int) -> tuple[int, ...]:
        return struct.unpack(form, self._part(offset, struct.calcsize(form)))

    def _linked(self, section: _Section) -> bytes:
        if section.link >= len(self.sections):
            raise BadLibrary("a section's string table is missing")
        table = self.sections[section.link]
        return self._part(table.offset, table.size)

    def _records(self, kind: int, form: str) -> Iterator[tuple[tuple[int, ...], bytes]]:
        """Yield the entries of all sections of one kind, each with the table that its names are in."""
        for section in self.sections:
            if section.kind == kind:
                part = self._part(section.offset, section.size)
                whole = len(part) - len(part) % struct.calcsize(form)
                names = self._linked(section)
                yield from ((entry, names) for entry in struct.iter_unpack(form, part[:whole]))

    def symbols(self) -> set[str]:
        """Return the names that the file defines."""
        found = set()
        for kind in (_SHT_DYNSYM, _SHT_SYMTAB):
            for (name, _, _, section, _, _), names in self._records(kind, "<IBBHQQ"):
                if section:
                    found.add(_string(names, name))
        return found

    def needed(self) -> list[str]:
        """Return the libraries that this one asks for, as DT_NEEDED names them."""
        return [
            _string(names, value) for (tag, value), names in self._records(_SHT_DYNAMIC, "<qQ") if tag == _DT_NEEDED
        ]


def _string(table: bytes, offset: int) -> str:
    return table[offset : table.find(b"\0", offset)].decode(errors="replace")


def check_library(content: bytes, exports: Sequence[str]) -> Elf:
    """Return the ELF file in `content`, a shared library that exports the tvm-ffi functions `exports`.

    Raises:
        BadLibrary: it is damaged, incomplete, for another machine, or without one of the functions.
    """
    library = Elf(content)
    machine = _EM_HOST.get(platform.machine(), library.machine)
    if library.type != _ET_DYN or library.machine != machine:
        raise BadLibrary(f"it is no shared library for {platform.machine()}")
    _require(library, [_symbol(name) for name in exports])
    return library


def check_cubin(content: bytes, kernel: str) -> None:
    """Raise BadLibrary unless `content` is a whole cubin that defines `kernel`."""
    cubin = Elf(content)
    if cubin.machine != EM_CUDA:
        raise BadLibrary("the cubin holds no CUDA code")
    _require(cubin, [kernel])


def _require(file: Elf, symbols: Sequence[str]) -> None:
    defined = file.symbols()
    if missing := [symbol for symbol in symbols if symbol not in defined]:
        raise BadLibrary(f"it does not define {', '.join(missing)}")


def _symbol(function: str) -> str:
    return f"__tvm_ffi_{function}"


# What the child process runs. Its input is the number of bytes of each part, then the parts: the paths of libraries
# that the parent has loaded, and the library's bytes. Like `open_library`, it loads them from memory.
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
    """A process that opens a library, so that one which kills a process kills that one.

    It is started before the build, so that it is ready when the library is. Use it in a `with` statement.
    """

    def __init__(self) -> None:
        """Start it. Where Python is embedded into another program there is nothing to start: then it checks nothing."""
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
        """Raise BadLibrary if opening the library in `content` fails, or ends the process."""
        if not self._process:
            return
        parts = [*map(os.fsencode, _loaded_paths(library)), content]
        message = " ".join(str(len(part)) for part in parts).encode() + b"\n" + b"".join(parts)
        try:
            ready, said = self._process.communicate(message, timeout=_CHECK_LIMIT_S)
        except subprocess.TimeoutExpired:
            return  # a busy machine, or a process that was forked meanwhile and holds a pipe: nothing is known
        code = self._process.returncode
        if ready != b"ready" or not code:
            return  # such a Python cannot start like this
        if code < 0:
            raise BadLibrary(f"opening it ends a process by signal {-code}")
        words = said.decode(errors="replace").strip().splitlines()
        raise BadLibrary(words[-1] if words else f"opening it fails ({code})")

    def __enter__(self) -> ChildCheck:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, _: TracebackType | None) -> None:
        if self._process:
            if self._process.poll() is None:
                self._process.kill()
            for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
                with suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]
            self._process.wait()


@functools.cache
def _can_load_from_memory() -> bool:
    """Return whether memfd_create works here, and /proc has paths to its files."""
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
    """Yield the paths of those needed libraries that this process has loaded already, such as torch's own libgomp."""
    for name in library.needed():
        try:
            handle = ctypes.CDLL(name, mode=os.RTLD_NOW | os.RTLD_NOLOAD)._handle
            found = ctypes.POINTER(_LinkMap)()
            if ctypes.CDLL(None).dlinfo(ctypes.c_void_p(handle), 2, ctypes.byref(found)) == 0:  # RTLD_DI_LINKMAP
                path = os.fsdecode(found.contents.l_name or b"")
                if os.path.isabs(path):
                    yield path
        except (OSError, AttributeError):
            continue  # not loaded: the loader finds it in the child as it would here


_spellings = itertools.count(1)


def open_library(name: str, content: bytes, export: str) -> tvm_ffi.Module:
    """Load the shared library in `content`: exactly the bytes that the caller has verified.

    They are loaded from a sealed file in memory. What happens to the file that they came from changes nothing.

    Args:
        name: what /proc/self/maps and profilers call it.
        content: the library.
        export: a tvm-ffi function that it must have.

    Raises:
        BadLibrary: the loader refuses it, or the function is missing.
        OSError: this process cannot give it to the loader, for want of descriptors or room.
    """
    problem = ""
    for loadable in (_in_memory, _in_private_file):  # some systems' rules allow the loader one of them alone
        with loadable(name, content) as path:
            if not path:
                continue
            try:
                library = ctypes.CDLL(path)  # never unloaded: its functions may be called until the process ends
            except OSError as error:
                problem = str(error).replace(path, name)
                continue
            if not hasattr(library, _symbol(export)):
                raise BadLibrary(f"it does not define {_symbol(export)}")
            module: tvm_ffi.Module = tvm_ffi.get_global_func("ffi.Module.load_from_file.so")(path, "so")
            return module
    raise BadLibrary(problem)


@contextmanager
def _in_memory(name: str, content: bytes) -> Iterator[str]:
    """Yield the path of a sealed memory file; an empty one where memfd_create does not work."""
    if not _can_load_from_memory():
        yield ""
        return
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        _write(fd, content)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        # dlopen returns the library that it has for a path which it has seen, and descriptors are used again. So each
        # path is spelled in a way of its own: the digits of a counter as "/" and "./".
        digits = f"{next(_spellings):b}"
        yield f"/proc/self/fd/{''.join('./' if digit == '1' else '/' for digit in digits)}{fd}"
    finally:
        close(fd)


@contextmanager
def _in_private_file(_: str, content: bytes) -> Iterator[str]:
    """Yield the path of a temporary file that only this user can write."""
    fd, path = tempfile.mkstemp(prefix="jitnorm-", suffix=".so")
    try:
        try:
            _write(fd, content)
        finally:
            close(fd)
        yield path
    finally:
        with suppress(OSError):
            os.unlink(path)


def _write(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
