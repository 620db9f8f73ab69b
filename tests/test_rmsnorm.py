"""rmsnorm and gemma_rmsnorm against their definitions in float64, and the promises of their docstrings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import TOLERANCE, WEIGHTS, relative_error, rmsnorm_reference, same_bits, sizes_and_dtypes

import jitnorm.rmsnorm
from jitnorm.rmsnorm import _is_supported_rmsnorm_hidden_size, _rmsnorm_kernel_class, gemma_rmsnorm, rmsnorm

UNSUPPORTED = (0, -256, 1, 32, 96, 192, 300, 384, 8448, 16384)
# Both ends of either class, and sizes whose vectors do not divide evenly among threads (768, 3328, 5632).
HIDDEN_SIZES = (64, 128, 256, 512, 768, 1024, 3328, 4096, 5632, 7168, 8192)


def inputs(num_tokens, hidden_size, dtype, device, weight_dtype=None):
    x = torch.randn(num_tokens, hidden_size, device=device) * torch.rand(num_tokens, 1, device=device).mul(4).exp()
    return x.to(dtype), torch.randn(hidden_size, device=device).to(weight_dtype or dtype)


def poisoned(x):
    return torch.full_like(x, float("nan"), memory_format=torch.contiguous_format)


@sizes_and_dtypes(HIDDEN_SIZES, WEIGHTS)
def test_matches_the_definition(device, hidden_size, dtype, weight_dtype):
    for num_tokens in (1, 3, 257):  # one row, fewer and more than a block has, odd
        x, w = inputs(num_tokens, hidden_size, dtype, device, weight_dtype)
        out = poisoned(x)
        assert rmsnorm(x, w, 1e-6, out) is out
        reference = rmsnorm_reference(x, w, 1e-6)
        error = relative_error(out, reference)
        assert error <= TOLERANCE[dtype]
    # Over few rows one rounding of rstd decides which is closer; hundreds of rows average that out.
    theirs = relative_error(F.rms_norm(x.float(), (hidden_size,), w.float(), 1e-6).to(dtype), reference)
    assert error <= 1.05 * theirs


def test_module_and_function_can_be_imported():
    x, w = inputs(3, 64, torch.float32, "cpu")
    assert jitnorm.rmsnorm is rmsnorm
    assert same_bits(jitnorm.rmsnorm(x, w), rmsnorm(x, w))


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1.0, 7])
def test_eps_is_used(device, eps):
    x, w = inputs(5, 256, torch.float32, device)
    assert relative_error(rmsnorm(x, w, eps), rmsnorm_reference(x, w, eps)) <= 1e-6


@pytest.mark.parametrize("hidden_size", [128, 1024])  # one of each class
def test_shapes_and_strides(device, hidden_size):
    x, w = inputs(24, hidden_size, torch.bfloat16, device)
    expected = rmsnorm(x, w)
    wide = torch.randn(24, 2 * hidden_size + 64, device=device).bfloat16()
    strided = wide[:, 32 : 32 + hidden_size]
    strided.copy_(x)
    before = wide.clone()
    assert same_bits(rmsnorm(strided, w), expected)
    assert same_bits(rmsnorm(x.view(2, 3, 4, hidden_size), w), expected.view(2, 3, 4, hidden_size))
    assert same_bits(rmsnorm(strided.unflatten(0, (4, 6)), w), expected.unflatten(0, (4, 6)))
    assert same_bits(rmsnorm(x[5], w), expected[5])
    assert same_bits(rmsnorm(x[7].expand(3, hidden_size), w), expected[7].expand(3, hidden_size))
    out = wide[:, hidden_size + 32 : 2 * hidden_size + 32]  # columns beside the input's: no shared memory
    out.fill_(float("nan"))
    assert rmsnorm(strided, w, out=out) is out
    assert same_bits(out, expected)
    before[:, hidden_size + 32 : 2 * hidden_size + 32] = expected
    assert same_bits(wide, before)  # nothing beside the output was written


@pytest.mark.parametrize("hidden_size", [64, 4096])
def test_in_place(device, hidden_size):
    x, w = inputs(65, hidden_size, torch.float16, device)
    expected = rmsnorm(x, w)
    assert rmsnorm(x, w, out=x) is x
    assert same_bits(x, expected)


def test_no_rows(device):
    for shape in ((0, 512), (0, 3, 512), (3, 0, 512)):
        x = torch.empty(shape, device=device)
        assert rmsnorm(x, torch.ones(512, device=device)).shape == shape
    # Without elements the strides do not matter.
    x = torch.empty(4, 4, 0, 512, device=device).transpose(0, 1)
    assert rmsnorm(x, torch.ones(512, device=device)).shape == x.shape


def test_special_values_stay_in_their_row(device):
    x, w = inputs(5, 512, torch.float32, device)
    expected = rmsnorm(x, w)
    x[1, 7], x[3, 9] = float("inf"), float("nan")
    out = rmsnorm(x, w)
    assert same_bits(out[[0, 2, 4]], expected[[0, 2, 4]])
    assert out[1, 7].isnan() and (out[1].nan_to_num() == 0).all()
    assert out[3].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounds_to_nearest_even_and_overflows_to_infinity(device, dtype):
    """Rows of ones have rstd 1, so the output is the float32 weight, rounded."""
    bits = torch.randint(-(2**31), 2**31 - 1, (64, 8192), dtype=torch.int32)
    for row in bits.view(torch.float32)[:8]:
        w = row.to(device)
        out = rmsnorm(torch.ones(1, 8192, dtype=dtype, device=device), w, eps=0.0)[0]
        expected = w.to(dtype)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out[~out.isnan()], expected[~expected.isnan()])
    subnormal = torch.linspace(-2e-7, 2e-7, 512).to(device)
    assert torch.equal(
        rmsnorm(torch.ones(1, 512, dtype=dtype, device=device), subnormal, eps=0.0)[0], subnormal.to(dtype)
    )


@pytest.mark.parametrize(("hidden_size", "dtype"), [(64, torch.bfloat16), (256, torch.float32), (4096, torch.bfloat16)])
def test_the_same_bits_in_any_batch(device, hidden_size, dtype):
    x, w = inputs(4096, hidden_size, dtype, device)
    everything = rmsnorm(x, w)
    for batch in (1, 2, 3, 7, 16, 33, 64, 255, 1000, 4095):
        for first in (0, 1, (4096 - batch) // 2, 4096 - batch):
            rows = slice(first, first + batch)
            assert same_bits(rmsnorm(x[rows], w), everything[rows])
            assert same_bits(rmsnorm(x[rows].clone(), w, enable_pdl=False), everything[rows])
    wide = torch.randn(4096, hidden_size + 64, device=device).to(dtype)
    wide[:, 64:] = x
    assert same_bits(rmsnorm(wide[:, 64:], w), everything)
    for neighbour in (0.0, float("inf"), float("nan"), 1e30):
        others = torch.full_like(x[:9], neighbour)
        others[4] = x[17]
        assert same_bits(rmsnorm(others, w)[4], everything[17])


def test_offsets_beyond_32_bits():
    """Three rows 2^30 elements apart. Only the pages that are touched take memory."""
    apart = 2**30 + 64
    storage = torch.empty(2 * apart + 256, dtype=torch.bfloat16)
    x = storage.as_strided((3, 256), (apart, 1))
    values, w = inputs(3, 256, torch.bfloat16, "cpu")
    x.copy_(values)
    assert same_bits(rmsnorm(x, w), rmsnorm(values, w))
    rmsnorm(x, w, out=x)
    assert same_bits(x, rmsnorm(values, w))


def test_parameters_and_inference_mode(device):
    x, w = inputs(4, 128, torch.float32, device)
    expected = rmsnorm(x, w)
    with torch.inference_mode():
        assert same_bits(rmsnorm(x.clone(), torch.nn.Parameter(w)), expected)


@pytest.mark.parametrize("hidden_size", UNSUPPORTED)
def test_unsupported_sizes(hidden_size):
    assert not _is_supported_rmsnorm_hidden_size(hidden_size)
    with pytest.raises(RuntimeError, match=rf"hidden_size {hidden_size}: supported are 64, 128, 256 and the multiples"):
        _rmsnorm_kernel_class(hidden_size)
    if hidden_size >= 0:
        x = torch.randn(2, hidden_size)
        with pytest.raises(RuntimeError, match=f"hidden_size {hidden_size}:"):
            rmsnorm(x, torch.ones(hidden_size))


def test_supported_sizes_and_their_classes():
    supported = [h for h in range(-512, 10000) if _is_supported_rmsnorm_hidden_size(h)]
    assert supported == [64, 128, 256, *range(512, 8193, 256)]
    classes = {h: _rmsnorm_kernel_class(h) for h in supported}
    assert [h for h, c in classes.items() if c == "RMSNormWarpKernel"] == [64, 128, 256]
    assert set(classes.values()) == {"RMSNormWarpKernel", "RMSNormKernel"}


# Gemma. What it shares with rmsnorm is tested above.


@sizes_and_dtypes((64, 256, 512, 3328, 8192), WEIGHTS)
def test_gemma_matches_the_definition(device, hidden_size, dtype, weight_dtype):
    x = torch.randn(65, hidden_size, device=device).to(dtype)
    w = torch.randn(hidden_size, device=device).mul(0.1).to(weight_dtype)
    out = torch.full_like(x, float("nan"))
    assert gemma_rmsnorm(x, w, 1e-6, out) is out
    assert relative_error(out, rmsnorm_reference(x, w.double() + 1, 1e-6)) <= TOLERANCE[dtype]
    assert same_bits(gemma_rmsnorm(x, w), out)
    gemma_rmsnorm(x, w, out=x)
    assert same_bits(x, out)


def test_gemma_small_weights_are_not_lost(device):
    """In bfloat16, 1 + 2^-10 is 1; the sum is formed in float32, and a float32 output shows it."""
    x = torch.ones(2, 512, device=device)
    w = torch.full((512,), 2.0**-10, device=device)
    assert (gemma_rmsnorm(x, w, 0.0) == 1 + 2.0**-10).all()


def test_gemma_unsupported_sizes_are_named():
    with pytest.raises(RuntimeError, match="gemma_rmsnorm does not support hidden_size 300"):
        gemma_rmsnorm(torch.randn(2, 300), torch.randn(300))
