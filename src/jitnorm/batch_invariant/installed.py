"""What the mode changes while it is on: ATen's operators, torch's choice of attention, and what Inductor lowers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack

import torch

from jitnorm.batch_invariant.inductor import operators_kept_whole
from jitnorm.batch_invariant.rms_norm import clear_ones


class Installed:
    """The changes. All of them are made, or none is."""

    def __init__(self, bmm: bool) -> None:
        self.bmm = bmm
        with ExitStack() as stack:
            stack.enter_context(_attention_without_splits())
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
    for name, function in overrides.COMPOSITE.items():
        library.impl(name, function, "CompositeImplicitAutograd")


class _attention_without_splits:
    """Flash attention and cuDNN's may split the keys by how many queries there are. torch's memory-efficient kernel
    does not, and its composed form is made of operators that the mode overrides."""

    def __enter__(self) -> None:
        cuda = torch.backends.cuda
        self._switches: list[tuple[Callable[[bool], None], bool]] = [
            (cuda.enable_flash_sdp, cuda.flash_sdp_enabled()),
            (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled()),
        ]
        for switch, _ in self._switches:
            switch(False)

    def __exit__(self, *_: object) -> None:
        for switch, before in self._switches:
            switch(before)
