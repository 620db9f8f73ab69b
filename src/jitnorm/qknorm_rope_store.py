"""From the QKV projection to attention in one launch: norm of q and k, rotary embedding, store into the KV cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch

from jitnorm.core import checks
from jitnorm.core.operators import CPP_TYPES, DTYPES, EXAMPLES, Example, Operator, Shape
from jitnorm.core.targets import target_of
from jitnorm.core.torch_library import (
    build_while_tracing,
    increment_versions,
    needs_dispatcher,
    refuse_gradient,
    refuse_torch_func,
    register,
)
from jitnorm.jit.environment import is_on
from jitnorm.jit.spec import KernelSpec, Target

HEAD_DIMS = range(64, 512 + 1, 16)
ROTARY_STEP = 16  # of rotary_dim: a kernel loads whole vectors of cosines
MAX_ROWS = 2**31 - 1  # kMaxDividend in csrc/include/jitnorm/divisor.h, for the heads of all tokens and for slots
ROUNDINGS = ("once", "each_step")
EXAMPLE_SIZES = (128, 256)  # heads whose threads have one pair of vectors, and several
E4M3 = torch.float8_e4m3fn

NO_SKIP_INDEX = -(2**63)  # which is no slot

check_indices = is_on("JITNORM_CHECK_INDICES")  # read once, as in jitnorm.store_cache

_CPP_TYPES: dict[Any, str] = {**CPP_TYPES, E4M3: "e4m3_t", None: "NoNorm"}
_DTYPE_NAMES = {**checks.DTYPE_NAMES, E4M3: "fp8"}


class Variant(NamedTuple):
    """The properties that a kernel is compiled for, other than its target.

    Attributes:
        head_dim: The elements of a head.
        rotary_dim: How many of them are rotated; 0 for none.
        dtype: That of q, k and v.
        weight_dtype: That of the norms' weights; None without a norm.
        cos_sin_dtype: That of the cosines and sines.
        cache_dtype: That of the caches, dtype or float8_e4m3fn.
        q_out_dtype: That of the result for q, dtype or float8_e4m3fn.
        is_neox: Whether element i is rotated with i + rotary_dim / 2, and not 2 i with 2 i + 1.
        has_sections: Whether a token has three positions.
        rounds_each_step: Whether norm and rotation round their results.
    """

    head_dim: int
    rotary_dim: int
    dtype: torch.dtype
    weight_dtype: torch.dtype | None
    cos_sin_dtype: torch.dtype
    cache_dtype: torch.dtype
    q_out_dtype: torch.dtype
    is_neox: bool = True
    has_sections: bool = False
    rounds_each_step: bool = False


class HeadsOperator(Operator):
    """An operator whose rows are the heads of q, k and v. Its kernels differ by the steps that they take."""

    size_name: ClassVar[str | None] = "head_dim"
    options: ClassVar[tuple[str, ...]] = (
        *("rotary_dim", "cos_sin_dtype", "cache_dtype", "q_out_dtype", "interleaved", "mrope", "rounding"),
    )
    rotates: ClassVar[bool] = True

    def spec(self, variant: Variant, target: Target) -> KernelSpec:
        """Return what to build for a variant. Raise RuntimeError for an unsupported head_dim or rotary_dim."""
        v = variant
        check_sizes(self.op, v.head_dim, v.rotary_dim)
        types = [_CPP_TYPES[d] for d in (v.dtype, v.weight_dtype, v.cos_sin_dtype, v.cache_dtype, v.q_out_dtype)]
        is_neox, has_sections, rounds = (str(flag).lower() for flag in (v.is_neox, v.has_sections, v.rounds_each_step))
        policies = f"{', '.join(types)}, Rotation<{is_neox}, {has_sections}>, {rounds}"
        name, warmup = self._names(v)
        return KernelSpec(
            op=self.op,
            family="qknorm_rope_store",
            binding=self.binding,
            name=name,
            kernel=f"QKNormRopeStoreKernel<{v.head_dim}, {v.rotary_dim}, {policies}>",
            target=target,
            warmup=warmup,
        )

    def _names(self, v: Variant) -> tuple[str, str]:
        """Return the name of a variant's kernel and the arguments of `jitnorm warmup` that build it."""
        name = f"{self.op}_{v.head_dim}_{_DTYPE_NAMES[v.dtype]}"
        warmup = f"--op {self.op} --hidden-size {v.head_dim} --dtype {_DTYPE_NAMES[v.dtype]}"
        if v.weight_dtype not in (None, v.dtype):
            name += f"_{_DTYPE_NAMES[v.weight_dtype]}_weight"
            warmup += f" --weight-dtype {_DTYPE_NAMES[v.weight_dtype]}"
        if v.rotary_dim:
            if v.rotary_dim != v.head_dim:
                name += f"_rotary_{v.rotary_dim}"
                warmup += f" --rotary-dim {v.rotary_dim}"
            if v.cos_sin_dtype != v.dtype:
                name += f"_{_DTYPE_NAMES[v.cos_sin_dtype]}_cos_sin"
                warmup += f" --cos-sin-dtype {_DTYPE_NAMES[v.cos_sin_dtype]}"
            if not v.is_neox:
                name += "_interleaved"
                warmup += " --interleaved"
            if v.has_sections:
                name += "_mrope"
                warmup += " --mrope"
        if v.rounds_each_step:
            name += "_each_step"
            warmup += " --rounding each_step"
        if v.cache_dtype != v.dtype:
            name += "_fp8_cache"
            warmup += " --cache-dtype fp8"
        if v.q_out_dtype != v.dtype:
            name += "_fp8_q_out"
            warmup += " --q-out-dtype fp8"
        return name, warmup

    def warmup_spec(
        self,
        size: int | None,
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        target: Target,
        *,
        rotary_dim: int | None = None,
        cos_sin_dtype: torch.dtype | None = None,
        cache_dtype: torch.dtype | None = None,
        q_out_dtype: torch.dtype | None = None,
        interleaved: bool = False,
        mrope: bool = False,
        rounding: str = "once",
    ) -> KernelSpec:
        """Return what to build for heads of `size` elements; by default all rotated, and caches of the same dtype."""
        assert size is not None
        checks.choice("rounding", rounding, ROUNDINGS)
        types = cos_sin_dtype, cache_dtype, q_out_dtype
        variant = self.variant(
            *(size, dtype, weight_dtype, rotary_dim, *types, not interleaved, mrope, rounding == "each_step")
        )
        return self.spec(variant, target)

    def variant(
        self,
        head_dim: int,
        dtype: torch.dtype,
        weight_dtype: torch.dtype,
        rotary_dim: int | None = None,
        cos_sin_dtype: torch.dtype | None = None,
        cache_dtype: torch.dtype | None = None,
        q_out_dtype: torch.dtype | None = None,
        is_neox: bool = True,
        has_sections: bool = False,
        rounds_each_step: bool = False,
    ) -> Variant:
        """Return the variant of this operator with these properties; None stands for what most models have."""
        if dtype not in DTYPES or weight_dtype not in (dtype, torch.float32):
            raise TypeError(
                f"{self.op} takes {checks.enumeration(DTYPES)}, with weights of the same dtype or float32, "
                f"got {dtype} with weights of {weight_dtype}"
            )
        for name, given, other in (
            ("cos_sin_dtype", cos_sin_dtype, torch.float32),
            ("cache_dtype", cache_dtype, E4M3),
            ("q_out_dtype", q_out_dtype, E4M3),
        ):
            if given not in (None, dtype, other):
                raise TypeError(f"{name} must be {dtype} like the input's or {other}, got {given}")
        return Variant(
            head_dim,
            (head_dim if rotary_dim is None else rotary_dim) if self.rotates else 0,
            dtype,
            weight_dtype if self.has_weight else None,
            (cos_sin_dtype or dtype) if self.rotates else dtype,
            cache_dtype or dtype,
            q_out_dtype or dtype,
            is_neox or not self.rotates,
            has_sections and self.rotates,
            rounds_each_step and self is not STORE_HEADS,
        )

    def run(self, a: Arguments) -> None:
        """Run the kernel that serves arguments that have been checked."""
        self.call((a.k.dtype, a.k.size(-1)), (a.variant, target_of(a.k)), *a.of_bindings())


class QKNormRopeStore(HeadsOperator):
    """The operator with norms."""

    has_weight: ClassVar[bool] = True


class StoreHeads(HeadsOperator):
    """The operator that only stores k and v: the part of `store_cache` for paged and float8 caches."""

    options: ClassVar[tuple[str, ...]] = ("cache_dtype",)
    rotates: ClassVar[bool] = False


QK_NORM_ROPE_STORE = QKNormRopeStore("qk_norm_rope_store", "qk_norm_rope_store")
ROPE = HeadsOperator("rope", "qk_norm_rope_store")
STORE_HEADS = StoreHeads("store_cache_heads", "qk_norm_rope_store")

_norm_kernels = QK_NORM_ROPE_STORE.fast_cache
_rope_kernels = ROPE.fast_cache
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_any_requires_grad = torch._C._any_requires_grad
_Tensor = torch.Tensor
_NO_SECTIONS = (0, 0, 0)
_SEQUENCES = frozenset({list, tuple})
_OPTIONAL_TENSOR = frozenset({torch.Tensor, type(None)})
_OPTIONAL_WEIGHT = frozenset({torch.Tensor, torch.nn.Parameter, type(None)})


@dataclass(eq=False, repr=False)
class Arguments:
    """The arguments of a call. Tensors are None where the step that needs them is left out."""

    q: Any
    k: Any
    v: Any
    cos_sin_cache: Any
    positions: Any
    k_cache: Any
    v_cache: Any
    slot_mapping: Any
    q_weight: Any
    k_weight: Any
    eps: Any
    weight_offset: Any
    is_neox: Any
    mrope_section: Any
    mrope_interleaved: Any
    q_out: Any
    k_out: Any
    q_scale: Any
    k_scale: Any
    v_scale: Any
    skip_index: Any
    rounding: Any
    enable_pdl: Any

    @classmethod
    def of_store(
        cls, k: Any, v: Any, k_cache: Any, v_cache: Any, indices: Any, k_scale: Any, v_scale: Any, skip_index: Any
    ) -> Arguments:
        """Return the arguments of a call that only stores k and v."""
        return cls(
            *(None, k, v, None, None, k_cache, v_cache, indices, None, None, 0.0, 0.0, True, None, False, None, None),
            *(None, k_scale, v_scale, skip_index, "once", None),
        )

    @property
    def slots_name(self) -> str:
        """Return what the caller calls `slot_mapping`."""
        return "indices" if self.operator is STORE_HEADS else "slot_mapping"

    @property
    def tensors(self) -> dict[str, Any]:
        """Return the arguments that are tensors or None, by name."""
        return {self.slots_name if name == "slot_mapping" else name: getattr(self, name) for name in TENSORS}

    @property
    def has_sections(self) -> bool:
        """Return whether a token has three positions. Three sections of one position rotate as one."""
        return self.mrope_section is not None and self.positions.dim() == 2

    @property
    def operator(self) -> HeadsOperator:
        """Return the operator that serves them."""
        if self.q is None and self.cos_sin_cache is None:
            return STORE_HEADS
        return ROPE if self.q_weight is None and self.k_weight is None else QK_NORM_ROPE_STORE

    @property
    def variant(self) -> Variant:
        """Return what their kernel is compiled for."""
        weight = self.q_weight if self.q_weight is not None else self.k_weight
        rotates = self.cos_sin_cache is not None
        dtype = self.k.dtype
        return Variant(
            head_dim=int(self.k.shape[-1]),
            rotary_dim=int(self.cos_sin_cache.shape[-1]) if rotates else 0,
            dtype=dtype,
            weight_dtype=None if weight is None else weight.dtype,
            cos_sin_dtype=self.cos_sin_cache.dtype if rotates else dtype,
            cache_dtype=dtype if self.k_cache is None else self.k_cache.dtype,
            q_out_dtype=dtype if self.q_out is None else self.q_out.dtype,
            is_neox=self.is_neox or not rotates,
            has_sections=rotates and self.has_sections,
            rounds_each_step=self.rounding == "each_step",
        )

    @property
    def written(self) -> dict[str, Any]:
        """Return the tensors that are written, by name."""
        changed = self.cos_sin_cache is not None or self.operator is QK_NORM_ROPE_STORE
        names = {
            "q" if self.q_out is None else "q_out": changed and self.q is not None,
            "k" if self.k_out is None else "k_out": changed,
            "k_cache": self.k_cache is not None,
            "v_cache": self.v_cache is not None,
        }
        return {name: getattr(self, name) for name, is_written in names.items() if is_written}

    def of_bindings(self) -> tuple[Any, ...]:
        """Return them as the bindings in csrc/elementwise/qknorm_rope_store.h take them."""
        sections = _NO_SECTIONS if self.cos_sin_cache is None else self.mrope_section or _NO_SECTIONS
        return (
            *(self.q, self.k, self.v, self.cos_sin_cache, self.positions, self.k_cache, self.v_cache),
            *(self.slot_mapping, self.q_weight, self.k_weight, self.eps, self.weight_offset, self.is_neox),
            *(*map(int, sections), self.mrope_interleaved, self.q_out, self.k_out, self.q_scale, self.k_scale),
            *(self.v_scale, self.skip_index, self.rounding == "each_step", self.enable_pdl),
        )


_HEADS = ("q", "k", "v", "q_out", "k_out", "k_cache", "v_cache")  # the tensors of heads
TENSORS = (
    *("q", "k", "v", "cos_sin_cache", "positions", "k_cache", "v_cache", "slot_mapping", "q_weight", "k_weight"),
    *("q_out", "k_out", "q_scale", "k_scale", "v_scale"),
)


def qk_norm_rope_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor | None = None,
    v_cache: torch.Tensor | None = None,
    slot_mapping: torch.Tensor | None = None,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    is_neox: bool = True,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    q_out: torch.Tensor | None = None,
    k_out: torch.Tensor | None = None,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    skip_index: int = -1,
    rounding: str = "once",
    enable_pdl: bool | None = None,
) -> None:
    """Normalise the heads of q and k, rotate them, and store k and v into a paged cache, in one launch.

    Each head of q and k becomes `x / sqrt(mean(x^2) + eps) * (weight_offset + weight)`, where a weight is given, and is
    then rotated (Su et al., 2021, https://arxiv.org/abs/2104.09864): for each pair (a, b) of its first rotary_dim
    elements, `a * cos - b * sin` and `b * cos + a * sin`. With `is_neox` pair i is elements i and i + rotary_dim / 2,
    otherwise 2 i and 2 i + 1. Token t's cosines and sines are row `positions[t]` of `cos_sin_cache`, which the model
    computes: scaled frequencies (YaRN, Llama 3, NTK) need nothing here.

    All is computed in float32, and by default rounded once, at the end. With rounding="each_step" the results of the
    norm, of the rotation and of quantisation are each rounded to their dtype, as by engines that run one after another.
    A token has the same bits in any batch. The first call of a size compiles its kernel. Out-of-range positions and
    slots are undefined behaviour; set `JITNORM_CHECK_INDICES=1` before importing jitnorm to raise IndexError.

    Args:
        q: `[tokens, q_heads, head_dim]`, float16, bfloat16 or float32, on the CPU or a CUDA device; written unless
            `q_out` is given. The last stride is 1, the others are free as long as no two heads share memory: slices of
            a fused projection, with gates between its heads too, need no copy. head_dim is a multiple of 16 from 64 to
            512. On CUDA every head is aligned to 16 bytes.
        k: `[tokens, kv_heads, head_dim]`, likewise, of q's dtype and device; written unless `k_out` is given.
        v: `[tokens, kv_heads, head_dim]`, likewise, never written. None if nothing is stored.
        cos_sin_cache: `[max_position, rotary_dim]`, of q's dtype or float32: the cosines of all pairs, then their
            sines. rotary_dim is a multiple of 16 up to head_dim. The last stride is 1.
        positions: `[tokens]`, int32 or int64; or `[3, tokens]` with `mrope_section`.
        k_cache: `[slots, kv_heads, head_dim]` or `[blocks, block_size, kv_heads, head_dim]`, written; of q's dtype or
            float8_e4m3fn. The last stride is 1, the others are free as long as no two heads share memory: views of
            vLLM's `[2, blocks, block_size, heads, dim]` and of caches with heads before tokens serve as they are. On
            CUDA every head is aligned to 16 bytes, to 8 for float8 caches of half-precision heads and to 4 for those of
            float32. Shares no memory with any other argument.
        v_cache: Likewise, of k_cache's shape and dtype.
        slot_mapping: `[stored]`, int32 or int64, contiguous: the slots of the first tokens. Slot s is token
            `s % block_size` of block `s // block_size`. Tokens beyond its end are not stored, as the padding of a
            captured graph.
        q_weight: `[head_dim]`, of q's dtype or float32. None: q is not normalised.
        k_weight: `[head_dim]`, of q_weight's dtype. None: k is not normalised.
        eps: Added to the mean of the squares; zero or more.
        weight_offset: Added to the weights; 1 for Gemma's norms.
        is_neox: Which elements form a pair: i and i + rotary_dim / 2, or with False 2 i and 2 i + 1.
        mrope_section: How many pairs are rotated by a token's first, second and third position (time, height, width);
            their sum is rotary_dim / 2. With positions `[tokens]` all three are the same.
        mrope_interleaved: Whether pairs 0, 3, 6, ... belong to the first section, 1, 4, ... to the second and 2, 5, ...
            to the third, each until it is full; the remaining pairs belong to the first (Qwen3-VL). Otherwise the
            sections follow each other (Qwen2-VL).
        q_out: `[tokens, q_heads, head_dim]`, written instead of q; of q's dtype or float8_e4m3fn.
        k_out: `[tokens, kv_heads, head_dim]`, written instead of k; of k's dtype.
        q_scale: float32, one element or `[q_heads]`, on q's device: a float8 q_out is q divided by it. None for 1.
        k_scale: float32, one element or `[kv_heads]`: a float8 k_cache is k divided by it. None for 1.
        v_scale: Likewise, for v.
        skip_index: Tokens with this slot are not stored.
        rounding: "once", or "each_step" to round after the norm, the rotation and the quantisation, as described above.
        enable_pdl: Programmatic dependent launch. None turns it on where the GPU supports it. The bits are the same.

    Raises:
        TypeError: An argument has a wrong type or dtype.
        ValueError: A shape, stride, device, alignment or overlap is not accepted, or arguments do not go together.
        IndexError: With `JITNORM_CHECK_INDICES=1`, a position or slot is out of range; nothing is written then. Every
            call waits for the GPU to check this, except while a CUDA graph is captured.
        RuntimeError: head_dim or rotary_dim is not supported (nothing is built then), a tensor needs a gradient, all
            tokens together have 2^31 heads or more, or the kernel cannot be built or launched.
    """
    if not _is_dynamo_compiling():
        try:
            if (
                not check_indices
                and q.__class__ is k.__class__ is cos_sin_cache.__class__ is positions.__class__ is _Tensor
                and v.__class__ in _OPTIONAL_TENSOR
                and k_cache.__class__ is v_cache.__class__ is slot_mapping.__class__
                and k_cache.__class__ in _OPTIONAL_TENSOR
                and q_weight.__class__ in _OPTIONAL_WEIGHT
                and k_weight.__class__ in _OPTIONAL_WEIGHT
                and q_out.__class__ in _OPTIONAL_TENSOR
                and k_out.__class__ in _OPTIONAL_TENSOR
                and q_scale.__class__ in _OPTIONAL_TENSOR
                and k_scale.__class__ is v_scale.__class__
                and k_scale.__class__ in _OPTIONAL_TENSOR
                and (mrope_section is None or (mrope_section.__class__ in _SEQUENCES and any(mrope_section)))
                and rounding in ROUNDINGS
                and (
                    not torch.is_grad_enabled()
                    or not _any_requires_grad(
                        *(q, k, v, cos_sin_cache, k_cache, v_cache, q_weight, k_weight, q_out, k_out),
                        *(q_scale, k_scale, v_scale),
                    )
                )
                and not (_rope_kernels if q_weight is k_weight is None else _norm_kernels)[k.dtype][k.size(-1)](
                    *(q, k, v, cos_sin_cache, positions, k_cache, v_cache, slot_mapping, q_weight, k_weight, eps),
                    *(weight_offset, is_neox),
                    *(_NO_SECTIONS if mrope_section is None else mrope_section),
                    *(mrope_interleaved, q_out, k_out, q_scale, k_scale, v_scale, skip_index),
                    *(rounding == "each_step", enable_pdl),
                )
            ):
                return None
        except Exception:  # no kernel yet, or arguments without such attributes: the slow path raises for these
            pass
    for name, value in (("q", q), ("cos_sin_cache", cos_sin_cache), ("positions", positions)):
        checks.tensor(name, value)  # slow_path takes None for steps that are left out
    return slow_path(
        Arguments(
            *(q, k, v, cos_sin_cache, positions, k_cache, v_cache, slot_mapping, q_weight, k_weight, eps),
            *(weight_offset, is_neox, mrope_section, mrope_interleaved, q_out, k_out, q_scale, k_scale, v_scale),
            *(skip_index, rounding, enable_pdl),
        )
    )


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    *,
    is_neox: bool = True,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    q_out: torch.Tensor | None = None,
    k_out: torch.Tensor | None = None,
    q_scale: torch.Tensor | None = None,
    enable_pdl: bool | None = None,
) -> None:
    """Rotate the heads of q and k by their positions, in place or into `q_out` and `k_out`.

    `qk_norm_rope_store` without norms and caches, with the same arguments, results and errors.
    """
    return qk_norm_rope_store(
        *(q, k, None, cos_sin_cache, positions),
        is_neox=is_neox,
        mrope_section=mrope_section,
        mrope_interleaved=mrope_interleaved,
        q_out=q_out,
        k_out=k_out,
        q_scale=q_scale,
        enable_pdl=enable_pdl,
    )


def rope_and_store(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    is_neox: bool = True,
    mrope_section: Sequence[int] | None = None,
    mrope_interleaved: bool = False,
    q_out: torch.Tensor | None = None,
    k_out: torch.Tensor | None = None,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    skip_index: int = -1,
    rounding: str = "once",
    enable_pdl: bool | None = None,
) -> None:
    """Rotate the heads of q and k by their positions, and store k and v into a paged cache, in one launch.

    `qk_norm_rope_store` without norms, with the same arguments, results and errors.
    """
    return qk_norm_rope_store(
        *(q, k, v, cos_sin_cache, positions, k_cache, v_cache, slot_mapping),
        is_neox=is_neox,
        mrope_section=mrope_section,
        mrope_interleaved=mrope_interleaved,
        q_out=q_out,
        k_out=k_out,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        skip_index=skip_index,
        rounding=rounding,
        enable_pdl=enable_pdl,
    )


def slow_path(a: Arguments) -> None:
    """Check the arguments, then run the right kernel, which is built and cached if need be."""
    tensors = [t for t in a.tensors.values() if t is not None]
    if needs_dispatcher(*tensors):
        a = _check_types(a)
        if not _is_dynamo_compiling():  # dynamo cannot trace this check, and breaks the graph at torch.func anyway
            refuse_torch_func(a.operator.op, *tensors)
        return _call_torch_op(a)
    a = check(a)
    refuse_gradient(a.operator.op, *tensors)
    return run_checked(a)


def run_checked(a: Arguments) -> None:
    """Run the kernel on arguments that have been checked; with JITNORM_CHECK_INDICES=1, check the indices first."""
    if check_indices:
        if a.cos_sin_cache is not None:
            checks.index_range("positions", a.positions, a.cos_sin_cache.shape[0], "cos_sin_cache has {} rows")
        if a.k_cache is not None:
            slots = a.k_cache.shape[0] * (a.k_cache.shape[1] if a.k_cache.dim() == 4 else 1)
            checks.index_range(a.slots_name, a.slot_mapping, slots, "the caches have {} slots", a.skip_index)
    a.operator.run(a)


def check(a: Arguments) -> Arguments:
    """Raise for what the bindings in csrc/elementwise/qknorm_rope_store.h refuse. Return arguments that they take."""
    a = _check_types(a)
    check_metadata(a)
    checks.supported_device("k", a.k)
    for name in _HEADS:
        if (value := getattr(a, name)) is not None:
            checks.heads(name, value, checks.CUDA_ALIGNMENT * value.element_size() // a.k.element_size())
    for name in ("q_weight", "k_weight"):
        if (value := getattr(a, name)) is not None:
            checks.rows(name, value)
    if a.cos_sin_cache is not None:
        _check_angles(a)
    for name, value in (("positions", a.positions), (a.slots_name, a.slot_mapping)):
        if value is not None:
            checks.storage(name, value)
            checks.address(name, value, value.element_size())
    for name in ("q_scale", "k_scale", "v_scale"):
        if (value := getattr(a, name)) is not None:
            checks.elements(name, value, value.numel(), "one, or one for each head")
    stored = a.slot_mapping is not None and a.slot_mapping.numel() > 0 and a.k.shape[1] > 0
    if stored and a.k_cache.numel() == 0:
        raise ValueError(f"k_cache must have a slot to write to, got shape {list(a.k_cache.shape)}")
    heads = sum(value.shape[1] for value in (a.q, a.k, a.v if a.k_cache is not None else None) if value is not None)
    if (rows := a.k.shape[0] * heads) > MAX_ROWS:
        raise RuntimeError(f"{a.operator.op} does not support more than {MAX_ROWS} heads in all tokens, got {rows}")
    if rows:
        _check_overlap(a)
    return a


def _check_overlap(a: Arguments) -> None:
    """Raise if a written tensor overlaps itself or another argument, unless it is the input that it replaces."""
    written = a.written
    replaced = {"q_out": "q", "k_out": "k"}
    for i, (name, value) in enumerate(written.items()):
        if not value.numel():
            continue
        checks.no_internal_overlap(name, value)
        others = {n: t for n, t in a.tensors.items() if t is not None and n != name}
        for other, tensor in others.items():
            if other in list(written)[i + 1 :]:
                continue  # compared when it is its turn
            if replaced.get(name) == other and checks.are_same_rows(value, tensor):
                continue
            checks.no_shared_heads(name, value, other, tensor, has_heads=other in _HEADS)


def _check_types(a: Arguments) -> Arguments:
    """Raise for bad types. Return the arguments with Python's own numbers.

    torch's dispatcher would raise for bad types too, with messages that name no argument.
    """
    required = {"k", "cos_sin_cache", "positions", "q"} if a.q is not None or a.cos_sin_cache is not None else {"k"}
    for name, value in a.tensors.items():
        if value is not None or name in required:
            checks.tensor(name, value)
    checks.eps(a.eps)
    checks.number("weight_offset", a.weight_offset)
    for name in ("is_neox", "mrope_interleaved"):
        if not isinstance(value := getattr(a, name), bool):
            raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    checks.enable_pdl(a.enable_pdl)
    if not isinstance(a.rounding, str):
        raise TypeError(f"rounding must be a str, got {type(a.rounding).__name__}")
    checks.choice("rounding", a.rounding, ROUNDINGS)
    sections = a.mrope_section
    if sections is not None:
        if isinstance(sections, (str, bytes)) or not isinstance(sections, Sequence):
            raise TypeError(f"mrope_section must be three ints, got {type(sections).__name__}")
        sections = [checks.integer("mrope_section", section) for section in sections]
        if len(sections) != 3 or min(sections) < 0:
            raise ValueError(f"mrope_section must be three ints of zero or more, got {sections}")
    return replace(
        a,
        eps=float(a.eps),
        weight_offset=float(a.weight_offset),
        mrope_section=sections,
        skip_index=checks.integer("skip_index", a.skip_index),
    )


def check_sizes(op: str, head_dim: int, rotary_dim: int) -> None:
    """Raise RuntimeError unless there is a kernel for head_dim, and for a rotation of rotary_dim elements of a head."""
    step = HEAD_DIMS.step
    if head_dim not in HEAD_DIMS:
        supported = f"the multiples of {step} from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}"
        raise RuntimeError(f"{op} does not support head_dim {head_dim}: supported are {supported}")
    if rotary_dim % ROTARY_STEP or not 0 <= rotary_dim <= head_dim:
        supported = f"the multiples of {ROTARY_STEP} from {ROTARY_STEP} to head_dim, {head_dim}"
        raise RuntimeError(f"{op} does not support rotary_dim {rotary_dim}: supported are {supported}")


def check_metadata(a: Arguments) -> None:
    """Raise for what is wrong with dtypes, shapes and devices; works on fake and meta tensors too."""
    for name in ("q", "k", "v", "q_out", "k_out"):
        if (value := getattr(a, name)) is not None and value.dim() != 3:
            raise ValueError(f"{name} must have shape [tokens, heads, head_dim], got {list(value.shape)}")
    dtype, (tokens, kv_heads, head_dim) = a.k.dtype, a.k.shape
    checks.dtype("k", a.k, DTYPES)
    op, head_dim = a.operator.op, int(head_dim)
    for name, value in a.tensors.items():
        if value is not None:
            checks.device(name, value, "k", a.k)
    heads = {"q": a.q.shape[1] if a.q is not None else 0, "k": kv_heads, "v": kv_heads}
    for name, why in (("q", "k's tokens and head_dim, with any number of heads"), ("v", "like k")):
        if (value := getattr(a, name)) is not None:
            checks.dtype(name, value, (dtype,))
            checks.shape(name, value, [tokens, heads[name], head_dim], why)
    for name, accepted in (("q_out", (dtype, E4M3)), ("k_out", (dtype,))):
        if (value := getattr(a, name)) is not None:
            like = name[0]
            checks.dtype(name, value, accepted)
            checks.shape(name, value, [tokens, heads[like], head_dim], f"like {like}")
    weights = {name: w for name, w in (("q_weight", a.q_weight), ("k_weight", a.k_weight)) if w is not None}
    for name, weight in weights.items():
        first = next(iter(weights.values()))
        checks.dtype(name, weight, (dtype, torch.float32) if weight is first else (first.dtype,))
        checks.shape(name, weight, [head_dim], "one factor for each element of a head")
    rotary_dim = 0
    if a.cos_sin_cache is not None:
        checks.dtype("cos_sin_cache", a.cos_sin_cache, (dtype, torch.float32))
        if a.cos_sin_cache.dim() != 2:
            raise ValueError(
                f"cos_sin_cache must have shape [max_position, rotary_dim], got {list(a.cos_sin_cache.shape)}"
            )
        rotary_dim = int(a.cos_sin_cache.shape[1])
        if rotary_dim == 0:
            raise ValueError(f"cos_sin_cache must have a row of cosines and sines, got {list(a.cos_sin_cache.shape)}")
    check_sizes(op, head_dim, rotary_dim)
    if rotary_dim:
        _check_positions(a, tokens, rotary_dim)
    _check_caches(a, tokens, kv_heads, head_dim)
    for name, output in (("q_scale", "q_out"), ("k_scale", "k_cache"), ("v_scale", "v_cache")):
        if (scale := getattr(a, name)) is not None:
            check_scale(name, scale, output, getattr(a, output), heads[name[0]])


def check_scale(name: str, scale: torch.Tensor, output_name: str, output: torch.Tensor | None, heads: int) -> None:
    """Raise unless `output` is float8 and `scale` has one element, or one for each head."""
    if output is None or output.dtype != E4M3:
        given = "none" if output is None else str(output.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be given with a float8_e4m3fn {output_name}, got {given}")
    checks.dtype(name, scale, (torch.float32,))
    if scale.numel() not in (1, heads):
        raise ValueError(f"{name} must have 1 or {heads} elements, one for each head, got shape {list(scale.shape)}")


def _check_positions(a: Arguments, tokens: int, rotary_dim: int) -> None:
    checks.dtype("positions", a.positions, (torch.int32, torch.int64))
    shape = [3, tokens] if a.positions.dim() == 2 else [tokens]
    why = "one position for each token; three with mrope_section"
    if a.positions.dim() == 2 and a.mrope_section is None:
        shape = [tokens]
    checks.shape("positions", a.positions, shape, why)
    if tokens > 1 and a.positions.stride(-1) != 1:
        raise ValueError(f"positions must be contiguous along the tokens, got a stride of {a.positions.stride(-1)}")
    if a.mrope_section is not None and sum(a.mrope_section) != rotary_dim // 2:
        raise ValueError(
            f"mrope_section must add up to {rotary_dim // 2}, half of cos_sin_cache's last dimension, "
            f"got {list(a.mrope_section)}"
        )


def _check_caches(a: Arguments, tokens: int, kv_heads: int, head_dim: int) -> None:
    given = [name for name in ("k_cache", "v_cache", "slot_mapping") if getattr(a, name) is not None]
    if not given:
        return
    if len(given) < 3 or a.v is None:
        missing = [name for name in ("v", "k_cache", "v_cache", "slot_mapping") if getattr(a, name) is None]
        raise ValueError(f"{given[0]} must be given with {checks.enumeration(missing)}, got None")
    checks.dtype("k_cache", a.k_cache, (a.k.dtype, E4M3))
    checks.dtype("v_cache", a.v_cache, (a.k_cache.dtype,))
    leading = list(a.k_cache.shape[:-2])
    if len(leading) not in (1, 2) or list(a.k_cache.shape[-2:]) != [kv_heads, head_dim]:
        raise ValueError(
            f"k_cache must have shape [slots, {kv_heads}, {head_dim}] or [blocks, block_size, {kv_heads}, {head_dim}], "
            f"got {list(a.k_cache.shape)}"
        )
    checks.shape("v_cache", a.v_cache, a.k_cache.shape, "like k_cache")
    if (slots := math.prod(leading)) > MAX_ROWS:
        raise RuntimeError(f"{a.operator.op} does not support more than {MAX_ROWS} slots, got {slots}")
    checks.indices(a.slots_name, a.slot_mapping, "k", a.k)
    if a.slot_mapping.shape[0] > tokens:
        raise ValueError(
            f"{a.slots_name} must have at most {tokens} elements like k's tokens, got {len(a.slot_mapping)}"
        )


def _check_angles(a: Arguments) -> None:
    angles = a.cos_sin_cache
    layout = f"shape {list(angles.shape)} and strides {list(angles.stride())}"
    if angles.stride(1) != 1:
        raise ValueError(f"cos_sin_cache must have a last stride of 1, got {layout}")
    if angles.shape[0] > 1 and angles.stride(0) < angles.shape[1]:
        raise ValueError(f"cos_sin_cache must have rows that do not overlap, got {layout}")
    if not a.k.shape[0]:
        return
    if not angles.shape[0]:
        raise ValueError(f"cos_sin_cache must have a row for each position, got {layout}")
    checks.storage("cos_sin_cache", angles)
    checks.aligned("cos_sin_cache", angles, *(angles.stride(0),) * (angles.shape[0] > 1))


def _call_torch_op(a: Arguments) -> None:
    """Call the operator in torch.ops.jitnorm, for tracers.

    There are two: one writes q and k in place, and one writes q_out and k_out, so that a compiled graph copies neither.
    """
    refuse_gradient(a.operator.op, *(t for t in a.tensors.values() if t is not None))
    options = {name: getattr(a, name) for name in _OPTIONS}
    inputs = (a.q, a.k, a.v, a.cos_sin_cache, a.positions)
    if a.q_out is None and a.k_out is None:
        torch.ops.jitnorm.qk_norm_rope_store(*inputs, **options)
        return
    q_out = torch.empty_like(a.q) if a.q_out is None else a.q_out
    k_out = torch.empty_like(a.k) if a.k_out is None else a.k_out
    torch.ops.jitnorm.qk_norm_rope_store_out(*inputs, q_out, k_out, **options)
    if a.q_out is None:
        a.q.copy_(q_out)
    if a.k_out is None:
        a.k.copy_(k_out)


_OPTIONS = (
    *("k_cache", "v_cache", "slot_mapping", "q_weight", "k_weight", "eps", "weight_offset", "is_neox", "mrope_section"),
    *("mrope_interleaved", "q_scale", "k_scale", "v_scale", "skip_index", "rounding", "enable_pdl"),
)


def _run(q: Any, k: Any, v: Any, cos_sin_cache: Any, positions: Any, **options: Any) -> None:
    _run_out(q, k, v, cos_sin_cache, positions, None, None, **options)


def _run_out(
    q: Any, k: Any, v: Any, cos_sin_cache: Any, positions: Any, q_out: Any, k_out: Any, **options: Any
) -> None:
    a = check(_arguments_of(q, k, v, cos_sin_cache, positions, q_out, k_out, options))
    run_checked(a)
    increment_versions(*a.written.values())


def _fake(q: Any, k: Any, v: Any, cos_sin_cache: Any, positions: Any, **options: Any) -> None:
    _fake_out(q, k, v, cos_sin_cache, positions, None, None, **options)


def _fake_out(
    q: Any, k: Any, v: Any, cos_sin_cache: Any, positions: Any, q_out: Any, k_out: Any, **options: Any
) -> None:
    a = _check_types(_arguments_of(q, k, v, cos_sin_cache, positions, q_out, k_out, options))
    check_metadata(a)
    build_while_tracing(a.operator, k, a.variant)


def _arguments_of(
    q: Any, k: Any, v: Any, cos_sin_cache: Any, positions: Any, q_out: Any, k_out: Any, options: dict[str, Any]
) -> Arguments:
    tensors = {"q": q, "k": k, "v": v, "cos_sin_cache": cos_sin_cache, "positions": positions}
    return Arguments(**tensors, q_out=q_out, k_out=k_out, **(_DEFAULTS | options))


_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(_OPTIONS),
    "eps": 1e-6,
    "weight_offset": 0.0,
    "is_neox": True,
    "mrope_interleaved": False,
    "skip_index": -1,
    "rounding": "once",
}
_SCHEMA = (
    "*, {cache}? k_cache=None, {v_cache}? v_cache=None, Tensor? slot_mapping=None, Tensor? q_weight=None, "
    "Tensor? k_weight=None, float eps=1e-6, float weight_offset=0.0, bool is_neox=True, int[]? mrope_section=None, "
    "bool mrope_interleaved=False, Tensor? q_scale=None, Tensor? k_scale=None, Tensor? v_scale=None, "
    'int skip_index=-1, str rounding="once", bool? enable_pdl=None) -> ()'
).format(cache="Tensor(c!)", v_cache="Tensor(d!)")
register(
    "qk_norm_rope_store(Tensor(a!) q, Tensor(b!) k, Tensor? v, Tensor cos_sin_cache, Tensor positions, " + _SCHEMA,
    _run,
    _fake,
)
register(
    "qk_norm_rope_store_out(Tensor q, Tensor k, Tensor? v, Tensor cos_sin_cache, Tensor positions, "
    "Tensor(a!) q_out, Tensor(b!) k_out, " + _SCHEMA,
    _run_out,
    _fake_out,
)


def angles_of(max_position: int, rotary_dim: int, base: float = 10000.0) -> torch.Tensor:
    """Return the cosines and sines of a plain rotary embedding, `[max_position, rotary_dim]`, float32, on the CPU."""
    frequencies = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(max_position, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def _heads(shape: Shape) -> dict[str, Any]:
    positions, slots = 4 * shape.rows, 2 * shape.rows
    return {
        "q": shape.randn(shape.rows, 2, shape.size),
        "k": shape.randn(shape.rows, 1, shape.size),
        "v": shape.randn(shape.rows, 1, shape.size),
        "cos_sin_cache": angles_of(positions, shape.size).to(shape.device, shape.dtype),
        "positions": torch.randint(positions, (shape.rows,), device=shape.device),
        "k_cache": shape.zeros(slots, 1, shape.size),
        "v_cache": shape.zeros(slots, 1, shape.size),
        "slot_mapping": torch.randperm(slots, device=shape.device)[: shape.rows],
    }


def _arguments(shape: Shape) -> dict[str, Any]:
    return _heads(shape) | {"q_weight": shape.randn(shape.size), "k_weight": shape.randn(shape.size)}


_WRITTEN, _PER_ROW = ("q", "k", "k_cache", "v_cache"), ("q", "k", "v", "positions", "slot_mapping")
EXAMPLES[QK_NORM_ROPE_STORE.op] = Example(
    qk_norm_rope_store, _arguments, written=_WRITTEN, per_row=_PER_ROW, slots="slot_mapping", sizes=EXAMPLE_SIZES
)
EXAMPLES[ROPE.op] = Example(
    rope_and_store, _heads, written=_WRITTEN, per_row=_PER_ROW, slots="slot_mapping", sizes=EXAMPLE_SIZES
)
