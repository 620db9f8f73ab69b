"""per_tensor_quant_fp8 and per_token_quant_fp8, code by code."""

from __future__ import annotations

import pytest
import torch
from fp8_reference import check_operator, codes, decode, encode, neighbours, quotient, ties
from helpers import DTYPES, same_bits

import jitnorm
from jitnorm import per_tensor_quant_fp8, per_token_quant_fp8

E4M3 = torch.float8_e4m3fn
MIN_TENSOR_SCALE, MIN_TOKEN_SCALE = 2.0**-90, float(torch.tensor(1 / (448 * 512)))


def poisoned(*shape, device):
    return torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(E4M3)


def per_tensor(x, scale=None):
    q = poisoned(*x.shape, device=x.device)
    s = torch.tensor(float("nan") if scale is None else scale, device=x.device)
    per_tensor_quant_fp8(x, q, s, is_static=scale is not None)
    return q, s


def per_token(x):
    q, s = poisoned(*x.shape, device=x.device), torch.full((*x.shape[:-1], 1), torch.nan, device=x.device)
    per_token_quant_fp8(x, q, s)
    return q, s


def test_the_reference_agrees_with_torch():
    every = torch.arange(256)
    assert torch.equal(decode(every).nan_to_num(1e9), every.to(torch.uint8).view(E4M3).double().nan_to_num(1e9))
    numbers = every[(every & 127) != 127]
    assert torch.equal(encode(decode(numbers)), numbers.to(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_and_its_neighbours(device, dtype):
    tiny = torch.tensor([0.0, 2.0**-149, 2.0**-126, 2.0**-24, 2.0**-11, torch.finfo(dtype).tiny]).to(dtype)
    special = torch.tensor([torch.inf, torch.nan, torch.finfo(dtype).max]).to(dtype)
    x = torch.cat([neighbours(ties()[1:], dtype), tiny, special])
    x = torch.cat([x, -x]).to(device)
    q, _ = per_tensor(x, 1.0)
    assert torch.equal(codes(q), encode(x.double()))


def test_the_division_is_float32s(device):
    """At ties, where a product with the reciprocal would round wrongly, and with scales up to both limits."""
    generator = torch.Generator().manual_seed(0)
    mantissas = 1 + torch.rand(64, generator=generator)
    scales = mantissas * torch.pow(2.0, torch.linspace(-90, 124, 64).round())
    for scale in (*scales.tolist(), 1.0, 2.0**-90, 2.0**125, 1 / 448):
        x = neighbours((ties().double() * scale).float(), torch.float32)
        x = torch.cat([x, -x, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])]).to(device)
        q, s = per_tensor(x, scale)
        assert torch.equal(codes(q), encode(quotient(x, s))), scale


@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan")])
def test_invalid_scales(device, scale):
    x = torch.tensor([0.0, 1.0, -1.0, 1e-30, torch.inf, -torch.inf, torch.nan], device=device)
    q, s = per_tensor(x, scale)
    assert torch.equal(codes(q), encode(quotient(x, s)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (4096,), (3, 1367), (5, 7, 129), (2049, 1025)])
def test_dynamic_scale(device, dtype, shape):
    """Sizes just below and above a vector, a tile, and the number of partial amax values."""
    x = (torch.randn(shape) * 3).to(dtype).to(device)
    q, s = per_tensor(x)
    assert s == quotient(x.abs().amax(), torch.tensor(448.0)).float()
    assert torch.equal(codes(q), encode(quotient(x, s)))


@pytest.mark.parametrize("place", [0, 1, 4095, 4096, 70000, 2**21 - 1, 2**21, 2**21 + 4])
def test_the_largest_magnitude_may_be_anywhere(device, place):
    x = torch.full((2**21 + 5,), 0.25, device=device, dtype=torch.bfloat16)
    x[place] = -448 * 3
    q, s = per_tensor(x)
    assert s == 3 and decode(codes(q)[place].int()) == -448


def test_scales_of_no_elements_zeros_nans_and_infinities(device):
    for x, scale in (
        (torch.zeros(0), MIN_TENSOR_SCALE),
        (torch.zeros(100), MIN_TENSOR_SCALE),
        (torch.tensor([1e-30, 0.0]), MIN_TENSOR_SCALE),
        (torch.tensor([torch.nan, 448.0, -1.0]), 1.0),
        (torch.tensor([torch.nan]), MIN_TENSOR_SCALE),
        (torch.tensor([torch.inf, 1.0, -1.0]), torch.inf),
    ):
        q, s = per_tensor(x.to(device))
        assert s == scale
        assert torch.equal(codes(q), encode(quotient(x.to(device), s)))


def test_a_given_scale_is_only_read(device):
    q, s = per_tensor(torch.zeros(0, device=device), 3.0)
    assert q.numel() == 0 and s == 3
    scale = torch.full((1, 1), 0.5, device=device)
    q = poisoned(3, 33, device=device)
    per_tensor_quant_fp8(torch.ones(3, 33, device=device), q, scale, True)
    assert scale == 0.5 and (q.float() == 2).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [16, 144, 4096, 14336])
def test_each_token_gets_a_scale(device, dtype, hidden_size):
    x = torch.randn(37, hidden_size + 16).to(dtype).to(device)[:, :hidden_size]
    x[3] = 0
    x[5, 2] = torch.nan
    q, s = per_token(x)
    largest = x.float().abs().nan_to_num(0.0).amax(dim=-1, keepdim=True)
    expected = quotient(largest, torch.tensor(448.0)).float().clamp(min=MIN_TOKEN_SCALE)
    assert torch.equal(s, expected)
    assert torch.equal(codes(q), encode(quotient(x, s)))
    for row in (0, 5, 36):
        alone, scale = per_token(x[row])
        assert same_bits(codes(alone), codes(q)[row]) and same_bits(scale, s[row])


def test_tokens_into_rows_of_a_wider_buffer(device):
    x = torch.randn(9, 2, 64, device=device).transpose(0, 1).contiguous().transpose(0, 1)[:, 1]
    wide = poisoned(9, 192, device=device)
    s = torch.empty(9, device=device)
    per_token_quant_fp8(x, wide[:, 64:128], s)
    assert torch.equal(codes(wide[:, 64:128]), encode(quotient(x, s[:, None])))
    assert (codes(wide[:, :64]) == 0x7F).all() and (codes(wide[:, 128:]) == 0x7F).all()
    per_token_quant_fp8(x[:0], wide[:0, :64], s[:0])


def test_torch_sees_the_operators(device):
    x, q = torch.randn(5, 64, device=device), poisoned(5, 64, device=device)
    operators = torch.ops.jitnorm
    check_operator(operators.per_tensor_quant_fp8.default, (x, q, torch.ones(1, device=device)))
    check_operator(operators.per_tensor_quant_fp8_dynamic.default, (x, q, torch.ones((), device=device)))
    check_operator(operators.per_token_quant_fp8.default, (x, q, torch.ones(5, 1, device=device)))


def test_compiles_without_a_graph_break(device):
    def quantise(x):
        q, s = torch.empty_like(x, dtype=E4M3), x.new_empty((), dtype=torch.float32)
        per_tensor_quant_fp8(x + 1, q, s)
        rows, scales = torch.empty_like(x, dtype=E4M3), x.new_empty((x.shape[0], 1), dtype=torch.float32)
        per_token_quant_fp8(x, rows, scales)
        given = torch.empty_like(x, dtype=E4M3)
        per_tensor_quant_fp8(x, given, s, is_static=True)
        return q.float() * s, rows.float() * scales, given.float()

    torch._dynamo.reset()
    compiled = torch.compile(quantise, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 17):
        x = torch.randn(rows, 64, device=device)
        for got, want in zip(compiled(x), quantise(x), strict=True):
            assert same_bits(got, want)


def test_there_is_no_gradient(device):
    x = torch.randn(5, 64, device=device, requires_grad=True)
    q, s = poisoned(5, 64, device=device), torch.ones(5, device=device)
    for call in (lambda: per_tensor_quant_fp8(x, q, s[0]), lambda: per_token_quant_fp8(x, q, s)):
        torch._dynamo.reset()
        for function in (call, torch.compile(call, fullgraph=True, backend="eager")):
            with pytest.raises(RuntimeError, match=r"has no gradient: call it under torch.no_grad\(\)"):
                function()
        with torch.no_grad():
            call()
    assert torch.equal(codes(q), encode(quotient(x.detach(), s[:, None])))


@pytest.mark.gpu
def test_a_graph_computes_its_scale_at_each_replay():
    """Replayed on other numbers, larger and smaller; no state is left from one replay to the next."""
    x = torch.zeros(1000, 4096, device="cuda", dtype=torch.bfloat16)
    q, s = poisoned(1000, 4096, device="cuda"), torch.full((), torch.nan, device="cuda")
    per_tensor_quant_fp8(x, q, s)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        per_tensor_quant_fp8(x, q, s)
    for factor in (1.0, 1000.0, 0.001):
        x.copy_(torch.randn_like(x) * factor)
        s.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert s == quotient(x.abs().amax(), torch.tensor(448.0)).float()
        assert torch.equal(codes(q), encode(quotient(x, s)))


@pytest.mark.gpu
def test_calls_that_overlap_wait_for_each_other():
    """Each call reads what the one before it wrote, on one stream, without other work between them."""
    x = torch.randn(64, 4096, device="cuda")
    expected, scales, results = x.clone(), [], []
    per_tensor(x)
    for _ in range(20):
        q, s = torch.empty_like(x, dtype=E4M3), torch.empty((), device="cuda")
        per_tensor_quant_fp8(x, q, s)
        jitnorm.rmsnorm(x, torch.ones(4096, device="cuda"), out=x)
        scales.append(s)
        results.append(q)
    for q, s in zip(results, scales, strict=True):
        assert s == quotient(expected.abs().amax(), torch.tensor(448.0)).float()
        assert torch.equal(codes(q), encode(quotient(expected, s)))
        expected = jitnorm.rmsnorm(expected, torch.ones(4096, device="cuda"))


@pytest.mark.gpu
def test_two_streams_compute_scales_at_the_same_time():
    inputs = [torch.randn(500, 4096, device="cuda") * (i + 1) for i in range(8)]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results = []
    for x, stream in zip(inputs, streams, strict=True):
        with torch.cuda.stream(stream):
            results.append(per_tensor(x))
    torch.cuda.synchronize()
    for x, (q, s) in zip(inputs, results, strict=True):
        assert s == quotient(x.abs().amax(), torch.tensor(448.0)).float()
        assert torch.equal(codes(q), encode(quotient(x, s)))


def test_warm_up_builds_what_a_call_loads(cache_dir):
    ops = [
        "per_tensor_quant_fp8",
        "per_tensor_quant_fp8_partial_amax",
        "per_tensor_quant_fp8_dynamic",
        "per_token_quant_fp8",
    ]
    assert len(jitnorm.warmup(ops, dtype="fp32", device="cpu").built) == 4
    x = torch.randn(2, 32)
    per_tensor(x)
    per_tensor(x, 1.0)
    per_token(x)
    assert len(list(cache_dir.glob("kernels/*/*/*.so"))) == 4
