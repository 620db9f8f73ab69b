"""qk_norm_rope_store as torch sees it: compilers, fake tensors, autograd, CUDA graphs."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import compiled, same_bits
from torch._inductor.utils import run_and_get_code

from jitnorm import qk_norm_rope_store, rope
from jitnorm.qknorm_rope_store import angles_of

D, Q_HEADS, KV_HEADS, SLOTS = 64, 4, 2, 20
E4M3 = torch.float8_e4m3fn


def inputs(device="cpu", tokens=5, dtype=torch.float32, cache_dtype=None):
    """Return a projection, its slices' arguments, and caches that are views of one tensor."""
    qkv = torch.randn(tokens, (Q_HEADS + 2 * KV_HEADS) * D, device=device).to(dtype)
    caches = torch.zeros(2, SLOTS, KV_HEADS, D, device=device).to(cache_dtype or dtype)
    return {
        "qkv": qkv,
        "caches": caches,
        "cos_sin_cache": angles_of(50, D).to(device, dtype),
        "positions": torch.randint(50, (tokens,), device=device),
        "slot_mapping": torch.randperm(SLOTS, device=device)[:tokens],
        "q_weight": torch.randn(D, device=device).to(dtype),
        "k_weight": torch.randn(D, device=device).to(dtype),
    }


def split(qkv):
    return qkv.unflatten(-1, (-1, D)).split((Q_HEADS, KV_HEADS, KV_HEADS), 1)


def in_place(qkv, caches, **more):
    q, k, v = split(qkv)
    qk_norm_rope_store(q, k, v, k_cache=caches[0], v_cache=caches[1], **more)
    return q * 2, k + 1, v * 3, caches.float().sum(0), qkv[::2]


def into_outputs(qkv, caches, **more):
    q, k, v = split(qkv)
    q_out, k_out = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    qk_norm_rope_store(q, k, v, k_cache=caches[0], v_cache=caches[1], q_out=q_out, k_out=k_out, **more)
    return q_out * 2, k_out + 1, v * 3, caches.float().sum(0), qkv[::2]


def into_one_output(qkv, caches, **more):
    q, k, v = split(qkv)
    q_out = torch.empty(q.shape, dtype=E4M3, device=q.device)
    qk_norm_rope_store(q, k, v, k_cache=caches[0], v_cache=caches[1], q_out=q_out, **more)
    return q_out.float(), k + 1, v * 3, qkv[::2]


def copied(a):
    return {name: value.clone() for name, value in a.items()}


@pytest.mark.parametrize(
    "function",
    [
        in_place,
        pytest.param(into_outputs, marks=pytest.mark.slow),
        pytest.param(into_one_output, marks=pytest.mark.slow),
    ],
)
def test_compiles_whole_and_writes_are_seen(device, function):
    run = compiled(function)
    for tokens in (3, 5, 17):  # the second makes torch compile with a dynamic dimension, which serves the third
        a = inputs(device, tokens)
        b = copied(a)
        for got, want in zip((*run(**a), *a.values()), (*function(**b), *b.values()), strict=True):
            assert same_bits(got, want)


def test_compiles_with_sections_and_without_a_cache(device):
    def function(q, k, cos_sin_cache, positions):
        rope(q, k, cos_sin_cache, positions, mrope_section=[16, 8, 8], mrope_interleaved=True, is_neox=False)
        return q + 1, k

    a = inputs(device)
    q, k, _ = (t.clone() for t in split(a["qkv"]))
    positions = torch.randint(50, (3, 5), device=device)
    other = q.clone(), k.clone()
    for got, want in zip(
        compiled(function)(q, k, a["cos_sin_cache"], positions),
        function(*other, a["cos_sin_cache"], positions),
        strict=True,
    ):
        assert same_bits(got, want)


def test_inductor_copies_neither_q_nor_k(device):
    """Between two linear layers and into outputs: the kernels of the graph are those of the layers and this one."""

    def block(x, weight, caches, **more):
        q, k, v = split(x @ weight)
        q_out, k_out = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
        qk_norm_rope_store(q, k, v, k_cache=caches[0], v_cache=caches[1], q_out=q_out, k_out=k_out, **more)
        return q_out.flatten(1) @ weight, k_out

    a = inputs(device)
    qkv = a.pop("qkv")
    x, weight = torch.randn(5, Q_HEADS * D, device=device), torch.randn(Q_HEADS * D, qkv.shape[1], device=device)
    b = copied(a)
    torch._dynamo.reset()
    # On a GPU inductor would pad the 5 rows of the first product, in kernels of its own.
    with torch._inductor.config.patch(shape_padding=False):
        got, (code,) = run_and_get_code(torch.compile(block, fullgraph=True), x, weight, **a)
    for one, other in zip((*got, *a.values()), (*block(x, weight, **b), *b.values()), strict=True):
        torch.testing.assert_close(one, other)
    assert code.count("torch.ops.jitnorm.qk_norm_rope_store_out.default(") == 1
    assert not re.search(r"cpp_fused|triton_poi|\.copy_\(|aten\.clone", code.partition("def call(")[2]), code


@pytest.mark.slow
def test_opcheck(device):
    a = inputs(device)
    q, k, v = (t.clone() for t in split(a.pop("qkv")))
    caches = a.pop("caches")
    positions, cos_sin = a.pop("positions"), a.pop("cos_sin_cache")
    stored = a | {"k_cache": caches[0].clone(), "v_cache": caches[1].clone()}
    op, out = (getattr(torch.ops.jitnorm, name).default for name in ("qk_norm_rope_store", "qk_norm_rope_store_out"))
    torch.library.opcheck(op, (q, k, v, cos_sin, positions), stored)
    torch.library.opcheck(op, (q, k, None, cos_sin, positions), {"is_neox": False})
    torch.library.opcheck(out, (q, k, v, cos_sin, positions, torch.zeros_like(q), torch.zeros_like(k)), stored)
    three = torch.randint(50, (3, 5), device=device)
    torch.library.opcheck(op, (q, k, v, cos_sin, three), {"mrope_section": [16, 8, 8], "rounding": "each_step"})


def test_tracing_builds_kernels_and_refuses_bad_calls(cache_dir):
    a = inputs()
    with pytest.raises(RuntimeError, match="does not support rotary_dim 40"):
        compiled(in_place)(**a | {"cos_sin_cache": a["cos_sin_cache"][:, :40]})
    with pytest.raises((RuntimeError, ValueError), match="positions must have shape"):
        compiled(in_place)(**a | {"positions": a["positions"][:3]})
    assert not cache_dir.exists()
    with torch._subclasses.FakeTensorMode() as mode:
        in_place(**{name: mode.from_tensor(value) for name, value in a.items()})
    assert len(list(cache_dir.glob("kernels/*/*/*.so"))) == 1


def test_the_operators_count_versions():
    a = inputs()
    q, k, v = (t.clone() for t in split(a.pop("qkv")))
    caches = a.pop("caches").clone()
    names = {"q": q, "k": k, "k_cache": caches[0].clone(), "v_cache": caches[1].clone()}
    for written in names.values():
        leaf = torch.randn_like(written).requires_grad_()
        product = (leaf * written).sum()
        torch.ops.jitnorm.qk_norm_rope_store(**names, v=v, **a)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    outputs = {"q_out": q.clone(), "k_out": k.clone()}
    versions = [t._version for t in (q, k, v)]
    for written in outputs.values():
        product = (torch.randn_like(written).requires_grad_() * written).sum()
        torch.ops.jitnorm.qk_norm_rope_store_out(**names, v=v, **a, **outputs)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
    assert versions == [t._version for t in (q, k, v)]


TENSORS = ("q", "k", "v", "cos_sin_cache", "q_weight", "k_weight", "k_cache", "v_cache", "q_out", "k_out")
SCALES = ("q_scale", "k_scale", "v_scale")


def arguments(is_quantised=False):
    a = inputs(cache_dtype=E4M3 if is_quantised else None)
    q, k, v = (t.clone() for t in split(a.pop("qkv")))
    caches = a.pop("caches").unbind()
    more = dict.fromkeys(SCALES, torch.ones(1)) if is_quantised else {}
    q_out = torch.zeros_like(q).to(E4M3) if is_quantised else torch.zeros_like(q)
    return {**{"q": q, "k": k, "v": v, "k_cache": caches[0], "v_cache": caches[1]}, **a} | {
        **{"q_out": q_out, "k_out": torch.zeros_like(k)},
        **more,
    }


@pytest.mark.parametrize("name", TENSORS + SCALES)
def test_a_gradient_is_refused(name):
    a = arguments(name in SCALES)
    qk_norm_rope_store(**a)  # so that the second call is the fast path's
    a[name] = a[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="qk_norm_rope_store has no gradient: call it under"):
        qk_norm_rope_store(**a)
    with torch.no_grad():
        qk_norm_rope_store(**a)


@pytest.mark.parametrize("name", ["q", "k", "q_weight", "cos_sin_cache"])
def test_torch_func_is_refused_not_lost(name):
    a = arguments()

    def function(value):
        qk_norm_rope_store(**a | {name: value})
        return value.sum()

    with pytest.raises(RuntimeError, match="qk_norm_rope_store has no derivative in torch"):
        torch.func.grad(function)(a[name])
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        torch.func.jvp(function, (a[name],), (a[name],))


# What only a GPU can show


@pytest.mark.gpu
@pytest.mark.parametrize("enable_pdl", [True, False])
def test_in_a_graph(enable_pdl, monkeypatch):
    import sys

    a = inputs("cuda", 17, torch.bfloat16)
    in_place(**copied(a))
    monkeypatch.setattr(sys.modules["jitnorm.qknorm_rope_store"], "check_indices", True)  # which a capture does not do
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        in_place(**a, enable_pdl=enable_pdl)
    monkeypatch.undo()
    for _ in range(3):
        a["qkv"].copy_(torch.randn_like(a["qkv"]))
        a["positions"].copy_(torch.randint_like(a["positions"], 50))
        a["slot_mapping"].copy_(torch.randperm(SLOTS)[:17])
        b = copied(a)
        in_place(**b)
        graph.replay()
        for name in a:
            assert same_bits(a[name], b[name])


@pytest.mark.gpu
def test_reads_nothing_before_the_kernel_before_it_has_written():
    """Each call reads the heads, weights, positions and slots that the one before it wrote: with PDL they overlap."""
    start = inputs("cuda", 64, torch.bfloat16) | {"slot_mapping": torch.arange(16, device="cuda")}
    results = []
    for pdl in (True, False):
        a = copied(start)
        q, k, v = split(a["qkv"])
        more = {"cos_sin_cache": a["cos_sin_cache"], "slot_mapping": a["slot_mapping"], "enable_pdl": pdl}
        outputs = [torch.zeros_like(t.contiguous()) for t in (q, k)]

        def chain(a=a, q=q, k=k, v=v, more=more, outputs=outputs):
            for step in range(40):
                source, to = ((q, k), outputs) if step % 2 == 0 else (outputs, (q, k))
                weights = {"q_weight": source[0][step % 16, 1], "k_weight": source[1][step % 16, 0]}
                qk_norm_rope_store(
                    *(*source, v, more["cos_sin_cache"], a["positions"], a["caches"][0], a["caches"][1]),
                    **{n: value for n, value in more.items() if n != "cos_sin_cache"},
                    **{"q_out": to[0], "k_out": to[1]},
                    **weights,
                )
                qk_norm_rope_store(
                    *(
                        a["caches"][0][:16],
                        a["caches"][1][:16].clone(),
                        None,
                        more["cos_sin_cache"],
                        a["positions"][:16],
                    ),
                    q_weight=a["q_weight"],
                    enable_pdl=more["enable_pdl"],
                )

        for _ in range(5):
            chain()
        torch.cuda.synchronize()
        results.append([*outputs, a["qkv"], a["caches"]])
    assert all(same_bits(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.gpu
def test_many_tokens():
    for dtype, tokens in ((torch.bfloat16, 16383), (torch.bfloat16, 1023)):
        a = inputs("cuda", tokens, dtype)
        a |= {"slot_mapping": torch.randperm(SLOTS, device="cuda")}
        expected = copied(a)
        in_place(**expected)
        for first in (0, tokens - 100, tokens // 2):
            b = copied(a)
            rows = slice(first, first + 100)
            own = {"qkv": b["qkv"][rows], "positions": b["positions"][rows], "slot_mapping": b["slot_mapping"][:0]}
            in_place(**b | own)
            assert same_bits(b["qkv"][rows], expected["qkv"][rows])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_a_device_that_is_not_current():
    a, b = inputs("cuda:1"), None
    b = copied(a)
    torch.cuda.set_device(1)
    in_place(**b)
    torch.cuda.set_device(0)
    in_place(**a)
    assert same_bits(a["qkv"], b["qkv"]) and torch.cuda.current_device() == 0
