"""Building kernels ahead of time, for any device, with or without a GPU.

    jitnorm.warmup(op="rmsnorm", hidden_size=4096, dtype="bf16", device="cuda", arch="9.0a")
    jitnorm.warmup(config="Qwen3-32B/config.json")  # all that the model calls

`jitnorm warmup` and `python -m jitnorm.warmup` are the same for a shell.
"""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

from jitnorm.core.checks import DTYPE_NAMES
from jitnorm.core.operators import OPERATORS
from jitnorm.core.targets import resolve_target
from jitnorm.jit.spec import KernelSpec
from jitnorm.qknorm import QKNORM
from jitnorm.store_cache import STORE_CACHE
from jitnorm.warmup.run import Result, build_all, prepare, survey

if TYPE_CHECKING:
    from jitnorm.warmup.config import Model

__all__ = ["DTYPES", "OPS", "Plan", "Result", "make_plan", "warmup"]

# The operators that can be built ahead of time are those of the registry.
OPS = OPERATORS

# The words for dtypes.
DTYPES = {name: d for d, short in DTYPE_NAMES.items() for name in (short, str(d).removeprefix("torch."))}

T = TypeVar("T")
OneOrMore: TypeAlias = T | Iterable[T]
DType: TypeAlias = str | torch.dtype


@dataclass(frozen=True)
class Plan:
    """What a warm-up comes to, before anything is built."""

    specs: list[KernelSpec]
    refused: list[str]  # a line for each size that no kernel serves, as the operator itself says it
    notes: list[str]  # what the config does not tell, and what patch_transformers does not call, a line each


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
    """Builds kernels into the cache ahead of their first call, several at a time; none is loaded.

    `op`, `hidden_size`, `dtype`, `weight_dtype` and `arch` are one value or several; every combination is built.
    JITNORM_DISABLE_JIT does not matter here: it forbids builds that nobody asked for.

    Args:
        op: the operator's name. None for all that the config's model calls in a forward pass, its norms with and
            without a residual, its activation and its cache among them; without a config for "rmsnorm".
        hidden_size: the size of the normalised dimension; for fused_inplace_qknorm that is head_dim, for activations d,
            and for store_cache the elements in a row. The last two do without one, and are built for sizes of whole 16
            bytes then, as nearly all are. Quantisation alone takes none: one kernel serves all sizes.
        dtype: the input's, such as "bf16", "bfloat16" or torch.bfloat16. None for the config's own, or else "bf16".
        weight_dtype: the weight's; None for the input's. Only norms have one.
        device: "cuda" or "cpu"; None for CUDA where torch sees a GPU or `arch` is given, else the CPU.
        arch: CUDA architectures, such as "9.0a" for an H100 or H200. None for this machine's GPU.
        config: a Hugging Face config.json, or the folder that holds one, instead of `hidden_size`.
        jobs: how many to build at a time; None for as many as there are CPUs.
        skip_unsupported: for a `hidden_size` that is not supported, build the rest instead of raising.

    Returns:
        The kernels that were built, those that the cache had, the sizes that were refused, and the builds that failed.
        With `config`, sizes that are not supported are among the refused; look at `Result.failed` as well.

    Raises:
        RuntimeError: a `hidden_size` is not supported (nothing is built then), or nothing can be built here.
        ValueError, TypeError: an argument that is not accepted.
    """
    if jobs is not None and _whole("jobs", jobs) < 1:
        raise ValueError(f"jobs must be 1 or more, got {jobs}")
    plan = make_plan(op, hidden_size, dtype, weight_dtype, device, arch, config, skip_unsupported)
    cached, missing = survey(plan.specs)
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
    """From `warmup`'s words to kernels. Nothing is built, created or started."""
    from jitnorm.warmup.config import read_config  # here, as `import jitnorm` would pay for it

    sizes, ops, weights = _several(hidden_size), _several(op), _several(weight_dtype)
    for name in ops:
        if not isinstance(name, str) or name not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, got {name!r}")
    if problem := problem_of_sources(ops, sizes, weights, config):
        raise ValueError(problem)
    model = None if config is None else read_config(config)
    sizes = [_whole("hidden_size", size) for size in sizes] or [None]
    notes = [*model.notes, model.note_on_patch(_ops_of(model))] if model and not ops else []
    specs: dict[KernelSpec, None] = {}
    refused: dict[str, None] = {}
    targets = [resolve_target(device, a) for a in _several(arch) or [None]]
    inputs, weights = _several(dtype), weights or [None]
    if model and not inputs:
        inputs = [_dtype_of(model)]
        notes = notes if model.dtype else [f"{model.path} has no dtype: bf16 is built (--dtype names another)", *notes]
    for name in ops or (_ops_of(model) if model else ["rmsnorm"]):
        if model:
            sizes, lacking = _sizes_of(model, name)
            if not sizes:
                refused[f"{model.path} has no {lacking}, which {name} is for"] = None
        for size, d, w, target in itertools.product(sizes, inputs or ["bf16"], weights, targets):
            try:
                specs[OPS[name].warmup_spec(size, _dtype(d), _dtype(w or d), target)] = None
            except RuntimeError as error:
                refused[str(error)] = None
    if refused and config is None and not skip_unsupported:
        raise RuntimeError("\n".join(refused))
    return Plan(list(specs), list(refused), notes)


def problem_of_sources(
    ops: Collection[str],
    sizes: Collection[int],
    weights: Collection[DType],
    config: object,
    names: tuple[str, str, str] = ("hidden_size", "config", "weight_dtype"),
) -> str | None:
    """What is wrong with where the sizes come from; None where either sizes or a config are given, or neither and no
    operator needs any, and where nothing is given that no operator takes."""
    size, source, weight = names
    what = "have" if len(ops) > 1 else "has"
    if weights and ops and not any(OPS[name].has_weight for name in ops):
        return f"{weight} is not accepted: {' and '.join(ops)} {what} no weight"
    if config is not None:
        return f"give {size} or {source}, not both" if sizes else None
    if sizes and ops and all(OPS[name].size_name is None for name in ops):
        return f"{size} is not accepted: {' and '.join(ops)} {what} one kernel for all sizes, which is built without it"
    return None if sizes or (ops and not any(OPS[name].needs_size for name in ops)) else f"give {size} or {source}"


def _ops_of(model: Model) -> list[str]:
    """What a forward pass of the model calls, as far as it is in OPS."""
    from jitnorm.warmup.config import HIDDEN_ACTS

    norms = ["gemma_rmsnorm", "gemma_fused_add_rmsnorm"] if model.adds_one else ["rmsnorm", "fused_add_rmsnorm"]
    heads = [QKNORM.op] if model.head_dims and not model.adds_one else []
    acts = [HIDDEN_ACTS[model.hidden_act]] if model.hidden_act in HIDDEN_ACTS and model.intermediate_sizes else []
    return [*norms, *heads, *acts, STORE_CACHE.op]


def _sizes_of(model: Model, op: str) -> tuple[list[int] | list[None], str]:
    """Those that `op` has in a model, and what it is that a model without any lacks."""
    from jitnorm.warmup.config import HIDDEN_ACTS

    if op == QKNORM.op:
        return model.head_dims, "norms of single heads"
    if op == STORE_CACHE.op:
        return model.kv_sizes or [None], ""  # rows of whole 16 bytes, where the config does not tell
    if "fused_add" in op:
        return model.hidden_sizes[:1], ""  # the residual's; q, k and latents have none
    if acts := [act for act, name in HIDDEN_ACTS.items() if name == op]:
        called = model.hidden_act is None or model.hidden_act in acts
        return (model.intermediate_sizes or [None]) if called else [], f"hidden_act {' or '.join(acts)}"
    return model.hidden_sizes, "norms"


def _several(values: Any) -> list[Any]:
    """Of one value, of several, or of None."""
    if values is None:
        return []
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str) else [values]


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None


def _dtype_of(model: Model) -> torch.dtype:
    try:
        return _dtype(model.dtype or "bf16")
    except TypeError:
        known = "float16, bfloat16 or float32"
        raise ValueError(
            f"{model.path}: dtype (torch_dtype) must be {known}, got {model.dtype!r}. --dtype names another"
        ) from None


def _dtype(value: DType) -> torch.dtype:
    dtype = DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPE_NAMES:
        raise TypeError(f"dtype must be {', '.join(DTYPE_NAMES.values())}, got {value}")
    return dtype
