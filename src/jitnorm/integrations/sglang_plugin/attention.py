"""Replace what SGLang's attention layers launch between the QKV projection and the attention kernel by one launch.

A layer's forward becomes: the projection, `jitnorm.qk_norm_rope_store`, attention without its store, and the projection
of its output. Where jitnorm cannot store into a cache, the launch normalises and rotates, and attention stores as
before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from jitnorm.core.operators import DTYPES
from jitnorm.integrations.engine_plugins import reason_to_skip
from jitnorm.integrations.sglang_plugin.layers import engine_norm, norm_problem
from jitnorm.integrations.sglang_plugin.replacement import Left, LoadedModel, Replacement
from jitnorm.integrations.sglang_plugin.store import Store, find_store
from jitnorm.integrations.sglang_plugin.tested import source_problem
from jitnorm.integrations.transformers_attention import PositionEmbeddings
from jitnorm.qknorm_rope_store import QK_NORM_ROPE_STORE, ROPE, check_sizes, qk_norm_rope_store

# The classes whose forward is replaced. Mistral's models are made of Llama's layers.
ATTENTION_CLASSES = {
    "Qwen3Attention": "sglang.srt.models.qwen3",
    "Qwen2Attention": "sglang.srt.models.qwen2",
    "LlamaAttention": "sglang.srt.models.llama",
    "Gemma3Attention": "sglang.srt.models.gemma3_causal",
}
# SGLang's kernels run one after another, and round the results of the norm and of the rotation.
_ROUNDING = "each_step"

Prepare = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Heads:
    """The heads of an attention layer, and their norms.

    Attributes:
        count: The heads of q, of k and of v.
        head_dim: The elements of a head.
        norms: The norms of q and k; None if they are not normalised.
        eps: Their eps.
        weight_offset: What they add to their weights.
    """

    count: tuple[int, int, int]
    head_dim: int
    norms: tuple[Any, Any] | None
    eps: float
    weight_offset: float


def attention_replacements(runner: Any, model: LoadedModel) -> Iterator[tuple[Any, Replacement | Left]]:
    """Yield each attention layer of a model, with its replacement or the reason to leave it.

    Args:
        runner: SGLang's ModelRunner, whose caches and attention backend exist.
        model: Its model.
    """
    classes = [getattr(sys.modules[owner], name) for name, owner in ATTENTION_CLASSES.items() if owner in sys.modules]
    problems: dict[str, str | None] = {}
    modules = list(model.module.modules())
    rotary_embeddings = [m for m in modules if type(m).__name__ == "Gemma3RotaryEmbedding"]
    for module in modules:
        cls = next((cls for cls in classes if isinstance(module, cls)), None)
        if cls is None:
            continue
        name = cls.__name__
        if runner.server_args.forward_hooks:  # SGLang adds them later, perhaps to modules that the launch replaces
            yield module, Left(name, "the server has --forward-hooks")
            continue
        if name not in problems:
            problems[name] = reason_to_skip("attention") or source_problem(name) or source_problem("attention")
        if reason := problems[name] or _layer_problem(module, cls, model.dtype):
            yield module, Left(name, reason)
            continue
        found = find_store(runner, module, model.dtype)
        if isinstance(found, str):
            yield module, Left(f"KV store of {name}", found)
        yield module, _replace_attention(module, name, None if isinstance(found, str) else found, model)
        if name == "Gemma3Attention":
            while rotary_embeddings:
                rotary = rotary_embeddings.pop()
                yield rotary, _replace_gemma3_rotary(rotary)


def head_norms(module: Any) -> tuple[Any, Any] | None:
    """Return the norms of q and k of an attention layer, or None."""
    return (module.q_norm, module.k_norm) if hasattr(module, "q_norm") else None


def _layer_problem(module: Any, cls: type, dtype: torch.dtype) -> str | None:
    """Return why jitnorm cannot prepare the heads of an attention layer, or None."""
    attn, rotary, norms = module.attn, module.rotary_emb, head_norms(module)
    if type(module).forward is not cls.forward or "forward" in vars(module):  # type: ignore[attr-defined]
        return f"its forward is not that of {cls.__name__}"
    if dtype not in DTYPES:
        return f"no kernel supports {dtype}"
    if attn.is_cross_attention or not attn.attn_type.value.startswith("decoder"):
        return "it is cross-attention or an encoder's"
    if not attn.qk_head_dim == attn.v_head_dim == module.head_dim:
        return "heads of k and v differ in size"
    if norms:
        if reason := norm_problem(norms[0], dtype) or norm_problem(norms[1], dtype):
            return reason
        if not all(norm.has_weight and norm.rounding == "once" for norm in (engine_norm(n, dtype) for n in norms)):
            return "its norms have no weight, or round before they multiply by it"
        if _eps_of(norms[0]) != _eps_of(norms[1]) or norms[0].weight.dtype != norms[1].weight.dtype:
            return "its norms differ in eps or in the dtype of their weights"
    rotary_dim = module.head_dim
    if cls.__name__ != "Gemma3Attention":
        base = next((base for base in type(rotary).__mro__ if base.__name__ == "RotaryEmbedding"), None)
        methods = ("forward", "forward_cuda", "forward_native")
        if base is None or any(getattr(type(rotary), name) is not getattr(base, name) for name in methods):
            return f"its rotary embedding, {type(rotary).__name__}, has a forward of its own"
        if hasattr(rotary, "sin_cos_cache"):
            return "its rotary embedding keeps the cosines of one batch"
        rotary_dim = rotary.cos_sin_cache.shape[-1]
    try:
        check_sizes(QK_NORM_ROPE_STORE.op, module.head_dim, rotary_dim)
    except RuntimeError as error:
        return str(error)
    return None


def _replace_attention(module: Any, name: str, store: Store | None, model: LoadedModel) -> Replacement:
    norms = head_norms(module)
    heads = Heads(
        count=(module.num_heads, module.num_kv_heads, module.num_kv_heads),
        head_dim=module.head_dim,
        norms=norms,
        eps=_eps_of(norms[0]) if norms else 0.0,
        weight_offset=1.0 if name == "Gemma3Attention" else 0.0,
    )
    is_neox = name == "Gemma3Attention" or module.rotary_emb.is_neox_style
    prepare = _make_prepare(heads, is_neox, store)
    make_forward = _make_gemma3_forward if name == "Gemma3Attention" else _make_forward
    what = ("QK-norm, " if norms else "") + "rotation" + (" and KV store" if store else "") + f" of {name}"
    forward = make_forward(module, prepare, store is not None, what, model)
    rotary = module.rotary_emb
    if name == "Gemma3Attention":
        rotary_dim, cos_sin_dtype = module.head_dim, model.dtype
    else:
        if rotary.use_fallback_kernel:  # SGLang rounds the cosines in the first call of its fallback kernel
            rotary.cos_sin_cache = rotary.cos_sin_cache.to(model.dtype)
        rotary_dim, cos_sin_dtype = rotary.cos_sin_cache.shape[-1], rotary.cos_sin_cache.dtype

    def first_call() -> None:
        qkv = torch.zeros(1, sum(heads.count) * heads.head_dim, dtype=model.dtype, device=model.device)
        cos_sin_cache = torch.zeros(1, rotary_dim, dtype=cos_sin_dtype, device=model.device)
        zero = torch.zeros(1, dtype=torch.int64, device=model.device)
        prepare(qkv, cos_sin_cache, zero, zero - 1)  # slot -1 is not stored

    operator = QK_NORM_ROPE_STORE if norms else ROPE
    variant = operator.variant(
        *(heads.head_dim, model.dtype, norms[0].weight.dtype if norms else model.dtype, rotary_dim, cos_sin_dtype),
        *(store.pool.dtype if store else None, None, is_neox, False, True),
    )
    specs = (operator.spec(variant, model.target),)
    return Replacement(what, QK_NORM_ROPE_STORE.op, specs, first_call, lambda: setattr(module, "forward", forward))


def _make_prepare(heads: Heads, is_neox: bool, store: Store | None) -> Prepare:
    """Return the function that turns the projection's result into q, k and v for the attention, and stores k and v."""
    head_dim, q_size = heads.head_dim, heads.count[0] * heads.head_dim
    q_parameters, k_parameters = (norm._parameters for norm in heads.norms) if heads.norms else ({}, {})
    eps, weight_offset = heads.eps, heads.weight_offset
    k_scale, v_scale = store.scales if store else (None, None)

    def prepare(
        qkv: torch.Tensor, cos_sin_cache: torch.Tensor, positions: torch.Tensor, slots: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = qkv.view(qkv.shape[0], -1, head_dim).split(heads.count, 1)
        q_weight = k_weight = k_cache = v_cache = None
        if q_parameters:
            q_weight, k_weight = q_parameters["weight"].data, k_parameters["weight"].data
        if store:
            k_cache, v_cache = store.caches()
        qk_norm_rope_store(
            *(q, k, v if store else None, cos_sin_cache, positions, k_cache, v_cache, slots if store else None),
            q_weight=q_weight,
            k_weight=k_weight,
            eps=eps,
            weight_offset=weight_offset,
            is_neox=is_neox,
            k_scale=k_scale,
            v_scale=v_scale,
            rounding=_ROUNDING,
        )
        return qkv[:, :q_size], k, v

    return prepare


def _make_forward(
    module: Any, prepare: Prepare, stores: bool, what: str, model: LoadedModel
) -> Callable[..., torch.Tensor]:
    """Return the forward of a layer of Qwen3, Qwen2 or Llama."""
    modules, buffers, original, report = module._modules, module.rotary_emb._buffers, module.forward, model.report

    def forward(positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: Any) -> torch.Tensor:
        slots = forward_batch.out_cache_loc
        if not torch.compiler.is_compiling() and hidden_states.shape[0] and not (stores and slots is None):
            qkv, _ = modules["qkv_proj"](hidden_states)
            try:
                q, k, v = prepare(qkv, buffers["cos_sin_cache"], positions, slots)
            except (TypeError, ValueError) as error:  # raised before anything is written
                report.leave_call(what, error)
            else:
                output = modules["attn"](q, k, v, forward_batch, save_kv_cache=not stores)
                return modules["o_proj"](output)[0]  # type: ignore[no-any-return]
        return original(positions, hidden_states, forward_batch)  # type: ignore[no-any-return]

    return forward


def _make_gemma3_forward(
    module: Any, prepare: Prepare, stores: bool, what: str, model: LoadedModel
) -> Callable[..., torch.Tensor]:
    """Return the forward of a layer of Gemma 3, whose model computes cosines and sines once for all layers."""
    modules, original, report = module._modules, module.forward, model.report

    def forward(
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        position_embeddings: Any,
        forward_batch: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        slots = forward_batch.out_cache_loc
        if (
            not torch.compiler.is_compiling()
            and isinstance(position_embeddings, PositionEmbeddings)
            and hidden_states.shape[0]
            and not (stores and slots is None)
        ):
            qkv, _ = modules["qkv_proj"](hidden_states)
            embeddings: Any = position_embeddings
            try:
                q, k, v = prepare(qkv, embeddings.cos_sin_cache, embeddings.positions, slots)
            except (TypeError, ValueError) as error:
                report.leave_call(what, error)
            else:
                output = modules["attn"](q, k, v, forward_batch=forward_batch, save_kv_cache=not stores)
                return modules["o_proj"](output)[0]  # type: ignore[no-any-return]
        return original(  # type: ignore[no-any-return]
            positions=positions,
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            forward_batch=forward_batch,
            **kwargs,
        )

    return forward


def _replace_gemma3_rotary(rotary: Any) -> Replacement:
    """Attach to the cosines and sines of Gemma 3's rotary embedding what the operator takes."""
    original = rotary.forward

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        cos, sin = pair = original(x, position_ids)
        if torch.compiler.is_compiling() or cos.shape[0] != 1:
            return pair
        half = cos.shape[-1] // 2
        cos_sin_cache = torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)
        rows = torch.arange(cos_sin_cache.shape[0], dtype=torch.int32, device=cos.device)
        return PositionEmbeddings(pair, cos_sin_cache, rows)

    return Replacement(
        "Gemma3RotaryEmbedding",
        "one that returns the kernel's cos_sin_cache too",
        (),
        lambda: None,
        lambda: setattr(rotary, "forward", forward),
    )


def _eps_of(norm: Any) -> float:
    eps: float = norm.eps if type(norm).__name__ == "Gemma3RMSNorm" else norm.variance_epsilon
    return eps
