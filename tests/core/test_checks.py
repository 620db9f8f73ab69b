"""Every argument that is refused: the message is the same before a kernel is built and after."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_refused

from jitnorm import rmsnorm

H = 512


def good(device="cpu", dtype=torch.float32):
    return torch.randn(4, H, device=device).to(dtype), torch.randn(H, device=device).to(dtype)


def bad_calls(device):
    """Return calls: (name, exception, pattern of the message, call)."""
    x, w = good(device)
    half = x.half()
    wide = torch.randn(4, 2 * H, device=device)
    flat = torch.randn(4 * H + 8, device=device)
    three = torch.randn(3, 5, 2 * H, device=device)
    out = torch.empty_like(x)
    calls = [
        ("input is a list", TypeError, "input must be a torch.Tensor, got list", lambda: rmsnorm([1.0], w)),
        ("weight is None", TypeError, "weight must be a torch.Tensor, got NoneType", lambda: rmsnorm(x, None)),
        ("out is a number", TypeError, "out must be a torch.Tensor, got int", lambda: rmsnorm(x, w, 1e-6, 3)),
        ("input is a scalar", ValueError, "input must have at least one dim", lambda: rmsnorm(w.new_ones(()), w)),
        ("sparse", TypeError, "input must be a dense tensor", lambda: rmsnorm(x.to_sparse(), w)),
        ("integers", TypeError, "input must be float16 or bfloat16 or float32, got int32", lambda: rmsnorm(x.int(), w)),
        ("float64", TypeError, "input must be .* got float64", lambda: rmsnorm(x.double(), w.double())),
        ("complex", TypeError, "input must be .* got complex64", lambda: rmsnorm(x.cfloat(), w)),
        ("weight float64", TypeError, "weight must be float32, got float64", lambda: rmsnorm(x, w.double())),
        ("weight bf16", TypeError, "weight must be float16 or float32, got bf", lambda: rmsnorm(half, w.bfloat16())),
        ("weight fp16 of fp32", TypeError, "weight must be float32, got float16", lambda: rmsnorm(x, w.half())),
        ("weight too short", ValueError, r"weight must have shape \[512\].*got \[256\]", lambda: rmsnorm(x, w[:256])),
        ("weight of rows", ValueError, r"weight must have shape \[512\].*\[4, 512\]", lambda: rmsnorm(x, x)),
        ("weight of one row", ValueError, r"weight must have shape.*\[1, 512\]", lambda: rmsnorm(x, w[None])),
        ("weight strided", ValueError, "weight must have a last stride of 1", lambda: rmsnorm(x, wide[0, ::2])),
        ("input strided", ValueError, "input must have a last stride of 1", lambda: rmsnorm(wide[:, ::2], w)),
        ("input transposed", ValueError, "last stride of 1", lambda: rmsnorm(torch.randn(H, 4, device=device).T, w)),
        ("input expanded", ValueError, "last stride of 1", lambda: rmsnorm(x[:, :1].expand(4, H), w)),
        ("no one row stride", ValueError, "collapse to one row stride", lambda: rmsnorm(three[:, :3, :H], w)),
        ("swapped dimensions", ValueError, "collapse to one", lambda: rmsnorm(three[..., :H].transpose(0, 1), w)),
        ("out of other dtype", TypeError, "out must be float32, got float16", lambda: rmsnorm(x, w, 1e-6, half)),
        ("out of other shape", ValueError, r"out must have shape \[4, 512\]", lambda: rmsnorm(x, w, 1e-6, out[:3])),
        ("out of other rank", ValueError, "out must have shape", lambda: rmsnorm(x, w, 1e-6, out.view(2, 2, H))),
        ("out strided", ValueError, "out must have a last stride", lambda: rmsnorm(x, w, 1e-6, wide[:, ::2])),
        ("out over itself", ValueError, "out must not overlap itself", lambda: rmsnorm(x, w, 1e-6, w.expand(4, H))),
        (
            "out shifted by a row",
            ValueError,
            "out must be input itself or share no memory with input",
            lambda: rmsnorm(flat[: 2 * H].view(2, H), w, 1e-6, flat[H : 3 * H].view(2, H)),
        ),
        (
            "out shifted by some columns",
            ValueError,
            "out must be input itself or share no memory with input",
            lambda: rmsnorm(wide[:, :H], w, 1e-6, wide[:, 8 : H + 8]),
        ),
        (
            "out of another stride",
            ValueError,
            "out must be input itself or share no memory with input",
            lambda: rmsnorm(wide[:, :H], w, 1e-6, wide.view(8, H)[:4]),
        ),
        (
            "out over the weight",
            ValueError,
            "out must share no memory with weight",
            lambda: rmsnorm(x, out[2], 1e-6, out),
        ),
        ("eps negative", ValueError, "eps must be zero or more, got -1", lambda: rmsnorm(x, w, -1.0)),
        ("eps NaN", ValueError, "eps must be zero or more, got nan", lambda: rmsnorm(x, w, float("nan"))),
        ("eps is text", TypeError, "eps must be a float, got str", lambda: rmsnorm(x, w, "1e-6")),
        ("eps is True", TypeError, "eps must be a float, got bool", lambda: rmsnorm(x, w, True)),
        ("eps is huge", ValueError, "eps must be a float or a 64-bit", lambda: rmsnorm(x, w, 2**70)),
        ("eps is None", TypeError, "eps must be a float, got NoneType", lambda: rmsnorm(x, w, None)),
        ("enable_pdl is a number", TypeError, "enable_pdl must be", lambda: rmsnorm(x, w, 1e-6, None, 1)),
        ("size not supported", RuntimeError, "does not support hidden_size 500", lambda: rmsnorm(x[:, :500], w[:500])),
    ]
    if device == "cuda":
        calls += [
            (
                "weight elsewhere",
                ValueError,
                "weight must be on cuda:0 like input, got cpu",
                lambda: rmsnorm(x, w.cpu()),
            ),
            ("out elsewhere", ValueError, "out must be on cuda:0", lambda: rmsnorm(x, w, 1e-6, out.cpu())),
            (
                "input misaligned",
                ValueError,
                "input must be aligned to 16 bytes",
                lambda: rmsnorm(flat[1 : 4 * H + 1].view(4, H), w),
            ),
            (
                "rows misaligned",
                ValueError,
                "input must be aligned to 16 bytes",
                lambda: rmsnorm(flat[: 3 * (H + 1) + H].as_strided((4, H), (H + 1, 1)), w),
            ),
            ("weight misaligned", ValueError, "weight must be aligned", lambda: rmsnorm(x, flat[1 : H + 1])),
            (
                "out misaligned",
                ValueError,
                "out must be al",
                lambda: rmsnorm(x, w, 1e-6, flat[1 : 4 * H + 1].view(4, H)),
            ),
        ]
    return calls


NAMES = [name for name, *_ in bad_calls("cpu")]


@pytest.mark.parametrize("name", NAMES)
def test_refused_before_anything_is_built(name, cache_dir):
    assert_refused(bad_calls("cpu"), name)
    assert not cache_dir.exists()


@pytest.mark.parametrize("name", NAMES)
def test_refused_by_a_kernel_that_is_there(name):
    for dtype in (torch.float32, torch.float16):
        rmsnorm(*good(dtype=dtype))
    assert_refused(bad_calls("cpu"), name)


@pytest.mark.gpu
def test_refused_on_a_gpu():
    for dtype in (torch.float32, torch.float16):
        rmsnorm(*good("cuda", dtype))
    for _, error, pattern, call in bad_calls("cuda"):
        with pytest.raises(error, match=pattern):
            call()
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_refused_on_a_gpu_before_anything_is_built(cache_dir):
    for _, error, pattern, call in bad_calls("cuda"):
        with pytest.raises(error, match=pattern):
            call()
    assert not cache_dir.exists()


def test_nothing_is_written_by_a_refused_call():
    x, w = good()
    out = torch.full_like(x, 7.0)
    for arguments in ((x, w, -1.0, out), (x, w[:256], 1e-6, out), (x.half(), w.half(), 1e-6, out)):
        with pytest.raises((TypeError, ValueError)):
            rmsnorm(*arguments)
        assert (out == 7).all()


def test_fake_and_meta_tensors_never_reach_a_kernel():
    from torch._subclasses import FakeTensorMode

    x, w = good()
    rmsnorm(x, w)
    with FakeTensorMode() as mode:
        fake = rmsnorm(mode.from_tensor(x), mode.from_tensor(w))
        assert fake.shape == x.shape and type(fake).__name__ == "FakeTensor"
    meta = rmsnorm(x.to("meta"), w.to("meta"))
    assert meta.is_meta and meta.shape == x.shape
