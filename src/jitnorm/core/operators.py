"""The base class of operators, which keeps their kernels and calls them, and the registry of all operators."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

from jitnorm.core import torch_modes
from jitnorm.jit.load import load
from jitnorm.jit.spec import KernelSpec, Target

# The dtypes that kernels compute with, as csrc/include/jitnorm/dtype.h calls them.
CPP_TYPES = {torch.float16: "fp16_t", torch.bfloat16: "bf16_t", torch.float32: "float"}
DTYPES = tuple(CPP_TYPES)

# The registry: every operator by name. Warm-up, the generated reference and the tests over all operators read it.
OPERATORS: dict[str, Operator] = {}
# An example call of every operator by name. A kernel that runs only as part of another operator's call has none.
EXAMPLES: dict[str, Example] = {}


@dataclass(eq=False, repr=False)  # not frozen: an import would compile two more functions for each class
class Operator:
    """One operator, or one variant of an operator. A subclass implements `spec`."""

    op: str  # its name
    binding: str  # the bindings function in csrc/elementwise that calls its kernels
    # The operator whose calls run this kernel too; None for an operator with a public function of its own.
    part_of: Operator | None = field(default=None, kw_only=True)

    # What the size in `warmup_spec` is; None if one kernel supports all sizes.
    size_name: ClassVar[str | None] = "hidden_size"
    needs_size: ClassVar[bool] = True  # whether a warm-up has to name a size
    has_weight: ClassVar[bool] = False  # whether kernels differ by the weight's dtype
    options: ClassVar[tuple[str, ...]] = ()  # what else a warm-up can name: keyword arguments of `warmup_spec`

    # Each operator has its own tables. They are not fields, because dynamo before torch 2.8 tries to trace their keys.
    #
    # The last kernel used for each `fast_key`, made of tensor attributes that are cheap to read, such as the input's
    # dtype and weight.nbytes. Nested dictionaries, because looking up a tuple takes longer. The cached kernel may be
    # for another device, or for other tensors with the same key: then it refuses the call, and the slow path finds
    # the right one.
    fast_cache: ClassVar[dict[Hashable, Any]]
    # The same kernels for calls through torch.ops.jitnorm: these do not check for an active mode of torch.
    torch_op_cache: ClassVar[dict[tuple[Hashable, ...], Callable[..., int]]]
    # Every kernel used so far, by the arguments of `spec`: its function for the fast path, and that for torch.ops.
    kernels_by_spec: ClassVar[dict[tuple[Any, ...], tuple[Any, Any]]]

    def __post_init__(self) -> None:
        for table in ("fast_cache", "torch_op_cache", "kernels_by_spec"):
            setattr(self, table, {})
        OPERATORS[self.op] = self

    @property
    def tables(self) -> tuple[dict[Any, Any], ...]:
        """Return the operator's tables of kernels, for tests that clear them."""
        return self.fast_cache, self.torch_op_cache, self.kernels_by_spec

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Return the dtypes of the input that its kernels support."""
        return DTYPES

    def spec(self, *args: Any, **kwargs: Any) -> KernelSpec:
        """Return what to build. RuntimeError for an unsupported size, TypeError for an unsupported dtype."""
        raise NotImplementedError

    def warmup_spec(
        self, size: int | None, dtype: torch.dtype, weight_dtype: torch.dtype, target: Target
    ) -> KernelSpec:
        """Return what to build for a size, or for most sizes if it is None. Raises as `spec`."""
        return self.spec(size, dtype, weight_dtype, target)

    def kernel(self, fast_key: tuple[Hashable, ...], key: tuple[Any, ...]) -> Callable[..., int]:
        """Return the function for `spec(*key)`, built and loaded if need be, and cache it under `fast_key`."""
        functions = self.kernels_by_spec.get(key)
        if functions is None:
            functions = self.kernels_by_spec[key] = self._load(key)
        fast_path, torch_op = functions
        *outer, last = fast_key
        table = self.fast_cache
        for name in outer:
            table = table.setdefault(name, {})
        table[last], self.torch_op_cache[fast_key] = fast_path, torch_op
        return torch_op  # type: ignore[no-any-return]

    def _load(self, key: tuple[Any, ...]) -> tuple[Any, Any]:
        spec = self.spec(*key)
        library = load(spec)
        torch_modes.set_mode_query(library)
        functions = getattr(library, f"{spec.binding}_fast_path"), getattr(library, spec.binding)
        # A launch takes microseconds: if another thread took the GIL meanwhile, this one would wait for it afterwards.
        # CPU libraries release the GIL themselves if the work takes long enough.
        for function in functions:
            function.release_gil = False
        return functions

    def try_cached(self, fast_key: tuple[Hashable, ...], *arguments: Any) -> bool:
        """Run the kernel cached for `fast_key` on unchecked arguments. False if there is none or it refuses them."""
        function = self.torch_op_cache.get(fast_key)
        return function is not None and not function(*arguments)

    def call(self, fast_key: tuple[Hashable, ...], key: tuple[Any, ...], *arguments: Any) -> None:
        """Run the kernel for `spec(*key)` on arguments that have been checked."""
        if self.kernel(fast_key, key)(*arguments):
            raise self.refused()

    def refused(self) -> RuntimeError:
        """Return the error of a kernel that refuses arguments that have been checked."""
        return RuntimeError(f"jitnorm: {self.op} refused arguments that its checks accept; please report this")


@dataclass(eq=False, repr=False)
class LayoutOperator(Operator):
    """An operator with a kernel for each layout of its arguments, in the order of their speed.

    Attributes:
        functions: by what kernels differ by, except the layout and the device: the function for each of `layouts`, or
            None for a layout that has not been called.
    """

    has_weight: ClassVar[bool] = True
    layouts: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.functions: dict[tuple[Any, ...], list[Callable[..., int] | None]] = {}

    @property
    def tables(self) -> tuple[dict[Any, Any], ...]:
        """Return the operator's tables of kernels, for tests that clear them."""
        return (*super().tables, self.functions)

    def kernel_of_layout(self, key: tuple[Any, ...], layout: str, spec_key: tuple[Any, ...]) -> Callable[..., int]:
        """Return the function for `spec(*spec_key)`, built and loaded if need be, and cache it under `key`."""
        if spec_key not in self.kernels_by_spec:
            self.kernels_by_spec[spec_key] = self._load(spec_key)
        fast_path, torch_op = self.kernels_by_spec[spec_key]
        self.functions.setdefault(key, [None] * len(self.layouts))[self.layouts.index(layout)] = fast_path
        return torch_op  # type: ignore[no-any-return]


class Shape(NamedTuple):
    """Sizes, dtype and device of the tensors of an example call."""

    rows: int
    size: int  # as in `Operator.warmup_spec`
    dtype: torch.dtype
    device: torch.device

    def randn(self, *shape: int) -> torch.Tensor:
        """Return normally distributed numbers of this dtype, [rows, size] unless a shape is given."""
        return torch.randn(shape or (self.rows, self.size), device=self.device).to(self.dtype)

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return zeros of `dtype`, or of this dtype, [rows, size] unless a shape is given."""
        zeros = torch.zeros(shape or (self.rows, self.size), dtype=torch.float32, device=self.device)
        return zeros.to(dtype or self.dtype)


class Example(NamedTuple):
    """A call of a public function that runs one operator."""

    function: Callable[..., Any]
    make_arguments: Callable[[Shape], dict[str, Any]]  # those that the variant needs, by name
    written: tuple[str, ...] = ()  # the arguments that are written in place
    per_row: tuple[str, ...] = ("input",)  # the arguments that have one row for each row of the result
    contiguous: tuple[str, ...] = ()  # the arguments that must be contiguous; the rows of others may be apart
    # The argument with the slot of each row in the caches, which are those written arguments that are not in `per_row`.
    slots: str | None = None
    slot_dims: int = 1  # how many leading dimensions of a cache count its slots: 2 if it has blocks
    sizes: tuple[int, ...] = (128, 4096)  # for `jitnorm verify-invariance`: a size for each kind of kernel
    # Makes the optional arguments in which the function returns its results, such as `out`.
    make_outputs: Callable[[Shape], dict[str, torch.Tensor]] | None = None

    def arguments(
        self, rows: int, size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> dict[str, Any]:
        """Return new arguments for `rows` rows of `size`, by name."""
        return self.make_arguments(Shape(rows, size, dtype, torch.device(device)))

    def outputs(
        self, rows: int, size: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> dict[str, torch.Tensor]:
        """Return new optional outputs for the same call, by name; nothing for a function that has none."""
        return self.make_outputs(Shape(rows, size, dtype, torch.device(device))) if self.make_outputs else {}

    def run(self, arguments: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Call the function. Return its results, followed by the arguments that it has written in place."""
        result = self.function(**arguments)
        returned = () if result is None else result if isinstance(result, tuple) else (result,)
        return (*returned, *(arguments[name] for name in self.written))
