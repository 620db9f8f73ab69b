"""Compile CUDA sources in this process with NVRTC, which comes with every CUDA build of torch."""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib.util
import os
import sys
from collections.abc import Sequence
from contextlib import suppress


class NvrtcError(Exception):
    """NVRTC cannot be used; the message says why."""


class CompileError(Exception):
    """The source does not compile; the message is NVRTC's log."""


_COMPILATION_FAILED = 6  # NVRTC_ERROR_COMPILATION; other errors do not come from the source
_INVALID_OPTION = 5  # NVRTC_ERROR_INVALID_OPTION
# It takes a tenth off the time of a build and changes no byte of the result: declarations are left out that no kernel
# uses. Older versions do not know it.
_OPTIONAL = ("-minimal",)
# Optimise the kernels of a cubin in threads, which takes a fifth off the time of a build. Their order in the cubin then
# changes from build to build.
_IN_THREADS = ("-split-compile=0", "-Xptxas", "--split-compile=0")
_FIRST_MAJOR_WITH_THREADS = 13  # the first whose options were tried
# Where NVIDIA's wheels have the library, below their namespace package: from CUDA 13 on, and before.
_IN_WHEELS = ("cu*/lib/libnvrtc.so.[0-9]*", "cuda_nvrtc/lib/libnvrtc.so.[0-9]*")


class Nvrtc:
    """The library, loaded."""

    def __init__(self, path: str) -> None:
        """Load the library at `path`. Raises NvrtcError if it cannot be loaded, or lacks one of the functions."""
        # It opens its second library by name, which is beside it and not always on a path of the loader.
        for builtins in glob.glob(os.path.join(glob.escape(os.path.dirname(path)), "libnvrtc-builtins.so*")):
            with suppress(OSError):
                ctypes.CDLL(builtins, mode=os.RTLD_NOW | os.RTLD_GLOBAL)
        try:
            self._library = ctypes.CDLL(path)
            for function in ("nvrtcGetCUBIN", "nvrtcGetSupportedArchs"):  # the newest of those that are used
                getattr(self._library, function)
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:
            raise NvrtcError(str(error)) from None
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version, self._major = f"{major.value}.{minor.value}", major.value
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", archs)
        self.archs = tuple(archs)  # such as 90 for sm_90 and sm_90a
        self._optional: tuple[str, ...] = _OPTIONAL

    def compile(self, source: str, name: str, options: Sequence[str], in_threads: bool = False) -> bytes:
        """Return the cubin of `source`.

        Args:
            source: The source, without the files that it includes.
            name: Its name in the log.
            options: NVRTC's options.
            in_threads: Whether to compile the kernels of the source in several threads, where NVRTC can.

        Raises:
            CompileError: The source does not compile.
            NvrtcError: NVRTC fails for another reason.
        """
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        try:
            threads = _IN_THREADS if in_threads and self._major >= _FIRST_MAJOR_WITH_THREADS else ()
            arguments = [os.fsencode(option) for option in (*options, *threads, *self._optional)]
            array = (ctypes.c_char_p * len(arguments))(*arguments)
            status = self._library.nvrtcCompileProgram(program, len(arguments), array)
            if status == _INVALID_OPTION and self._optional:
                self._optional = ()
                return self.compile(source, name, options, in_threads)
            if status:
                log = self._bytes("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
                if status == _COMPILATION_FAILED and "libnvrtc-builtins" not in log:
                    raise CompileError(log)
                raise NvrtcError(log.strip() or self._message(status))
            return self._bytes("CUBIN", program)
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, content)
        return content.raw

    def _call(self, function: str, *arguments: object) -> None:
        if status := getattr(self._library, function)(*arguments):
            raise NvrtcError(f"{function}: {self._message(status)}")

    def _message(self, status: int) -> str:
        return (self._library.nvrtcGetErrorString(status) or b"").decode()


def find() -> str:
    """Return the path of NVRTC's library, which is searched where torch does: in NVIDIA's wheels, then elsewhere.

    cuda-pathfinder searches the wheels too. Its import would take a fifth of the time of a first call.

    Raises:
        NvrtcError: There is none.
    """
    if in_wheels := _find_in_wheels():
        return in_wheels
    from cuda import pathfinder

    try:
        return str(pathfinder.load_nvidia_dynamic_lib("nvrtc").abs_path)
    except RuntimeError as error:
        lines = str(error).strip().splitlines() or ["it is not installed"]
        raise NvrtcError(lines[0]) from None


def _find_in_wheels() -> str | None:
    """Return the library of the wheels on `sys.path`, of torch's CUDA version if there are several, or None."""
    package = importlib.util.find_spec("nvidia")
    folders = list(package.submodule_search_locations or ()) if package else []
    names = [os.path.join(glob.escape(folder), pattern) for folder in folders for pattern in _IN_WHEELS]
    found = [path for name in names for path in sorted(glob.glob(name))]
    torch = sys.modules.get("torch")  # some commands do without it
    major = ((torch and torch.version.cuda) or "").partition(".")[0]
    return next((path for path in found if path.endswith(f".so.{major}")), found[0] if found else None)


@functools.cache
def load(path: str) -> Nvrtc:
    """Return the library at `path`, which is loaded once. Raises as `Nvrtc`."""
    return Nvrtc(path)
