"""Build kernels ahead of their first call, for any device, with or without a GPU.

    jitnorm.warmup(op="rmsnorm", hidden_size=4096, dtype="bf16", device="cuda", arch="9.0a")
    jitnorm.warmup(config="Qwen3-32B/config.json")  # all that the model calls

`jitnorm warmup` and `python -m jitnorm.warmup` are the same for a shell.
"""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch

from jitnorm import _operators  # noqa: F401
from jitnorm.core.checks import DTYPE_NAMES
from jitnorm.core.operators import OPERATORS
from jitnorm.core.targets import resolve_target
from jitnorm.jit.spec import KernelSpec
from jitnorm.warmup.run import Result, build_all, find_cached, prepare

if TYPE_CHECKING:
    from jitnorm.warmup.config import ModelConfig

__all__ = ["DTYPES", "OPS", "Plan", "Result", "make_plan", "warmup"]

OPS = OPERATORS  # the operators that can be built ahead of time, by name

# The names of dtypes that are accepted, such as "bf16" and "bfloat16".
DTYPES = {name: d for d, short in DTYPE_NAMES.items() for name in (short, str(d).removeprefix("torch."))}

T = TypeVar("T")
OneOrMore: TypeAlias = T | Iterable[T]
DType: TypeAlias = str | torch.dtype


class Plan(NamedTuple):
    """What a warm-up is going to do.

    Attributes:
        specs: The kernels to build.
        refused: The operator's message for each size that no kernel supports.
        notes: What the config does not say, and what patch_transformers does not call.
    """

    specs: list[KernelSpec]
    refused: list[str]
    notes: list[str]


def warmup(
    op: OneOrMore[str] | None = None,
    hidden_size: OneOrMore[int] | None = None,
    dtype: OneOrMore[DType] | None = None,
    weight_dtype: OneOrMore[DType] | None = None,
    device: str | None = None,
    arch: OneOrMore[str] | None = None,
    *,
    config: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    skip_unsupported: bool = False,
) -> Result:
    """Build kernels into the cache ahead of their first call, several at a time. None is loaded.

    `op`, `hidden_size`, `dtype`, `weight_dtype` and `arch` are one value or several, and every combination is built.
    JITNORM_DISABLE_JIT has no effect here: it forbids builds during calls.

    Args:
        op: The operator's name. None for all that a forward pass of the config's model calls, its norms with and
            without a residual, its activation and its cache among them; without a config, for "rmsnorm".
        hidden_size: The size of the normalised dimension; head_dim for fused_inplace_qknorm, d for activations, and
            the elements in a row for store_cache. The last two do not need one: without it they are built for sizes of
            whole 16 bytes, as nearly all are. Quantisation alone takes none: one kernel serves all sizes.
        dtype: The input's dtype, such as "bf16", "bfloat16" or torch.bfloat16. None for the config's own, or else
            "bf16".
        weight_dtype: The weight's dtype; None for the input's. Only norms have one.
        device: "cuda" or "cpu"; None for CUDA if torch finds a GPU or `arch` is given, else the CPU.
        arch: CUDA architectures, such as "9.0a" for an H100 or H200. None for this machine's GPU.
        config: A Hugging Face config.json, or the folder that contains one, instead of `hidden_size`.
        jobs: How many kernels to build at a time; None for as many as there are CPUs.
        skip_unsupported: Whether to build the rest, instead of raising, if a `hidden_size` is not supported.

    Returns:
        The kernels that were built, those that the cache had, the sizes that are not supported, and the builds that
        failed. With `config`, unsupported sizes raise nothing; check `Result.failed` as well.

    Raises:
        RuntimeError: A `hidden_size` is not supported (nothing is built then), or nothing can be built here.
        ValueError, TypeError: An argument is not accepted.
    """
    if jobs is not None and _integer("jobs", jobs) < 1:
        raise ValueError(f"jobs must be 1 or more, got {jobs}")
    plan = make_plan(op, hidden_size, dtype, weight_dtype, device, arch, config, skip_unsupported)
    cached, missing = find_cached(plan.specs)
    result = Result(cached=cached, refused=plan.refused)
    prepare(missing)
    for outcome in build_all(missing, jobs):
        result.add(outcome)
    return result


def make_plan(
    op: OneOrMore[str] | None = None,
    hidden_size: OneOrMore[int] | None = None,
    dtype: OneOrMore[DType] | None = None,
    weight_dtype: OneOrMore[DType] | None = None,
    device: str | None = None,
    arch: OneOrMore[str] | None = None,
    config: str | os.PathLike[str] | None = None,
    skip_unsupported: bool = False,
) -> Plan:
    """Return what `warmup` would do with these arguments, and raise what it raises. Nothing is built or created."""
    from jitnorm.warmup.config import read_config  # here, as `import jitnorm` would pay for it

    ops, sizes, weight_dtypes = _as_list(op), _as_list(hidden_size), _as_list(weight_dtype)
    for name in ops:
        if not isinstance(name, str) or name not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, got {name!r}")
    if problem := argument_problem(ops, sizes, weight_dtypes, config):
        raise ValueError(problem)
    model = None if config is None else read_config(config)
    sizes = [_integer("hidden_size", size) for size in sizes] or [None]
    notes = [*model.notes, model.note_on_patching()] if model and not ops else []
    targets = [resolve_target(device, a) for a in _as_list(arch) or [None]]
    dtypes = _as_list(dtype)
    if model and not dtypes:
        dtypes = [_dtype_of(model)]
        notes = notes if model.dtype else [f"{model.path} has no dtype: bf16 is built (--dtype names another)", *notes]
    specs: dict[KernelSpec, None] = {}
    refused: dict[str, None] = {}
    for name in ops or (model.operators() if model else ["rmsnorm"]):
        if model:
            sizes, missing = model.sizes_of(name)
            if not sizes:
                refused[f"{model.path} has no {missing}, which {name} is for"] = None
        for size, d, w, target in itertools.product(sizes, dtypes or ["bf16"], weight_dtypes or [None], targets):
            try:
                specs[OPS[name].warmup_spec(size, _dtype(d), _dtype(w or d), target)] = None
            except RuntimeError as error:
                refused[str(error)] = None
    if refused and config is None and not skip_unsupported:
        raise RuntimeError("\n".join(refused))
    return Plan(list(specs), list(refused), notes)


def argument_problem(
    ops: Collection[str],
    sizes: Collection[int],
    weight_dtypes: Collection[DType],
    config: object,
    names: tuple[str, str, str] = ("hidden_size", "config", "weight_dtype"),
) -> str | None:
    """Return why these arguments cannot be combined, or None if they can.

    Either sizes or a config must be given, unless no operator needs a size; and nothing that no operator takes.

    Args:
        ops: Names of operators; empty if none was given.
        sizes: The hidden sizes that were given.
        weight_dtypes: The weight dtypes that were given.
        config: The config that was given, or None.
        names: What the caller calls the size, the config and the weight's dtype.
    """
    size, source, weight = names
    have = "have" if len(ops) > 1 else "has"
    if weight_dtypes and ops and not any(OPS[name].has_weight for name in ops):
        return f"{weight} is not accepted: {' and '.join(ops)} {have} no weight"
    if config is not None:
        return f"give {size} or {source}, not both" if sizes else None
    if sizes and ops and all(OPS[name].size_name is None for name in ops):
        return f"{size} is not accepted: {' and '.join(ops)} {have} one kernel for all sizes, which is built without it"
    if sizes or (ops and not any(OPS[name].needs_size for name in ops)):
        return None
    return f"give {size} or {source}"


def _as_list(values: Any) -> list[Any]:
    """Return one value, several or None as a list."""
    if values is None:
        return []
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]


def _integer(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None


def _dtype_of(model: ModelConfig) -> torch.dtype:
    try:
        return _dtype(model.dtype or "bf16")
    except TypeError:
        accepted = "float16, bfloat16 or float32"
        raise ValueError(
            f"{model.path}: dtype (torch_dtype) must be {accepted}, got {model.dtype!r}. --dtype names another"
        ) from None


def _dtype(value: DType) -> torch.dtype:
    dtype = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPE_NAMES:
        raise TypeError(f"dtype must be {', '.join(DTYPE_NAMES.values())}, got {value}")
    return dtype
