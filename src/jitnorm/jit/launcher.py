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
        # The launcher keeps the addresses of the cubin and of the names for as long as the process lives.
        self._kept = [ctypes.create_string_buffer(cubin, len(cubin))]
        names = [ctypes.create_string_buffer(name.encode()) for name in (binding, *symbols.values())]
        self._kept += names
        address, *symbol_addresses = map(ctypes.addressof, names)
        described = ctypes.create_string_buffer(info, len(info))
        handle = launcher.make_kernel(
            address, ctypes.addressof(self._kept[0]), ctypes.addressof(described), len(info), *symbol_addresses
        )
        _for_ever.append(self._kept)
        self.set_mode_query = launcher.set_mode_query
        setattr(self, binding, launcher.make_function(address, handle, 0))
        setattr(self, f"{binding}_fast_path", launcher.make_function(address, handle, 1))

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


_for_ever: list[list[Any]] = []
