"""What the mode changes while it is on: ATen's operators, what Inductor lowers, and, where cuDNN's attention cannot be
called in parts, torch's choice of attention."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from jitnorm.batch_invariant.attention import can_split_cudnn_attention
from jitnorm.batch_invariant.inductor import operators_kept_whole
from jitnorm.batch_invariant.rms_norm import clear_ones


class Installed:
    """The changes. All of them are made, or none is."""

    def __init__(self, bmm: bool) -> None:
        self.bmm = bmm
        with ExitStack() as stack:
            if not can_split_cudnn_attention():
                stack.enter_context(_no_cudnn_attention())
            stack.enter_context(operators_kept_whole(bmm))
            library = torch.library.Library("aten", "IMPL")
            stack.callback(library._destroy)
            stack.callback(clear_ones)
            with warnings.catch_warnings():  # that operators are overridden: they are meant to be
                warnings.simplefilter("ignore", UserWarning)
                _override(library, bmm)
            self._stack = stack.pop_all()

    def remove(self) -> None:
        self._stack.close()


def _override(library: torch.library.Library, bmm: bool) -> None:
    from jitnorm.batch_invariant import overrides

    for name, function in {**overrides.BACKEND, **(overrides.BMM if bmm else {})}.items():
        for key in ("CPU", "CUDA"):
            library.impl(name, function, key)
    for key, functions in overrides.OF_ONE_KEY.items():
        for name, function in functions.items():
            library.impl(name, function, key)


@contextmanager
def _no_cudnn_attention() -> Iterator[None]:
    """torch then takes its flash attention or its memory-efficient kernel, or composes what these cannot do."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
