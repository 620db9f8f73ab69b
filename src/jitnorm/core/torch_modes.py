"""Find out whether a tracer or a dispatch mode of torch is active on this thread, which must see every call.

The fast path of an operator does not use torch's dispatcher, so it has to check this itself.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import torch

# While a mode is active, one of these dispatch keys is included on its thread: Python for a TorchDispatchMode (such as
# those of make_fx and FakeTensorMode), PreDispatch for make_fx with pre_dispatch=True, Tracer for torch.jit.trace.
_KEYS: tuple[Any, ...] = tuple(map(torch._C._dispatch_key_parse, ("Python", "PreDispatch", "Tracer")))
_IS_KEY_INCLUDED = "_ZN3c104impl28tls_is_dispatch_key_includedENS_11DispatchKeyE"  # bool (uint16_t), in libc10


def is_active() -> bool:
    """Return whether a tracer or a dispatch mode is active on this thread."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._dispatch_tls_is_dispatch_key_included(_KEYS[1])
    )


def set_mode_query(library: Any) -> None:
    """Pass to a loaded kernel library torch's function that queries a dispatch key, and the keys of the modes.

    Without these the library refuses every call of the fast path: calls take the slow path, with the same results.
    """
    if address := _is_key_included():
        library.set_mode_query(address, *map(int, _KEYS))


@functools.cache
def _is_key_included() -> int:
    """Return the address of torch's function that queries whether a dispatch key is included, or 0."""
    try:
        libc10 = ctypes.CDLL("libc10.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)  # the one that torch loaded
        return ctypes.cast(libc10[_IS_KEY_INCLUDED], ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0
