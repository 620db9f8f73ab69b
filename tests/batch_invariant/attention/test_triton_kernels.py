"""Test the Triton attention kernels, on a GPU or in Triton's interpreter: see the parent package's `common.py`."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import relative_error, same_bits

from ..common import DEVICE, GPU, random

pytest.importorskip("triton")
from jitnorm.batch_invariant.attention import triton_kernels
from jitnorm.batch_invariant.attention.schedule import Schedule, choose_schedule, tree_levels

# Fused attention has no float32, but in the interpreter its results show errors that are not rounding.
DTYPES = (torch.float16, torch.bfloat16 if GPU else torch.float32)
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-6}  # weights are rounded, and the result
NAN, INFINITE = float("nan"), float("inf")


def attend(q, k, v, bias=None, is_causal=False, scale=None, schedule=None):
    """Return the result, and compare the log-sum-exp here."""
    out, logsumexp = q.new_full((*q.shape[:3], v.shape[3]), NAN), q.new_full(q.shape[:3], NAN, dtype=torch.float32)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    triton_kernels.attend(q, k, v, bias, is_causal, scale, out, logsumexp, schedule)
    expected = exact_scores(q, k, bias, is_causal, scale).logsumexp(-1).float()
    torch.testing.assert_close(logsumexp, expected, rtol=1e-5, atol=1e-4, equal_nan=True)
    return out


def exact(q, k, v, bias=None, is_causal=False, scale=None):
    v = v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)
    return torch.softmax(exact_scores(q, k, bias, is_causal, scale), -1) @ v


def exact_scores(q, k, bias=None, is_causal=False, scale=None):
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores += bias
    if is_causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], device=DEVICE).triu(1).bool(), -INFINITE)
    return scores


@pytest.mark.parametrize(
    ("queries", "keys", "group", "dim", "value_dim", "is_causal", "dtype"),
    [
        (*case, dtype)
        for case in (
            (1, 100, 4, 64, 64, False),  # one split of the keys, and one leaf
            (1, 700, 4, 128, 128, False),  # several
            (1, 1100, 1, 64, 64, False),
            (3, 130, 3, 80, 80, False),
            (64, 300, 4, 64, 64, False),  # several blocks of rows
            (5, 5, 4, 96, 96, True),
            (64, 64, 3, 64, 64, True),
            (20, 300, 1, 70, 33, False),  # rows that are not aligned to 16 bytes
            (2, 140, 2, 256, 192, False),
        )
        for dtype in DTYPES
        # The interpreter computes every dtype in the same way, but for the rounding: there, one shape shows it.
        if GPU or dtype == torch.float32 or case[1] == 100
    ],
)
def test_matches_the_definition(queries, keys, group, dim, value_dim, is_causal, dtype):
    """Strides are those of a projection and of a cache with unused slots. A sequence alone has the same bits."""
    q = random(2, queries, 2 * group, dim, dtype=dtype).transpose(1, 2)
    k, v = (torch.full((2, 2, keys + 30, d), NAN, device=DEVICE, dtype=dtype)[:, :, :keys] for d in (dim, value_dim))
    k.copy_(random(*k.shape, dtype=dtype))
    v.copy_(random(*v.shape, dtype=dtype))
    out = attend(q, k, v, is_causal=is_causal)
    assert relative_error(out, exact(q, k, v, is_causal=is_causal)) <= TOLERANCE[dtype]
    alone = attend(*(t[1:].clone() for t in (q, k, v)), is_causal=is_causal)
    assert same_bits(alone, out[1:])


def test_scale_and_result_in_other_strides():
    q, k, v = random(2, 4, 3, 64), random(2, 2, 200, 64), random(2, 2, 200, 64)
    out = torch.full((2, 3, 4, 64), NAN, device=DEVICE, dtype=q.dtype).transpose(1, 2)
    triton_kernels.attend(q, k, v, None, False, 0.3, out, torch.empty(2, 4, 3, device=DEVICE))
    assert relative_error(out, exact(q, k, v, scale=0.3)) <= TOLERANCE[q.dtype]


@pytest.mark.slow
@pytest.mark.parametrize("keys", [100, 300])  # one leaf, several
def test_bias(keys):
    q, k, v = random(3, 2, 2, 64), random(3, 1, keys, 64), random(3, 1, keys, 64)
    for shape in ((keys,), (2, keys), (2, 1, 1), (3, 1, 1, keys), (3, 2, 2, keys)):
        bias = random(*shape)
        assert relative_error(attend(q, k, v, bias), exact(q, k, v, bias)) <= TOLERANCE[q.dtype]
    padding = torch.zeros(3, 1, 1, keys, device=DEVICE)
    padding[0, ..., :60], padding[1] = -INFINITE, -INFINITE
    out, expected = attend(q, k, v, padding), exact(q, k, v, padding)
    assert relative_error(out[::2], expected[::2]) <= TOLERANCE[q.dtype]
    assert not out[1].any()  # no key is seen


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of NaN
@pytest.mark.parametrize("keys", [100, 300])  # one leaf, several
def test_what_is_not_finite_stays_in_its_sequence(keys):
    q, k, v = random(4, 4, 1, 64), random(4, 2, keys, 64), random(4, 2, keys, 64)
    clean = attend(q, k, v)
    k[0, :, 9], k[1, :, 7], v[2, :, 5] = NAN, INFINITE, NAN
    out = attend(q, k, v)
    assert out[0].isnan().all() and out[1].isnan().any() and out[2].isnan().all()
    assert same_bits(out[3], clean[3])


def test_without_keys():
    q = random(2, 4, 1, 64)
    assert not attend(q, random(2, 2, 0, 64), random(2, 2, 0, 64)).any()
    assert attend(random(0, 4, 1, 64), random(0, 2, 9, 64), random(0, 2, 9, 64)).numel() == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES if GPU else [torch.float32])  # the interpreter differs in rounding alone
@pytest.mark.parametrize(
    ("rows", "dim", "keys"),
    # A program adds up 3, 2 or no levels of the tree; the last split and the last leaf are full or not.
    [(1, 64, 600), (1, 64, 512), (20, 128, 200), (5, 256, 140), (33, 128, 140)],
)
def test_splits_of_all_lengths_give_the_same_bits(dtype, rows, dim, keys):
    q, k, v = (random(2, length, 1, dim, dtype=dtype).transpose(1, 2) for length in (rows, keys, keys))
    levels = tree_levels(rows, dim)
    outs = [attend(q, k, v, schedule=Schedule(32, 32 << level, 16, 4, 2)) for level in range(levels + 1)]
    assert relative_error(outs[0], exact(q, k, v)) <= TOLERANCE[dtype]
    assert all(same_bits(out, outs[0]) for out in outs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule", [Schedule(32, 32, 16, 4, 2), Schedule(128, 1024, 32, 2, 4), Schedule(512, 512, 128, 8, 2)]
)
def test_every_schedule_is_right(schedule):
    q, k, v = random(2, 4, 1, 64), random(2, 1, 1000, 64), random(2, 1, 1000, 64)
    assert relative_error(attend(q, k, v, schedule=schedule), exact(q, k, v)) <= TOLERANCE[q.dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [1024, 2049])
def test_a_sequence_alone_among_many(keys):
    q, k, v = (
        random(100, heads, length, 128, dtype=torch.bfloat16) for heads, length in ((8, 1), (2, keys), (2, keys))
    )
    out = attend(q, k, v)
    for batch in (1, 2, 9, 33):  # with splits of different lengths
        assert same_bits(attend(*(t[-batch:] for t in (q, k, v))), out[-batch:])


@pytest.mark.gpu
def test_kernels_first_met_in_a_capture():
    """Calls with more keys or sequences than before may need other kernels."""
    q, k, v = random(2, 4, 1, 48), random(2, 2, 3000, 48), random(2, 2, 3000, 48)
    attend(*(t[:1, :, :100] for t in (q, k, v)))
    graphs = []
    for batch, keys in ((1, 200), (1, 500), (2, 1000), (1, 1500), (2, 3000)):
        operands = [t[:batch, :, :keys] for t in (q, k, v)]
        out = torch.full_like(operands[0], NAN)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            triton_kernels.attend(*operands, None, False, 0.1, out, out.new_empty(*out.shape[:3], dtype=torch.float32))
        graphs.append((graph, operands, out))
    for graph, operands, out in graphs:
        graph.replay()
        assert relative_error(out, exact(*operands, scale=0.1)) <= TOLERANCE[q.dtype]


def test_schedules():
    for rows in (1, 8, 20, 256):
        for dim in (64, 128, 256):
            for keys in (1, 128, 1024, 2049, 16384, 10**6):
                levels = tree_levels(rows, dim)
                schedules = {choose_schedule(rows, keys, dim, kv_heads, 132) for kv_heads in (1, 8, 64, 512, 10**5)}
                # All but split_keys is the same for every batch.
                assert len({schedule._replace(split_keys=0) for schedule in schedules}) == 1
                for leaf, split, block, *_ in schedules:
                    assert leaf % block == 0 and split in [leaf << level for level in range(levels + 1)]
                    assert math.ceil(keys / split) <= 32
    # One sequence gets many programs, and each of many sequences as few as possible.
    assert math.ceil(1024 / choose_schedule(4, 1024, 128, 8, 132).split_keys) * 8 >= 32
    assert choose_schedule(4, 1024, 128, 512, 132).split_keys == 1024
