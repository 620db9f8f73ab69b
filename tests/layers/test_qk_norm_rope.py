"""jitnorm.layers.apply_qk_norm_rope: which implementation runs where, its result, and what it does not overwrite."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from helpers import compiled, relative_error, rmsnorm_reference, same_bits

import jitnorm.layers
from jitnorm.layers import apply_qk_norm_rope, qk_norm_rope, set_compiler

D, Q_HEADS, K_HEADS, ROWS = 64, 4, 2, 32
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}  # the modules round before the rotation


@pytest.fixture(autouse=True)
def restore_the_setting():
    yield
    set_compiler("eager")


@pytest.fixture
def kernel_calls(monkeypatch):
    spy = mock.Mock(wraps=qk_norm_rope.qk_norm_rope_store)
    monkeypatch.setattr(qk_norm_rope, "qk_norm_rope_store", spy)
    return spy


def cosines_and_sines(rotary_dim=D, dtype=torch.float32, device="cpu"):
    angles = torch.randn(ROWS, rotary_dim // 2) * 3
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(device, dtype)


def norms(dtype=torch.float32, device="cpu", cls=jitnorm.nn.RMSNorm, eps=1e-5):
    made = [cls(D, eps, device=device, dtype=dtype) for _ in range(2)]
    for norm in made:
        torch.nn.init.normal_(norm.weight)
    return made


def projection(*leading, dtype=torch.float32, device="cpu"):
    """Return a fused projection, and its slices q, k and v."""
    qkv = torch.randn(*leading, (Q_HEADS + 2 * K_HEADS) * D, device=device).to(dtype)
    return qkv, *qkv.split([Q_HEADS * D, K_HEADS * D, K_HEADS * D], dim=-1)


def positions_of(tokens, device="cpu"):
    return torch.randint(ROWS, (tokens,), device=device)


def expected(x, norm, cos_sin_cache, positions, is_neox=True, section=None):
    """Return the result in float64. `section` is which of a token's positions rotates each pair."""
    heads = x.detach().reshape(positions.shape[-1], -1, D).double()
    if norm is not None:
        offset = 1 if isinstance(norm, jitnorm.nn.GemmaRMSNorm) else 0
        heads = rmsnorm_reference(heads, norm.weight.detach().double() + offset, norm.eps)
    half = cos_sin_cache.shape[1] // 2
    rows = cos_sin_cache.double()[positions]
    if section is not None:
        rows = torch.stack([rows[s, :, i::half] for i, s in enumerate(section)], dim=-1).flatten(1)
    cos, sin = rows[:, None, :half], rows[:, None, half:]
    out = heads.clone()
    first, second = (
        (slice(0, half), slice(half, 2 * half)) if is_neox else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    )
    out[..., first] = heads[..., first] * cos - heads[..., second] * sin
    out[..., second] = heads[..., second] * cos + heads[..., first] * sin
    return out.reshape(x.shape)


@torch.no_grad()
@pytest.mark.parametrize("leading", [(7,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["in place", "new tensors", "inductor"])
def test_every_implementation_gives_the_same_result(form, dtype, leading, kernel_calls, device):
    qkv, q, k, _ = projection(*leading, dtype=dtype, device=device)
    before = qkv.clone()
    q_norm, k_norm = norms(dtype, device)
    angles, positions = cosines_and_sines(dtype=dtype, device=device), positions_of(q[..., 0].numel(), device)
    want = expected(q, q_norm, angles, positions), expected(k, k_norm, angles, positions)
    options = {"in place": {}, "new tensors": {"allow_inplace": False}, "inductor": {"compiler": "inductor"}}[form]
    got = apply_qk_norm_rope(q, k, q_norm, k_norm, D, angles, positions, **options)
    for a, b, x in zip(got, want, (q, k), strict=True):
        assert a.shape == x.shape and a.dtype == dtype
        assert relative_error(a, b) <= TOLERANCE[dtype]
    assert kernel_calls.call_count == (form != "inductor")
    if form == "in place":
        assert got[0] is q and got[1] is k
        before[..., : Q_HEADS * D], before[..., Q_HEADS * D : (Q_HEADS + K_HEADS) * D] = q, k
    assert same_bits(qkv, before)


# Each option alone, with the kernel and with PyTorch. The sections of three positions of the 32 pairs of a head:
_CONTIGUOUS = [0] * 16 + [1] * 10 + [2] * 6
_INTERLEAVED = [0, 1, 2] * 6 + [0, 1, 0] * 4 + [0] * 2
OPTIONS = {
    "no norms": {"q_norm": None, "k_norm": None},
    "norm of q": {"k_norm": None},
    "Gemma": {"cls": jitnorm.nn.GemmaRMSNorm},
    "part of a head": {"rotary_dim": 32},
    "interleaved pairs": {"is_neox": False},
    "sections": {"mrope_section": [16, 10, 6], "section": _CONTIGUOUS},
    "interleaved sections": {"mrope_section": [16, 10, 6], "mrope_interleaved": True, "section": _INTERLEAVED},
    "sections of one position": {"mrope_section": [16, 10, 6]},
}


@torch.no_grad()
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, compiler, kernel_calls):
    options = dict(OPTIONS[name])
    made = dict(zip(("q_norm", "k_norm"), norms(cls=options.pop("cls", jitnorm.nn.RMSNorm)), strict=True))
    used = {key: options.pop(key, norm) for key, norm in made.items()}
    angles, section = cosines_and_sines(options.pop("rotary_dim", D)), options.pop("section", None)
    positions = positions_of(7) if section is None else torch.randint(ROWS, (3, 7))
    _, q, k, _ = projection(7)
    is_neox = options.get("is_neox", True)
    want = [
        expected(x, norm, angles, positions, is_neox, section) for x, norm in zip((q, k), used.values(), strict=True)
    ]
    got = apply_qk_norm_rope(q, k, *used.values(), D, angles, positions, compiler=compiler, **options)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= 1e-6
    assert kernel_calls.call_count == (compiler == "eager")


@torch.no_grad()
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("size", [D, 40])  # 40: which only PyTorch computes
def test_the_store(size, paged, cache_dtype, kernel_calls):
    tokens, slots = 6, torch.tensor([9, -1, 3, 14, 0])  # the last token is not stored, nor the second
    q, k, v = (torch.randn(tokens, heads * size) for heads in (Q_HEADS, K_HEADS, K_HEADS))
    shape = (4, 4, K_HEADS, size) if paged else (16, K_HEADS, size)
    caches = [torch.zeros(shape).to(cache_dtype) for _ in range(2)]
    scales = [None, None] if cache_dtype == torch.float32 else [torch.tensor([0.1]), torch.tensor([0.002, 0.5])]
    _, k_out = apply_qk_norm_rope(
        *(q, k, None, None, size, cosines_and_sines(16), positions_of(tokens)),
        **{"v": v, "k_cache": caches[0], "v_cache": caches[1], "slot_mapping": slots},
        **{"k_scale": scales[0], "v_scale": scales[1]},
        compiler="inductor",  # which does not matter where there is a cache
    )
    assert kernel_calls.called == (size == D)
    for x, cache, scale in zip((k_out, v), caches, scales, strict=True):
        values = x.view(tokens, K_HEADS, size)
        if scale is not None:
            values = (values / scale.view(-1, 1)).clamp(-448, 448)
        want = torch.zeros(16, K_HEADS, size).to(cache_dtype)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                want[slot] = values[token].to(cache_dtype)
        if cache_dtype == torch.float32 or x is v:
            assert same_bits(cache.view(want.shape), want)
        else:  # the kernel quantises k before it rounds it, so a code may be the next one
            assert relative_error(cache.view(want.shape), want.double()) < 0.01


@torch.no_grad()
def test_heads_between_gates():
    """Slices of [q | gate] projections have no [tokens, heads * head_dim] view."""
    gated = torch.randn(7, Q_HEADS, 2 * D)
    q, k = gated[..., :D], torch.randn(7, K_HEADS * D)
    angles, positions, (q_norm, k_norm) = cosines_and_sines(), positions_of(7), norms()
    want, gates = expected(q, q_norm, angles, positions), gated[..., D:].clone()
    got, _ = apply_qk_norm_rope(q, k, q_norm, k_norm, D, angles, positions)
    assert got is q and relative_error(q, want) <= 1e-6 and same_bits(gated[..., D:], gates)


def hooked(norm):
    norm.register_forward_hook(lambda module, arguments, out: out * 2)
    return norm


class OnePlusWeight(jitnorm.nn.RMSNorm):
    """A norm with another factor, which many models have under a name of their own."""

    def forward(self, x):
        return super().forward(x) + super().forward(x) / self.weight


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        {"k_norm": lambda: jitnorm.nn.RMSNorm(D, 1e-3)},  # another eps
        {"q_norm": lambda: jitnorm.nn.GemmaRMSNorm(D, 1e-5)},
        {"q_norm": lambda: OnePlusWeight(D, 1e-5)},
        {"q_norm": lambda: torch.nn.RMSNorm(D, 1e-5, elementwise_affine=False)},
        {"k_norm": lambda: hooked(jitnorm.nn.RMSNorm(D, 1e-5))},
        {"q": lambda: torch.randn(Q_HEADS * D, 7).T.double(), "q_norm": lambda: torch.nn.RMSNorm(D).double()},
        {"k": lambda: torch.randn(1, K_HEADS * D).expand(7, -1)},
        {"cos_sin_cache": lambda: cosines_and_sines(D - 8)},  # a size without a kernel
        {"cos_sin_cache": lambda: cosines_and_sines().double()},
    ],
    ids=lambda change: "-".join(change),
)
def test_what_the_kernel_does_not_compute_is_computed_by_pytorch(change, kernel_calls):
    _, q, k, _ = projection(7)
    arguments = {"q": q, "k": k, "q_norm": norms()[0], "k_norm": norms()[1], "head_dim": D}
    arguments |= {"cos_sin_cache": cosines_and_sines(), "positions": positions_of(7)}
    arguments |= {name: make() for name, make in change.items()}
    before = arguments["q"].clone(), arguments["k"].clone()
    got = apply_qk_norm_rope(**arguments)
    for a, x, name in zip(got, before, ("q", "k"), strict=True):
        normalised = arguments[f"{name}_norm"](x.reshape(7, -1, D))
        want = expected(normalised.reshape(x.shape), None, arguments["cos_sin_cache"], arguments["positions"])
        assert relative_error(a, want) <= 1e-6 and same_bits(arguments[name], x)
    assert not kernel_calls.called


@torch.no_grad()
def test_weights_that_promote_the_result(kernel_calls):
    """Llama's class promotes to its weight's dtype; an engine's RMSNorm does not."""
    modeling = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    _, q, k, _ = projection(3, dtype=torch.bfloat16)
    rest = D, cosines_and_sines(), positions_of(3)
    wide = [modeling.Qwen3RMSNorm(D) for _ in range(2)]
    assert apply_qk_norm_rope(q, k, *wide, *rest)[0].dtype == torch.float32 and not kernel_calls.called
    assert apply_qk_norm_rope(q, k, *norms(), *rest)[0].dtype == torch.bfloat16 and kernel_calls.called


def test_gradients_flow(kernel_calls, device):
    qkv, *_ = projection(7, device=device)
    leaf, used = qkv.requires_grad_(), norms(device=device)
    angles, positions = cosines_and_sines(device=device), positions_of(7, device)
    q, k, v = leaf.split([Q_HEADS * D, K_HEADS * D, K_HEADS * D], dim=-1)
    cache = torch.zeros(2, 8, K_HEADS, D, device=device)
    store = {"v": v, "k_cache": cache[0], "v_cache": cache[1], "slot_mapping": torch.arange(7, device=device)}
    out = apply_qk_norm_rope(q, k, *used, D, angles, positions, **store)
    factors = [torch.randn_like(x) for x in out]
    sum((x * factor).sum() for x, factor in zip(out, factors, strict=True)).backward()
    assert not kernel_calls.called and not cache.requires_grad and same_bits(cache[0, :7].flatten(1), out[1].detach())

    twin = leaf.detach().double().requires_grad_()
    weights = [norm.weight.detach().double().requires_grad_() for norm in used]
    cos, sin = angles.double()[positions][:, None].chunk(2, dim=-1)
    loss = 0
    for x, weight, factor in zip(twin.split([Q_HEADS * D, 2 * K_HEADS * D], dim=-1), weights, factors, strict=True):
        a, b = rmsnorm_reference(x[:, : factor.shape[1]].unflatten(-1, (-1, D)), weight, 1e-5).chunk(2, dim=-1)
        loss = loss + (torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(1) * factor).sum()
    loss.backward()
    got = leaf.grad, used[0].weight.grad, used[1].weight.grad
    for a, b in zip(got, (twin.grad, weights[0].grad, weights[1].grad), strict=True):
        assert relative_error(a, b) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("stores", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_compiled_graph_has_one_operator_and_no_copy(stores, device):
    """The operator writes new tensors, so that nothing has to copy slices back into the projection."""
    qkv, *_ = projection(6, dtype=torch.bfloat16, device=device)
    used = norms(torch.bfloat16, device)
    angles, slots = cosines_and_sines(dtype=torch.bfloat16, device=device), torch.arange(6, device=device)
    positions = positions_of(6, device)

    def function(qkv, cache):
        q, k, v = qkv.split([Q_HEADS * D, K_HEADS * D, K_HEADS * D], dim=-1)
        store = {"v": v, "k_cache": cache[0], "v_cache": cache[1], "slot_mapping": slots} if stores else {}
        return apply_qk_norm_rope(q, k, *used, D, angles, positions, **store)

    caches = [torch.zeros(2, 8, K_HEADS, D, dtype=torch.bfloat16, device=device) for _ in range(2)]
    want, before = function(qkv.clone(), caches[0]), qkv.clone()
    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend=backend)(qkv.clone(), caches[1].clone())
    operators = [target for target in seen if "jitnorm" in str(target)]
    assert [str(target) for target in operators] == ["jitnorm.qk_norm_rope_store_out"]
    assert not [target for target in seen if "copy" in str(target) or "clone" in str(target)]
    got = compiled(function)(qkv, caches[1])
    assert same_bits(qkv, before) and same_bits(caches[0], caches[1])
    for a, b in zip(got, want, strict=True):
        assert same_bits(a, b)


@torch.no_grad()
def test_inductor_compiles_the_plain_formula():
    _, q, k, _ = projection(6)
    used, angles, positions = norms(), cosines_and_sines(), positions_of(6)
    want = expected(q, used[0], angles, positions), expected(k, used[1], angles, positions)
    torch._dynamo.reset()
    function = torch.compile(apply_qk_norm_rope, fullgraph=True)
    for a, b in zip(function(q, k, *used, D, angles, positions, compiler="inductor"), want, strict=True):
        assert relative_error(a, b) <= 1e-6


@torch.no_grad()
def test_symbolic_trace():
    _, q, k, _ = projection(6)
    angles, positions = cosines_and_sines(), positions_of(6)

    def function(q, k, angles, positions):
        return apply_qk_norm_rope(q, k, None, None, D, angles, positions)

    want = expected(q, None, angles, positions)
    assert relative_error(torch.fx.symbolic_trace(function)(q, k, angles, positions)[0], want) <= 1e-6
    with pytest.raises(ValueError, match=r"k_cache must be None under torch\.fx\.symbolic_trace"):
        torch.fx.symbolic_trace(lambda q, k: apply_qk_norm_rope(q, k, None, None, D, angles, positions, k_cache=q))


@torch.no_grad()
def test_torch_func_and_jit_trace(kernel_calls):
    _, q, k, _ = projection(6)
    angles, positions = cosines_and_sines(), positions_of(6)
    want = expected(q, None, angles, positions)

    def function(q, k):
        return apply_qk_norm_rope(q, k, None, None, D, angles, positions)[0]

    assert relative_error(torch.func.vmap(function)(q[None], k[None])[0], want) <= 1e-6
    assert relative_error(torch.jit.trace(function, (q, k), check_trace=False)(q, k), want) <= 1e-6
    assert not kernel_calls.called


@torch.no_grad()
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_no_tokens_and_no_heads(compiler):
    angles, positions = cosines_and_sines(), positions_of(0)
    q, k = apply_qk_norm_rope(torch.randn(0, 2 * D), torch.randn(0, D), *norms(), D, angles, positions)
    assert q.shape == (0, 2 * D) and k.shape == (0, D)
    q, k, caches = torch.randn(0, 2, D), torch.randn(0, 2, D), torch.zeros(2, 4, 2, D)
    store = {"v": k.clone(), "k_cache": caches[0], "v_cache": caches[1], "slot_mapping": positions}
    q, k = apply_qk_norm_rope(q, k, *norms(), D, angles, positions, compiler=compiler, **store)
    assert q.shape == k.shape == (0, 2, D)
    q, k = torch.randn(3, 2 * D), torch.randn(3, 0)
    want = expected(q, None, angles, positions_of(3) * 0)
    got = apply_qk_norm_rope(q, k, None, None, D, angles, positions_of(3) * 0, compiler=compiler)
    assert relative_error(got[0], want) <= 1e-6 and got[1].shape == (3, 0)


@torch.no_grad()
@pytest.mark.parametrize("size", [D, D + 8])  # the second has no kernel
def test_bad_options_are_refused_with_and_without_a_kernel(size):
    q, k, cache, angles = torch.randn(3, 2, size), torch.randn(3, 1, size), torch.zeros(4, 1, size), torch.ones(9, size)
    store = {"v": k.clone(), "k_cache": cache, "v_cache": cache.clone(), "slot_mapping": positions_of(3) * 0}
    for message, options in (
        ("k_scale must be given with a float8_e4m3fn k_cache, got float32", {**store, "k_scale": torch.ones(1)}),
        ("slot_mapping must have at most 3 elements", {**store, "slot_mapping": torch.arange(4)}),
        (f"mrope_section must add up to {size // 2}", {"mrope_section": [4, 4, 4]}),
    ):
        with pytest.raises(ValueError, match=message):
            apply_qk_norm_rope(q, k, None, None, size, angles, positions_of(3) * 0, **options)


def test_bad_arguments_are_refused():
    _, q, k, v = projection(3)
    angles, positions, cache = cosines_and_sines(), positions_of(3), torch.zeros(4, K_HEADS, D)
    three = torch.zeros(3, 3, dtype=torch.long)
    for kind, message, arguments, options in (
        (TypeError, r"q must be a torch\.Tensor, got list", ([1.0], k, None, None, D, angles, positions), {}),
        (TypeError, "head_dim must be an int, got str", (q, k, None, None, "64", angles, positions), {}),
        (TypeError, r"positions must be a torch\.Tensor, got int", (q, k, None, None, D, angles, 3), {}),
        (
            ValueError,
            r"k must have whole heads of 64 .* 3 positions, got \[3, 1",
            (q, k[:, 1:], None, None, D, angles, positions),
            {},
        ),
        (
            ValueError,
            r"q must have whole heads of 64 .* 2 positions, got \[3, 256\]",
            (q, k, None, None, D, angles, positions[:2]),
            {},
        ),
        (
            ValueError,
            r"positions must have shape \[tokens\], or \[3, tokens\]",
            (q, k, None, None, D, angles, three),
            {},
        ),
        (
            ValueError,
            "k_cache must be given with v, v_cache and slot_mapping",
            (q, k, None, None, D, angles, positions),
            {"k_cache": cache},
        ),
        (
            ValueError,
            "compiler must be 'eager', 'inductor' or None",
            (q, k, None, None, D, angles, positions),
            {"compiler": "tvm"},
        ),
        (
            ValueError,
            "v_cache must have shape",
            (q, k, None, None, D, angles, positions),
            {"v": v, "k_cache": cache, "v_cache": cache[1:], "slot_mapping": positions},
        ),
    ):
        with pytest.raises(kind, match=message):
            apply_qk_norm_rope(*arguments, **options)
