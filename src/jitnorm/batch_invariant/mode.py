"""Entering and leaving the mode, exactly: what was there before is there after.

The mode belongs to the process, as torch's dispatcher does: all threads are in it or none is. Each context is an entry
of its own in a list, and the newest entry that is still there counts; so contexts may nest, overlap between threads and
end in any order.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jitnorm.batch_invariant.installed import Installed


@dataclass
class _Wish:
    """What one context asks for; compared by identity, as two contexts may ask for the same."""

    enabled: bool
    bmm: bool = True


_wishes = [_Wish(enabled=False)]  # the first is that of enable_ and disable_batch_invariant_mode outside any context
_installed: Installed | None = None
_lock = threading.RLock()


@contextmanager
def set_batch_invariant_mode(enabled: bool = True) -> Iterator[None]:
    """Turns the mode on, or off, until the end of the `with` block; then it is again what it was, even after an error.

    Args:
        enabled: False turns it off inside a block that has it on.

    Raises:
        TypeError: `enabled` is not a bool.
    """
    wish = _Wish(_bool("enabled", enabled))
    with _lock:
        _wishes.append(wish)
        try:
            _apply()
        except BaseException:
            _remove(wish)
            _apply()
            raise
    try:
        yield
    finally:
        with _lock:
            _remove(wish)
            _apply()


def enable_batch_invariant_mode(enable_bmm: bool = True) -> None:
    """Turns the mode on, until it is turned off. Doing so twice is doing so once.

    Inside a `set_batch_invariant_mode` block it changes that block's mode, which ends with the block.

    Args:
        enable_bmm: False leaves `bmm` and `baddbmm`, and so attention that is made of them, as torch has them.

    Raises:
        TypeError: `enable_bmm` is not a bool.
    """
    _set(True, _bool("enable_bmm", enable_bmm))


def disable_batch_invariant_mode() -> None:
    """Turns the mode off. Inside a `set_batch_invariant_mode` block, until that block ends."""
    _set(False, True)


def is_batch_invariant_mode_enabled() -> bool:
    """Whether the mode is on, in this process."""
    return _installed is not None


def _set(enabled: bool, bmm: bool) -> None:
    with _lock:
        wish = _wishes[-1]
        before = wish.enabled, wish.bmm
        wish.enabled, wish.bmm = enabled, bmm
        try:
            _apply()
        except BaseException:
            wish.enabled, wish.bmm = before
            _apply()
            raise


def _remove(wish: _Wish) -> None:
    _wishes[:] = [other for other in _wishes if other is not wish]


def _apply() -> None:
    """Makes the dispatcher what the newest wish says."""
    global _installed
    wish = _wishes[-1]
    if _installed and (not wish.enabled or _installed.bmm != wish.bmm):
        old, _installed = _installed, None  # whatever comes of its removal
        old.remove()
    if wish.enabled and not _installed:
        _installed = Installed(wish.bmm)


def _bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return value


def _after_fork() -> None:
    """The child is in the mode that the parent was in; a thread that held the lock stayed there."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
