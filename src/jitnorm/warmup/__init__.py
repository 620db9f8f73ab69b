"""Build kernels ahead of their first call, for any device, with or without a GPU.

    jitnorm.warmup(op="rmsnorm", hidden_size=4096, dtype="bf16", device="cuda", arch="9.0a")
    jitnorm.warmup(config="Qwen3-32B/config.json")  # all that the model calls

`jitnorm warmup` and `python -m jitnorm.warmup` are the same for a shell.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch

from jitnorm import _operators  # noqa: F401
from jitnorm.core.checks import DTYPE_NAMES, choice, number
from jitnorm.core.norms import is_supported_hidden_size
from jitnorm.core.operators import OPERATORS
from jitnorm.core.targets import resolve_target
from jitnorm.general_rmsnorm import ROUNDINGS as NORM_ROUNDINGS
from jitnorm.jit.spec import KernelSpec
from jitnorm.qknorm_rope_store import E4M3, ROUNDINGS

if TYPE_CHECKING:
    from jitnorm.warmup.config import ModelConfig
    from jitnorm.warmup.run import Result

__all__ = ["CACHE_DTYPES", "DTYPES", "OPS", "OPTIONS", "Plan", "Result", "make_plan", "warmup"]


def __getattr__(name: str) -> Any:
    if name != "Result":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from jitnorm.warmup.run import Result  # here, as `import jitnorm` would pay for it

    return Result


OPS = OPERATORS  # the operators that can be built ahead of time, by name

# The names of dtypes that are accepted, such as "bf16" and "bfloat16".
DTYPES = {name: d for d, short in DTYPE_NAMES.items() for name in (short, str(d).removeprefix("torch."))}
CACHE_DTYPES = {**DTYPES, "fp8": E4M3, "float8_e4m3fn": E4M3}  # those of caches and of results for float8 attention

ALL_ROUNDINGS = tuple(dict.fromkeys((*ROUNDINGS, *NORM_ROUNDINGS)))

# What an operator without the option does not have, by the names in `Operator.options`.
OPTIONS = {
    **dict.fromkeys(("rotary_dim", "cos_sin_dtype", "interleaved", "mrope"), "rotation"),
    "cache_dtype": "cache of another dtype",
    "q_out_dtype": "result for q of another dtype",
    "hidden_size2": "second size",
    "rounding": "steps to round between",
    "form": "other form",
}

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
    rotary_dim: OneOrMore[int] | None = None,
    cos_sin_dtype: OneOrMore[DType] | None = None,
    cache_dtype: OneOrMore[DType] | None = None,
    q_out_dtype: OneOrMore[DType] | None = None,
    interleaved: bool | None = None,
    mrope: bool | None = None,
    rounding: OneOrMore[str] | None = None,
    form: OneOrMore[str] | None = None,
    hidden_size2: OneOrMore[int] | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
    timeout: float = 600.0,
) -> Result:
    """Build kernels into the cache ahead of their first call, several at a time. None is loaded.

    `op`, `hidden_size`, `arch`, `rotary_dim`, `rounding` and the dtypes are one value or several, and every combination
    is built. The arguments from `rotary_dim` on are for qk_norm_rope_store, rope and store_cache_heads (the kernels of
    `store_cache` for paged and float8 caches, which have a `cache_dtype` alone); with a config they replace its values.
    JITNORM_DISABLE_JIT has no effect here: it forbids builds during calls.

    With a `process_group`, all its ranks call this. Each kernel is built by one rank, and added to the caches of the
    others. The kernels travel through the group's store, so the group may have any backend. They are compared with
    their hashes, and nothing is executed. Ranks may have different devices, caches and compilers: a rank takes only
    kernels that a call of its own would load. It builds the kernels that another rank did not send, because it ended,
    raised or was late. Rank 0 logs the progress at INFO.

    Args:
        op: The operator's name. None for all that a forward pass of the config's model calls, its norms with and
            without a residual, its activation and its cache among them; without a config, for "rmsnorm".
        hidden_size: The size of the normalised dimension, or of a group of gated_rmsnorm; head_dim for operators on
            heads (fused_inplace_qknorm, qk_norm_rope_store, rope, store_cache_heads), d for activations, and the
            elements in a row for store_cache.
            The last two do not need one: without it they are built for sizes of whole 16 bytes, as nearly all are.
            Quantisation alone takes none: one kernel serves all sizes.
        dtype: The input's dtype, such as "bf16", "bfloat16" or torch.bfloat16. None for the config's own, or else
            "bf16".
        weight_dtype: The weight's dtype; None for the input's. Only norms have one.
        device: "cuda" or "cpu"; None for CUDA if torch finds a GPU or `arch` is given, else the CPU.
        arch: CUDA architectures, such as "9.0a" for an H100 or H200. None for this machine's GPU.
        config: A Hugging Face config.json, or the folder that contains one, instead of `hidden_size`.
        jobs: How many kernels to build at a time; None for as many as there are CPUs.
        skip_unsupported: Whether to build the rest, instead of raising, if a `hidden_size` is not supported.
        rotary_dim: How many elements of a head are rotated; None for the config's, or else for all.
        cos_sin_dtype: The dtype of the cosines and sines: the input's, for which None stands, or "fp32".
        cache_dtype: The dtype of the caches: the input's, for which None stands, or "fp8".
        q_out_dtype: The dtype of the result for q: the input's, for which None stands, or "fp8".
        interleaved: Whether elements 2 i and 2 i + 1 form a pair (is_neox=False). None for the config's, or else False.
        mrope: Whether tokens have three positions. None for the config's, or else False.
        rounding: "once", for which None stands; "each_step" of qk_norm_rope_store and rope; "hf" of the general norms
            and the gated ones.
        form: Of the general norms: "rows", for which None stands, "strided" for rows under several leading dimensions,
            or "unaligned"; behind it may stand "+no_weight" and "+bias". Of the gated norms: "strided", for which None
            stands, or "unaligned"; behind it may stand "+no_weight", "+fp32_gate" and "+sigmoid". Of LayerNorm None
            stands for "strided+bias", and "rows" are "strided".
        hidden_size2: Of dual_rmsnorm: the size of its second input. None for `hidden_size`, or the config's.
        process_group: The ranks that share the work, such as `torch.distributed.group.WORLD`. None for this process
            alone.
        timeout: How many seconds after its start this call waits for other ranks, whatever it waits for. What is
            missing then is built here. Ranks that call this after half of the time take no part.

    Returns:
        The kernels that were built, those that the cache had, the sizes that are not supported, the builds that failed,
        and the kernels that other ranks built. With `config`, unsupported sizes raise nothing; check `Result.failed` as
        well.

    Raises:
        RuntimeError: A `hidden_size` is not supported (nothing is built then), or nothing can be built here: no
            compiler is found, and no other rank sends the kernels, or the cache cannot be written.
        ValueError, TypeError: An argument is not accepted.
    """
    # Here, as `import jitnorm` would pay for it.
    from jitnorm.warmup.run import Result, build_all, build_launcher, find_cached, prepare

    number("timeout", timeout)
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be a finite number of seconds above 0, got {timeout}")
    with contextlib.ExitStack() as stack:
        job = None
        if process_group is not None:
            from jitnorm.warmup.distributed import Job

            job = stack.enter_context(Job(process_group, timeout))  # errors from here on are told to the other ranks
        if jobs is not None and _integer("jobs", jobs) < 1:
            raise ValueError(f"jobs must be 1 or more, got {jobs}")
        plan = make_plan(
            *(op, hidden_size, dtype, weight_dtype, device, arch, config, skip_unsupported),
            rotary_dim=rotary_dim,
            cos_sin_dtype=cos_sin_dtype,
            cache_dtype=cache_dtype,
            q_out_dtype=q_out_dtype,
            interleaved=interleaved,
            mrope=mrope,
            rounding=rounding,
            form=form,
            hidden_size2=hidden_size2,
        )
        cached, missing = find_cached(plan.specs)
        result = Result(cached=cached, refused=plan.refused)
        if job:
            job.build(result, missing, jobs)
        else:
            prepare(missing)
            for outcome in build_all(missing, jobs):
                result.add(outcome)
        build_launcher(plan.specs, result)
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
    **options: Any,
) -> Plan:
    """Return what `warmup` would do with these arguments, and raise what it raises. Nothing is built or created.

    `options` are those of OPTIONS; what is None is not given.
    """
    from jitnorm.warmup.config import read_config  # here, as `import jitnorm` would pay for it

    ops, sizes, weight_dtypes = _as_list(op), _as_list(hidden_size), _as_list(weight_dtype)
    given = {name: _as_list(value) for name, value in options.items() if value is not None}
    for name in ops:
        if not isinstance(name, str) or name not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, got {name!r}")
    if problem := argument_problem(ops, sizes, weight_dtypes, config, given):
        raise ValueError(problem)
    chosen = {name: [_option(name, value) for value in values] for name, values in given.items() if values}
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
        variants = list(_variants(OPS[name].options, model.options_of(name) if model else [{}], chosen))
        for size, d, w, target in itertools.product(sizes, dtypes or ["bf16"], weight_dtypes or [None], targets):
            make_spec: Callable[..., KernelSpec] = OPS[name].warmup_spec
            general = OPS.get(f"general_{name}")
            if model and not ops and general and size and not is_supported_hidden_size(size):
                make_spec = general.warmup_spec  # as jitnorm.dispatch and jitnorm.nn choose
            for variant in variants:
                try:
                    specs[make_spec(size, _dtype(d), _dtype(w or d), target, **variant)] = None
                except RuntimeError as error:
                    refused[str(error)] = None
    if refused and config is None and not skip_unsupported:
        raise RuntimeError("\n".join(refused))
    return Plan(list(specs), list(refused), notes)


def _variants(
    accepted: Collection[str], of_model: list[dict[str, Any]], chosen: dict[str, list[Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the options of each kernel of an operator: every combination of those chosen, or else the model's."""
    own = {name: values for name, values in chosen.items() if name in accepted}
    for options in of_model:
        for values in itertools.product(*own.values()):
            yield {**options, **dict(zip(own, values, strict=True))}


def argument_problem(
    ops: Collection[str],
    sizes: Collection[int],
    weight_dtypes: Collection[DType],
    config: object,
    options: Collection[str] = (),
    spell: Callable[[str], str] = str,
) -> str | None:
    """Return why these arguments cannot be combined, or None if they can.

    Either sizes or a config must be given, unless no operator needs a size; and nothing that no operator takes.

    Args:
        ops: Names of operators; empty if none was given.
        sizes: The hidden sizes that were given.
        weight_dtypes: The weight dtypes that were given.
        config: The config that was given, or None.
        options: The names of those options of OPTIONS that were given.
        spell: Returns what the caller calls an argument.
    """
    size, source = spell("hidden_size"), spell("config")
    have = "have" if len(ops) > 1 else "has"
    if weight_dtypes and ops and not any(OPS[name].has_weight for name in ops):
        return f"{spell('weight_dtype')} is not accepted: {' and '.join(ops)} {have} no weight"
    called = ops or (["rmsnorm"] if config is None else [])  # with a config, those that the model calls
    for option in options:
        if called and not any(option in OPS[name].options for name in called):
            return f"{spell(option)} is not accepted: {' and '.join(called)} {have} no {OPTIONS[option]}"
    if config is not None:
        return f"give {size} or {source}, not both" if sizes else None
    if sizes and ops and all(OPS[name].size_name is None for name in ops):
        return f"{size} is not accepted: {' and '.join(ops)} {have} one kernel for all sizes, which is built without it"
    if sizes or (ops and not any(OPS[name].needs_size for name in ops)):
        return None
    return f"give {size} or {source}"


def _option(name: str, value: Any) -> Any:
    """Return the value of an option as `Operator.warmup_spec` takes it. Raise if it is none."""
    if name in ("interleaved", "mrope"):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
        return value
    if name == "rounding":
        choice(name, value, ALL_ROUNDINGS)
        return value
    if name == "form":
        return str(value)  # of which the operator knows the meaning
    if name in ("rotary_dim", "hidden_size2"):
        if (number := _integer(name, value)) < 1:
            raise ValueError(f"{name} must be 1 or more, got {number}")
        return number
    return _dtype(value, name, DTYPES if name == "cos_sin_dtype" else CACHE_DTYPES)


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


def _dtype(value: DType, name: str = "dtype", accepted: dict[str, torch.dtype] = DTYPES) -> torch.dtype:
    dtype = accepted.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or dtype not in accepted.values():
        names = {d: short for short, d in reversed(accepted.items())}  # the shorter of two names comes first
        raise TypeError(f"{name} must be {', '.join(names[d] for d in dict.fromkeys(accepted.values()))}, got {value}")
    return dtype
