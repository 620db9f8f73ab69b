"""Attention of decode steps to a paged KV cache or to tensors with a mask, against its definition in float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from helpers import TOLERANCE, relative_error, same_bits

from jitnorm.integrations import decode_attention
from jitnorm.integrations.decode_attention import (
    DecodeAttention,
    MaskedDecodeAttention,
    VisibleTokens,
    plan_splits,
    ranges_spec,
    spec,
)
from jitnorm.jit.build import build
from jitnorm.jit.spec import Target

BF16, F16 = torch.bfloat16, torch.float16
# Both head sizes; one query head of a key, some, all rows of a tensor core instruction, and between.
SHAPES = [(1, 1, 64), (8, 2, 64), (32, 2, 64), (16, 8, 128), (21, 3, 128), (24, 2, 128), (16, 1, 128)]
# None; one token; the ends of steps, of what a thread block takes at a time, and of splits; as many splits as there
# are, and more.
LENGTHS = [0, 1, 2, 15, 16, 17, 63, 64, 65, 100, 255, 256, 257, 300, 513, 1000, 2047, 4096, 4097, 6000]


class Cache:
    """A cache of random keys and values in shuffled blocks. All else in it is NaN."""

    def __init__(self, lengths, kv_heads, head_dim, dtype, block_size=16, layout="HND"):
        self.lengths = lengths
        counts = [-(-length // block_size) for length in lengths]
        blocks = torch.randperm(sum(counts) + 3, device="cuda", dtype=torch.int32)
        nan = float("nan")
        if layout == "HND":  # vLLM's: keys and values side by side
            whole = torch.full((len(blocks), kv_heads, block_size, 2 * head_dim), nan, dtype=dtype, device="cuda")
            self.k, self.v = whole.transpose(1, 2).split(head_dim, dim=-1)
        else:
            shape = (2, len(blocks), block_size, kv_heads, head_dim)
            self.k, self.v = torch.full(shape, nan, dtype=dtype, device="cuda").unbind(0)
        self.table = torch.full((len(lengths), max(counts) + 1), 1 << 30, dtype=torch.int32, device="cuda")
        self.keys, self.values, first = [], [], 0
        for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            mine = blocks[first : first + count]
            first += count
            self.table[i, :count] = mine
            for cache, kept in ((self.k, self.keys), (self.v, self.values)):
                rows = torch.randn(length, kv_heads, head_dim, device="cuda").to(dtype)
                kept.append(rows)
                padded = torch.full((count * block_size, kv_heads, head_dim), nan, dtype=dtype, device="cuda")
                padded[:length] = rows
                cache[mine.long()] = padded.unflatten(0, (count, block_size))
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")

    def attention(self, q, scale, window=0):
        """The definition."""
        results = []
        for queries, keys, values in zip(q.double(), self.keys, self.values, strict=True):
            group = len(queries) // keys.shape[1]
            k, v = (t[-window:].double().repeat_interleave(group, dim=1) for t in (keys, values))
            weights = torch.einsum("hd,thd->ht", queries * scale, k).softmax(dim=1)
            results.append(torch.einsum("ht,thd->hd", weights, v))
        return torch.stack(results)


def make(heads, kv_heads, head_dim, dtype, sequences):
    return DecodeAttention(heads, kv_heads, head_dim, dtype, torch.device("cuda", 0), sequences)


def attend(attention, q, cache, window=0, rows=slice(None), scale=None):
    out = torch.full_like(q, float("nan"))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    assert attention(q, cache.k, cache.v, cache.table[rows], cache.seq_lens[rows], out, scale, window)
    return out


@pytest.mark.slow
@pytest.mark.nvcc
@pytest.mark.parametrize(  # the first architecture that has the instruction, the first with PDL, and the newest
    ("arch", "heads", "kv_heads", "head_dim", "dtype", "is_masked"),
    [
        ("8.0", 32, 8, 64, F16, False),
        ("9.0a", 16, 8, 128, BF16, False),
        ("9.0a", 16, 1, 128, BF16, True),
        ("12.0a", 64, 8, 128, BF16, False),
    ],
)
def test_compiles(arch, heads, kv_heads, head_dim, dtype, is_masked):
    entry = build(spec(heads, kv_heads, head_dim, dtype, Target.cuda(arch), is_masked))
    assert f"{'masked_' * is_masked}decode_attention_{head_dim}x{heads // kv_heads}".encode() in entry.verify()


def test_what_builds_the_kernels_ahead_of_time():
    target = Target.cuda("9.0a")
    for kernel in (spec(8, 2, 64, BF16, target, is_masked=True), ranges_spec(target)):
        assert kernel.warmup_command.startswith("run a decode step with a mask")
    assert spec(8, 2, 64, BF16, target).warmup_command.startswith("load the model")


@pytest.mark.nvcc
def test_ranges_compile():
    assert b"mask_ranges" in build(ranges_spec(Target.cuda("9.0a"))).verify()


def test_more_sequences_have_fewer_and_longer_splits():
    assert [plan_splits(n, 8, 4096, 132) for n in (0, 1, 8, 16, 32, 64, 256)] == [
        *((16, 256), (16, 256), (16, 256), (8, 512), (4, 1024), (2, 2048), (2, 2048))
    ]
    assert [plan_splits(1, 8, tokens, 132)[0] for tokens in (16, 256, 257, 1 << 17)] == [1, 1, 2, 16]
    assert [plan_splits(1, heads, 1 << 17, 132)[0] for heads in (1, 2, 4, 8, 128)] == [128, 64, 32, 16, 16]
    assert [plan_splits(n, 8, 1 << 17, 132)[0] for n in (64, 128, 256, 2048)] == [16, 8, 4, 4]  # bounds the memory


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 7}, "num_heads must be num_kv_heads, 2, or up to 16 times as many, got 7"),
        ({"num_heads": 34}, "got 34"),
        ({"head_dim": 96}, "head_dim must be 64 or 128, got 96"),
        ({"dtype": torch.float32}, "dtype must be bfloat16 or float16, got torch.float32"),
    ],
)
def test_shapes_without_a_kernel(changes, words):
    sizes = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "dtype": BF16, "max_sequences": 3}
    with pytest.raises(ValueError, match=words):
        DecodeAttention(**sizes | changes, device=torch.device("cuda", 0))
    del sizes["max_sequences"]
    with pytest.raises(ValueError, match=words):
        MaskedDecodeAttention(**sizes | changes, device=torch.device("cuda", 0))


def test_the_first_call_outside_a_capture_allocates_the_counters(monkeypatch):
    """Not the constructor: what an engine allocates while it loads a model may be discarded."""
    calls, capturing, allocated = [], [True], []
    kernel = SimpleNamespace(decode_attention=lambda *arguments: calls.append(arguments) or len(calls) == 3)
    zeros = torch.zeros
    monkeypatch.setattr(decode_attention, "load", lambda spec: kernel)
    monkeypatch.setattr(decode_attention, "cuda_target", lambda index: Target.cuda("9.0a"))
    monkeypatch.setattr(torch, "zeros", lambda *sizes, **options: allocated.append(sizes) or zeros(*sizes, **options))
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    attention = DecodeAttention(8, 2, 64, BF16, torch.device("cpu"), 5)
    q, out = torch.empty(2, 3, 8, 64, dtype=BF16)
    caches = torch.empty(2, 4, 16, 2, 64, dtype=BF16)
    table, lengths = torch.ones(3, 40, dtype=torch.int32), torch.ones(3, dtype=torch.int32)
    assert not attention(q, *caches, table, lengths, out, 0.5) and not calls and not allocated
    capturing[0] = False
    assert attention(q, *caches, table, lengths, out, 0.5)
    capturing[0] = True
    assert attention(q, *caches, table, lengths, out, 0.5, window=7)
    assert not attention(q, *caches, table, lengths, out, 0.5)  # the kernel does not take it
    assert allocated == [(10,)] and {call[7].data_ptr() for call in calls} == {calls[0][7].data_ptr()}
    assert calls[0][7].dtype == torch.int32 and not calls[0][7].any()
    assert [call[8:] for call in calls[:2]] == [(3, 256, 132, 0.5, 0, None), (3, 256, 132, 0.5, 7, None)]
    assert calls[0][6].numel() == 3 * 8 * 3 * (64 + 2) and calls[0][6].dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_matches_the_definition(heads, kv_heads, head_dim, dtype):
    cache = Cache(LENGTHS, kv_heads, head_dim, dtype)
    q = torch.randn(len(LENGTHS), heads, head_dim, device="cuda").to(dtype)
    attention = make(heads, kv_heads, head_dim, dtype, len(LENGTHS))
    together = attend(attention, q, cache)
    expected = cache.attention(q, head_dim**-0.5)
    assert not together[0].any()  # a sequence without tokens
    assert relative_error(together[1:], expected[1:]) <= TOLERANCE[dtype]
    for i, length in enumerate(LENGTHS):
        assert length == 0 or relative_error(together[i], expected[i]) <= 2 * TOLERANCE[dtype], length
    # The same bits a second time, which needs the counters to be 0 again, and at other places of a batch.
    for places in (torch.arange(len(LENGTHS)), torch.randperm(len(LENGTHS))):
        assert same_bits(attend(attention, q[places], cache, rows=places), together[places])


@pytest.mark.gpu
@pytest.mark.parametrize("num_sms", [None, 1])  # with one, each block computes many splits
@pytest.mark.parametrize("sequences", [1, 3, 9, 17, 40])
def test_batches_whose_sequences_have_splits_of_other_sizes(sequences, num_sms):
    lengths = [*(5000 - 300 * i for i in range(min(sequences, 9))), *range(90, 90 + max(0, sequences - 9))]
    cache = Cache(lengths, 8, 64, BF16)
    q = torch.randn(sequences, 32, 64, device="cuda").to(BF16)
    attention = make(32, 8, 64, BF16, sequences)
    attention._num_sms = num_sms or attention._num_sms
    for _ in range(2):
        assert relative_error(attend(attention, q, cache), cache.attention(q, 0.125)) <= TOLERANCE[BF16]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 16, 100, 256, 1000])
def test_a_window(window):
    """Blocks and tokens before it are not read."""
    cache = Cache(LENGTHS[1:], 2, 128, BF16)
    for i, length in enumerate(cache.lengths):
        before = max(0, length - window)
        last = cache.table[i, before // 16].long()  # the first block that is read
        cache.table[i, : before // 16] = 1 << 30
        for each in (cache.k, cache.v):
            each[last, : before % 16] = float("nan")
    q = torch.randn(len(LENGTHS) - 1, 8, 128, device="cuda").to(BF16)
    out = attend(make(8, 2, 128, BF16, len(q)), q, cache, window)
    assert relative_error(out, cache.attention(q, 128**-0.5, window)) <= TOLERANCE[BF16]


@pytest.mark.gpu
@pytest.mark.parametrize(("block_size", "layout"), [(16, "NHD"), (48, "HND"), (256, "NHD")])
def test_layouts_and_strides(block_size, layout):
    lengths = [1, 47, 49, 300, 1111]
    cache = Cache(lengths, 4, 64, BF16, block_size, layout)
    q = torch.randn(len(lengths), 3, 8, 64, device="cuda").to(BF16)[:, 1]
    out = torch.full((len(lengths) + 2, 9, 72), -7.0, dtype=BF16, device="cuda")
    inside = out[1:-1, :8, :64]
    table = torch.full((len(lengths), cache.table.shape[1] + 3), -1, dtype=torch.int32, device="cuda")
    table[:, : cache.table.shape[1]] = cache.table
    part = table[:, : cache.table.shape[1]]
    assert make(8, 4, 64, BF16, 8)(q, cache.k, cache.v, part, cache.seq_lens, inside, 0.2)
    assert relative_error(inside, cache.attention(q, 0.2)) <= TOLERANCE[BF16]
    inside[:] = -7.0
    assert (out == -7.0).all()


@pytest.mark.gpu
def test_many_sequences_and_large_logits():
    """More sequences than 32 times 32, most of one token, and a few long ones. Logits of hundreds do not overflow."""
    lengths = [1 + i % 3 if i % 97 else 700 for i in range(1100)]
    cache = Cache(lengths, 1, 64, F16)
    q = 20 * torch.randn(len(lengths), 2, 64, device="cuda").to(F16)
    out = attend(make(2, 1, 64, F16, len(q)), q, cache, scale=1.0)
    assert relative_error(out, cache.attention(q, 1.0)) <= TOLERANCE[F16]


@pytest.mark.gpu
def test_in_a_graph_lengths_and_blocks_may_change():
    cache = Cache([5, 1000, 40], 2, 64, BF16)
    q = torch.randn(3, 8, 64, device="cuda").to(BF16)
    attention = make(8, 2, 64, BF16, 3)
    out = torch.empty_like(q)
    lengths, table = torch.zeros_like(cache.seq_lens), torch.full_like(cache.table, 1 << 30)
    arguments = (q, cache.k, cache.v, table, lengths, out, 0.125)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert not attention(*arguments)  # a first call would have to allocate the counters
    assert attention(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            assert attention(*arguments)
    for order in (torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])):
        lengths.copy_(cache.seq_lens[order])
        table.copy_(cache.table[order])
        out.fill_(float("nan"))
        graph.replay()
        assert same_bits(out, attend(attention, q, cache, rows=order))
        lengths.zero_()
        graph.replay()
        assert not out.any()


@pytest.mark.gpu
def test_lengths_beyond_the_table_and_below_zero():
    cache = Cache([48, 48], 2, 64, BF16)
    cache.table = cache.table[:, :3]
    q = torch.randn(2, 8, 64, device="cuda").to(BF16)
    attention = make(8, 2, 64, BF16, 2)
    expected = attend(attention, q, cache)
    cache.seq_lens = torch.tensor([1 << 30, -5], dtype=torch.int32, device="cuda")
    out = attend(attention, q, cache)
    assert same_bits(out[0], expected[0]) and not out[1].any()


@pytest.mark.gpu
def test_nan_stays_in_its_sequence():
    cache = Cache([40, 700, 30], 2, 64, BF16)
    q = torch.randn(3, 8, 64, device="cuda").to(BF16)
    attention = make(8, 2, 64, BF16, 3)
    before = attend(attention, q, cache)
    q[1, 3] = float("nan")
    after = attend(attention, q, cache)
    assert after[1, 3].isnan().all()
    after[1, 3] = before[1, 3]
    assert same_bits(after, before)


@pytest.mark.gpu
def test_what_the_kernel_does_not_take():
    cache = Cache([40, 70], 2, 64, BF16)
    q = torch.randn(2, 8, 64, device="cuda").to(BF16)
    attention, out = make(8, 2, 64, BF16, 2), torch.full_like(q, 3.0)
    good = {"q": q, "k_cache": cache.k, "v_cache": cache.v, "block_table": cache.table, "seq_lens": cache.seq_lens}
    bad = [
        {"q": q.half()},
        {"q": q[:1]},
        {"q": q[..., :32]},
        {"q": q[:, :6]},
        {"q": out},
        {"q": torch.empty(2, 8, 65, dtype=BF16, device="cuda")[..., :64]},
        {"q": torch.empty(2 * 8 * 64 + 1, dtype=BF16, device="cuda")[1:].view(2, 8, 64)},
        {"k_cache": cache.k[..., :1, :], "v_cache": cache.v[..., :1, :]},
        {"k_cache": cache.k[:, :8]},
        {"v_cache": cache.v[:-1]},
        {"k_cache": cache.k.half()},
        {"k_cache": cache.k.cpu()},
        {"block_table": cache.table.long()},
        {"block_table": cache.table[:1]},
        {"block_table": cache.table.t().contiguous().t()},
        {"seq_lens": cache.seq_lens[:1]},
        {"seq_lens": cache.seq_lens.long()},
        {"seq_lens": cache.seq_lens.cpu()},
        {"window": -1},
    ]
    for change in bad:
        assert not attention(**{**good, **change}, out=out, scale=0.125), change
    assert not make(8, 2, 64, BF16, 1)(**good, out=out, scale=0.125)  # too few counters
    assert not attention(**good, out=cache.k[0, :8].transpose(0, 1), scale=0.125)
    assert (out == 3.0).all()
    assert attention(**good, out=out, scale=0.125)
    nothing = {"q": q[:0], "block_table": cache.table[:0], "seq_lens": cache.seq_lens[:0], "out": out[:0]}
    assert attention(**{**good, **nothing}, scale=0.125)


# The first and the last visible token of a sequence, and what is hidden between them. None; one; the ends of steps and
# of what a thread block takes at a time; left padding; holes of a token, of steps, and of more than a split.
MASKS = [
    (0, 0, ()),
    *((0, 1, ()), (5, 6, ()), (1032, 1033, ())),
    *((0, 16, ()), (0, 17, ()), (15, 65, ()), (16, 64, ()), (63, 300, ())),
    *((0, 1033, ()), (7, 1033, ()), (500, 1033, ()), (1000, 1020, ())),
    *((0, 1033, [(1, 2)]), (3, 1000, [(16, 48), (100, 101)]), (0, 1033, [(4, 1031)]), (2, 900, [(128, 800)])),
]


class Masked:
    """Keys and values of a length, with a mask. Those before the first visible token and after the last are NaN."""

    def __init__(self, kv_heads, head_dim, dtype, masks=MASKS, tokens=1033, storage=None):
        shape = (2, len(masks), kv_heads, tokens, head_dim)
        self.k, self.v = torch.randn(shape, device="cuda").to(dtype).unbind(0)
        self.mask = torch.zeros(len(masks), tokens, dtype=torch.bool, device="cuda") if storage is None else storage
        self.mask.fill_(False)
        for i, (first, end, hidden) in enumerate(masks):
            self.mask[i, first:end] = True
            for begin, stop in hidden:
                self.mask[i, begin:stop] = False
            for each in (self.k, self.v):
                each[i, :, :first] = float("nan")
                each[i, :, end:] = float("nan")

    def attention(self, q, scale):
        """The definition."""
        group = q.shape[1] // self.k.shape[1]
        results = torch.zeros(q.shape, dtype=torch.float64, device="cuda")
        for i, mask in enumerate(self.mask):
            k, v = (t[i][:, mask].double().repeat_interleave(group, dim=0) for t in (self.k, self.v))
            weights = torch.einsum("hd,htd->ht", q[i].double() * scale, k).softmax(dim=1)
            results[i] = torch.einsum("ht,htd->hd", weights, v)
        return results


def attend_masked(attention, q, cache, visible=None, scale=None):
    out = torch.full_like(q, float("nan"))
    visible = attention.find_visible(cache.mask) if visible is None else visible
    assert attention(q, cache.k, cache.v, visible, out, q.shape[-1] ** -0.5 if scale is None else scale)
    assert not visible.counters.any()
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_masked_matches_the_definition(heads, kv_heads, head_dim, dtype):
    cache = Masked(kv_heads, head_dim, dtype)
    q = torch.randn(len(MASKS), heads, head_dim, device="cuda").to(dtype)
    attention = MaskedDecodeAttention(heads, kv_heads, head_dim, dtype, torch.device("cuda", 0))
    visible = attention.find_visible(cache.mask)
    assert visible.ranges.tolist() == [[first, end] for first, end, _ in MASKS]
    together = attend_masked(attention, q, cache, visible)
    expected = cache.attention(q, head_dim**-0.5)
    assert not together[0].any()  # a sequence of which nothing is visible
    assert relative_error(together[1:], expected[1:]) <= TOLERANCE[dtype]
    for i in range(1, len(MASKS)):
        assert relative_error(together[i], expected[i]) <= 2 * TOLERANCE[dtype], MASKS[i]
    for _ in range(2):  # the counters are 0 again
        assert same_bits(attend_masked(attention, q, cache, visible), together)


@pytest.mark.gpu
@pytest.mark.parametrize("num_sms", [None, 1])  # with one, each block computes many splits
@pytest.mark.parametrize(("sequences", "tokens"), [(1, 5000), (3, 16), (40, 3001), (1100, 70)])
def test_masked_batches(sequences, tokens, num_sms):
    masks = [(3 * i % (tokens // 2), tokens - 5 * i % (tokens // 2), ()) for i in range(sequences)]
    cache = Masked(2, 64, BF16, masks, tokens)
    cache.mask &= torch.rand(sequences, tokens, device="cuda") < 0.9
    q = torch.randn(sequences, 8, 64, device="cuda").to(BF16)
    attention = MaskedDecodeAttention(8, 2, 64, BF16, torch.device("cuda", 0))
    attention._num_sms = num_sms or attention._num_sms
    assert relative_error(attend_masked(attention, q, cache), cache.attention(q, 0.125)) <= TOLERANCE[BF16]


@pytest.mark.gpu
def test_masked_strides():
    """A mask at an odd address with other elements beside it, one mask of all sequences, strided q, k, v and out."""
    storage = torch.ones(len(MASKS), 1050, dtype=torch.bool, device="cuda")
    cache = Masked(2, 64, BF16, storage=storage[:, 7:1040])
    q = torch.randn(len(MASKS), 3, 8, 64, device="cuda").to(BF16)[:, 1]
    attention = MaskedDecodeAttention(8, 2, 64, BF16, torch.device("cuda", 0))
    expected = cache.attention(q, 0.2)
    whole = torch.full((len(MASKS) + 2, 9, 72), -7.0, dtype=BF16, device="cuda")
    out, visible = whole[1:-1, :8, :64], attention.find_visible(cache.mask)
    cache.k, cache.v = (torch.stack([t, t], dim=3)[:, :, :, 1] for t in (cache.k, cache.v))
    assert attention(q, cache.k, cache.v, visible, out, 0.2)
    assert relative_error(out[1:], expected[1:]) <= TOLERANCE[BF16]
    out[:] = -7.0
    assert (whole == -7.0).all()
    one = Masked(2, 64, BF16, [(3, 900, [(40, 90)])] * 5)
    one.mask = one.mask[:1].expand(5, -1)
    assert relative_error(attend_masked(attention, q[:5], one), one.attention(q[:5], 0.125)) <= TOLERANCE[BF16]


@pytest.mark.gpu
def test_in_a_graph_the_mask_may_change_and_layers_share_it():
    """The layers have other numbers of heads, and more of k and v than others."""
    layers = [(8, 2), (4, 1), (2, 2)]
    kernels = [MaskedDecodeAttention(*heads, 64, BF16, torch.device("cuda", 0)) for heads in layers]
    caches = [Masked(kv_heads, 64, BF16, [(0, 700, ())] * 3, 700) for _, kv_heads in layers]
    queries = [torch.randn(3, heads, 64, device="cuda").to(BF16) for heads, _ in layers]
    outs, mask = [torch.empty_like(q) for q in queries], torch.zeros(3, 700, dtype=torch.bool, device="cuda")

    def step():
        visible = kernels[0].find_visible(mask)
        for kernel, cache, q, out in zip(kernels, caches, queries, outs, strict=True):
            assert kernel(q, cache.k, cache.v, visible, out, 0.125)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for first, end in ((0, 1), (0, 700), (300, 650)):
        mask.fill_(False)
        mask[:, first:end] = True
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        for cache, q, out in zip(caches, queries, outs, strict=True):
            cache.mask = mask
            assert relative_error(out, cache.attention(q, 0.125)) <= TOLERANCE[BF16]
    mask.fill_(False)
    graph.replay()
    assert not any(out.any() for out in outs)


@pytest.mark.gpu
def test_what_the_masked_kernel_does_not_take():
    cache = Masked(2, 64, BF16, [(0, 100, ()), (3, 90, ())], 100)
    q = torch.randn(2, 8, 64, device="cuda").to(BF16)
    attention, out = MaskedDecodeAttention(8, 2, 64, BF16, torch.device("cuda", 0)), torch.full_like(q, 3.0)
    for mask in (cache.mask.byte(), cache.mask[0], cache.mask.t(), cache.mask[:0], cache.mask.cpu()):
        assert attention.find_visible(mask) is None
    visible = attention.find_visible(cache.mask)
    mask, ranges, counters = visible
    good = {"q": q, "k": cache.k, "v": cache.v, "visible": visible, "out": out}
    bad = [
        {"q": q.half()},
        {"q": q[:1]},
        {"q": q[..., :32]},
        {"q": q[:, :6]},
        {"q": out},
        {"k": cache.k.half()},
        {"k": cache.k[:, :, :96], "v": cache.v[:, :, :96]},
        {"k": cache.k[:1], "v": cache.v[:1]},
        {"k": cache.k[:, :1], "v": cache.v[:, :1]},
        {"v": cache.v[:, :, :96]},
        {"k": cache.k.cpu()},
        {"out": cache.k[:, 0, :8]},
        {"visible": VisibleTokens(mask[:1], ranges, counters)},
        {"visible": VisibleTokens(mask[:, :96], ranges, counters)},
        {"visible": VisibleTokens(mask.byte(), ranges, counters)},
        {"visible": VisibleTokens(mask, ranges[:1], counters)},
        {"visible": VisibleTokens(mask, ranges.long(), counters)},
        {"visible": VisibleTokens(mask, ranges.cpu(), counters)},
        {"visible": VisibleTokens(mask, ranges, counters[:3])},
    ]
    for change in bad:
        assert not attention(**{**good, **change}, scale=0.125), change
    assert (out == 3.0).all()
    assert attention(**good, scale=0.125)
