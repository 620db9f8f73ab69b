"""What torch keeps for each thread of the modes that want to see every call: tracers and torch.utils' dispatch modes.

The fast path of an operator does not pass torch's dispatcher, so that it has to ask itself whether one is active.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import torch

# The dispatch keys that a thread includes while a mode is active: TorchDispatchMode (which make_fx and FakeTensorMode
# are), make_fx with pre_dispatch=True, and torch.jit.trace.
_KEYS: tuple[Any, ...] = tuple(map(torch._C._dispatch_key_parse, ("Python", "PreDispatch", "Tracer")))
_IS_KEY_INCLUDED = "_ZN3c104impl28tls_is_dispatch_key_includedENS_11DispatchKeyE"  # bool (uint16_t), in libc10


def is_active() -> bool:
    """Return whether a mode of this thread wants to see every call."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch._C._dispatch_tls_is_dispatch_key_included(_KEYS[1])
    )


def watch(library: Any) -> None:
    """Tell a loaded kernel library how to ask torch for active modes.

    A library that was not told refuses every call of the fast path, so that calls stay right and become slow.
    """
    if address := _is_key_included():
        library.watch_modes(address, *map(int, _KEYS))


@functools.cache
def _is_key_included() -> int:
    """Return the address of torch's function that tells whether this thread includes a dispatch key, or 0."""
    try:
        libc10 = ctypes.CDLL("libc10.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)  # the one that torch loaded
        return ctypes.cast(libc10[_IS_KEY_INCLUDED], ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0
