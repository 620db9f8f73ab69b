"""Every argument that fused_inplace_qknorm refuses: the message is the same before a kernel is built and after."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_refused, same_bits

from jitnorm import fused_inplace_qknorm as qknorm

D = 64


def good(device="cpu", dtype=torch.float32):
    return (
        *(torch.randn(5, heads, D, device=device).to(dtype) for heads in (4, 2)),
        *(torch.randn(D, device=device).to(dtype) for _ in range(2)),
    )


def bad_calls(device):
    """Return calls: (name, exception, pattern of the message, call)."""
    q, k, w, v = good(device)
    half = [t.half() for t in (q, k, w, v)]
    flat = torch.randn(5 * 6 * D + 8, device=device)
    wide = torch.randn(5, 4, 2 * D, device=device)
    qkv = torch.randn(5, 6 * D, device=device)

    def heads(tensor, *shape):
        return tensor.reshape(-1)[: shape[0] * shape[1] * shape[2]].view(shape)

    calls = [
        ("q is a list", TypeError, "q must be a torch.Tensor, got list", lambda: qknorm([1.0], k, w, v)),
        ("k is None", TypeError, "k must be a torch.Tensor, got NoneType", lambda: qknorm(q, None, w, v)),
        ("q_weight is a number", TypeError, "q_weight must be a torch.Tensor, got int", lambda: qknorm(q, k, 1, v)),
        ("k_weight is None", TypeError, "k_weight must be a torch.Tensor", lambda: qknorm(q, k, w, None)),
        ("sparse", TypeError, "q must be a dense tensor", lambda: qknorm(q.to_sparse(), k, w, v)),
        ("q flat", ValueError, r"q must have shape \[tokens, heads, head_dim\], got", lambda: qknorm(q[0], k, w, v)),
        ("k of a batch", ValueError, r"k must have shape \[tokens, heads", lambda: qknorm(q, k[None], w, v)),
        (
            "integers",
            TypeError,
            "q must be float16 or bfloat16 or float32, got int32",
            lambda: qknorm(q.int(), k, w, v),
        ),
        ("float64", TypeError, "q must be .* got float64", lambda: qknorm(q.double(), k.double(), w, v)),
        ("k of other dtype", TypeError, "k must be float32, got float16", lambda: qknorm(q, half[1], w, v)),
        ("q_weight half", TypeError, "q_weight must be float32, got float16", lambda: qknorm(q, k, half[2], v)),
        ("q_weight bf16", TypeError, "q_weight must be float16 or", lambda: qknorm(*half[:2], w.bfloat16(), half[3])),
        ("k_weight bf16", TypeError, "k_weight must be float16, got", lambda: qknorm(*half[:3], v.bfloat16())),
        ("weights differ", TypeError, "k_weight must be float16, got float32", lambda: qknorm(*half[:3], v)),
        ("weights differ too", TypeError, "k_weight must be float32, got f", lambda: qknorm(*half[:2], w, half[3])),
        ("k of other tokens", ValueError, r"k must have shape \[5, 2, 64\].*\[4,", lambda: qknorm(q, k[:4], w, v)),
        ("k of other head_dim", ValueError, r"k must have shape \[5, 2, 64\]", lambda: qknorm(q, k[..., :32], w, v)),
        ("q_weight short", ValueError, r"q_weight must have shape \[64\].*\[32\]", lambda: qknorm(q, k, w[:32], v)),
        ("k_weight of rows", ValueError, r"k_weight must have shape.*\[1, 64\]", lambda: qknorm(q, k, w, v[None])),
        ("weight strided", ValueError, "k_weight must have a last stride", lambda: qknorm(q, k, w, wide[0, 0, ::2])),
        ("q strided", ValueError, "q must have a last stride of 1", lambda: qknorm(wide[..., ::2], k, w, v)),
        ("k strided", ValueError, "k must have a last stride of 1", lambda: qknorm(q, wide[..., ::2], w, v)),
        ("q over itself", ValueError, "q must not overlap itself", lambda: qknorm(q[:1].expand(5, 4, D), k, w, v)),
        ("one head", ValueError, "q must not overlap itself", lambda: qknorm(q[:, :1].expand(5, 4, D), k, w, v)),
        (
            "heads that overlap",
            ValueError,
            "k must not overlap itself",
            lambda: qknorm(q, flat.as_strided((5, 3, D), (4 * D, D - 16, 1)), w, v),
        ),
        (
            "tokens that overlap",
            ValueError,
            "k must not overlap itself",
            lambda: qknorm(q, flat.as_strided((5, 3, D), (2 * D, D, 1)), w, v),
        ),
        ("q is k", ValueError, "k must share no memory with q", lambda: qknorm(q, q, w, v)),
        ("a head of both", ValueError, "k must share no memory", lambda: qknorm(q[:, :3], q[:, 2:], w, v)),
        (
            "between tokens, but not wholly",
            ValueError,
            "k must share no memory",
            lambda: qknorm(qkv[:, : 4 * D].unflatten(1, (4, D)), qkv[:, 3 * D : 5 * D].unflatten(1, (2, D)), w, v),
        ),
        (
            "beyond the end of a token",
            ValueError,
            "k must share no memory",
            lambda: qknorm(
                qkv[:4, : 4 * D].unflatten(1, (4, D)), qkv.as_strided((4, 2, D), (6 * D, D, 1), 5 * D), w, v
            ),
        ),
        (
            "of another stride",
            ValueError,
            "k must share no memory",
            lambda: qknorm(qkv[:, : 4 * D].unflatten(1, (4, D)), heads(qkv, 5, 1, D), w, v),
        ),
        (
            "q over k_weight",
            ValueError,
            "q must share no memory with k_weight",
            lambda: qknorm(q, k, w, q[2, 1]),
        ),
        ("k over q_weight", ValueError, "k must share no memory with q_weight", lambda: qknorm(q, k, k[0, 0], v)),
        ("eps negative", ValueError, "eps must be zero or more, got -1", lambda: qknorm(q, k, w, v, -1.0)),
        ("eps NaN", ValueError, "eps must be zero or more, got nan", lambda: qknorm(q, k, w, v, float("nan"))),
        ("eps is None", TypeError, "eps must be a float, got NoneType", lambda: qknorm(q, k, w, v, None)),
        ("head_dim is text", TypeError, "head_dim must be an int, got str", lambda: qknorm(q, k, w, v, head_dim="64")),
        ("head_dim is True", TypeError, "head_dim must be an int, got bool", lambda: qknorm(q, k, w, v, head_dim=True)),
        (
            "another head_dim",
            ValueError,
            "head_dim must be q's last dimension, 64, or 0",
            lambda: qknorm(q, k, w, v, head_dim=128),
        ),
        ("enable_pdl is 1", TypeError, "enable_pdl must be True", lambda: qknorm(q, k, w, v, enable_pdl=1)),
        (
            "head_dim 96",
            RuntimeError,
            "fused_inplace_qknorm does not support head_dim 96: supported are 64, 128, 256, 512 and 1024",
            lambda: qknorm(heads(qkv, 5, 2, 96), heads(flat, 5, 2, 96), wide[0, 0, :96], wide[0, 1, :96]),
        ),
    ]
    if device == "cuda":
        calls += [
            ("k elsewhere", ValueError, "k must be on cuda:0 like q, got cpu", lambda: qknorm(q, k.cpu(), w, v)),
            ("weight elsewhere", ValueError, "k_weight must be on cuda:0", lambda: qknorm(q, k, w, v.cpu())),
            (
                "k misaligned",
                ValueError,
                "k must be aligned to 16 bytes",
                lambda: qknorm(q, flat[1 : 10 * D + 1].view(5, 2, D), w, v),
            ),
            (
                "tokens misaligned",
                ValueError,
                "k must be aligned to 16 bytes",
                lambda: qknorm(q, flat.as_strided((5, 2, D), (2 * D + 1, D, 1)), w, v),
            ),
            (
                "heads misaligned",
                ValueError,
                "q must be aligned to 16 bytes",
                lambda: qknorm(flat.as_strided((5, 2, D), (3 * D, D + 2, 1)), k, w, v),
            ),
            ("weight misaligned", ValueError, "q_weight must be al", lambda: qknorm(q, k, flat[1 : D + 1], v)),
        ]
    return calls


NAMES = [name for name, *_ in bad_calls("cpu")]


def there(device):
    """Kernels for every dtype that the calls above have, each the last one used."""
    q, k, w, v = good(device)
    qknorm(q, k, w, v)
    q, k = q.half(), k.half()
    qknorm(q, k, w, v)
    qknorm(q, k, w.half(), v.half())


@pytest.mark.parametrize("name", NAMES)
def test_refused_before_anything_is_built(name, cache_dir):
    assert_refused(bad_calls("cpu"), name)
    assert not cache_dir.exists()


@pytest.mark.parametrize("name", NAMES)
def test_refused_by_a_kernel_that_is_there(name):
    there("cpu")
    assert_refused(bad_calls("cpu"), name)


@pytest.mark.gpu
@pytest.mark.parametrize("built", [False, True])
def test_refused_on_a_gpu(built, cache_dir):
    if built:
        there("cuda")
    for _, error, pattern, call in bad_calls("cuda"):
        with pytest.raises(error, match=pattern):
            call()
    torch.cuda.synchronize()
    assert built or not cache_dir.exists()


def test_nothing_is_written_by_a_refused_call():
    there("cpu")
    q, k, w, v = good()
    before = q.clone(), k.clone()
    for arguments in ((q, k, w, v, -1.0), (q, k, w, v[:32]), (q, k[:4], w, v), (q, k, w.half(), v)):
        with pytest.raises((TypeError, ValueError)):
            qknorm(*arguments)
        assert same_bits(q, before[0]) and same_bits(k, before[1])
