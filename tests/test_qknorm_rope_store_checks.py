"""Every argument that qk_norm_rope_store refuses: the message is the same before a kernel is built and after."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_refused

from jitnorm import qk_norm_rope_store, rope, rope_and_store
from jitnorm.qknorm_rope_store import angles_of

D, TOKENS, SLOTS = 64, 5, 20
E4M3 = torch.float8_e4m3fn


def good(device="cpu", dtype=torch.float32, cache_dtype=None):
    """Return arguments: slices of a projection, and of one tensor of caches."""
    qkv = torch.randn(TOKENS, 8, D, device=device).to(dtype)
    caches = torch.zeros(2, SLOTS, 2, D, device=device).to(cache_dtype or dtype)
    return {
        **{"q": qkv[:, :4], "k": qkv[:, 4:6], "v": qkv[:, 6:]},
        **{"cos_sin_cache": angles_of(9, 32).to(device, dtype), "positions": torch.arange(TOKENS, device=device)},
        **{"k_cache": caches[0], "v_cache": caches[1], "slot_mapping": torch.arange(TOKENS, device=device)},
        **{name: torch.randn(D, device=device).to(dtype) for name in ("q_weight", "k_weight")},
    }


def bad_calls(device):
    """Return calls: (name, exception, pattern of the message, call)."""
    a, fp8 = good(device), good(device, cache_dtype=E4M3)
    q, k, v, angles, positions, k_cache, v_cache, slots, w, _ = a.values()
    one = torch.ones(1, device=device)
    q_out, k_out, q_out_fp8 = torch.empty_like(q), torch.empty_like(k), torch.empty(q.shape, device=device).to(E4M3)
    wide = torch.randn(TOKENS, 4, 2 * D, device=device)
    flat = torch.randn(8 * TOKENS * D, device=device)
    blocks = torch.zeros(2, 4, 5, 2, D, device=device)
    three = positions.expand(3, TOKENS)

    def heads(tensor, *shape):
        return tensor.reshape(-1)[: shape[0] * shape[1] * shape[2]].view(shape)

    def bad(name, error, pattern, base=a, **changes):
        return name, error, pattern, lambda: qk_norm_rope_store(**base | changes)

    no_cache = {n: value for n, value in a.items() if n not in ("v", "k_cache", "v_cache", "slot_mapping")} | {
        "v": None
    }
    t, e, r = TypeError, ValueError, RuntimeError
    sections = {"positions": three, "mrope_section": [8, 4, 4]}
    calls = [
        *(
            bad(f"{n} is None", t, f"{n} must be a torch.Tensor, got NoneType", **{n: None})
            for n in ("q", "k", "cos_sin_cache", "positions")
        ),
        *(bad(f"{n} is a list", t, f"{n} must be a torch.Tensor, got list", **{n: [1.0]}) for n in a),
        *(
            bad(f"{n} is a number", t, f"{n} must be a torch.Tensor, got int", **{n: 1})
            for n in ("q_out", "k_out", "q_scale", "k_scale", "v_scale")
        ),
        bad("sparse", t, "q must be a dense tensor", q=q.to_sparse()),
        *(bad(f"{n} flat", e, rf"{n} must have shape \[tokens, heads, head_dim\]", **{n: a[n][0]}) for n in "qkv"),
        bad("q_out flat", e, r"q_out must have shape \[tokens, heads", q_out=q_out[0]),
        bad("k_out flat", e, r"k_out must have shape \[tokens, heads", k_out=k_out[0]),
        bad("float64", t, "k must be float16 or bfloat16 or float32, got float64", k=k.double()),
        *(bad(f"{n} half", t, f"{n} must be float32, got float16", **{n: a[n].half()}) for n in ("q", "v", "v_cache")),
        bad("k_cache half", t, "k_cache must be float32 or float8_e4m3fn, got float16", k_cache=k_cache.half()),
        bad("v_cache float32", t, "v_cache must be float8_e4m3fn, got float32", fp8, v_cache=v_cache),
        bad("q_out half", t, "q_out must be float32 or float8_e4m3fn, got float16", q_out=q_out.half()),
        bad("k_out float8", t, "k_out must be float32, got float8_e4m3fn", k_out=k_out.to(E4M3)),
        bad("q_weight half", t, "q_weight must be float32, got float16", q_weight=w.half()),
        bad("k_weight half", t, "k_weight must be float32, got float16", k_weight=w.half()),
        bad("angles half", t, "cos_sin_cache must be float32, got float16", cos_sin_cache=angles.half()),
        bad("float positions", t, "positions must be int32 or int64, got float32", positions=positions.float()),
        bad("short slots", t, "slot_mapping must be int32 or int64, got int16", slot_mapping=slots.short()),
        bad("float16 scale", t, "k_scale must be float32, got float16", fp8, k_scale=one.half()),
        bad("q of other tokens", e, r"q must have shape \[5, 4, 64\].*got \[4, 4, 64\]", q=q[:4]),
        bad("q of other head_dim", e, r"q must have shape \[5, 4, 64\]", q=q[..., :32]),
        bad("v of other heads", e, r"v must have shape \[5, 2, 64\] \(like k\), got \[5, 1, 64\]", v=v[:, :1]),
        bad("q_out of other heads", e, r"q_out must have shape \[5, 4, 64\] \(like q\)", q_out=q_out[:, :3]),
        bad("k_out of other tokens", e, r"k_out must have shape \[5, 2, 64\] \(like k\)", k_out=k_out[:4]),
        bad("q_weight short", e, r"q_weight must have shape \[64\].*\[32\]", q_weight=w[:32]),
        bad("k_weight of rows", e, r"k_weight must have shape \[64\].*\[1, 64\]", k_weight=w[None]),
        bad("angles flat", e, r"cos_sin_cache must have shape \[max_position, rotary_dim\]", cos_sin_cache=angles[0]),
        bad("no angles", e, "cos_sin_cache must have a row of cosines and sines", cos_sin_cache=angles[:, :0]),
        bad("no positions' angles", e, "cos_sin_cache must have a row for each", cos_sin_cache=angles[:0]),
        bad("fewer positions", e, r"positions must have shape \[5\].*got \[4\]", positions=positions[:4]),
        bad("positions of axes", e, r"positions must have shape \[5\] .*got \[3, 5\]", positions=three),
        bad("two axes", e, r"positions must have shape \[3, 5\]", **sections | {"positions": three[:2]}),
        bad("strided positions", e, "positions must be contiguous along the", positions=positions.repeat(2)[::2]),
        bad("sections are text", t, "mrope_section must be three ints, got str", **sections | {"mrope_section": "888"}),
        bad("sections are a set", t, "mrope_section must be three ints, got set", mrope_section={8, 4, 2}),
        bad("sections of floats", t, "mrope_section must be an int, got float", mrope_section=[8.0, 4.0, 4.0]),
        bad("two sections", e, "mrope_section must be three ints of zero or more", mrope_section=[8, 8]),
        bad("negative sections", e, "mrope_section must be three ints of zero or", mrope_section=[24, -4, -4]),
        bad("sections too short", e, "mrope_section must add up to 16,", **sections | {"mrope_section": [4, 4, 4]}),
        bad("sections of one position", e, "mrope_section must add up to 16,", mrope_section=[0, 0, 0]),
        bad("slots of rows", e, "slot_mapping must have one dim", slot_mapping=slots[:, None]),
        bad("strided slots", e, "slot_mapping must be contiguous", slot_mapping=slots.repeat(2)[::2]),
        bad("more slots", e, "slot_mapping must have at most 5 elements", slot_mapping=slots.repeat(2)),
        bad("no slot", e, "k_cache must have a slot to write to", k_cache=k_cache[:0], v_cache=v_cache[:0]),
        bad("cache of other heads", e, r"k_cache must have shape \[slots, 2, 64\] or", k_cache=k_cache[:, :1]),
        bad("cache flat", e, r"k_cache must have shape \[slots, 2, 64\] or", k_cache=k_cache.flatten(1)),
        bad("other cache", e, r"v_cache must have shape \[20, 2, 64\] \(like k_cache\)", v_cache=v_cache[:9]),
        bad("blocks and slots", e, r"v_cache must have shape \[4, 5, 2, 64\]", k_cache=blocks[0]),
        bad("no v", e, "k_cache must be given with v, got None", v=None),
        bad("no v_cache", e, "k_cache must be given with v_cache, got None", v_cache=None),
        bad("k_cache alone", e, "k_cache must be given with v, v_cache and slot_m", no_cache, k_cache=k_cache),
        bad("slots alone", e, "slot_mapping must be given with v, k_cache and v_cache", no_cache, slot_mapping=slots),
        bad("q_scale alone", e, "q_scale must be given with a float8_e4m3fn q_out, got none", q_scale=one),
        bad("q_scale of float32", e, "q_scale must be given with a .* q_out, got float32", q_scale=one, q_out=q_out),
        bad("k_scale of float32", e, "k_scale must be given with a .* k_cache, got float32", k_scale=one),
        bad("v_scale alone", e, "v_scale must be given with a .* v_cache, got none", no_cache, v_scale=one),
        bad("3 k_scales", e, "k_scale must have 1 or 2 elements", fp8, k_scale=one.repeat(3)),
        bad("2 q_scales", e, "q_scale must have 1 or 4 el", q_out=q_out_fp8, q_scale=one.repeat(2)),
        bad("strided scales", e, "v_scale must be contiguous", fp8, v_scale=one.repeat(4)[::2]),
        *(
            bad(f"{n} strided", e, f"{n} must have a last stride of 1", **{n: wide[:, :heads_of, ::2]})
            for n, heads_of in (("q", 4), ("k", 2), ("v", 2), ("q_out", 4), ("k_out", 2))
        ),
        bad("cache strided", e, "v_cache must have a last", v_cache=torch.zeros(20, 2, 2 * D, device=device)[..., ::2]),
        bad("weight strided", e, "k_weight must have a last stride of 1", k_weight=wide[0, 0, ::2]),
        bad("angles strided", e, "cos_sin_cache must have a last stride of 1", cos_sin_cache=wide[:, 0, :64:2]),
        bad("angles overlap", e, "cos_sin_cache must have rows that do not ov", cos_sin_cache=angles[:1].expand(9, 32)),
        bad("q over itself", e, "q must not overlap itself", q=q[:1].expand(5, 4, D)),
        bad("heads that overlap", e, "q_out must not overlap", q_out=flat.as_strided((5, 4, D), (4 * D, D - 16, 1))),
        bad("tokens that overlap", e, "k must not overlap itself", k=flat.as_strided((5, 2, D), (D, D, 1))),
        bad("cache over itself", e, "k_cache must not overlap", k_cache=k_cache[:1].expand(20, 2, D)),
        bad("pages that overlap", e, "v_cache must not", k_cache=blocks[0], v_cache=blocks[1, :1].expand(4, 5, 2, D)),
        bad("q is k", e, "k must share no memory with q", q=k),
        bad("a head of both", e, "k must share no memory with q", q=a["q"]._base[:, 1:5]),
        bad("k in v", e, "k must share no memory with v", v=k),
        bad("q_out in q", e, "q_out must share no memory with q,", q_out=a["q"]._base[:, 1:5], k_out=k_out),
        bad("q_out is k", e, "k must share no memory with q_out", q=q[:, :2], q_out=k),
        bad("float8 in q", e, "q_out must share no", q_out=heads(q_out.view(E4M3).view(-1), 5, 4, D), q=q_out),
        bad("one cache", e, "v_cache must share no memory with k_cache", v_cache=k_cache),
        bad("caches that touch", e, "v_cache must share no memory with k_cache", v_cache=k_cache.view(20, 2, D)),
        bad("k in the cache", e, "k_cache must share no memory with k,", k=k_cache[:5]),
        bad("v in the cache", e, "v_cache must share no memory with v,", v=v_cache[5:10]),
        bad("k_cache is v", e, "k_cache must share no memory with v,", k_cache=v, v_cache=torch.zeros_like(v)),
        bad(
            "v_cache is q_weight",
            e,
            "v_cache must share no memory with q_weight,",
            **{"q": q[:1], "k": k[:1, :1], "v": v[:1, :1], "positions": positions[:1], "slot_mapping": slots[:1]},
            **{"k_cache": k_cache[:1, :1], "v_cache": w.view(1, 1, D)},
        ),
        bad("weight in q", e, "q must share no memory with q_weight", q_weight=q[1, 1]),
        bad("weight in the cache", e, "k_cache must share no memory with k_weight", k_weight=k_cache[0, 0]),
        bad("angles in k", e, "k must share no memory with cos_sin_cache", cos_sin_cache=k[:, 0, :32], q=q.clone()),
        bad(
            "positions in q_out",
            e,
            "q_out must share no memory",
            q_out=q_out.zero_(),
            positions=q_out.view(torch.int64)[0, 0, :5],
        ),
        bad("slots in v_cache", e, "v_cache must share no memory", slot_mapping=v_cache.view(torch.int64)[0, 0, :5]),
        bad("eps negative", e, "eps must be zero or more, got -1", eps=-1.0),
        bad("eps is None", t, "eps must be a float, got NoneType", eps=None),
        bad("offset is text", t, "weight_offset must be a float, got str", weight_offset="1"),
        bad("offset is True", t, "weight_offset must be a float, got bool", weight_offset=True),
        bad("huge offset", e, "weight_offset must be a float or a 64-bit int", weight_offset=2**64),
        bad("is_neox is None", t, "is_neox must be True or False, got NoneType", is_neox=None),
        bad("is_neox is 1", t, "is_neox must be True or False, got int", is_neox=1),
        bad("interleaved is None", t, "mrope_interleaved must be True or False, got N", mrope_interleaved=None),
        bad("skip is None", t, "skip_index must be an int, got NoneType", skip_index=None),
        bad("skip is huge", e, "skip_index must fit 64 bits", skip_index=2**63),
        bad("rounding is None", t, "rounding must be a str, got NoneType", rounding=None),
        bad("other rounding", e, "rounding must be 'once' or 'each_step', got 'hf'", rounding="hf"),
        bad("enable_pdl is 1", t, "enable_pdl must be True", enable_pdl=1),
        bad(
            "head_dim 72",
            r,
            "qk_norm_rope_store does not support head_dim 72: supported are the multiples of 16 from 64 to 512",
            no_cache,
            **{"q": wide[..., :72], "k": wide[:, :2, :72].clone(), "q_weight": w.new_ones(72), "k_weight": None},
        ),
        bad(
            "rotary_dim 24",
            r,
            "does not support rotary_dim 24: .* from 16 to head_dim, 64",
            cos_sin_cache=angles[:, :24],
        ),
        bad("rotary_dim 80", r, "does not support rotary_dim 80", cos_sin_cache=torch.zeros(9, 80, device=device)),
        ("rope names itself", r, "^rope does not support rotary_dim 24", lambda: rope(q, k, angles[:, :24], positions)),
        (
            "rope_and_store without v",
            e,
            "k_cache must be given with v, got None",
            lambda: rope_and_store(q, k, None, angles, positions, k_cache, v_cache, slots),
        ),
        bad(
            "too many slots",
            r,
            "does not support more than 2147483647 slots, got 2147483648",
            **{"k": k[:, :0], "v": v[:, :0]},
            **dict.fromkeys(("k_cache", "v_cache"), torch.empty(2**31, 0, D, device=device)),
        ),
        bad("a gradient", r, "qk_norm_rope_store has no gradient", q=q.clone().requires_grad_()),
    ]
    if device == "cuda":
        misaligned = flat[1 : 10 * D + 1].view(5, 2, D)
        calls += [
            *(
                bad(f"{n} elsewhere", e, f"{n} must be on cuda:0 like k, got cpu", **{n: a[n].cpu()})
                for n in a
                if n != "k"
            ),
            bad("k misaligned", e, "k must be aligned to 16 bytes", k=misaligned),
            bad(
                "heads misaligned", e, "q must be aligned to 16 bytes", q=flat.as_strided((5, 2, D), (3 * D, D + 2, 1))
            ),
            bad(
                "cache misaligned",
                e,
                "k_cache must be aligned to 16 bytes",
                k_cache=flat[2 : 10 * D + 2].view(5, 2, D),
                v_cache=v_cache[:5],
            ),
            bad("weight misaligned", e, "q_weight must be aligned", q_weight=flat[1 : D + 1]),
            bad("angles misaligned", e, "cos_sin_cache must be aligned", cos_sin_cache=flat[1:289].view(9, 32)),
        ]
    return calls


NAMES = [name for name, *_ in bad_calls("cpu")]


def prepare(device):
    """Build the kernels that the calls above would use, each the last one used for its key."""
    for cache_dtype in (torch.float32, E4M3):
        a = good(device, cache_dtype=cache_dtype)
        three = {"positions": a["positions"].expand(3, -1), "mrope_section": [8, 4, 4]}
        for more in (three, {}):
            qk_norm_rope_store(**a | more)


@pytest.mark.parametrize("name", NAMES)
def test_refused_before_anything_is_built(name, cache_dir):
    assert_refused(bad_calls("cpu"), name)
    assert not cache_dir.exists()


@pytest.mark.parametrize("name", NAMES)
def test_refused_by_a_kernel_that_is_there(name):
    prepare("cpu")
    assert_refused(bad_calls("cpu"), name)


@pytest.mark.gpu
@pytest.mark.parametrize("built", [False, True])
def test_refused_on_a_gpu(built, cache_dir):
    if built:
        prepare("cuda")
    for _, error, pattern, call in bad_calls("cuda"):
        with pytest.raises(error, match=pattern):
            call()
    torch.cuda.synchronize()
    assert built or not cache_dir.exists()
