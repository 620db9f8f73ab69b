"""The residual forms, plain and Gemma's, against their definition in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, TOLERANCE, WEIGHTS, relative_error, rmsnorm_reference, same_bits, sizes_and_dtypes

from jitnorm import fused_add_rmsnorm, gemma_fused_add_rmsnorm, gemma_rmsnorm, rmsnorm
from jitnorm.core.norms import Norm
from jitnorm.core.operators import OPERATORS as REGISTRY

OPERATORS = [(fused_add_rmsnorm, 0.0), (gemma_fused_add_rmsnorm, 1.0)]


def inputs(num_tokens, hidden_size, dtype, device, weight_dtype=None):
    x, residual = (torch.randn(num_tokens, hidden_size, device=device).mul(3).to(dtype) for _ in range(2))
    return x, residual, torch.randn(hidden_size, device=device).to(weight_dtype or dtype)


@pytest.mark.parametrize(("operator", "offset"), OPERATORS)
@sizes_and_dtypes((64, 256, 512, 3328, 8192), WEIGHTS)  # both ends of either class, and an uneven one
def test_matches_the_definition(device, operator, offset, hidden_size, dtype, weight_dtype):
    for num_tokens in (1, 37):
        x, residual, w = inputs(num_tokens, hidden_size, dtype, device, weight_dtype)
        total = x.double() + residual.double()
        assert operator(x, residual, w, 1e-5) is None
        assert same_bits(residual, total.float().to(dtype))
        assert relative_error(x, rmsnorm_reference(total, w.double() + offset, 1e-5)) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("dtype", "large", "small"), [(torch.bfloat16, 320.0, 0.9), (torch.float16, 1280.0, 0.49)])
def test_the_sum_is_normalised_before_it_is_rounded(device, dtype, large, small):
    """A sum of which rounding keeps nothing but the residual: the input must be seen in the result all the same."""
    residual = torch.full((3, 512), large, device=device).to(dtype)
    x = torch.full((3, 512), small, device=device).to(dtype)
    x[:, ::2] = -small
    w = torch.full((512,), 4096.0, device=device)
    exact, rounded, total = x.clone(), x.clone(), residual.clone()
    fused_add_rmsnorm(exact, total, w)
    fused_add_rmsnorm(rounded, residual.clone(), w, round_sum=True)
    assert same_bits(total, residual) and same_bits(rounded, torch.full_like(x, 4096.0))
    reference = rmsnorm_reference(x.double() + residual.double(), w, 1e-6)
    assert relative_error(exact, reference) <= TOLERANCE[dtype] and not same_bits(exact, rounded)


@pytest.mark.parametrize(("operator", "offset", "alone"), [(*OPERATORS[0], rmsnorm), (*OPERATORS[1], gemma_rmsnorm)])
@sizes_and_dtypes((128, 4096), [(dtype, dtype) for dtype in DTYPES])
def test_round_sum_is_the_two_operators_one_after_the_other(
    device, operator, offset, alone, hidden_size, dtype, weight_dtype
):
    x, residual, w = inputs(33, hidden_size, dtype, device, weight_dtype)
    expected_residual = residual + x
    operator(x, residual, w, round_sum=True)
    assert same_bits(residual, expected_residual)
    assert relative_error(x, rmsnorm_reference(expected_residual, w.double() + offset, 1e-6)) <= TOLERANCE[dtype]
    if device == "cpu":  # a GPU adds up a row in another order where there is a residual
        assert same_bits(x, alone(expected_residual, w))


HALF_WEIGHTS = [pair for pair in WEIGHTS if pair[0] != torch.float32]


@pytest.mark.parametrize(("operator", "offset"), OPERATORS)
@sizes_and_dtypes((64, 256, 512, 3328, 8192), HALF_WEIGHTS)
def test_a_float32_residual(device, operator, offset, hidden_size, dtype, weight_dtype):
    """The sum is rounded nowhere, with round_sum neither; rows of both may be apart, by other strides."""
    for num_tokens in (1, 37):
        x, _, w = inputs(num_tokens, hidden_size, dtype, device, weight_dtype)
        residual = torch.randn(num_tokens, hidden_size, device=device) * 3
        total = x.float() + residual
        wide, wide_residual = (
            torch.full((num_tokens, n * hidden_size), torch.nan, dtype=t.dtype, device=device)
            for n, t in ((3, x), (2, residual))
        )
        strided, strided_residual = wide[:, hidden_size : 2 * hidden_size], wide_residual[:, hidden_size:]
        rounded, rounded_residual = x.clone(), residual.clone()
        strided.copy_(x), strided_residual.copy_(residual)
        assert operator(x, residual, w, 1e-5) is None
        assert same_bits(residual, total)
        assert relative_error(x, rmsnorm_reference(total, w.double() + offset, 1e-5)) <= TOLERANCE[dtype]
        operator(rounded, rounded_residual, w, 1e-5, round_sum=True)
        operator(strided, strided_residual, w, 1e-5, enable_pdl=False)
        assert same_bits(rounded, x) and same_bits(rounded_residual, total)
        assert same_bits(strided, x) and same_bits(strided_residual, total)
        beside = torch.cat((wide[:, :hidden_size], wide[:, 2 * hidden_size :], wide_residual[:, :hidden_size]), 1)
        assert beside.isnan().all()


def test_a_float32_residual_keeps_what_rounding_would_lose(device):
    """Of 256 + 0.5, bfloat16 keeps 256: after 64 layers a residual in bfloat16 would be unchanged."""
    x, w = torch.full((3, 512), 0.5, device=device).bfloat16(), torch.ones(512, device=device).bfloat16()
    residual = torch.full((3, 512), 256.0, device=device)
    for _ in range(64):
        fused_add_rmsnorm(x.clone(), residual, w)
    assert (residual == 288).all()


def test_rows_of_both_dtypes_in_one_buffer(device):
    """They alternate where their strides have as many bytes."""
    x, residual, w = inputs(9, 512, torch.bfloat16, device)
    residual = residual.float()
    buffer = torch.zeros(9, 3 * 512, dtype=torch.bfloat16, device=device)
    inside, inside_residual = buffer[:, :512], buffer.view(torch.float32)[:, 256:]
    inside.copy_(x), inside_residual.copy_(residual)
    fused_add_rmsnorm(x, residual, w)
    fused_add_rmsnorm(inside, inside_residual, w)
    assert same_bits(inside, x) and same_bits(inside_residual, residual)
    for start in (248, 0):
        with pytest.raises(ValueError, match="residual must share no memory with input"):
            fused_add_rmsnorm(inside, buffer.view(torch.float32)[:, start : start + 512], w)


@pytest.mark.parametrize("hidden_size", [128, 1024])
def test_shapes_and_strides(device, hidden_size):
    x, residual, w = inputs(24, hidden_size, torch.bfloat16, device)
    wide = torch.randn(24, 3 * hidden_size, device=device).bfloat16()
    wide[:, :hidden_size], wide[:, 2 * hidden_size :] = x, residual
    middle = wide[:, hidden_size : 2 * hidden_size].clone()
    shaped, shaped_residual = x.clone().view(2, 3, 4, hidden_size), residual.clone().view(2, 3, 4, hidden_size)
    fused_add_rmsnorm(x, residual, w)
    fused_add_rmsnorm(wide[:, :hidden_size], wide[:, 2 * hidden_size :], w)
    fused_add_rmsnorm(shaped, shaped_residual, w)
    assert same_bits(wide, torch.cat((x, middle, residual), dim=1))
    assert same_bits(shaped.view_as(x), x) and same_bits(shaped_residual.view_as(x), residual)


def test_no_rows_and_special_values(device):
    empty = torch.empty(0, 3, 512, device=device)
    fused_add_rmsnorm(empty, empty.clone(), torch.ones(512, device=device))
    x, residual, w = inputs(5, 512, torch.float32, device)
    expected, expected_residual = x.clone(), residual.clone()
    fused_add_rmsnorm(expected, expected_residual, w)
    x[1, 7], residual[3, 9] = float("inf"), float("nan")
    fused_add_rmsnorm(x, residual, w)
    assert same_bits(x[[0, 2, 4]], expected[[0, 2, 4]]) and same_bits(residual[[0, 2, 4]], expected_residual[[0, 2, 4]])
    assert x[1, 7].isnan() and (x[1].nan_to_num() == 0).all() and x[3].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden_size", "dtype", "residual_dtype"),
    [
        (64, torch.bfloat16, torch.bfloat16),
        (4096, torch.bfloat16, torch.bfloat16),
        (7168, torch.float16, torch.float16),
        (64, torch.float16, torch.float32),
        (4096, torch.bfloat16, torch.float32),
    ],
)
def test_the_same_bits_in_any_batch(device, hidden_size, dtype, residual_dtype):
    x, residual, w = inputs(4096, hidden_size, dtype, device)
    residual = (residual.float() / 3).to(residual_dtype)
    everything, total = x.clone(), residual.clone()
    fused_add_rmsnorm(everything, total, w)
    for batch in (1, 2, 7, 64, 255, 4095):
        for first in (0, (4096 - batch) // 2, 4096 - batch):
            rows = slice(first, first + batch)
            for pdl in (None, False):
                part, part_residual = x[rows].clone(), residual[rows].clone()
                fused_add_rmsnorm(part, part_residual, w, enable_pdl=pdl)
                assert same_bits(part, everything[rows]) and same_bits(part_residual, total[rows])


@pytest.mark.gpu
def test_a_chain_of_overlapping_kernels():
    """Each call reads what the one before it wrote; with PDL they overlap."""
    x, residual, w = inputs(1, 8192, torch.bfloat16, "cuda")
    results = []
    for pdl in (True, False):
        a, b = x.clone(), residual.clone()

        def chain(a=a, b=b, pdl=pdl):
            for _ in range(50):
                fused_add_rmsnorm(a, b, w, enable_pdl=pdl)
                rmsnorm(b, w, out=b, enable_pdl=pdl)

        chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        for _ in range(20):
            graph.replay()
        results.append((a, b))
    assert same_bits(results[0][0], results[1][0]) and same_bits(results[0][1], results[1][1])


H = 512


def bad_calls():
    x, residual, w = inputs(4, H, torch.float32, "cpu")
    x16, w16 = x.bfloat16(), w.bfloat16()
    wide = torch.randn(4, 2 * H)
    flat = torch.randn(5 * H)
    return [
        (TypeError, "residual must be a torch.Tensor, got NoneType", (x, None, w)),
        (TypeError, "input must be .* got float64", (x.double(), residual.double(), w.double())),
        (TypeError, "residual must be float32, got float16", (x, residual.half(), w)),
        (TypeError, "residual must be float32, got bfloat16", (x, residual.bfloat16(), w)),
        (TypeError, "residual must be bfloat16 or float32, got float16", (x16, residual.half(), w16)),
        (TypeError, "residual must be float16 or float32, got bfloat16", (x.half(), residual.bfloat16(), w)),
        (TypeError, "weight must be bfloat16 or float32, got float16", (x16, residual, w.half())),
        (ValueError, r"residual must have shape \[4, 512\].*got \[3, 512\]", (x16, residual[:3], w16)),
        (
            ValueError,
            "residual must share no memory with input",
            (flat.view(torch.bfloat16)[: 4 * H].view(4, H), flat[: 4 * H].view(4, H), w16),
        ),
        (TypeError, "weight must be float32, got bfloat16", (x, residual, w.bfloat16())),
        (ValueError, r"residual must have shape \[4, 512\].*got \[3, 512\]", (x, residual[:3], w)),
        (ValueError, r"weight must have shape \[512\]", (x, residual, w[:256])),
        (ValueError, "residual must have a last stride of 1", (x, wide[:, ::2], w)),
        (ValueError, "input must have a last stride of 1", (wide[:, ::2], residual, w)),
        (ValueError, "input must not overlap itself", (w.expand(4, H), residual, torch.randn(H))),
        (ValueError, "residual must not overlap itself", (x, torch.randn(H).expand(4, H), w)),
        (ValueError, "residual must share no memory with input", (x, x, w)),
        (ValueError, "residual must share no memory with input", (flat[: 4 * H].view(4, H), flat[H:].view(4, H), w)),
        (ValueError, "residual must share no memory with input", (wide[:, :H], wide[:, 8 : H + 8], w)),
        (ValueError, "input must share no memory with weight", (x, residual, x[1])),
        (ValueError, "residual must share no memory with weight", (x, residual, residual[2])),
        (ValueError, "eps must be zero or more, got nan", (x, residual, w, float("nan"))),
        (TypeError, "enable_pdl must be", (x, residual, w, 1e-6, "yes")),
        (RuntimeError, "fused_add_rmsnorm does not support hidden_size 300", (x[:, :300], residual[:, :300], w[:300])),
    ]


@pytest.mark.parametrize("warm", [False, True])
def test_refused_alike_before_and_after_the_kernel_is_built(warm, cache_dir):
    if warm:
        for dtype in (torch.float32, torch.bfloat16):
            x, _, w = inputs(4, H, dtype, "cpu")
            fused_add_rmsnorm(x, torch.randn(4, H), w)
    for error, pattern, arguments in bad_calls():
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        with pytest.raises(error, match=pattern):
            fused_add_rmsnorm(*arguments)
        assert cache_dir.exists() == warm, pattern
        for a, b in zip(arguments, before, strict=True):
            assert not isinstance(a, torch.Tensor) or same_bits(a, b), pattern


def test_the_variants_are_different_kernels():
    norms = [operator for operator in REGISTRY.values() if isinstance(operator, Norm)]
    assert len({(norm.family, norm.binding, norm.policy) for norm in norms}) == len(norms) == 13
