"""Make the functions of a CUDA kernel from its cubin, by the launcher (csrc/launcher/launcher.cc)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jitnorm.jit.library import KERNEL_INFO, Elf

if TYPE_CHECKING:
    import tvm_ffi


class CudaModule:
    """The functions of one cubin, with the names that a CPU kernel's library has.

    Args:
        launcher: The launcher.
        binding: The bindings function that calls the kernel.
        cubin: The cubin, verified.
        symbols: The names of its functions, as in `KernelSpec.symbols`.

    Raises:
        BadLibrary: The cubin is damaged.
        RuntimeError: The launcher does not know the bindings function, or is of another version.
    """

    def __init__(self, launcher: tvm_ffi.Module, binding: str, cubin: bytes, symbols: Mapping[str, str]) -> None:
        info = Elf(cubin).variable(KERNEL_INFO)
        texts = [name.encode() + b"\0" for name in (binding, *symbols.values())]
        buffers = [ctypes.create_string_buffer(content, len(content)) for content in (cubin, info, *texts)]
        cubin_address, info_address, name, *symbol_names = map(ctypes.addressof, buffers)
        handle = launcher.make_kernel(name, cubin_address, info_address, len(info), *symbol_names)
        _buffers.append(buffers)
        self.set_mode_query = launcher.set_mode_query
        setattr(self, binding, launcher.make_function(name, handle, 0))
        setattr(self, f"{binding}_fast_path", launcher.make_function(name, handle, 1))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


# Never freed: a kernel of the launcher keeps the addresses of its cubin and names, and exists until the process ends.
_buffers: list[list[Any]] = []
