"""What every operator keeps of its kernels: the last ones, which a call finds in nanoseconds, and all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from jitnorm.core import torch_modes
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
    # The last kernel used for what is cheapest to ask of tensors, such as the input's dtype and then the weight's
    # bytes: a dictionary of dictionaries, as looking up a tuple takes longer. It may be for another device, or for
    # tensors that this does not tell apart: then it refuses, and the slow path finds the right one.
    kernels: ClassVar[dict[Hashable, Any]]
    # The same kernels for calls that torch's dispatcher has seen: these run whatever mode of torch is active.
    dispatched: ClassVar[dict[tuple[Hashable, ...], Callable[..., int]]]
    # Every kernel used so far, for the fast path and for dispatched calls, by all that tells one from another: the
    # arguments of `spec`.
    exact: ClassVar[dict[tuple[Any, ...], tuple[Any, Any]]]

    def __post_init__(self) -> None:
        for table in ("kernels", "dispatched", "exact"):
            object.__setattr__(self, table, {})
        OPERATORS.append(self)

    def spec(self, *args: Any, **kwargs: Any) -> KernelSpec:
        """What to build. RuntimeError for a size that is not supported, TypeError for such a dtype."""
        raise NotImplementedError

    def kernel(self, quick: tuple[Hashable, ...], key: tuple[Any, ...]) -> Callable[..., int]:
        """The function for `spec(*key)`, built and loaded if need be; the next call finds it at once by `quick`."""
        functions = self.exact.get(key)
        if functions is None:
            functions = self.exact[key] = self._load(key)
        # A launch takes microseconds: to hand the interpreter to another thread meanwhile is to wait for it afterwards.
        # On the CPU the library hands it over itself, where the work is long enough.
        for function in functions:
            function.release_gil = False
        fast_path, dispatched = functions
        *outer, last = quick
        table = self.kernels
        for name in outer:
            table = table.setdefault(name, {})
        table[last], self.dispatched[quick] = fast_path, dispatched
        return dispatched  # type: ignore[no-any-return]

    def _load(self, key: tuple[Any, ...]) -> tuple[Any, Any]:
        library = load(self.spec(*key))
        torch_modes.watch(library)
        return getattr(library, f"{self.entry}_fast_path"), getattr(library, self.entry)

    def call_last(self, quick: tuple[Hashable, ...], *arguments: Any) -> bool:
        """Runs the kernel that served last on unchecked `arguments`; False if there is none or it refuses them."""
        function = self.dispatched.get(quick)
        return function is not None and not function(*arguments)

    def call(self, quick: tuple[Hashable, ...], key: tuple[Any, ...], *arguments: Any) -> None:
        """Runs the kernel on `arguments`, which have been checked."""
        if self.kernel(quick, key)(*arguments):
            raise RuntimeError(f"jitnorm: {self.op} refused arguments that its checks accept; please report this")
