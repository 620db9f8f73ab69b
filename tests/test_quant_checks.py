"""What the float8 operators refuse: with the same message before a kernel is built and after; nothing is written."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_refused

from jitnorm import (
    fused_add_rmsnorm_quant_fp8,
    per_tensor_quant_fp8,
    per_token_quant_fp8,
    rmsnorm_quant_fp8,
)

H = 512
E4M3 = torch.float8_e4m3fn
norm, fused, tensor, token = (
    rmsnorm_quant_fp8,
    fused_add_rmsnorm_quant_fp8,
    per_tensor_quant_fp8,
    per_token_quant_fp8,
)


def e4m3(*shape, device):
    return torch.zeros(shape, dtype=torch.uint8, device=device).view(E4M3)


def bad_calls(device):
    """Return calls: (name, exception, pattern of the message, call)."""
    x, residual, w = (torch.randn(shape, device=device) for shape in ((4, H), (4, H), (H,)))
    q, one, scales = e4m3(4, H, device=device), torch.ones(1, device=device), torch.ones(4, 1, device=device)
    wide, wide_q = torch.randn(4, 2 * H, device=device), e4m3(4, 2 * H, device=device)
    memory = torch.zeros(4 * 4 * H, dtype=torch.uint8, device=device)
    as_x, as_q = memory.view(torch.float32).view(4, H), memory[: 4 * H].view(E4M3).view(4, H)
    calls = [
        # The norms
        ("norm: input is a list", TypeError, "input must be a torch.Tensor, got list", lambda: norm([1.0], w)),
        ("norm: integers", TypeError, "input must be .* got int32", lambda: norm(x.int(), w)),
        ("norm: float8", TypeError, "input must be .* got float8_e4m3fn", lambda: norm(q, w)),
        ("norm: size", RuntimeError, "quant_fp8_dynamic does not support hidden_size 500", lambda: norm(x[:, :500], w)),
        ("norm: weight", TypeError, "weight must be float32, got float16", lambda: norm(x, w.half())),
        ("norm: weight's shape", ValueError, r"weight must have shape \[512\]", lambda: norm(x, w[:256])),
        ("norm: strided", ValueError, "input must have a last stride of 1", lambda: norm(wide[:, ::2], w)),
        ("norm: eps", ValueError, "eps must be zero or more, got -1", lambda: norm(x, w, one, -1.0)),
        ("norm: eps is a tensor", TypeError, "eps must be a float, got Tensor", lambda: norm(x, w, one, one)),
        ("norm: enable_pdl", TypeError, "enable_pdl must be", lambda: norm(x, w, one, 1e-6, None, 1)),
        (
            "scale is a number",
            TypeError,
            "scale must be a float32 tensor of one element, got float",
            lambda: norm(x, w, 0.5),
        ),
        ("scale is half", TypeError, "scale must be float32, got float16", lambda: norm(x, w, one.half())),
        (
            "two scales",
            ValueError,
            r"scale must have 1 element \(one scale",
            lambda: norm(x, w, torch.cat([one, one])),
        ),
        ("scale and scales", ValueError, "scales must be None where scale", lambda: norm(x, w, one, scales=scales)),
        ("scales too few", ValueError, r"scales must have 4 elements \(one for", lambda: norm(x, w, scales=scales[:3])),
        ("scales are half", TypeError, "scales must be float32", lambda: norm(x, w, scales=scales.half())),
        ("scales strided", ValueError, "scales must be contiguous", lambda: norm(x, w, scales=wide[:, :1])),
        (
            "scales over input",
            ValueError,
            "scales must share no memory with input",
            lambda: norm(x, w, scales=x[0, :4]),
        ),
        ("scales over weight", ValueError, "scales must share no mem.* weight", lambda: norm(x, w, scales=w[:4])),
        ("out is no float8", TypeError, "out must be float8_e4m3fn, got float32", lambda: norm(x, w, out=residual)),
        ("out of other shape", ValueError, r"out must have shape \[4, 512\]", lambda: norm(x, w, out=q[:3])),
        ("out strided", ValueError, "out must have a last stride of 1", lambda: norm(x, w, out=wide_q[:, ::2])),
        ("out over itself", ValueError, "out must not overlap itself", lambda: norm(x, w, out=q[:1].expand(4, H))),
        ("out over input", ValueError, "out must share no memory with input", lambda: norm(as_x, w, out=as_q)),
        ("out over weight", ValueError, "out must share .* weight", lambda: norm(x, as_x[0], out=as_q)),
        ("out over scale", ValueError, "out must share .* scale", lambda: norm(x, w, as_x[0, :1], out=as_q)),
        ("out over scales", ValueError, "out must share .* scales", lambda: norm(x, w, out=as_q, scales=as_x[0, :4])),
        ("fused: residual", TypeError, "residual must be a torch.Tensor, got None", lambda: fused(x, None, w)),
        ("fused: residual's dtype", TypeError, "residual must be float32", lambda: fused(x, residual.half(), w)),
        ("fused: residual's shape", ValueError, "residual must have shape", lambda: fused(x, residual[:3], w)),
        ("fused: the same", ValueError, "residual must share no memory with input", lambda: fused(x, x, w)),
        ("fused: over itself", ValueError, "residual must not overlap", lambda: fused(x, w.expand(4, H), w.clone())),
        ("fused: over weight", ValueError, "residual must share .* weight", lambda: fused(x, residual, residual[0])),
        ("fused: over out", ValueError, "out must share .* residual", lambda: fused(x, as_x, w, out=as_q)),
        (
            "fused: over scale",
            ValueError,
            "scale must share .* residual",
            lambda: fused(x, residual, w, residual[0, :1]),
        ),
        (
            "fused: scales",
            ValueError,
            "scales must share .* resid",
            lambda: fused(x, residual, w, scales=residual[0, :4]),
        ),
        # Whole tensors
        ("tensor: no tensor", TypeError, "input must be a torch.Tensor, got None", lambda: tensor(None, q, one)),
        ("tensor: float64", TypeError, "input must be .* got float64", lambda: tensor(x.double(), q, one)),
        ("tensor: q is no float8", TypeError, "output_q must be float8_e4m3fn", lambda: tensor(x, residual, one)),
        ("tensor: q's shape", ValueError, r"output_q must have shape \[4, 512\]", lambda: tensor(x, q[:3], one)),
        ("tensor: s is half", TypeError, "output_s must be float32", lambda: tensor(x, q, one.half(), True)),
        ("tensor: s of two", ValueError, r"output_s must have 1 element \(", lambda: tensor(x, q, scales, True)),
        ("tensor: columns", ValueError, "input must be contiguous", lambda: tensor(wide[:, :H], q, one)),
        ("tensor: q columns", ValueError, "output_q must be contiguous", lambda: tensor(x, wide_q[:, :H], one)),
        ("tensor: is_static", TypeError, "is_static must be True or False", lambda: tensor(x, q, one, 1)),
        ("tensor: q over input", ValueError, "output_q must share .* input", lambda: tensor(as_x, as_q, one)),
        ("tensor: q over s", ValueError, "output_q must share .* output_s", lambda: tensor(x, as_q, as_x[0, :1], True)),
        ("tensor: s over input", ValueError, "output_s must share .* input", lambda: tensor(x, q, x[0, :1])),
        # Rows
        ("token: scalar", ValueError, "at least one dimension", lambda: token(x[0, 0], q[0, 0], one)),
        ("token: size", RuntimeError, "does not support hidden_size 24", lambda: token(x[:, :24], q[:, :24], scales)),
        ("token: q's dtype", TypeError, "output_q must be float8_e4m3fn", lambda: token(x, residual, scales)),
        ("token: too few", ValueError, r"output_s must have 4 elements", lambda: token(x, q, one)),
        ("token: strided", ValueError, "input must have a last", lambda: token(wide[:, ::2], q, scales)),
        ("token: q over itself", ValueError, "output_q must not", lambda: token(x, q[:1].expand(4, H), scales)),
        ("token: q over input", ValueError, "output_q must share .* input", lambda: token(as_x, as_q, scales)),
        ("token: s over input", ValueError, "output_s must share .* input", lambda: token(x, q, x[0, :4])),
    ]
    if device == "cuda":
        flat, flat_q = torch.randn(4 * H + 1, device=device), e4m3(4 * H + 1, device=device)
        calls += [
            ("scale elsewhere", ValueError, "scale must be on cuda:0", lambda: norm(x, w, one.cpu())),
            ("out elsewhere", ValueError, "out must be on cuda:0", lambda: norm(x, w, out=q.cpu())),
            ("out misaligned", ValueError, "out must be aligned", lambda: norm(x, w, out=flat_q[1:].view(4, H))),
            ("tensor: misaligned", ValueError, "input must be aligned", lambda: tensor(flat[1:].view(4, H), q, one)),
            ("tensor: q", ValueError, "output_q must be aligned", lambda: tensor(x, flat_q[1:].view(4, H), one)),
            ("token: misaligned", ValueError, "output_q must be al", lambda: token(x, flat_q[1:].view(4, H), scales)),
        ]
    return calls


NAMES = [name for name, *_ in bad_calls("cpu")]


def build_all(device):
    for dtype in (torch.float32, torch.float16):
        x, w = torch.randn(2, H, device=device).to(dtype), torch.ones(H, device=device).to(dtype)
        q, s = e4m3(2, H, device=device), torch.ones(2, device=device)
        for scale in (None, s[:1]):
            norm(x, w, scale)
            fused(x, x.clone(), w, scale)
        tensor(x, q, s[0])
        tensor(x, q, s[0], True)
        token(x, q, s)


@pytest.mark.parametrize("name", NAMES)
def test_refused_before_anything_is_built(name, cache_dir):
    assert_refused(bad_calls("cpu"), name)
    assert not cache_dir.exists()


def test_refused_by_kernels_that_are_there(device):
    build_all(device)
    for name, error, pattern, call in bad_calls(device):
        with pytest.raises(error, match=pattern):
            pytest.fail(f"{name}: {call()}")
    if device == "cuda":
        torch.cuda.synchronize()


@pytest.mark.gpu
def test_refused_on_a_gpu_before_anything_is_built(cache_dir):
    for _, error, pattern, call in bad_calls("cuda"):
        with pytest.raises(error, match=pattern):
            call()
    assert not cache_dir.exists()


def test_nothing_is_written_by_a_refused_call():
    build_all("cpu")
    x, w, q, scales = torch.randn(4, H), torch.ones(H), e4m3(4, H, device="cpu"), torch.full((4, 1), 7.0)
    residual = x.clone()
    for call in (
        lambda: norm(x, w, None, -1.0, q, scales=scales),
        lambda: norm(x, w[:256], None, 1e-6, q, scales=scales),
        lambda: fused(x, residual, w, None, 1e-6, q, scales=scales[:3]),
        lambda: tensor(x, q, scales),
        lambda: tensor(x, q[:3], scales[0]),
        lambda: token(x, q, scales[:3]),
    ):
        with pytest.raises(ValueError):
            call()
        assert torch.equal(residual, x) and (scales == 7).all() and (q.float() == 0).all()
