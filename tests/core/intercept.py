"""A dispatch mode and a tensor subclass, which torch's dispatcher asks about every call."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Seen(TorchDispatchMode):
    """Records the names of the operators that it sees."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Negated(torch.Tensor):
    """Stands for the negative of what its storage holds."""

    @staticmethod
    def __new__(cls, value):
        return torch.Tensor._make_subclass(cls, -value)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        opened = []

        def plain(value):
            if isinstance(value, Negated):
                with torch._C._DisableTorchDispatch():
                    opened.append((value, torch.neg(value).as_subclass(torch.Tensor)))
                return opened[-1][1]
            return value

        result = func(*map(plain, args), **{name: plain(value) for name, value in (kwargs or {}).items()})
        with torch._C._DisableTorchDispatch():
            for value, real in opened:  # what was written
                value.as_subclass(torch.Tensor).copy_(-real)
        return result


def real(value):
    """Return the tensor that a `Negated` stands for."""
    with torch._C._DisableTorchDispatch():
        return torch.neg(value).as_subclass(torch.Tensor)
