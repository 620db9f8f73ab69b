"""The signatures of vLLM, SGLang and FlashInfer, against the references of their own tests, written here in PyTorch.

Tests marked gpu compare with the engines' kernels too, where an engine can be imported.
"""

from __future__ import annotations

import importlib
import inspect

import pytest
import torch
from helpers import TOLERANCE, assert_refused, compiled, relative_error, same_bits

from jitnorm.integrations import flashinfer, sglang, vllm
from jitnorm.qknorm_rope_store import angles_of

pytestmark = pytest.mark.slow

E4M3 = torch.float8_e4m3fn
DTYPE = torch.bfloat16  # of all engines' models; the dtypes of the operators are tested with them
TOKENS, STORED, Q_HEADS, KV_HEADS, HEAD_DIM = 5, 4, 4, 2, 64
BLOCKS, BLOCK_SIZE, EPS = 3, 16, 1e-6

# The parameters as the engines declare them, with what separates them and their defaults.
SIGNATURES = {
    # vllm/_custom_ops.py, vLLM 0.26.0
    vllm.fused_qk_norm_rope: "qkv, num_heads_q, num_heads_k, num_heads_v, head_dim, eps, q_weight, k_weight, "
    "cos_sin_cache, is_neox, position_ids, forced_token_heads_per_warp=-1",
    vllm.reshape_and_cache_flash: "key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale",
    # rocm_aiter_ops in vllm/_aiter_ops.py, vLLM 0.26.0
    vllm.do_qk_norm_rope_kvcache_update: "qkv, q_weight, k_weight, cos_sin_cache, positions, num_heads_q, num_heads_k, "
    "head_dim, is_neox, rms_norm_eps, q_out, k_out, key_cache, value_cache, slot_mapping, k_scale, v_scale, "
    "kv_cache_dtype, use_shuffle_layout",
    # sglang/jit_kernel/rope.py and norm.py, SGLang 0.5.16
    sglang.apply_rope_inplace_with_kvcache: "q, k, v, k_cache, v_cache, cos_sin_cache, positions, out_loc, *, is_neox, "
    "rope_dim=0",
    sglang.fused_inplace_qknorm: "q, k, q_weight, k_weight, eps=1e-06, *, head_dim=0",
    sglang.can_use_fused_inplace_qknorm: "head_dim, dtype",
    # flashinfer/rope.py, FlashInfer 0.6.14
    flashinfer.apply_rope_with_cos_sin_cache_inplace: "positions, query, key, head_size, cos_sin_cache, is_neox=True",
}
MODULES = {  # where the engines have these functions
    vllm: ("vllm._custom_ops", "vllm.platforms"),
    sglang: ("sglang.jit_kernel.rope",),
    flashinfer: ("flashinfer.rope",),
}

# Pairs are halves of a head or neighbours; all of a head is rotated or half of it.
rotations = pytest.mark.parametrize(("is_neox", "rotary_dim"), [(True, 64), (False, 64), (True, 32)])
# vLLM 0.26.0 keeps k and v of a token side by side, with tokens or heads first; versions before had two caches.
LAYOUTS = {
    "NHD": lambda cache: cache((BLOCKS, BLOCK_SIZE, KV_HEADS, 2 * HEAD_DIM)).split(HEAD_DIM, -1),
    "HND": lambda cache: cache((BLOCKS, KV_HEADS, BLOCK_SIZE, 2 * HEAD_DIM)).transpose(1, 2).split(HEAD_DIM, -1),
    "two": lambda cache: cache((2, BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_DIM)).unbind(0),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*shape, device, dtype=DTYPE):
    return torch.randn(shape, dtype=torch.float32).to(device, dtype)


def make_caches(layout, device, dtype):
    return LAYOUTS[layout](lambda shape: torch.zeros(shape, device=device, dtype=dtype))


def rms_norm(x, weight, eps=EPS):
    """RMSNorm.forward_native of vLLM, which is vllm/ir/ops/layernorm.py."""
    x_float = x if x.dtype == torch.float64 else x.float()
    x_float = x_float * torch.rsqrt(x_float.pow(2).mean(-1, keepdim=True) + eps)
    return (x_float.to(weight.dtype) * weight).to(x.dtype)


def rotate(x, cos_sin_cache, positions, is_neox):
    """RotaryEmbedding.forward_static of vLLM; SGLang's and FlashInfer's tests have the same formula."""
    rotary_dim = cos_sin_cache.shape[-1]
    cos, sin = cos_sin_cache[positions].unsqueeze(-2).to(x.dtype).chunk(2, -1)
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    a, b = rotated.chunk(2, -1) if is_neox else (rotated[..., ::2], rotated[..., 1::2])
    pair = a * cos - b * sin, b * cos + a * sin
    return torch.cat([torch.cat(pair, -1) if is_neox else torch.stack(pair, -1).flatten(-2), rest], -1)


def store(caches, values, slots, scales=None):
    """The loop of tests/kernels/attention/test_cache.py of vLLM, with its conversion to float8."""
    for cache, value, scale in zip(caches, values, scales or (None, None), strict=True):
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                row = value[token]
                if scale is not None:
                    row = (row.float() / scale.reshape(-1, 1)).clamp(-448, 448).to(E4M3)
                cache[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = row


def assert_rounded(out, in_float64, in_dtype, roundings=1):
    """Assert the error of so many roundings, and what the engines' tests ask of a formula in the dtype itself."""
    assert relative_error(out, in_float64) < TOLERANCE[out.dtype] * roundings**0.5
    torch.testing.assert_close(out, in_dtype, atol=5e-2, rtol=2e-2)


def projection(device):
    return randn(TOKENS, (Q_HEADS + 2 * KV_HEADS) * HEAD_DIM, device=device)


def heads_of(qkv):
    return qkv.view(len(qkv), -1, HEAD_DIM).split((Q_HEADS, KV_HEADS, KV_HEADS), 1)


def weights(device):
    return [1 + 0.3 * randn(HEAD_DIM, device=device) for _ in range(2)]


def angles(rotary_dim, device, dtype=torch.float32):
    return angles_of(64, rotary_dim).to(device, dtype)


def positions_on(device):
    return torch.randint(64, (TOKENS,), device=device)


def slots_on(device):
    slots = torch.randperm(BLOCKS * BLOCK_SIZE)[:STORED]
    slots[1] = -1
    return slots.to(device)


def scales_on(device, per_head):
    """Return scales of k and v; one for all heads has no dimension, as in vLLM's attention layers."""
    scales = [torch.linspace(first, 2 * first, KV_HEADS, device=device) for first in (0.013, 0.7)]
    return scales if per_head else [scale[0].clone() for scale in scales]


@pytest.mark.parametrize("adapter", SIGNATURES, ids=lambda adapter: adapter.__name__)
def test_signatures_are_the_engines(adapter):
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(adapter).parameters.values()]
    if adapter is sglang.fused_inplace_qknorm:
        assert parameters.pop().name == "enable_pdl"  # jitnorm's own, at the end, with a default
    assert str(inspect.Signature(parameters)) == f"({SIGNATURES[adapter]})"


def engine_function(module, name):
    """Return a function of an engine. Skip the test where the engine cannot be imported."""
    for imported in MODULES[module]:
        pytest.importorskip(imported, exc_type=ImportError)
    return getattr(importlib.import_module(MODULES[module][0]), name)


@pytest.mark.parametrize(
    ("module", "name"), [(m, n) for m in MODULES for n in m.__all__ if not n.startswith(("do_", "can_", "fused_in"))]
)
def test_signatures_are_those_of_installed_engines(module, name):
    theirs = list(inspect.signature(engine_function(module, name)).parameters)
    ours = list(inspect.signature(getattr(module, name)).parameters)
    assert theirs[: len(ours)] == ours  # FlashInfer appends the choice of a backend


@rotations
def test_vllm_fused_qk_norm_rope(is_neox, rotary_dim, device):
    qkv, (q_weight, k_weight), positions = projection(device), weights(device), positions_on(device)
    cos_sin_cache = angles(rotary_dim, device, DTYPE)
    before = qkv.clone()
    out = vllm.fused_qk_norm_rope(
        qkv, Q_HEADS, KV_HEADS, KV_HEADS, HEAD_DIM, EPS, q_weight, k_weight, cos_sin_cache, is_neox, positions
    )
    assert out is None
    (q, k, v), inputs = heads_of(qkv), heads_of(before)
    for result, x, weight in ((q, inputs[0], q_weight), (k, inputs[1], k_weight)):
        exact = rotate(rms_norm(x.double(), weight.double()), cos_sin_cache.double(), positions, is_neox)
        native = rotate(rms_norm(x, weight), cos_sin_cache, positions, is_neox)
        assert_rounded(result, exact, native)
    assert same_bits(v, inputs[2])


@pytest.mark.parametrize("flat", [False, True])  # vLLM's passes give q_out and k_out in either shape
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_vllm_do_qk_norm_rope_kvcache_update(kv_cache_dtype, flat, device):
    qkv, (q_weight, k_weight), positions = projection(device), weights(device), positions_on(device)
    cos_sin_cache, slots, scales = angles(HEAD_DIM, device, DTYPE), slots_on(device), scales_on(device, per_head=False)
    is_fp8 = kv_cache_dtype == "fp8"
    caches = make_caches("NHD", device, torch.uint8 if is_fp8 else DTYPE)
    before = qkv.clone()
    q, k, v = heads_of(before)
    outs = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k)]
    q_out, k_out = (x.flatten(1) if flat else x for x in outs)
    vllm.do_qk_norm_rope_kvcache_update(
        *(qkv, q_weight, k_weight, cos_sin_cache, positions, Q_HEADS, KV_HEADS, HEAD_DIM, True, EPS, q_out, k_out),
        *(*caches, slots, *scales, kv_cache_dtype, False),
    )
    assert same_bits(qkv, before)
    for result, x, weight in ((outs[0], q, q_weight), (outs[1], k, k_weight)):
        exact = rotate(rms_norm(x.double(), weight.double()), cos_sin_cache.double(), positions, True)
        native = rotate(rms_norm(x, weight), cos_sin_cache, positions, True)
        assert_rounded(result, exact, native, roundings=2)
        # Each step is rounded: the norm, and the rotation of what was rounded.
        norm = rms_norm(x.double(), weight.double()).to(DTYPE)
        stepwise = rotate(norm.double(), cos_sin_cache.double(), positions, True)
        assert relative_error(result, stepwise) < TOLERANCE[DTYPE]
    # Exactly: the cache holds k_out, quantised as by reshape_and_cache_flash.
    expected = make_caches("NHD", device, E4M3 if is_fp8 else DTYPE)
    store(expected, (outs[1], v), slots, scales if is_fp8 else None)
    assert all(same_bits(cache, reference) for cache, reference in zip(caches, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("kv_cache_dtype", "per_head"),
    [("auto", False), ("bfloat16", False), ("fp8", False), ("fp8_e4m3", True)],  # both names of each kind
)
def test_vllm_reshape_and_cache_flash(layout, kv_cache_dtype, per_head, device):
    _, key, value = heads_of(projection(device))
    value[0, 0, 0] = 1e4  # beyond what float8 holds, where it saturates
    is_fp8 = kv_cache_dtype.startswith("fp8")
    slots, scales = slots_on(device), scales_on(device, per_head)
    caches = make_caches(layout, device, torch.uint8 if is_fp8 else DTYPE)
    expected = make_caches(layout, device, E4M3 if is_fp8 else DTYPE)
    vllm.reshape_and_cache_flash(key, value, *caches, slots, kv_cache_dtype, *scales)
    store(expected, (key, value), slots, scales if is_fp8 else None)
    assert all(same_bits(cache, reference) for cache, reference in zip(caches, expected, strict=True))


@rotations
def test_sglang_apply_rope_inplace_with_kvcache(is_neox, rotary_dim, device):
    inputs = heads_of(projection(device))
    q, k, v = (x.clone() for x in inputs)
    cos_sin_cache, positions = angles(rotary_dim, device), positions_on(device)
    out_loc = torch.randperm(32, device=device)[:TOKENS]
    k_cache, v_cache = (torch.zeros(32, KV_HEADS * HEAD_DIM, device=device, dtype=DTYPE) for _ in "kv")
    out = sglang.apply_rope_inplace_with_kvcache(
        q, k, v.flatten(1), k_cache, v_cache, cos_sin_cache, positions, out_loc, is_neox=is_neox, rope_dim=rotary_dim
    )
    assert out is None
    for result, x in ((q, inputs[0]), (k, inputs[1])):
        exact = rotate(x.double(), cos_sin_cache.double(), positions, is_neox)
        assert_rounded(result, exact, rotate(x, cos_sin_cache, positions, is_neox))
    for cache, stored in ((k_cache, k), (v_cache, inputs[2])):
        expected = torch.zeros_like(cache)
        expected[out_loc] = stored.flatten(1)
        assert same_bits(cache, expected)


@rotations
def test_flashinfer_apply_rope_with_cos_sin_cache_inplace(is_neox, rotary_dim, device):
    qkv = projection(device)
    before, positions, cos_sin_cache = qkv.clone(), positions_on(device), angles(rotary_dim, device)
    query, key, _ = qkv.split([n * HEAD_DIM for n in (Q_HEADS, KV_HEADS, KV_HEADS)], 1)
    out = flashinfer.apply_rope_with_cos_sin_cache_inplace(positions, query, key, HEAD_DIM, cos_sin_cache, is_neox)
    assert out is None
    (q, k, v), inputs = heads_of(qkv), heads_of(before)
    for result, x in ((q, inputs[0]), (k, inputs[1])):
        exact = rotate(x.double(), cos_sin_cache.double(), positions, is_neox)
        assert_rounded(result, exact, rotate(x, cos_sin_cache, positions, is_neox))
    assert same_bits(v, inputs[2])


def test_adapters_compile_into_one_graph():
    qkv, (q_weight, k_weight), positions = projection("cpu"), weights("cpu"), positions_on("cpu")
    cos_sin_cache, slots, scales = angles(HEAD_DIM, "cpu", DTYPE), slots_on("cpu"), scales_on("cpu", per_head=False)

    def step(qkv, key_cache, value_cache):
        sizes = Q_HEADS, KV_HEADS, KV_HEADS, HEAD_DIM
        vllm.fused_qk_norm_rope(qkv, *sizes, EPS, q_weight, k_weight, cos_sin_cache, True, positions)
        _, key, value = heads_of(qkv)
        vllm.reshape_and_cache_flash(key, value, key_cache, value_cache, slots, "fp8", *scales)
        return qkv

    results = []
    for run in (step, compiled(step, dynamic=False)):
        caches = make_caches("two", "cpu", torch.uint8)
        results.append((run(qkv.clone(), *caches), *caches))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


def update(**changes):
    """Call do_qk_norm_rope_kvcache_update with good arguments, but for the given ones."""
    caches = make_caches("two", "cpu", changes.pop("dtype", DTYPE))
    q, k, _ = heads_of(projection("cpu"))
    names = SIGNATURES[vllm.do_qk_norm_rope_kvcache_update].split(", ")
    values = (
        *(projection("cpu"), *weights("cpu"), angles(HEAD_DIM, "cpu", DTYPE), positions_on("cpu"), Q_HEADS, KV_HEADS),
        *(HEAD_DIM, True, EPS, q.clone(), k.clone(), *caches, slots_on("cpu"), *scales_on("cpu", False), "auto", False),
    )
    vllm.do_qk_norm_rope_kvcache_update(**(dict(zip(names, values, strict=True)) | changes))


def refused_calls():
    _, key, value = heads_of(projection("cpu"))
    bf16, uint8 = (make_caches("two", "cpu", dtype) for dtype in (DTYPE, torch.uint8))
    slots, scales, positions = slots_on("cpu"), scales_on("cpu", False), positions_on("cpu")
    qkv, cos_sin_cache, rows = projection("cpu"), angles(HEAD_DIM, "cpu"), torch.zeros(32, 100, dtype=DTYPE)

    def reshape(*caches, kv_cache_dtype="auto", key=key):
        return lambda: vllm.reshape_and_cache_flash(key, value, *caches, slots, kv_cache_dtype, *scales)

    def flash(query, key, head_size=HEAD_DIM, cache=cos_sin_cache):
        return lambda: flashinfer.apply_rope_with_cos_sin_cache_inplace(positions, query, key, head_size, cache)

    def sgl(k_cache, rope_dim=0, cache=cos_sin_cache):
        return lambda: sglang.apply_rope_inplace_with_kvcache(
            key, key.clone(), value, k_cache, k_cache, cache, positions, positions, is_neox=True, rope_dim=rope_dim
        )

    return [
        (
            "kv_cache_dtype",
            ValueError,
            "kv_cache_dtype must be 'auto', .* got 'fp8_e5m2'",
            reshape(*uint8, kv_cache_dtype="fp8_e5m2"),
        ),
        ("uint8 as auto", TypeError, "key_cache must be bfloat16, got uint8", reshape(*uint8)),
        ("bf16 as fp8", TypeError, "key_cache must be uint8 or float8_e4m3fn", reshape(*bf16, kv_cache_dtype="fp8")),
        ("flat cache", ValueError, r"key_cache must have shape \[blocks, ", reshape(*(c.flatten(0, 1) for c in bf16))),
        ("no key", TypeError, "key must be a torch.Tensor, got NoneType", reshape(*bf16, key=None)),
        ("shuffled", ValueError, "use_shuffle_layout must be False", lambda: update(use_shuffle_layout=True)),
        (
            "qkv width",
            ValueError,
            r"qkv must have shape \[tokens, 576\] for 9 heads of 64",
            lambda: update(num_heads_q=5),
        ),
        ("q_out dtype", TypeError, "q_out must be bfloat16", lambda: update(q_out=torch.zeros(5, 4, 64))),
        ("q_out shape", ValueError, "q_out must have shape", lambda: update(q_out=torch.zeros(5, 9, dtype=DTYPE))),
        (
            "q_out elements",
            ValueError,
            "q_out must have shape",
            lambda: update(q_out=torch.zeros(10, 128, dtype=DTYPE)),
        ),
        ("heads are a float", TypeError, "num_heads_q must be an int, got float", lambda: update(num_heads_q=4.0)),
        ("no heads", ValueError, "num_heads_k must be zero or more, got -1", lambda: update(num_heads_k=-1)),
        ("qkv strides", ValueError, "qkv must have a last stride of 1", lambda: update(qkv=qkv.t().contiguous().t())),
        ("query", TypeError, "query must be a torch.Tensor", flash(None, qkv)),
        ("head_size", ValueError, r"query must have shape \[tokens, heads \* 80\]", flash(qkv, qkv.clone(), 80)),
        (
            "angles",
            ValueError,
            "cos_sin_cache must be float32, got bfloat16",
            flash(qkv, qkv, cache=cos_sin_cache.to(DTYPE)),
        ),
        ("rope_dim", ValueError, "rope_dim must be 0 or the last dimension of cos_sin_cache, 64", sgl(bf16[0], 32)),
        ("no rows of angles", ValueError, "cos_sin_cache must have shape", sgl(bf16[0][0], cache=torch.tensor(1.0))),
        ("rows", ValueError, "k_cache must have rows of 128 elements", sgl(rows)),
        ("fp8 cache", TypeError, "k_cache must be bfloat16", sgl(rows.to(E4M3))),
    ]


REFUSED = [name for name, *_ in refused_calls()]


@pytest.mark.parametrize("name", REFUSED)
def test_bad_arguments_raise_one_line(name):
    assert_refused(refused_calls(), name)


@pytest.mark.gpu
@rotations
@pytest.mark.parametrize("tokens", [1, 300])  # vLLM has a kernel for few heads and one for many
def test_vllm_kernel_fused_qk_norm_rope(is_neox, rotary_dim, tokens):
    if tokens == 300 and is_neox and rotary_dim == 32:
        pytest.skip("vLLM 0.26.0's kernel for many heads returns NaNs here")
    theirs = engine_function(vllm, "fused_qk_norm_rope")
    qkv, positions = randn(tokens, 64 * HEAD_DIM, device="cuda"), torch.randint(64, (tokens,), device="cuda")
    results = [qkv.clone(), qkv.clone()]
    for function, result in zip((theirs, vllm.fused_qk_norm_rope), results, strict=True):
        torch.manual_seed(1)
        function(
            result, 48, 8, 8, HEAD_DIM, EPS, *weights("cuda"), angles(rotary_dim, "cuda", DTYPE), is_neox, positions
        )
    # Both compute in float32 and round once, in another order: some elements differ by the last bit.
    assert relative_error(*(result.double() for result in results)) < TOLERANCE[DTYPE] / 4


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kv_cache_dtype", "per_head"), [("auto", False), ("fp8", False), ("fp8", True)])
def test_vllm_kernel_reshape_and_cache_flash(layout, kv_cache_dtype, per_head):
    theirs = engine_function(vllm, "reshape_and_cache_flash")
    _, key, value = heads_of(projection("cuda"))
    key, value = 100 * key, value.clone()  # some saturate
    slots, scales = slots_on("cuda"), scales_on("cuda", per_head)
    results = [make_caches(layout, "cuda", torch.uint8 if kv_cache_dtype == "fp8" else DTYPE) for _ in "ab"]
    for function, caches in zip((theirs, vllm.reshape_and_cache_flash), results, strict=True):
        function(key, value, *caches, slots, kv_cache_dtype, *scales)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("is_neox", [True, False])
def test_sglang_kernel_apply_rope_inplace_with_kvcache(is_neox):
    theirs = engine_function(sglang, "apply_rope_inplace_with_kvcache")
    inputs, positions = heads_of(projection("cuda")), positions_on("cuda")
    out_loc, results = torch.randperm(32, device="cuda")[:TOKENS], []
    for function in (theirs, sglang.apply_rope_inplace_with_kvcache):
        q, k, v = (x.clone() for x in inputs)
        caches = [torch.zeros(32, KV_HEADS * HEAD_DIM, device="cuda", dtype=DTYPE) for _ in "kv"]
        function(q, k, v, *caches, angles(HEAD_DIM, "cuda"), positions, out_loc, is_neox=is_neox)
        results.append((q, k, *caches))
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b.double()) < TOLERANCE[DTYPE] / 4


@pytest.mark.gpu
@rotations
def test_flashinfer_kernel_apply_rope_with_cos_sin_cache_inplace(is_neox, rotary_dim):
    theirs = engine_function(flashinfer, "apply_rope_with_cos_sin_cache_inplace")
    qkv, positions, results = projection("cuda"), positions_on("cuda"), []
    for function in (theirs, flashinfer.apply_rope_with_cos_sin_cache_inplace):
        results.append(qkv.clone())
        query, key, _ = results[-1].split([n * HEAD_DIM for n in (Q_HEADS, KV_HEADS, KV_HEADS)], 1)
        function(positions, query, key, HEAD_DIM, angles(rotary_dim, "cuda"), is_neox)
    assert relative_error(*(result.double() for result in results)) < TOLERANCE[DTYPE] / 4
