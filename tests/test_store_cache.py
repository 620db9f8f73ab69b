"""jitnorm.store_cache, byte for byte, and the promises of its docstring."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import assert_refused, compiled, same_bits
from processes import run_before_import

import jitnorm
from jitnorm import store_cache

MODULE = sys.modules["jitnorm.store_cache"]  # jitnorm.store_cache is the function
# One dtype of each size, and dtypes that no kernel computes with.
DTYPES = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.bool,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.complex128,
)
INDEX_DTYPES = (torch.int32, torch.int64)


def random(*shape, dtype=torch.bfloat16, device="cpu"):
    """Return random bits, NaNs included; for bool only its two values."""
    *leading, last = shape
    bits = torch.randint(0, 2 if dtype == torch.bool else 256, (*leading, last * dtype.itemsize), dtype=torch.uint8)
    return bits.view(dtype).to(device)


def tokens_and_caches(num_tokens=7, shape=(2, 64), v_shape=None, slots=50, dtype=torch.bfloat16, device="cpu"):
    v_shape = v_shape or shape
    return tuple(
        random(n, *s, dtype=dtype, device=device)
        for n, s in ((num_tokens, shape), (num_tokens, v_shape), (slots, shape), (slots, v_shape))
    )


def some_slots(num_tokens, slots, dtype=torch.int64, device="cpu"):
    return torch.randperm(slots)[:num_tokens].to(dtype).to(device)


def as_bytes(rows):
    return rows.detach().cpu().contiguous().flatten(1).view(torch.uint8)


def stored(rows, cache, indices, skip_index=None):
    """Return the expected bytes of the cache, written row by row."""
    expected = as_bytes(cache).clone()
    source = as_bytes(rows)
    for row, slot in enumerate(indices.tolist()):
        if slot != skip_index:
            expected[slot] = source[row]
    return expected


def check(k, v, k_cache, v_cache, indices, **more):
    skip_index = more.get("skip_index")
    expected = [stored(k, k_cache, indices, skip_index), stored(v, v_cache, indices, skip_index)]
    assert store_cache(k, v, k_cache, v_cache, indices, **more) is None
    for cache, bits in zip((k_cache, v_cache), expected, strict=True):
        assert torch.equal(as_bytes(cache), bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("index_dtype", INDEX_DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_dtype(device, dtype, index_dtype):
    for num_tokens in (1, 7, 133):
        k, v, k_cache, v_cache = tokens_and_caches(num_tokens, (3, 24), slots=200, dtype=dtype, device=device)
        check(k, v, k_cache, v_cache, some_slots(num_tokens, 200, index_dtype, device))


# In bytes: a row of each access width, rows that share a block and do not fill it, one block, several blocks, the last
# one in part; and MLA's 1152 beside 128, in either order.
@pytest.mark.parametrize("num_split", [0, 1, 2, 4])
@pytest.mark.parametrize(
    ("k_bytes", "v_bytes"),
    [(4, 4), (8, 24), (16, 16), (196, 196), (1152, 128), (128, 1152), (2048, 2048), (8192, 8192), (20496, 2056)],
)
def test_every_width_and_split(device, k_bytes, v_bytes, num_split):
    k, v, k_cache, v_cache = tokens_and_caches(33, (k_bytes,), (v_bytes,), slots=70, dtype=torch.uint8, device=device)
    check(k, v, k_cache, v_cache, some_slots(33, 70, device=device), num_split=num_split, row_bytes=k_bytes)


def test_rows_that_are_fetched_before_their_turn(device):
    """Rows of more than 2 MiB, contiguous and from a projection, where the tokens of k and v lie far apart."""
    k, v, k_cache, v_cache = tokens_and_caches(301, (4096,), slots=700, device=device)
    check(k, v, k_cache, v_cache, some_slots(301, 700, device=device))
    wide = random(301, 3 * 4096, device=device)
    check(wide[:, 4096:8192], wide[:, 8192:], k_cache, v_cache, some_slots(301, 700, device=device))


def test_slices_of_fused_qkv_and_caches_side_by_side(device):
    """k, v and the caches have strides between rows, and nothing but the rows is written."""
    qkv = random(9, (8 + 2 + 2) * 64, device=device)
    k, v = qkv[:, 8 * 64 : 10 * 64].view(9, 2, 64), qkv[:, 10 * 64 :].view(9, 2, 64)
    both = random(40, 2, 3, 64, device=device)
    slots = some_slots(9, 40, device=device)
    expected = both.clone()
    expected[slots, 0, :2], expected[slots, 1, :2] = k, v
    store_cache(k, v, both[:, 0, :2], both[:, 1, :2], slots)
    assert same_bits(both, expected)
    latent = random(40, 576, device=device)  # MLA's: keys without and with position in one row
    expected = latent.clone()
    expected[slots, :512], expected[slots, 512:] = qkv[:, :512], qkv[:, 512:576]
    store_cache(qkv[:, :512], qkv[:, 512:576], latent[:, :512], latent[:, 512:], slots)
    assert same_bits(latent, expected)


def test_heads_apart(device):
    """Heads before tokens, in k and v and in the caches: tests/test_qknorm_rope_store.py has the other layouts."""
    k, v, k_cache, v_cache = (t.half() for t in tokens_and_caches(9, dtype=torch.int8, device=device))
    slots = some_slots(9, 50, device=device)
    expected = [stored(k, k_cache, slots), stored(v, v_cache, slots)]
    heads_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (k, v, k_cache, v_cache)]
    assert not heads_first[0][0].is_contiguous()
    store_cache(heads_first[0], v, heads_first[2], v_cache, slots)
    store_cache(k, heads_first[1], k_cache, heads_first[3], slots)
    for cache, bits in zip((heads_first[2], heads_first[3], k_cache, v_cache), 2 * expected, strict=True):
        assert torch.equal(as_bytes(cache), bits)


def test_one_row_for_many_slots_and_other_shapes_of_a_row(device):
    k, v, k_cache, v_cache = tokens_and_caches(1, (2, 64), device=device)
    slots = some_slots(5, 50, device=device)
    check(k.expand(5, 2, 64), v.expand(5, 2, 64), k_cache.view(50, 128), v_cache.view(50, 1, 128), slots)
    k, v, k_cache, v_cache = tokens_and_caches(5, (4, 32), device=device)  # heads that have no kernel of their own
    for shape in ((50, 2, 2, 32), (50, 1, 4, 32)):
        check(k, v, k_cache.view(shape), v_cache.view(shape), slots)


def test_heads_before_tokens(device):
    k, v, k_cache, v_cache = tokens_and_caches(5, (2, 64), device=device)
    swapped = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (k, v, k_cache, v_cache))
    check(*swapped, some_slots(5, 50, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_paged_caches_keep_the_bits_of_nans(device, dtype):
    bits = torch.tensor([0x7FC1, 0x7F81] if dtype == torch.bfloat16 else [0x7E01, 0x7C01], dtype=torch.int16)
    k = bits.repeat(32).view(1, 1, 64).to(device).view(dtype)
    k_cache, v_cache = (torch.zeros(2, 4, 1, 64, dtype=dtype, device=device) for _ in range(2))
    store_cache(k, k.clone(), k_cache, v_cache, torch.tensor([5], device=device))
    assert same_bits(k_cache[1, 1], k[0]) and same_bits(v_cache[1, 1], k[0])


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
def test_skipped_rows_are_not_written(device, index_dtype):
    k, v, k_cache, v_cache = tokens_and_caches(33, device=device)
    slots = some_slots(33, 50, index_dtype, device)
    check(k, v, k_cache, v_cache, slots, skip_index=int(slots[4]))
    slots[::3] = -1
    check(k, v, k_cache, v_cache, slots, skip_index=-1)
    check(k, v, k_cache, v_cache, torch.full_like(slots, 10**9), skip_index=10**9)  # all are skipped


def test_nothing_to_store(device):
    k, v, k_cache, v_cache = tokens_and_caches(0, device=device)
    check(k, v, k_cache, v_cache, some_slots(0, 50, device=device))


def test_the_same_bits_in_any_batch(device):
    k, v, k_cache, v_cache = tokens_and_caches(300, slots=300, device=device)
    slots = some_slots(300, 300, device=device)
    check(k, v, k_cache, v_cache, slots)
    for batch in (1, 2, 37, 299):
        one_by_one = torch.zeros_like(k_cache), torch.zeros_like(v_cache)
        for first in range(0, 300, batch):
            rows = slice(first, first + batch)
            store_cache(k[rows], v[rows], *one_by_one, slots[rows])
        assert same_bits(one_by_one[0], k_cache) and same_bits(one_by_one[1], v_cache)


def bad_calls(device):
    """Return calls: (name, exception, pattern of the message, call)."""
    k, v, kc, vc = tokens_and_caches(4, (2, 64), slots=8, device=device)
    i = torch.arange(4, device=device)
    buffer = random(16, 128, device=device)
    wide = random(8, 384, device=device)
    f = store_cache
    heads_first = k.view(4, 2, 2, 32).transpose(0, 1).contiguous().transpose(0, 1)
    calls = [
        ("k is a list", TypeError, "k must be a torch.Tensor, got list", lambda: f([1], v, kc, vc, i)),
        ("cache is None", TypeError, "v_cache must be a torch.Tensor", lambda: f(k, v, kc, None, i)),
        ("indices are a list", TypeError, "indices must be a torch.Tensor", lambda: f(k, v, kc, vc, [0, 1, 2, 3])),
        ("sparse", TypeError, "k must be a dense tensor", lambda: f(k.to_sparse(), v, kc, vc, i)),
        ("two dtypes", TypeError, "v must be bfloat16, got float16", lambda: f(k, v.half(), kc, vc, i)),
        ("cache of other dtype", TypeError, "k_cache must be bf", lambda: f(k, v, kc.view(torch.float16), vc, i)),
        ("float indices", TypeError, "indices must be int32 or int64", lambda: f(k, v, kc, vc, i.float())),
        ("short indices", TypeError, "indices must be .* got int16", lambda: f(k, v, kc, vc, i.short())),
        ("indices of rows", ValueError, "indices must have one dim", lambda: f(k, v, kc, vc, i[:, None])),
        ("strided indices", ValueError, "indices must be contiguous", lambda: f(k, v, kc, vc, i.repeat(2)[::2])),
        ("a row alone", ValueError, "k must have two dimensions", lambda: f(k[0, 0], v, kc, vc, i)),
        ("too few rows", ValueError, "v must have 4 rows like indices, got 3", lambda: f(k, v[:3], kc, vc, i)),
        ("too many indices", ValueError, "k must have 5 rows", lambda: f(k, v, kc, vc, torch.arange(5, device=device))),
        (
            "wider cache",
            ValueError,
            "k_cache must have rows of 256 bytes like k, got 768",
            lambda: f(k, v, wide, vc, i),
        ),
        ("caches of other slots", ValueError, "v_cache must have 8 slots", lambda: f(k, v, kc, vc[:5], i)),
        ("no slots", ValueError, "k_cache must have a slot", lambda: f(k, v, kc[:0], vc[:0], i)),
        (
            "three bytes",
            RuntimeError,
            "does not support rows of 3 bytes, as of k: supported are multiples of 4",
            lambda: f(*(t.view(torch.uint8)[:, 0, :3] for t in (k, v, kc, vc)), i),
        ),
        ("no width", RuntimeError, "rows of 0 bytes, as of v", lambda: f(k, v[:, :0], kc, vc[:, :0], i)),
        ("strided row", ValueError, "k must be contiguous within a row", lambda: f(wide[:4, ::3], v, kc, vc, i)),
        # Heads may be apart, but not the elements of one; and that is for the dtypes of kernels on heads alone.
        (
            "strided head",
            ValueError,
            "k must be contiguous within a row",
            lambda: f(wide[:4].view(4, 2, 192)[..., ::3], v, kc, vc, i),
        ),
        (
            "heads first, of another dtype",
            ValueError,
            "k must be contiguous within a row",
            lambda: f(heads_first.view(torch.int16), *(t.view(torch.int16) for t in (v, kc, vc)), i),
        ),
        ("cache strided", ValueError, "k_cache must be contiguous", lambda: f(k, v, wide[:, ::3], vc, i)),
        ("cache over itself", ValueError, "k_cache must not ov", lambda: f(k, v, kc[:1].expand(8, 2, 64), vc, i)),
        ("one cache", ValueError, "v_cache must share no memory with k_cache", lambda: f(k, v, kc, kc, i)),
        ("source in its cache", ValueError, "k_cache must share no memory with k,", lambda: f(kc[4:], v, kc, vc, i)),
        ("source in the other", ValueError, "v_cache must share no memory with k,", lambda: f(vc[4:], v, kc, vc, i)),
        (
            "caches that touch",
            ValueError,
            "v_cache must share no memory with k_cache",
            lambda: f(k, v, wide[:, :128], wide[:, 120:248], i),
        ),
        ("shifted", ValueError, "k_cache must share no", lambda: f(buffer[4:8], v, buffer[:8], vc, i)),
        (
            "indices in a cache",
            ValueError,
            "v_cache must share no memory with indices",
            lambda: f(k, v, kc, vc, vc.view(-1).view(torch.int64)[:4].zero_()),
        ),
        ("row_bytes", ValueError, "row_bytes must be 0 or 256, .* got 128", lambda: f(k, v, kc, vc, i, row_bytes=128)),
        ("row_bytes None", TypeError, "row_bytes must be an int", lambda: f(k, v, kc, vc, i, row_bytes=None)),
        ("split of 3", ValueError, "num_split must be 0, 1, 2 or 4, got 3", lambda: f(k, v, kc, vc, i, num_split=3)),
        ("split is True", TypeError, "num_split must be an int", lambda: f(k, v, kc, vc, i, num_split=True)),
        ("skip is a float", TypeError, "skip_index must be an int", lambda: f(k, v, kc, vc, i, skip_index=1.0)),
        ("skip is huge", ValueError, "skip_index must fit 64", lambda: f(k, v, kc, vc, i, skip_index=2**63)),
        (
            "a gradient",
            RuntimeError,
            "store_cache has no gradient",
            lambda: f(k.float().requires_grad_(), v.float(), kc.float(), vc.float(), i),
        ),
    ]
    if device == "cuda":
        flat = random(1, 4 * 128 + 8, device=device)[0]
        calls += [
            ("v elsewhere", ValueError, "v must be on cuda:0 like k", lambda: f(k, v.cpu(), kc, vc, i)),
            ("indices elsewhere", ValueError, "indices must be on cuda:0", lambda: f(k, v, kc, vc, i.cpu())),
            (
                "misaligned",
                ValueError,
                "k must be aligned to 16 bytes",
                lambda: f(flat[4:516].view(4, 128), v, kc, vc, i),
            ),
        ]
    return calls


NAMES = [name for name, *_ in bad_calls("cpu")]


@pytest.mark.parametrize("name", NAMES)
def test_refused_before_anything_is_built(name, cache_dir):
    assert_refused(bad_calls("cpu"), name)
    assert not cache_dir.exists()


def prepare(device):
    for dtype in (torch.bfloat16, torch.uint8, torch.float16, torch.float32):
        for width in (128, 6):
            k, v, k_cache, v_cache = tokens_and_caches(1, (2 * width,), dtype=dtype, device=device)
            store_cache(k, v, k_cache, v_cache, torch.zeros(1, dtype=torch.int64, device=device))


@pytest.mark.parametrize("name", NAMES)
def test_refused_by_a_kernel_that_is_there(name):
    prepare("cpu")
    assert_refused(bad_calls("cpu"), name)


@pytest.mark.gpu
def test_refused_on_a_gpu(cache_dir):
    for _, error, pattern, call in bad_calls("cuda"):
        with pytest.raises(error, match=pattern):
            call()
    assert not cache_dir.exists()
    prepare("cuda")
    for _, error, pattern, call in bad_calls("cuda"):
        with pytest.raises(error, match=pattern):
            call()
    torch.cuda.synchronize()


def test_a_refused_call_writes_nothing():
    k, v, k_cache, v_cache = tokens_and_caches()
    before = k_cache.clone(), v_cache.clone()
    for arguments in ((k, v[:3], k_cache, v_cache), (k, v.half(), k_cache, v_cache), (k, v, k_cache, v_cache[:9])):
        with pytest.raises((TypeError, ValueError)):
            store_cache(*arguments, some_slots(7, 9))
    assert same_bits(k_cache, before[0]) and same_bits(v_cache, before[1])


@pytest.mark.parametrize("index_dtype", INDEX_DTYPES)
def test_checked_indices(device, index_dtype, monkeypatch):
    monkeypatch.setattr(MODULE, "check_indices", True)
    k, v, k_cache, v_cache = tokens_and_caches(device=device)
    slots = some_slots(7, 50, index_dtype, device)
    check(k, v, k_cache, v_cache, slots)
    before = k_cache.clone(), v_cache.clone()
    for wrong in (50, -1, 2**31 - 1):
        slots[3] = wrong
        with pytest.raises(IndexError, match=rf"indices\[3\] is {wrong}, and the caches have 50 slots"):
            store_cache(k, v, k_cache, v_cache, slots)
        with pytest.raises(IndexError, match=rf"indices\[3\] is {wrong}"):
            torch.ops.jitnorm.store_cache(k, v, k_cache, v_cache, slots, skip_index=5)
        assert same_bits(k_cache, before[0]) and same_bits(v_cache, before[1])
        check(k, v, k_cache, v_cache, slots, skip_index=wrong)
        before = k_cache.clone(), v_cache.clone()


def test_the_variable_asks_for_checked_indices():
    """It is read at import: in a fork for each value."""
    script = """
import os, torch
for value in ("1", "0", ""):
    os.environ["JITNORM_CHECK_INDICES"] = value
    if os.fork() == 0:
        from jitnorm.store_cache import check_indices
        print(check_indices, flush=True)
        os._exit(0)
    os.wait()
"""
    done = run_before_import(script)
    assert done.stdout.split() == ["True", "False", "False"], done.stderr


def test_widths_and_dtypes_share_a_kernel(cache_dir):
    for dtype in DTYPES:
        k, v, k_cache, v_cache = tokens_and_caches(3, (16,), (48,), dtype=dtype)
        store_cache(k, v, k_cache, v_cache, some_slots(3, 50))
    assert len(list(cache_dir.glob("kernels/*/*/*.so"))) == 1


def test_the_compiler_sees_what_is_written(device):
    def block(k, v, k_cache, v_cache, slots):
        store_cache(k + 1, v, k_cache, v_cache, slots, skip_index=3)
        return k_cache[slots] * 2, v_cache.sum(0)

    run = compiled(block)
    for num_tokens in (3, 7, 20):
        tensors = [torch.randn(n, 8, 16, device=device) for n in (num_tokens, num_tokens, 50, 50)]
        slots = some_slots(num_tokens, 50, device=device)
        others = [t.clone() for t in tensors]
        expected, got = block(*others, slots), run(*tensors, slots)
        for one, other in zip((*got, *tensors), (*expected, *others), strict=True):
            assert same_bits(one, other)


def test_opcheck(device):
    tensors = [torch.randn(n, 2, 8, device=device) for n in (3, 3, 9, 9)]
    for more in ({}, {"skip_index": 2, "num_split": 2}):
        torch.library.opcheck(torch.ops.jitnorm.store_cache.default, (*tensors, some_slots(3, 9, device=device)), more)


def test_tracing_builds_kernels_and_refuses_bad_calls(cache_dir):
    k, v, k_cache, v_cache = tokens_and_caches()
    with pytest.raises(RuntimeError, match="rows of 6 bytes, as of k"):
        compiled(store_cache)(k[:, 0, :3], v, k_cache[:, 0, :3], v_cache, some_slots(7, 50))
    assert not cache_dir.exists()
    with torch._subclasses.FakeTensorMode() as mode:
        store_cache(*(mode.from_tensor(t) for t in (k, v, k_cache, v_cache, some_slots(7, 50))))
    assert len(list(cache_dir.glob("kernels/*/*/*.so"))) == 1


def test_the_operator_counts_versions():
    leaf = torch.randn(50, 16, requires_grad=True)
    k, k_cache = torch.randn(2, 16), torch.randn(50, 16)
    product = (leaf * k_cache).sum()
    torch.ops.jitnorm.store_cache(k, k.clone(), k_cache, k_cache.clone(), some_slots(2, 50))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_under_no_grad_a_leaf_is_data(device):
    tensors = [torch.randn(n, 8, device=device).requires_grad_() for n in (3, 3, 9, 9)]
    slots = some_slots(3, 9, device=device)
    with torch.no_grad():
        check(*tensors, slots)
    with pytest.raises(RuntimeError, match="store_cache has no gradient"):
        store_cache(*tensors, slots)


def test_module_and_function_can_be_imported():
    from jitnorm.store_cache import store_cache as imported

    assert jitnorm.store_cache is imported


@pytest.mark.gpu
def test_in_a_graph(monkeypatch):
    k, v, k_cache, v_cache = tokens_and_caches(64, (8, 128), slots=300, device="cuda")
    slots, graph = some_slots(64, 300, device="cuda"), torch.cuda.CUDAGraph()
    store_cache(k, v, k_cache, v_cache, slots)
    monkeypatch.setattr(MODULE, "check_indices", True)  # which a capture does not do
    with torch.cuda.graph(graph):
        store_cache(k, v, k_cache, v_cache, slots, skip_index=7)
    for _ in range(3):
        k.copy_(torch.randn_like(k))
        slots.copy_(some_slots(64, 300))
        expected = stored(k, k_cache, slots, 7)
        graph.replay()
        assert torch.equal(as_bytes(k_cache), expected)


@pytest.mark.gpu
def test_reads_nothing_before_the_kernel_before_it_has_written():
    """Each call reads what the one before it stored: with PDL they overlap."""
    a, b = (random(1024, 1024, device="cuda") for _ in range(2))
    directions = [(a, b), (b, a)]
    slots = torch.randperm(1024, device="cuda")
    other = random(1024, 1024, device="cuda"), torch.empty(1024, 1024, device="cuda", dtype=torch.bfloat16)
    expected = a.clone()
    for _ in range(100):
        for source, to in directions:
            store_cache(source, other[0], to, other[1], slots)
            permuted = torch.empty_like(expected)
            permuted[slots] = expected
            expected = permuted
    assert same_bits(a, expected)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    num_slots = 2**31 // 1024 + 100
    caches = [torch.zeros(num_slots, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    k, v = random(5, 1024, device="cuda"), random(5, 1024, device="cuda")
    slots = torch.tensor([num_slots - 1, 3, num_slots - 50, 2**31 // 1024 + 1, 0], device="cuda")
    store_cache(k, v, *caches, slots)
    assert same_bits(caches[0][slots], k) and same_bits(caches[1][slots], v)
    for cache in caches:
        cache[slots] = 0
        assert not cache.any()


@pytest.mark.parametrize("which", ["k", "v", "k_cache", "v_cache"])
def test_conjugate_views_are_refused_and_other_complex_numbers_stored(which):
    """The bytes of a conjugate view are not its values, so they must not be copied."""
    tensors = {name: torch.randn(count, 8).cfloat() * (1 + 2j) for name, count in (("k", 4), ("v", 4))}
    tensors |= {name: torch.zeros(9, 8).cfloat() for name in ("k_cache", "v_cache")}
    indices = torch.tensor([7, 1, 2, 8])
    for _ in range(2):
        store_cache(**tensors, indices=indices)
        for name in ("k", "v"):
            assert torch.equal(tensors[f"{name}_cache"][indices], tensors[name])
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        with pytest.raises(ValueError, match=f"{which} must not be a conjugate view"):
            store_cache(**tensors | {which: tensors[which].conj()}, indices=indices)
        assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def test_quantised_dtypes_are_refused_in_one_line():
    k = torch.quantize_per_tensor(torch.randn(4, 64), 0.1, 0, torch.qint8)
    caches = [torch.quantize_per_tensor(torch.zeros(9, 64), 0.1, 0, torch.qint8) for _ in range(2)]
    with pytest.raises(TypeError, match=r"^k must not be quantised by PyTorch, got qint8$"):
        store_cache(k, k.clone(), *caches, torch.arange(4))
