"""jitnorm.fused_inplace_qknorm against its definition in float64, and the promises of its docstring."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, TOLERANCE, WEIGHTS, relative_error, rmsnorm_reference, same_bits
from processes import run

from jitnorm import can_use_fused_inplace_qknorm, fused_inplace_qknorm

HEAD_DIMS = (64, 128, 256, 512, 1024)


def heads(num_tokens, num_heads, head_dim, dtype, device):
    """Return heads of very different magnitudes, so that a head normalised by another's sum is wrong."""
    scale = torch.rand(num_tokens, num_heads, 1, device=device).mul(8).exp()
    return (torch.randn(num_tokens, num_heads, head_dim, device=device) * scale).to(dtype)


def weights(head_dim, dtype, device):
    return [torch.randn(head_dim, device=device).to(dtype) for _ in range(2)]


def fused(q, k):
    """A projection of q, k and as many heads of v as of k, and its slices."""
    width_q, width_k = q[0].numel(), k[0].numel()
    qkv = torch.randn(q.shape[0], width_q + 2 * width_k, device=q.device).to(q.dtype)
    to_q, to_k = (t.unflatten(1, (-1, q.shape[2])) for t in qkv.split((width_q, width_k, width_k), dim=1)[:2])
    to_q.copy_(q)
    to_k.copy_(k)
    return qkv, to_q, to_k


def normalised(q, k, *arguments, **named):
    q, k = q.clone(memory_format=torch.contiguous_format), k.clone(memory_format=torch.contiguous_format)
    fused_inplace_qknorm(q, k, *arguments, **named)
    return q, k


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("dtype", "weight_dtype"), WEIGHTS)
def test_matches_the_definition(device, head_dim, dtype, weight_dtype):
    # A model's heads; fewer rows than a block has, with the last of them k's; many, odd, and more of k than of q.
    for num_tokens, num_q_heads, num_k_heads in ((1, 32, 8), (1, 2, 1), (77, 3, 5)):
        q = heads(num_tokens, num_q_heads, head_dim, dtype, device)
        k = heads(num_tokens, num_k_heads, head_dim, dtype, device)
        q_weight, k_weight = weights(head_dim, weight_dtype, device)
        qkv, q_slice, k_slice = fused(q, k)
        v = qkv[:, -k[0].numel() :].clone()
        assert fused_inplace_qknorm(q_slice, k_slice, q_weight, k_weight, 1e-5) is None
        for got, x, weight in ((q_slice, q, q_weight), (k_slice, k, k_weight)):
            reference = rmsnorm_reference(x, weight, 1e-5)
            for head in range(x.shape[1]):  # each by itself: no head's error hides behind the others
                assert relative_error(got[:, head], reference[:, head]) <= TOLERANCE[dtype]
        assert same_bits(qkv[:, -k[0].numel() :], v)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1.0, 7])
def test_eps_is_used(device, eps):
    q, k = (torch.randn(3, n, 64, device=device) for n in (4, 2))
    w = torch.ones(64, device=device)
    for got, x in zip(normalised(q, k, w, w, eps), (q, k), strict=True):
        assert relative_error(got, rmsnorm_reference(x, w, eps)) <= 1e-6


@pytest.mark.parametrize("head_dim", [64, 128, 1024])
def test_strides_change_no_bit_and_touch_nothing_else(device, head_dim):
    q, k = heads(19, 6, head_dim, torch.bfloat16, device), heads(19, 2, head_dim, torch.bfloat16, device)
    w = weights(head_dim, torch.bfloat16, device)
    expected = normalised(q, k, *w)

    def buffer(*shape):
        return torch.randn(*shape, device=device).bfloat16()

    qkv = buffer(19, 10 * head_dim + 64)
    padded, head_major = buffer(19, 9, head_dim + 32), buffer(9, 19, head_dim)
    every_second = buffer(38, 8, head_dim)
    for base, to_q, to_k in (
        (qkv, qkv[:, 64 : 64 + 6 * head_dim].unflatten(1, (6, -1)), qkv[:, -2 * head_dim :].unflatten(1, (2, -1))),
        (qkv, qkv[:, 3 * head_dim : 9 * head_dim].unflatten(1, (6, -1)), qkv[:, : 2 * head_dim].unflatten(1, (2, -1))),
        (padded, padded[:, :6, :head_dim], padded[:, 7:, 32:]),
        (head_major, head_major[1:7].transpose(0, 1), head_major[7:].transpose(0, 1)),
        (every_second, every_second[::2, :6], every_second[1::2, 6:]),
    ):
        to_q.copy_(q)
        to_k.copy_(k)
        whole = base.clone()
        fused_inplace_qknorm(to_q, to_k, *w)
        assert same_bits(to_q, expected[0]) and same_bits(to_k, expected[1])
        to_q.copy_(q)
        to_k.copy_(k)
        assert same_bits(base, whole)


def test_head_dim_may_be_given(device):
    q, k = heads(3, 4, 128, torch.float32, device), heads(3, 2, 128, torch.float32, device)
    w = weights(128, torch.float32, device)
    for got, want in zip(normalised(q, k, *w, head_dim=128), normalised(q, k, *w), strict=True):
        assert same_bits(got, want)


def test_no_tokens_and_no_heads(device):
    w = weights(64, torch.float32, device)
    for shape in ((0, 4, 64), (5, 0, 64), (0, 0, 64)):
        empty = torch.empty(shape, device=device)
        fused_inplace_qknorm(empty, empty.clone(), *w)
    x = heads(5, 3, 64, torch.float32, device)
    reference = [rmsnorm_reference(x, weight, 1e-6) for weight in w]
    none = x[:, :0].clone()
    assert relative_error(normalised(x, none, *w)[0], reference[0]) <= 1e-6
    assert relative_error(normalised(none, x, *w)[1], reference[1]) <= 1e-6
    assert relative_error(normalised(x[:, 1:], x[:, :0], *w)[0], reference[0][:, 1:]) <= 1e-6


def test_special_values_stay_in_their_head(device):
    q, k = heads(5, 3, 128, torch.float32, device), heads(5, 2, 128, torch.float32, device)
    w = weights(128, torch.float32, device)
    expected_q, expected_k = normalised(q, k, *w)
    q[1, 2, 7], k[1, 0, 9], k[4, 1] = float("inf"), float("nan"), 0.0
    got_q, got_k = normalised(q, k, *w)
    assert got_q[1, 2, 7].isnan() and (got_q[1, 2].nan_to_num() == 0).all()
    assert got_k[1, 0].isnan().all() and (got_k[4, 1] == 0).all()
    for got, expected, changed in ((got_q, expected_q, [(1, 2)]), (got_k, expected_k, [(1, 0), (4, 1)])):
        for token, head in changed:
            got[token, head] = expected[token, head]
        assert same_bits(got, expected)


@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.bfloat16), (128, torch.float16), (1024, torch.float32)])
def test_the_same_bits_in_any_batch(device, head_dim, dtype):
    num_tokens = 4096 if head_dim < 1024 else 600
    q, k = heads(num_tokens, 5, head_dim, dtype, device), heads(num_tokens, 3, head_dim, dtype, device)
    w = weights(head_dim, dtype, device)
    all_q, all_k = normalised(q, k, *w)
    for batch in (1, 2, 3, 7, 16, 33, 64, 255, 1000, 4095):
        for first in {0, 1, (num_tokens - batch) // 2, num_tokens - batch} if batch < num_tokens else ():
            rows = slice(first, first + batch)
            for named in ({}, {"enable_pdl": False}):
                got_q, got_k = normalised(q[rows], k[rows], *w, **named)
                assert same_bits(got_q, all_q[rows]) and same_bits(got_k, all_k[rows])
    # The other heads do not matter, or whether a head is one of q or of k.
    assert same_bits(normalised(q[:, 3:4], k[:, :1], *w)[0], all_q[:, 3:4])
    assert same_bits(normalised(k, q, *reversed(w))[1], all_q)
    _, to_q, to_k = fused(q, k)
    fused_inplace_qknorm(to_q, to_k, *w)
    assert same_bits(to_q, all_q) and same_bits(to_k, all_k)


def test_any_number_of_heads(device):
    """The kernel divides by the number of heads with a multiplication and a shift."""
    for num_heads in (*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129):
        q, k = torch.randn(11, num_heads, 64, device=device), torch.randn(11, 1, 64, device=device)
        w = weights(64, torch.float32, device)
        for got, x, weight in zip(normalised(q, k, *w), (q, k), w, strict=True):
            assert relative_error(got, rmsnorm_reference(x, weight, 1e-6)) <= 1e-6


def test_offsets_beyond_32_bits():
    """Tokens 2^30 elements apart. Only the pages that are touched take memory."""
    apart = 2**30 + 64
    storage = torch.empty(2 * apart + 1024, dtype=torch.bfloat16)
    q, k = storage.as_strided((3, 2, 64), (apart, 128, 1)), storage.as_strided((3, 1, 64), (apart, 64, 1), 256)
    w = weights(64, torch.bfloat16, "cpu")
    q.copy_(torch.randn(3, 2, 64))
    k.copy_(torch.randn(3, 1, 64))
    expected = normalised(q, k, *w)
    fused_inplace_qknorm(q, k, *w)
    assert same_bits(q, expected[0]) and same_bits(k, expected[1])


def test_too_many_heads_for_one_call(tmp_path):
    """In a process of its own: q is a sparse file that cannot be written, so a kernel that ran would crash."""
    script = """
        import mmap, sys, warnings
        import torch, jitnorm
        warnings.simplefilter("ignore")
        with open(sys.argv[1], "w+b") as file:
            file.truncate(2**38)
            zeros = torch.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), dtype=torch.float16)
        from jitnorm.qknorm import MAX_ROWS, check
        w = torch.ones(64).half()
        check(zeros[:-64].view(-1, 1, 64), torch.empty(MAX_ROWS, 0, 64).half(), w, w, 1e-6, 0, None)
        jitnorm.fused_inplace_qknorm(*torch.zeros(2, 1, 1, 64).half(), w, w)  # the bindings refuse it as well
        jitnorm.fused_inplace_qknorm(zeros.view(-1, 1, 64), torch.empty(2**31, 0, 64).half(), w, w)
    """
    stderr = run(f"import sys; sys.argv[1:] = [{str(tmp_path / 'zeros')!r}]", script).stderr
    assert "RuntimeError: fused_inplace_qknorm does not support more than 2147483647 heads in all tokens, got" in stderr


def test_parameters_and_inference_mode(device):
    q, k = heads(4, 3, 64, torch.float32, device), heads(4, 1, 64, torch.float32, device)
    w = weights(64, torch.float32, device)
    expected = normalised(q, k, *w)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            got = normalised(q, k, *map(torch.nn.Parameter, w))
        assert same_bits(got[0], expected[0]) and same_bits(got[1], expected[1])


def test_can_use(cache_dir):
    assert [d for d in range(-64, 5000) if can_use_fused_inplace_qknorm(d, torch.bfloat16)] == list(HEAD_DIMS)
    for dtype in (*DTYPES, torch.float64, torch.int8, torch.float8_e4m3fn):
        assert can_use_fused_inplace_qknorm(64, dtype) == (dtype in DTYPES)
    assert not cache_dir.exists()


# What only a GPU can show


@pytest.mark.gpu
@pytest.mark.parametrize(("num_q_heads", "num_k_heads", "head_dim"), [(32, 8, 128), (32, 8, 64), (16, 4, 256)])
def test_many_tokens(num_q_heads, num_k_heads, head_dim):
    w = weights(head_dim, torch.bfloat16, "cuda")
    for num_tokens in (1023, 16384):
        q = heads(num_tokens, num_q_heads, head_dim, torch.bfloat16, "cuda")
        k = heads(num_tokens, num_k_heads, head_dim, torch.bfloat16, "cuda")
        for got, x, weight in zip(normalised(q, k, *w), (q, k), w, strict=True):
            reference = rmsnorm_reference(x, weight, 1e-6)
            errors = (got.double() - reference).norm(dim=-1) / reference.norm(dim=-1)
            assert float(errors.max()) <= 2**-8  # one rounding of every element, in the worst head
            assert relative_error(got, reference) <= TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    num_tokens = 2**31 // 1024 + 5
    q = torch.empty(num_tokens, 8, 128, device="cuda", dtype=torch.bfloat16)
    k = torch.empty(num_tokens, 1, 128, device="cuda", dtype=torch.bfloat16)
    first, w = (heads(5, 8, 128, q.dtype, "cuda"), heads(5, 1, 128, q.dtype, "cuda")), weights(128, q.dtype, "cuda")
    for rows in (slice(0, 5), slice(num_tokens - 5, num_tokens)):
        q[rows], k[rows] = first
    expected = normalised(*first, *w)
    fused_inplace_qknorm(q, k, *w)
    for rows in (slice(0, 5), slice(num_tokens - 5, num_tokens)):
        assert same_bits(q[rows], expected[0]) and same_bits(k[rows], expected[1])


@pytest.mark.gpu
@pytest.mark.parametrize("enable_pdl", [True, False])
def test_in_a_graph(enable_pdl):
    w = weights(128, torch.bfloat16, "cuda")
    q, k = heads(65, 32, 128, torch.bfloat16, "cuda"), heads(65, 8, 128, torch.bfloat16, "cuda")
    normalised(q, k, *w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_inplace_qknorm(q, k, *w, enable_pdl=enable_pdl)
    for _ in range(3):
        q.copy_(torch.randn_like(q))
        k.copy_(torch.randn_like(k))
        expected = normalised(q, k, *w)
        graph.replay()
        assert same_bits(q, expected[0]) and same_bits(k, expected[1])


@pytest.mark.gpu
def test_a_kernel_reads_nothing_before_the_kernel_before_it_has_written():
    """Each call's result is the next one's weights, and then normalised again: with PDL they overlap."""
    w = weights(128, torch.bfloat16, "cuda")
    start = [heads(40, n, 128, torch.bfloat16, "cuda") for n in (32, 8, 32, 8)]
    for _ in range(20):
        results = []
        for pdl in (True, False):
            state = [t.clone() for t in start]

            def chain(state=state, pdl=pdl):
                for token in range(40):
                    q, k, other_q, other_k = (t[token : token + 1] for t in state)
                    fused_inplace_qknorm(q, k, *w, enable_pdl=pdl)
                    fused_inplace_qknorm(other_q, other_k, q[0, 31], k[0, 7], enable_pdl=pdl)
                    fused_inplace_qknorm(q, k, other_q[0, 0], other_k[0, 7], enable_pdl=pdl)

            chain()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                chain()
            graph.replay()
            results.append(state)
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_a_device_that_is_not_current():
    q, k = (heads(3, n, 128, torch.bfloat16, "cuda:1") for n in (4, 2))
    w = weights(128, torch.bfloat16, "cuda:1")
    torch.cuda.set_device(0)
    got = normalised(q, k, *w)
    assert relative_error(got[0], rmsnorm_reference(q, w[0], 1e-6)) <= TOLERANCE[torch.bfloat16]
    assert torch.cuda.current_device() == 0
