"""jitnorm.qk_norm_rope_store against its definition in float64, and the promises of its docstring."""

from __future__ import annotations

import random as python_random
import sys
from dataclasses import dataclass

import pytest
import torch
from fp8_reference import codes, encode, quotient
from helpers import TOLERANCE, relative_error, same_bits
from references import qk_norm_rope

from jitnorm import qk_norm_rope_store, rope, rope_and_store, store_cache
from jitnorm.core import checks
from jitnorm.qknorm_rope_store import angles_of

MODULE = sys.modules["jitnorm.qknorm_rope_store"]
F32, F16, BF16, E4M3 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn
POSITIONS, BLOCKS, BLOCK_SIZE = 50, 7, 5
SLOTS = BLOCKS * BLOCK_SIZE


@dataclass(frozen=True)
class Case:
    """What a kernel is compiled for."""

    head_dim: int
    rotary_dim: int
    dtype: torch.dtype = BF16
    weight_dtype: torch.dtype | None = BF16
    cos_sin_dtype: torch.dtype = BF16
    cache_dtype: torch.dtype = BF16
    q_dtype: torch.dtype = BF16
    is_neox: bool = True
    sections: str | None = None


QWEN3 = Case(128, 128)
# Each kernel takes a build. Each head_dim and each value of the other axes occurs, next to different values of the
# others; the comments name the models or the reason.
CASES = {
    "qwen3": QWEN3,
    "qwen3-next, all float8": Case(256, 64, weight_dtype=F32, cos_sin_dtype=F32, cache_dtype=E4M3, q_dtype=E4M3),
    "interleaved pairs, no norm": Case(64, 64, F16, None, F32, F16, F16, is_neox=False),
    "deepseek's head_dim": Case(192, 128, F32, F32, F32, E4M3, F32, is_neox=False, sections="contiguous"),
    "largest": Case(512, 512, F32, F32, F32, F32, E4M3, sections="interleaved"),
    "threads without a pair": Case(80, 32, cache_dtype=E4M3, sections="interleaved"),
    "qwen2-vl": Case(128, 128, F16, None, F16, E4M3, F16, sections="contiguous"),
    "interleaved pairs, sections, norm": Case(64, 32, F16, F32, F16, F16, E4M3, is_neox=False, sections="interleaved"),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def random(*shape, dtype=BF16, device="cpu"):
    """Return random numbers of the dtype. What is to be overwritten holds them too: no output is right by chance."""
    return torch.randn(*shape, device=device).to(dtype)


def sections_of(case):
    """Return sections of different lengths; interleaved, those of height and width end at different pairs."""
    pairs = case.rotary_dim // 2
    return (pairs - pairs // 4 - pairs // 3, pairs // 4, pairs // 3)


def make(case, device, tokens=7, q_heads=6, kv_heads=2, stored=True, index_dtype=torch.int64):
    """Return arguments. q, k and v are slices of one projection, of heads of very different magnitudes."""
    d = case.head_dim
    heads = q_heads + 2 * kv_heads
    qkv = torch.randn(tokens, heads, d, device=device) * torch.rand(tokens, heads, 1, device=device).mul(6).exp()
    if case.cache_dtype == E4M3 or case.q_dtype == E4M3 or case.weight_dtype is None:
        qkv = torch.randn(tokens, heads, d, device=device) * (1 + torch.arange(heads, device=device)[:, None] % 3)
    qkv = qkv.to(case.dtype).flatten(1)
    q, k, v = (t.unflatten(-1, (t.shape[-1] // d, d)) for t in qkv.split((q_heads * d, kv_heads * d, kv_heads * d), -1))
    shape = (3, tokens) if case.sections else (tokens,)
    a = {
        **{
            "q": q,
            "k": k,
            "v": v,
            "cos_sin_cache": angles_of(POSITIONS, case.rotary_dim).to(device, case.cos_sin_dtype),
        },
        "positions": torch.randint(POSITIONS, shape, device=device).to(index_dtype),
        "is_neox": case.is_neox,
    }
    if case.sections:
        a |= {"mrope_section": sections_of(case), "mrope_interleaved": case.sections == "interleaved"}
    if case.weight_dtype:
        a |= {f"{n}_weight": random(d, dtype=case.weight_dtype, device=device) for n in ("q", "k")}
    if case.q_dtype != case.dtype:
        a["q_out"] = random(tokens, q_heads, d, dtype=case.q_dtype, device=device)
    if stored:
        a |= caches(case, device, kv_heads)
        a["slot_mapping"] = torch.randperm(SLOTS, device=device)[:tokens].to(index_dtype)
    return a


def caches(case, device, kv_heads=2, layout="flat"):
    """Return caches of a layout, as views of one tensor."""
    shapes = {
        "flat": (2, SLOTS, kv_heads, case.head_dim),
        "pages": (2, BLOCKS, BLOCK_SIZE, kv_heads, case.head_dim),
        "k and v in each block": (BLOCKS, 2, BLOCK_SIZE, kv_heads, case.head_dim),
        "heads before tokens": (2, BLOCKS, kv_heads, BLOCK_SIZE, case.head_dim),
        "k and v in each head": (BLOCKS, BLOCK_SIZE, kv_heads, 2 * case.head_dim),
        "flat rows with gaps": (2, SLOTS, kv_heads + 1, case.head_dim + 32),
    }
    whole = random(*shapes[layout], dtype=case.cache_dtype, device=device)
    k_cache, v_cache = (
        whole.chunk(2, -1)
        if layout == "k and v in each head"
        else whole.unbind(1 if layout == "k and v in each block" else 0)
    )
    if layout == "heads before tokens":
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    if layout == "flat rows with gaps":
        k_cache, v_cache = (c[:, 1:, 16 : 16 + case.head_dim] for c in (k_cache, v_cache))
    return {"k_cache": k_cache, "v_cache": v_cache}


def at(cache, slots):
    """Return the heads of slots, `[stored, heads, head_dim]`."""
    slots = slots.long()
    return cache[slots] if cache.dim() == 3 else cache[slots // cache.shape[1], slots % cache.shape[1]]


def put(cache, slots, value):
    """Write the heads of slots."""
    slots = slots.long()
    cache[(slots,) if cache.dim() == 3 else (slots // cache.shape[1], slots % cache.shape[1])] = value


def whole(tensor):
    """Return all memory of a tensor's storage, its gaps included."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def call(a, function=qk_norm_rope_store):
    assert function(**a) is None


def copied(a):
    """Return arguments with memory of their own, laid out alike and sharing what they share."""
    storages = {}
    for value in a.values():
        if isinstance(value, torch.Tensor):
            key = value.untyped_storage().data_ptr()
            storages.setdefault(key, whole(value).clone().untyped_storage())
    return {
        name: torch.empty(0, dtype=v.dtype, device=v.device).set_(
            storages[v.untyped_storage().data_ptr()], v.storage_offset(), v.shape, v.stride()
        )
        if isinstance(v, torch.Tensor)
        else v
        for name, v in a.items()
    }


def assert_rounded(got, reference):
    """Assert that a result is the reference, rounded once, but for float32's own rounding near a tie."""
    dtype = got.dtype
    if got.numel() == 0:
        return
    for head in range(got.shape[1]):  # each by itself: no head's error hides behind the others
        assert relative_error(got[:, head], reference[:, head]) <= TOLERANCE[dtype]
    if dtype != F32:
        assert (got == reference.to(dtype)).double().mean() >= 0.99


def assert_codes(got, reference, scale):
    """Assert that float8 codes are those of the reference, or of a number that float32 cannot tell from it."""
    scale = torch.ones(1, device=got.device) if scale is None else scale.flatten()
    exact = (reference / scale.double()[:, None]).cpu()
    error = 1e-6 * exact.abs().amax(-1, keepdim=True)
    found = codes(got).cpu()
    # A zero may have either sign where the exact value is within the error of it.
    accepted = [encode(exact + step * error) for step in (0, -1, 1)]
    assert sum((found == code).int() for code in accepted).bool().all()
    assert (found == accepted[0]).double().mean() >= 0.99


def check(a, function=qk_norm_rope_store):
    """Call the operator, and check all that it writes, and that it writes nothing else."""
    before = copied(a)
    call(a, function)
    q, k = qk_norm_rope(before)
    to_q, to_k = a.get("q_out"), a.get("k_out")
    to_q, to_k = a["q"] if to_q is None else to_q, a["k"] if to_k is None else to_k
    if to_q.dtype == E4M3:
        assert_codes(to_q, q, a.get("q_scale"))
    else:
        assert_rounded(to_q, q)
    assert_rounded(to_k, k)
    written = [
        (to_q, "q_out" if a.get("q_out") is not None else "q"),
        (to_k, "k_out" if a.get("k_out") is not None else "k"),
    ]
    if a.get("k_cache") is not None:
        slots = a["slot_mapping"]
        kept = (slots != a.get("skip_index", -1)).nonzero()[:, 0]
        for name, rows in (("k", k), ("v", before["v"].double())):
            cache, scale = a[f"{name}_cache"], a.get(f"{name}_scale")
            got = at(cache, slots[kept])
            if cache.dtype == E4M3 and name == "v":  # nothing is rounded before the quotient
                scale = torch.ones(1) if scale is None else scale.cpu().flatten()
                assert torch.equal(codes(got).cpu(), encode(quotient(rows[kept].cpu(), scale[:, None])))
            elif cache.dtype == E4M3:
                assert_codes(got, rows[kept], scale)
            else:
                assert same_bits(got, to_k[kept] if name == "k" else before["v"][kept])
            put(cache, slots[kept], at(before[f"{name}_cache"], slots[kept]))
    for tensor, name in written:
        tensor.copy_(before[name])
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            assert same_bits(whole(value), whole(before[name])), name


@cases
def test_matches_the_definition(device, case):
    # One token; odd numbers that fill no block; one kv head, and more kv heads than q heads.
    for tokens, q_heads, kv_heads in ((1, 6, 2), (7, 3, 1), (77, 2, 5)):
        a = make(case, device, tokens, q_heads, kv_heads, index_dtype=(torch.int32, torch.int64)[tokens % 2])
        if tokens > SLOTS:
            a["slot_mapping"] = a["slot_mapping"][:SLOTS]
        check(a)


@cases
def test_scales_offsets_and_outputs(device, case):
    """What a kernel does not differ by: Gemma's offset, scales, outputs of their own, rows with gates between."""
    a = make(case, device, 9, 4, 3, index_dtype=torch.int32)
    gated = random(9, 4, 2, case.head_dim, dtype=case.dtype, device=device)
    gated[:, :, 0] = a["q"]
    a |= {"q": gated[:, :, 0], "k_out": torch.full_like(a["k"], float("nan")), "eps": 0.5}
    if case.weight_dtype:
        a["weight_offset"] = 1.0
    if case.q_dtype == E4M3:
        a["q_scale"] = torch.tensor([0.5, 0.1, 0.03, 2.0], device=device)
    else:
        a["q_out"] = torch.full_like(a["q"], float("nan"))
    if case.cache_dtype == E4M3:
        a |= {
            "k_scale": torch.tensor(0.07, device=device),
            "v_scale": torch.tensor([[0.3], [0.7], [0.01]], device=device),
        }
    check(a)
    # Per-tensor for q and v, per head for k.
    if case.q_dtype == E4M3:
        a["q_scale"] = a["q_scale"][1:2]
    if case.cache_dtype == E4M3:
        a |= {"k_scale": torch.tensor([0.2, 0.3, 0.4], device=device), "v_scale": torch.tensor([0.25], device=device)}
    check(a)


@pytest.mark.slow
@cases
def test_rounding_of_each_step(device, case):
    a = make(case, device, 33, 4, 3) | {"rounding": "each_step"}
    if case.cache_dtype == E4M3:
        a |= {n: torch.rand(3, device=device) + 0.1 for n in ("k_scale", "v_scale")}
    if case.q_dtype == E4M3:
        a["q_scale"] = torch.rand(4, device=device) + 0.1
    stepwise = copied(a)
    call(stepwise)
    q, k = qk_norm_rope(a)
    assert_rounded(stepwise["k"], k)
    if case.q_dtype != E4M3:
        assert_rounded(stepwise["q"], q)
    if case.cache_dtype == E4M3:  # the codes are those of the rounded k, as of an engine that stores it afterwards
        for name in ("k", "v"):
            scale = a[f"{name}_scale"][:, None]
            expected = (stepwise[name][: len(a["slot_mapping"])].float() / scale).clamp(-448, 448).to(E4M3)
            assert same_bits(at(stepwise[f"{name}_cache"], a["slot_mapping"]), expected)
    if case.q_dtype == E4M3:
        in_place = copied({n: v for n, v in a.items() if n not in ("q_out", "q_scale")})
        call(in_place)
        expected = (in_place["q"].float() / a["q_scale"][:, None]).clamp(-448, 448).to(E4M3)
        assert same_bits(stepwise["q_out"], expected)
    once = copied(a | {"rounding": "once"})
    call(once)
    if case.weight_dtype and case.dtype != F32:
        assert not same_bits(once["k"], stepwise["k"])


def test_norms_may_be_absent_for_one(device):
    for name in ("q_weight", "k_weight"):
        a = make(QWEN3, device)
        del a[name]
        check(a)


def test_positions_of_one_kind_with_sections(device):
    """Text: all three positions are the same, and given once."""
    a = make(QWEN3, device) | {"mrope_section": [16, 24, 24]}
    check(a)
    a = make(CASES["qwen2-vl"], device)
    a["positions"] = a["positions"][:1].expand(3, -1)
    one = copied(a)
    one["positions"] = a["positions"][0]
    check(copied(a))
    call(one)
    call(a)
    assert same_bits(one["q"], a["q"]) and same_bits(one["k_cache"], a["k_cache"])


@pytest.mark.parametrize("case", [QWEN3, CASES["qwen3-next, all float8"]], ids=["bf16", "float8"])
@pytest.mark.parametrize(
    "layout",
    ["flat", "pages", "k and v in each block", "heads before tokens", "k and v in each head", "flat rows with gaps"],
)
def test_cache_layouts(device, layout, case):
    for index_dtype in (torch.int32, torch.int64):
        check(make(case, device, index_dtype=index_dtype) | caches(case, device, layout=layout))
    # One kv head and one block: strides of dimensions of one element.
    a = make(case, device, 3, kv_heads=1) | caches(case, device, 1, layout)
    a |= {name: a[name][: 1 if a[name].dim() == 4 else 5] for name in ("k_cache", "v_cache")}
    check(a | {"slot_mapping": torch.tensor([4, 0, 2], device=device)})


def test_skipped_slots_and_fewer_slots_than_tokens(device):
    a = make(QWEN3, device, 11)
    slots = a["slot_mapping"].clone()
    slots[::3] = -1
    check(copied(a | {"slot_mapping": slots}))
    check(copied(a | {"skip_index": int(slots[1])}))
    check(copied(a | {"slot_mapping": torch.full_like(slots, 10**9), "skip_index": 10**9}))
    for stored in (0, 1, 10):
        check(copied(a | {"slot_mapping": slots[:stored]}))


def test_separate_tensors_and_odd_strides(device):
    """The same bits, and nothing else is written."""
    case, d = QWEN3, QWEN3.head_dim
    a = make(case, device, 9, 6, 2)
    expected = copied(a)
    call(expected)
    token_major = random(9, 12, d + 32, device=device)
    head_major = random(12, 9, d, device=device).transpose(0, 1)
    every_second = random(18, 12, d, device=device)[::2]
    for base in (token_major[..., 32:], head_major, every_second):
        views = {"q": base[:, 1:7], "k": base[:, 8:10], "v": base[:, 10:]}
        for name, view in views.items():
            view.copy_(a[name])
        b = copied(a | views)
        check(copied(b))
        call(b)
        for name in ("q", "k", "k_cache", "v_cache"):
            assert same_bits(b[name], expected[name])
    separate = copied({n: v.clone(memory_format=torch.contiguous_format) if n in "qkv" else v for n, v in a.items()})
    outputs = copied(a | {"q_out": random(9, 7, d, device=device)[:, 1:], "k_out": random(9, 2, d, device=device)})
    for b in (separate, outputs, a | {"q_out": a["q"], "k_out": a["k"]}):
        call(b)
        assert same_bits(b["q"] if b is separate else b["q_out"], expected["q"])
        assert same_bits(b["k"] if b is separate else b["k_out"], expected["k"])
        assert same_bits(b["k_cache"], expected["k_cache"])


@pytest.mark.parametrize(
    "case",
    [QWEN3, CASES["qwen3-next, all float8"], CASES["threads without a pair"]],
    ids=["bf16", "float8", "sections"],
)
def test_the_same_bits_in_any_batch(device, case):
    tokens = SLOTS
    a = make(case, device, tokens, 5, 3)
    together = copied(a)
    call(together)
    names = ["q_out" if "q_out" in a else "q", "k"]
    for batch in (1, 2, 3, 16, 33):
        for first in {0, 1, (tokens - batch) // 2, tokens - batch}:
            rows = slice(first, first + batch)
            for pdl in (None, False):
                b = copied(a)
                own = {n: b[n][rows] for n in ("q", "k", "v", "q_out", "slot_mapping") if n in b}
                call(b | own | {"positions": b["positions"][..., rows], "enable_pdl": pdl})
                for name in names:
                    assert same_bits(b[name][rows], together[name][rows])
                for name in ("k_cache", "v_cache"):
                    slots = a["slot_mapping"][rows]
                    assert same_bits(at(b[name], slots), at(together[name], slots))
    # The other heads do not matter, or where in its tensor a head is.
    alone = copied(a)
    for name, heads in (("q", 5), ("k", 3)):
        for head in range(heads):
            b = {n: v for n, v in copied(a).items() if n not in ("k_cache", "v_cache", "slot_mapping", "v")} | {
                "v": None
            }
            b["q"], b["k"] = b["q"][:, : 5 if name == "k" else 0], b["k"][:, : 3 if name == "q" else 0]
            b[name] = alone[name][:, head : head + 1]
            out = "q_out" if name == "q" and "q_out" in a else name
            b |= {"q_out": alone["q_out"][:, head : head + 1] if name == "q" else b["q_out"]} if "q_out" in a else {}
            call(b)
            assert same_bits(alone[out][:, head], together[out][:, head])


@pytest.mark.gpu
@pytest.mark.parametrize("case", [QWEN3, CASES["threads without a pair"]], ids=["bf16", "sections"])
def test_positions_that_an_earlier_kernel_writes(case):
    """With PDL the kernel starts while an earlier one runs, and reads old positions as a guess.

    They may be any bits. `store_cache` lets the next kernel start before its own stores.
    """
    a = make(case, "cuda", tokens=32)
    positions = a["positions"].contiguous()
    expected = copied(a)
    call(expected | {"positions": positions, "enable_pdl": False})
    row = torch.zeros(1, dtype=torch.int64, device="cuda")
    for old in (positions.flip(-1), torch.randint_like(positions, -(1 << 62), 1 << 62)):
        for _ in range(20):
            b = copied(a)
            b["positions"] = old.clone()
            rows, written = (t.view(BF16).view(1, -1) for t in (positions, b["positions"]))
            store_cache(rows, rows, written, torch.empty_like(rows), row)
            call(b)
            assert torch.equal(b["positions"], positions)
            for name in ("q", "k", "k_cache", "v_cache"):
                assert same_bits(b[name], expected[name])


@pytest.mark.gpu
@cases
def test_the_same_bits_in_a_large_grid(case):
    """Compare a large grid, in which a thread takes two heads of a tile of tokens, with small ones.

    Odd numbers of heads leave a thread with one at the end.
    """
    for q_heads, kv_heads in ((5, 3), (0, 1)):
        check_large_grid(case, q_heads, kv_heads, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [QWEN3, CASES["qwen3-next, all float8"]], ids=["qwen3", "qwen3-next, all float8"])
@pytest.mark.parametrize(("q_heads", "kv_heads", "share"), [(5, 0, 1.0), (5, 3, 0.7), (5, 3, None)])
def test_a_large_grid_with_fewer_slots(case, q_heads, kv_heads, share):
    """Leave out the heads of k and v, the slots of the last tokens, or the caches."""
    check_large_grid(case, q_heads, kv_heads, share)


def check_large_grid(case, q_heads, kv_heads, share):
    """Compare with small grids. `share` is that of the tokens that have a slot; None means that there are no caches."""
    tokens = (9 << 20) // (case.head_dim * case.dtype.itemsize * (q_heads + 2 * kv_heads)) + 1
    a = make(case, "cuda", tokens, q_heads, kv_heads, stored=False)
    results = ["q_out" if "q_out" in a else "q", "k"]
    if share is not None:
        a |= {f"{n}_cache": random(tokens, kv_heads, case.head_dim, device="cuda").to(case.cache_dtype) for n in "kv"}
        a["slot_mapping"] = torch.randperm(tokens, device="cuda")[: int(tokens * share)]
        results += ["k_cache", "v_cache"]
    before, together, in_parts = copied(a), copied(a), copied(a)
    call(together)
    for rows in torch.arange(tokens).chunk(3):
        rows = slice(int(rows[0]), int(rows[-1]) + 1)
        own = {n: in_parts[n][rows] for n in ("q", "k", "v", "q_out", "slot_mapping") if n in in_parts}
        call(in_parts | own | {"positions": a["positions"][..., rows]})
    for name in results:
        assert same_bits(in_parts[name], together[name])
        assert not together[name].numel() or not same_bits(together[name], before[name])


def test_rope_and_rope_and_store(device):
    case = CASES["interleaved pairs, no norm"]
    a = make(case, device)
    check(copied(a), rope_and_store)
    check({n: v for n, v in a.items() if n not in ("v", "k_cache", "v_cache", "slot_mapping")}, rope)


def test_nothing_to_do(device):
    case = QWEN3
    check(make(case, device, 0))
    check(make(case, device, 3, 0, 0))
    check(make(case, device, 3, 0, 2))
    a = make(case, device, 3, 2, 0)
    check(copied(a))
    call(a | {n: a[n][:0] for n in ("k_cache", "v_cache")})  # no slot, and no head that needs one


def test_special_values_stay_in_their_head(device):
    a = make(QWEN3, device)
    expected = copied(a)
    call(expected)
    a["q"][1, 2, 7], a["k"][3, 0, 9], a["v"][2, 1, 5], a["k"][4, 1] = float("inf"), float("nan"), float("nan"), 0.0
    v = a["v"].clone()
    call(a)
    assert a["q"][1, 2].isnan().any() and a["k"][3, 0].isnan().all() and (a["k"][4, 1] == 0).all()
    assert same_bits(at(a["v_cache"], a["slot_mapping"]), v)  # a NaN's bits too
    for name, token, head in (("q", 1, 2), ("k", 3, 0), ("k", 4, 1)):
        a[name][token, head] = expected[name][token, head]
    assert same_bits(a["q"], expected["q"]) and same_bits(a["k"], expected["k"])


def test_offsets_beyond_32_bits():
    """Tokens and blocks 2^30 elements apart. Only the pages that are touched take memory."""
    apart, case = 2**30 + 64, QWEN3
    a = make(case, "cpu", 3, 2, 1)
    storage = torch.empty(3 * apart, dtype=BF16)
    views = {
        n: storage.as_strided((3, h, 128), (apart, 128, 1), o)
        for n, h, o in (("q", 2, 0), ("k", 1, 256), ("v", 1, 384))
    }
    cache = [storage.as_strided((3, 2, 1, 128), (apart, 128, 128, 1), o) for o in (512, 1024)]
    expected = copied(a | {"slot_mapping": torch.tensor([5, 0, 3])})
    for name, view in views.items():
        view.copy_(a[name])
    call(expected)
    call(a | views | {"k_cache": cache[0], "v_cache": cache[1], "slot_mapping": torch.tensor([5, 0, 3])})
    assert same_bits(views["q"], expected["q"]) and same_bits(views["k"], expected["k"])
    assert same_bits(at(cache[0], torch.tensor([5, 0, 3])), expected["k"])


def test_parameters_and_inference_mode(device):
    a = make(QWEN3, device)
    expected = copied(a)
    call(expected)
    for mode in (torch.inference_mode, torch.no_grad):
        b = copied(a)
        b |= {n: torch.nn.Parameter(b[n]) for n in ("q_weight", "k_weight")}
        with mode():
            call(b)
        assert same_bits(b["q"], expected["q"]) and same_bits(b["k_cache"], expected["k_cache"])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_checked_indices(device, index_dtype, monkeypatch):
    monkeypatch.setattr(MODULE, "check_indices", True)
    a = make(QWEN3, device, index_dtype=index_dtype)
    check(copied(a))
    paged = a | caches(QWEN3, device, layout="pages")
    three = make(CASES["qwen2-vl"], device, index_dtype=index_dtype)
    for b, name, place, wrong, pattern in (
        (a, "slot_mapping", (3,), SLOTS, rf"slot_mapping\[3\] is {SLOTS}, and the caches have {SLOTS} slots"),
        (paged, "slot_mapping", (2,), -2, rf"slot_mapping\[2\] is -2, and the caches have {SLOTS} slots"),
        (a, "positions", (5,), POSITIONS, rf"positions\[5\] is {POSITIONS}, and cos_sin_cache has {POSITIONS} rows"),
        (a, "positions", (0,), -1, r"positions\[0\] is -1"),
        (three, "positions", (2, 1), 10**6, r"positions\[2, 1\] is 1000000"),
    ):
        b = copied(b)
        b[name][place] = wrong
        before = copied(b)
        with pytest.raises(IndexError, match=pattern):
            call(b)
        for one, value in b.items():
            assert not isinstance(value, torch.Tensor) or same_bits(value, before[one])
        if name == "slot_mapping":
            check(b | {"skip_index": wrong})


# Which heads share memory, as overlap is decided; the bindings are compared with it in core/test_checks_agree.py.


def shares(a, b):
    try:
        checks.no_shared_heads("a", a, "b", b)
    except ValueError:
        return True
    return False


def test_shared_heads_are_found():
    pick, memory, found = python_random.Random(0), torch.zeros(4000, dtype=torch.bool), []

    def view(dims, strides=None):
        shape = [pick.choice((1, 1, 2, 3, 5, 9)) for _ in range(dims)] + [4]
        strides = strides or [pick.choice((4, 8, 8, 12, 16, 40, 120)) for _ in range(dims)] + [1]
        return memory.as_strided(shape, strides, pick.randrange(200))

    for _ in range(3000):
        a = view(pick.choice((2, 3)))
        b = view(a.dim() - 1, a.stride()) if pick.random() < 0.6 else view(pick.choice((2, 3)))
        if checks._is_self_overlapping(a):
            continue
        memory.zero_()
        b.fill_(True)
        overlap = bool(a.any())
        assert shares(a, b) or not overlap
        if not checks._is_self_overlapping(b) and a.stride() == b.stride() and min(*a.shape, *b.shape) > 1:
            assert shares(a, b) == overlap
            found.append(overlap)
    assert 20 < sum(found) < len(found) - 20


def test_heads_in_a_dimension_that_the_other_tensor_has_not():
    """The heads of one token lie two slots apart in a cache of one head: many steps of one stride in another's."""
    memory = torch.zeros(64, 64)
    cache = memory[:40].view(40, 1, 64)
    assert shares(cache, memory[30:38:2].view(1, 4, 64)) and shares(memory[30:38:2].view(1, 4, 64), cache)
    assert not shares(cache, memory[40:48:2].view(1, 4, 64))
