"""Enter and leave the mode. Leaving restores what was there before.

The mode belongs to the process, as torch's dispatcher does: all threads are in it or none is. Each context is an entry
in a list, and the newest entry decides. So contexts may nest, overlap between threads and end in any order.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jitnorm.batch_invariant.aten_patches import AtenPatches


@dataclass
class _Request:
    """The mode that one context asks for. Compared by identity, because two contexts may ask for the same."""

    enabled: bool
    bmm: bool = True


# The first belongs to enable_ and disable_batch_invariant_mode outside any context.
_requests = [_Request(enabled=False)]
_aten_patches: AtenPatches | None = None
_lock = threading.RLock()


@contextmanager
def set_batch_invariant_mode(enabled: bool = True) -> Iterator[None]:
    """Turn the mode on, or off, until the end of the `with` block, and then restore it, even after an error.

    Args:
        enabled: False turns the mode off, inside a block that has turned it on.

    Raises:
        TypeError: `enabled` is not a bool.
    """
    request = _Request(_check_bool("enabled", enabled))
    with _lock:
        _requests.append(request)
        try:
            _apply()
        except BaseException:
            _remove(request)
            _apply()
            raise
    try:
        yield
    finally:
        with _lock:
            _remove(request)
            _apply()


def enable_batch_invariant_mode(enable_bmm: bool = True) -> None:
    """Turn the mode on until it is turned off. A second call changes nothing.

    Inside a `set_batch_invariant_mode` block it changes the mode of that block, which ends with the block.

    Args:
        enable_bmm: False leaves torch's own `bmm` and `baddbmm`, and so attention that is composed of them.

    Raises:
        TypeError: `enable_bmm` is not a bool.
    """
    _set(True, _check_bool("enable_bmm", enable_bmm))


def disable_batch_invariant_mode() -> None:
    """Turn the mode off; inside a `set_batch_invariant_mode` block, until that block ends."""
    _set(False, True)


def is_batch_invariant_mode_enabled() -> bool:
    """Return whether the mode is on in this process."""
    return _aten_patches is not None


def _set(enabled: bool, bmm: bool) -> None:
    with _lock:
        request = _requests[-1]
        before = request.enabled, request.bmm
        request.enabled, request.bmm = enabled, bmm
        try:
            _apply()
        except BaseException:
            request.enabled, request.bmm = before
            _apply()
            raise


def _remove(request: _Request) -> None:
    _requests[:] = [other for other in _requests if other is not request]


def _apply() -> None:
    """Make or undo the changes that the newest request asks for."""
    global _aten_patches
    request = _requests[-1]
    if _aten_patches and (not request.enabled or _aten_patches.bmm != request.bmm):
        old, _aten_patches = _aten_patches, None  # forgotten even if its removal fails
        old.remove()
    if request.enabled and not _aten_patches:
        _aten_patches = AtenPatches(request.bmm)


def _check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return value


def _after_fork() -> None:
    """Replace the lock: a thread that held it does not exist in the child. The mode stays that of the parent."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
