"""What every operator keeps of its kernels: the last ones, which a call finds in nanoseconds, and all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from jitnorm.jit.load import load
from jitnorm.jit.spec import KernelSpec

# The dtypes that kernels compute with, as csrc/include/jitnorm/dtype.h calls them.
CPP_TYPES = {torch.float16: "fp16_t", torch.bfloat16: "bf16_t", torch.float32: "float"}
DTYPES = tuple(CPP_TYPES)

OPERATORS: list[Operator] = []  # every one of the package, in the order in which they were made


@dataclass(frozen=True)
class Operator:
    """One operator: a subclass says in `spec` what to build for one of its sizes."""

    op: str  # its name
    entry: str  # the glue in csrc/elementwise that its kernels are called through
    # Each operator has its own, but not as fields, of which dynamo before torch 2.8 wants to understand the keys.
    # The last kernel used for what is cheapest to ask of tensors, such as (weight's bytes, input's dtype). It may be
    # for another device, or for tensors that this does not tell apart: then it refuses, and a detour finds the right
    # one.
    kernels: ClassVar[dict[Hashable, Callable[..., int]]]
    # Every kernel used so far, by all that tells one from another: the arguments of `spec`.
    exact: ClassVar[dict[tuple[Any, ...], Any]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernels", {})
        object.__setattr__(self, "exact", {})
        OPERATORS.append(self)

    def spec(self, *args: Any, **kwargs: Any) -> KernelSpec:
        """What to build. RuntimeError for a size that is not supported, TypeError for such a dtype."""
        raise NotImplementedError

    def kernel(self, quick: Hashable, key: tuple[Any, ...]) -> Callable[..., int]:
        """The function for `spec(*key)`, built and loaded if need be; the next call finds it at once by `quick`."""
        function = self.exact.get(key)
        if function is None:
            function = self.exact[key] = getattr(load(self.spec(*key)), self.entry)
        # A launch takes microseconds: to hand the interpreter to another thread meanwhile is to wait for it afterwards.
        # On the CPU the library hands it over itself, where the work is long enough.
        function.release_gil = False
        self.kernels[quick] = function
        return function  # type: ignore[no-any-return]

    def call_last(self, quick: Hashable, *arguments: Any) -> bool:
        """Runs the kernel that served last on unchecked `arguments`; False if there is none or it refuses them."""
        function = self.kernels.get(quick)
        return function is not None and not function(*arguments)

    def call(self, quick: Hashable, key: tuple[Any, ...], *arguments: Any) -> None:
        """Runs the kernel on `arguments`, which have been checked."""
        if self.kernel(quick, key)(*arguments):
            raise RuntimeError(f"jitnorm: {self.op} refused arguments that its checks accept; please report this")
