"""jitnorm.dual_rmsnorm against its definition in float64, and against jitnorm.general_rmsnorm of each input alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import DTYPES, TOLERANCE, WEIGHTS, compiled, relative_error, rmsnorm_reference, same_bits
from operator_calls import forget_kernels

import jitnorm
from jitnorm import dispatch, dual_rmsnorm
from jitnorm.core.operators import OPERATORS

MLA = (1536, 512, 64)  # of DeepSeek V3 and Kimi K2: the columns of queries, of keys and values, and of the rotated part
# Those of MLA; the same size twice; rows of less than a warp beside the longest; idle threads in the blocks of either
# norm (576 and 320 beside 1536, 416 threads for a row of 6656); sizes that no number of warps divides; half a warp.
SIZES = [
    (1536, 512),
    (512, 512),
    (8192, 8),
    (16, 8192),
    (1536, 576),
    (320, 1536),
    (6656, 3072),
    (1096, 2200),
    (128, 72),
]
PAIRS = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.float32)]


def sizes_and_dtypes(cpu_sizes):
    """Parametrise by device, sizes and dtypes. A CPU kernel is one loop for all sizes: the first three are not slow."""
    cpu = [
        pytest.param("cpu", sizes, WEIGHTS[i], marks=pytest.mark.slow if i > 2 else ())
        for i, sizes in enumerate(cpu_sizes)
    ]
    cuda = [pytest.param("cuda", sizes, pair, marks=pytest.mark.gpu) for sizes in SIZES for pair in PAIRS]
    return pytest.mark.parametrize(("device", "sizes", "dtypes"), [*cpu, *cuda])


def projection(rows, sizes=MLA, dtype=torch.bfloat16, device="cpu", weight_dtype=None):
    """Return a projection, its first two slices, and their weights. Rows have magnitudes of their own."""
    scale = torch.rand(rows, 1, device=device).mul(4).exp()
    whole = (torch.randn(rows, sum(sizes), device=device) * scale).to(dtype)
    weights = [torch.randn(size, device=device).to(weight_dtype or dtype) for size in sizes[:2]]
    return whole, *whole.split(sizes, 1)[:2], *weights


def poisoned(x):
    return torch.full(x.shape, float("nan"), dtype=x.dtype, device=x.device)


@sizes_and_dtypes([(1536, 512), (8, 8192), (1096, 72), (512, 512), (64, 8)])
def test_matches_the_definition(device, sizes, dtypes):
    dtype, weight_dtype = dtypes
    for rows in (1, 3, 67):
        _, a, b, w1, w2 = projection(rows, (*sizes, 8), dtype, device, weight_dtype)
        before = a.clone(), b.clone()
        outs = poisoned(a), poisoned(b)
        results = dual_rmsnorm(a, b, w1, w2, 1e-6, *outs, eps2=0.5)
        assert results[0] is outs[0] and results[1] is outs[1]
        for out, x, w, eps in zip(outs, (a, b), (w1, w2), (1e-6, 0.5), strict=True):
            assert relative_error(out, rmsnorm_reference(x, w, eps)) <= TOLERANCE[dtype]
        assert same_bits(a, before[0]) and same_bits(b, before[1])


@pytest.mark.parametrize(
    ("device", "sizes"),
    [("cpu", (1536, 512)), *(pytest.param("cuda", sizes, marks=pytest.mark.gpu) for sizes in SIZES)],
)
def test_has_the_bits_of_two_launches(device, sizes):
    """Large enough on CUDA for each variant of the kernel: a few rows, more, and as many as L2 holds."""
    for dtype, weight_dtype in PAIRS[: 1 if device == "cpu" else 3]:
        whole = 96 * 2**20 // (sum(sizes) * dtype.itemsize)
        for rows in (1, 37, *([whole] if device == "cuda" else [])):
            _, a, b, w1, w2 = projection(rows, (*sizes, 8), dtype, device, weight_dtype)
            found = dual_rmsnorm(a, b, w1, w2, eps2=1e-5)
            for out, x, w, eps in zip(found, (a, b), (w1, w2), (1e-6, 1e-5), strict=True):
                assert same_bits(out, jitnorm.general_rmsnorm(x, w, eps))


def test_the_same_bits_in_any_batch(device):
    _, a, b, w1, w2 = projection(515, device=device)
    everything = dual_rmsnorm(a, b, w1, w2)
    for rows in (slice(0, 1), slice(514, 515), slice(7, 40), slice(1, 515)):
        for one, two in ((a[rows], b[rows]), (a[rows].clone(), b[rows].clone())):
            for pdl in (None, False):
                found = dual_rmsnorm(one, two, w1, w2, enable_pdl=pdl)
                assert all(same_bits(x, y[rows]) for x, y in zip(found, everything, strict=True))


def test_strided_rows_and_results(device):
    """In place and into slices of another tensor: nothing beside the rows is written."""
    whole, a, b, w1, w2 = projection(13, device=device)
    expected = dual_rmsnorm(a, b, w1, w2)
    assert all(out.is_contiguous() for out in expected)
    other = torch.full((13, 4096), 7.0, device=device).bfloat16()
    slices = other[:, 8 : 8 + 1536], other[:, 2048 : 2048 + 512]
    dual_rmsnorm(a, b, w1, w2, out1=slices[0], out2=slices[1])
    assert same_bits(slices[0], expected[0]) and same_bits(slices[1], expected[1])
    other[:, 8 : 8 + 1536] = other[:, 2048 : 2048 + 512] = 7
    assert (other == 7).all()
    rest = whole[:, 2048:].clone()
    one = dual_rmsnorm(a, b, w1, w2, out2=b)  # the second in place alone
    assert same_bits(one[0], expected[0]) and one[1] is b and same_bits(b, expected[1])
    dual_rmsnorm(a, torch.zeros_like(b), w1, w2, out1=a)
    assert same_bits(a, expected[0]) and same_bits(b, expected[1]) and same_bits(whole[:, 2048:], rest)
    # Three dimensions, inputs whose rows are apart by different strides, and rows that repeat.
    x, y = torch.randn(4, 6, 1600, device=device).bfloat16()[..., :1536], torch.randn(1, 512, device=device).bfloat16()
    found = dual_rmsnorm(x, y.expand(4, 6, 512), w1, w2)
    assert found[0].shape == (4, 6, 1536) and same_bits(found[0], jitnorm.general_rmsnorm(x, w1))
    assert same_bits(found[1], jitnorm.general_rmsnorm(y, w2).expand(4, 6, 512))


def test_no_rows_and_a_single_vector(device):
    w1, w2 = torch.randn(1536, device=device), torch.randn(512, device=device)
    for shape in ((0,), (0, 3), (3, 0)):
        found = dual_rmsnorm(torch.empty(*shape, 1536, device=device), torch.empty(*shape, 512, device=device), w1, w2)
        assert [out.shape for out in found] == [(*shape, 1536), (*shape, 512)]
    x, y = torch.randn(1536, device=device), torch.randn(512, device=device)
    for out, a, w in zip(dual_rmsnorm(x, y, w1, w2), (x, y), (w1, w2), strict=True):
        assert relative_error(out, rmsnorm_reference(a, w, 1e-6)) <= 1e-6


def test_special_values_stay_in_their_row(device):
    _, a, b, w1, w2 = projection(9, device=device)
    expected = dual_rmsnorm(a, b, w1, w2)
    a[1, 7], b[3, 9] = float("inf"), float("nan")
    found = dual_rmsnorm(a, b, w1, w2)
    others = [[0, *range(2, 9)], [0, 1, 2, *range(4, 9)]]
    assert all(same_bits(x[rows], y[rows]) for x, y, rows in zip(found, expected, others, strict=True))
    assert found[0][1, 7].isnan() and found[1][3].isnan().all()


def test_gradients(device):
    leaves = [torch.randn(shape, device=device).requires_grad_() for shape in ((5, 64), (5, 12), (64,), (12,))]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    grads = torch.randn(5, 64, device=device), torch.randn(5, 12, device=device)
    for both in (True, False):  # or the first result alone is used
        for tensors, norm in ((leaves, lambda a, b, w, v: dual_rmsnorm(a, b, w, v, eps2=0.1)), (doubles, None)):
            a, b, w1, w2 = tensors
            one, two = norm(*tensors) if norm else (rmsnorm_reference(a, w1, 1e-6), rmsnorm_reference(b, w2, 0.1))
            loss = (one * grads[0]).sum() + ((two * grads[1]).sum() if both else 0)
            for tensor in tensors:
                tensor.grad = None
            loss.backward()
        for leaf, double in zip(leaves, doubles, strict=True):
            if double.grad is None or not double.grad.any():
                assert leaf.grad is None or not leaf.grad.any()
            else:
                assert relative_error(leaf.grad, double.grad) <= 1e-5
    with pytest.raises(RuntimeError, match="dual_rmsnorm with out1= or out2= has no gradient"):
        dual_rmsnorm(*leaves, out2=torch.empty(5, 12, device=device))


@pytest.mark.slow
def test_compiles_into_one_graph(device):
    whole, _, _, w1, w2 = projection(6, device=device)

    def attention(x):
        q, kv, _ = (x + x).split(MLA, 1)
        return dual_rmsnorm(q, kv, w1, w2, eps2=1e-5)

    def in_place(x):
        x = x + x
        q, kv, _ = x.split(MLA, 1)
        dual_rmsnorm(q, kv, w1, w2, out1=q, out2=kv)
        return x, q * 2

    for function in (attention, in_place):
        run = compiled(function)
        for rows in (6, 3):
            for found, expected in zip(run(whole[:rows]), function(whole[:rows]), strict=True):
                assert same_bits(found, expected)


@pytest.mark.slow
def test_opcheck(device):
    _, a, b, w1, w2 = projection(3, (64, 16, 8), torch.float32, device)
    ops = torch.ops.jitnorm
    torch.library.opcheck(ops.dual_rmsnorm.default, (a, b, w1, w2, 1e-6, 1e-5))
    leaves = [t.clone().requires_grad_() for t in (a, b, w1, w2)]
    torch.library.opcheck(ops.dual_rmsnorm.default, (*leaves,))
    outs = torch.empty_like(a), torch.empty_like(b)
    torch.library.opcheck(ops.dual_rmsnorm_out.default, (a, b, w1, w2, *outs, 1e-5, None, False))


REFUSED = {
    "size": (RuntimeError, "hidden_size 300 in bfloat16: supported are multiples of 8 up to 8192",
             lambda a, b, w, v: (a[:, :300], b, w[:300], v)),
    "size in fp32": (RuntimeError, "hidden_size 6 in float32: supported are multiples of 4",
                     lambda a, b, w, v: (a.float(), b.float()[:, :6], w.float(), v.float()[:6])),
    "too long": (RuntimeError, "hidden_size 8200", lambda a, b, w, v: (a.new_zeros(2, 8200), b[:2], w, v)),
    "no elements": (RuntimeError, "hidden_size 0", lambda a, b, w, v: (a, b[:, :0], w, v[:0])),
    "dtype": (TypeError, "input1 must be .*, got float64", lambda a, b, w, v: (a.double(), b.double(), w, v)),
    "dtypes": (TypeError, "input2 must be bfloat16, got float16", lambda a, b, w, v: (a, b.half(), w, v)),
    "weight dtype": (TypeError, "weight1 must be bfloat16 or float32, got float16",
                     lambda a, b, w, v: (a, b, w.half(), v.half())),
    "weight dtypes": (TypeError, "weight2 must be float32, got bfloat16", lambda a, b, w, v: (a, b, w.float(), v)),
    "no tensor": (TypeError, "weight2 must be a torch.Tensor, got NoneType", lambda a, b, w, v: (a, b, w, None)),
    "scalar": (ValueError, "input2 must have at least one dimension", lambda a, b, w, v: (a, b[0, 0], w, v)),
    "rows": (ValueError, r"input2 must have shape \[5, 512\] \(the leading", lambda a, b, w, v: (a, b[:3], w, v)),
    "weight": (ValueError, r"weight2 must have shape \[512\] .*input2", lambda a, b, w, v: (a, b, w, v[:8])),
    "columns apart": (ValueError, "input2 must have a last stride of 1",
                      lambda a, b, w, v: (a, b.t().contiguous().t(), w, v)),
    "strides": (ValueError, "input1 must have leading dimensions that collapse",
                lambda a, b, w, v: (a.clone().view(5, 1, 1536).expand(5, 2, 1536), b[:, None].expand(5, 2, 512), w, v)),
    "eps": (ValueError, "eps must be zero or more, got -1", lambda a, b, w, v: (a, b, w, v, -1)),
    "eps2": (ValueError, "eps2 must be zero or more, or None for eps, got -1",
             lambda a, b, w, v: (a, b, w, v, 1e-6, None, None, -1)),
    "eps2 type": (TypeError, "eps2 must be a float, got str", lambda a, b, w, v: (a, b, w, v, 1e-6, None, None, "1")),
    "pdl": (TypeError, "enable_pdl must be True", lambda a, b, w, v: (a, b, w, v, 1e-6, None, None, None, 1)),
    "out shape": (ValueError, r"out2 must have shape \[5, 512\] \(like input2\)",
                  lambda a, b, w, v: (a, b, w, v, 1e-6, None, a)),
    "out dtype": (TypeError, "out1 must be bfloat16", lambda a, b, w, v: (a, b, w, v, 1e-6, a.float())),
    "out on an input": (ValueError, "out1 must be input1 itself or share no memory with input1",
                        lambda a, b, w, v: (a[1:], b[1:], w, v, 1e-6, a[:-1])),
    "out on the other input": (ValueError, "out2 must share no memory with input1",
                               lambda a, b, w, v: (a, b, w, v, 1e-6, None, a[:, :512])),
    "outs": (ValueError, "out2 must share no memory with out1",
             lambda a, b, w, v: (a, b, w, v, 1e-6, (out := a.clone()), out[:, 1024:])),
    "out on a weight": (ValueError, "out2 must share no memory with weight1",
                        lambda a, b, w, v: (a[:1], b[:1], w, v, 1e-6, None, w[None, :512])),
    "out repeats": (ValueError, "out1 must not overlap itself",
                    lambda a, b, w, v: (a, b, w, v, 1e-6, w.clone().expand(5, 1536))),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_before_anything_is_built(name, cache_dir):
    kind, pattern, make = REFUSED[name]
    _, *arguments = projection(5)
    with pytest.raises(kind, match=pattern) as caught:
        dual_rmsnorm(*make(*arguments))
    assert "\n" not in str(caught.value) and not list(cache_dir.glob("kernels/*"))


def test_a_later_call_refuses_what_a_first_call_refuses():
    _, *arguments = projection(5)
    dual_rmsnorm(*arguments)
    for name, (kind, pattern, make) in REFUSED.items():
        _, *arguments = projection(5)
        made = make(*arguments)
        before = [(value, value.clone()) for value in made if isinstance(value, torch.Tensor)]
        with pytest.raises(kind, match=pattern):
            dual_rmsnorm(*made)
        assert all(same_bits(*pair) for pair in before), name


@pytest.mark.gpu
def test_unaligned_rows_are_refused():
    a, w1 = torch.randn(3 * 64 + 1, device="cuda").half()[1:].view(3, 64), torch.ones(64, device="cuda").half()
    b = torch.randn(3, 64, device="cuda").half()
    for one, two in ((a, b), (b, a)):
        with pytest.raises(ValueError, match="must be aligned to 16 bytes in every row"):
            dual_rmsnorm(one, two, w1, w1)
        with dispatch.backend("auto-fast"):  # FlashInfer's bits are others
            found = dispatch.dual_rmsnorm(one, two, w1, w1)
        assert all(same_bits(x, jitnorm.general_rmsnorm(y, w1)) for x, y in zip(found, (one, two), strict=True))


# What the kernel does not take: sizes, layouts, two dtypes, a weight's dtype; and other leading dimensions.
FALLBACKS = [
    lambda a, b, w, v: (a[:, :300], b, w[:300], v),
    lambda a, b, w, v: (a.clone().view(5, 1, 1536).expand(5, 2, 1536), b[:, None].expand(5, 2, 512), w, v),
    lambda a, b, w, v: (a, b.float(), w, v),
    lambda a, b, w, v: (a, b, w.half(), v.half()),
    lambda a, b, w, v: (a, b[:2], w, v),
]


@pytest.mark.parametrize("case", range(len(FALLBACKS)))
def test_dispatch_serves_the_rest_by_two_launches(case, device):
    _, *arguments = projection(5, device=device)
    a, b, w1, w2 = FALLBACKS[case](*arguments)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        dual_rmsnorm(a, b, w1, w2)
    with dispatch.backend("auto-fast"):  # FlashInfer's bits are others
        found = dispatch.dual_rmsnorm(a, b, w1, w2, eps2=1e-5)
    for out, x, w, eps in zip(found, (a, b), (w1, w2), (1e-6, 1e-5), strict=True):
        assert same_bits(out, jitnorm.general_rmsnorm(x, w, eps))


def test_dispatch_is_one_launch_where_it_can_be(device):
    _, a, b, w1, w2 = projection(5, device=device)
    forget_kernels()
    found = dispatch.dual_rmsnorm(a, b, w1, w2)
    assert [op for op, operator in OPERATORS.items() if operator.kernels_by_spec] == ["dual_rmsnorm"]
    with dispatch.backend("torch"):
        again = dispatch.dual_rmsnorm(a, b, w1, w2)
    for one, two in zip(found, again, strict=True):
        assert relative_error(one, two.double()) <= TOLERANCE[torch.bfloat16]
    for out1, out2, pattern in (
        (b.new_empty(5, 7), None, "out1 must have shape"),
        (None, a[:, :512], "out2 must share no memory with input1"),
        (None, w1[:512].expand(5, 512), "out2 must"),
    ):
        for name in ("auto", "torch"):
            before = a.clone()
            with dispatch.backend(name), pytest.raises(ValueError, match=pattern):
                dispatch.dual_rmsnorm(a, b, w1, w2, out1=out1, out2=out2)
            assert same_bits(a, before)


def test_dispatch_writes_nothing_that_a_second_launch_would_refuse():
    """Of sizes without one kernel, which are two launches. The first result lies where the second weight does."""
    buffer = torch.randn(5 * 41 + 23)
    a, b, w1, w2 = torch.randn(5, 41), torch.randn(5, 23), torch.randn(41), buffer[100:123]
    kept = a.clone(), buffer.clone()
    leaf = torch.randn(23, requires_grad=True)
    for kind, pattern, weight, options in (
        (ValueError, "out1 must share no memory with weight2", w2, {"out1": buffer[: 5 * 41].view(5, 41)}),
        (ValueError, "eps2 must be", w2, {"out1": a, "eps2": -1.0}),
        (RuntimeError, "has no gradient", leaf, {"out1": a}),
        (ValueError, "out2 must", w2, {"out1": a, "out2": b[:1].clone().expand(5, 23)}),
    ):
        with pytest.raises(kind, match=pattern):
            dispatch.dual_rmsnorm(a, b, w1, weight, **options)
        assert same_bits(a, kept[0]) and same_bits(buffer, kept[1])


def test_warm_up_builds_what_calls_load(cache_dir, monkeypatch):
    forget_kernels()
    result = jitnorm.warmup("dual_rmsnorm", 64, "fp32", device="cpu", hidden_size2=[16, 64])
    assert len(result.built) == 2 and not result.failed
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    _, a, b, w1, w2 = projection(3, (64, 16, 8), torch.float32)
    dual_rmsnorm(a, b, w1, w2)
    dual_rmsnorm(a, a, w1, w1)
    with pytest.raises(RuntimeError, match="--op dual_rmsnorm --hidden-size 16 --hidden-size2 64 --dtype fp32"):
        dual_rmsnorm(b, a, w2, w1)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 3000])
def test_reads_nothing_before_the_kernel_before_it_has_written(rows):
    _, a, b, w1, w2 = projection(rows, device="cuda")
    for _ in range(10):
        results = []
        for pdl in (True, False):
            inputs, outs = (a.clone(), b.clone()), (poisoned(a), poisoned(b))

            def chain(inputs=inputs, outs=outs, pdl=pdl):
                for _ in range(20):
                    for source, to in ((inputs, outs), (outs, inputs)):
                        dual_rmsnorm(*source, w1, w2, 1e-6, *to, enable_pdl=pdl)

            chain()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                chain()
            graph.replay()
            results.append(inputs)
        assert all(same_bits(*pair) for pair in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.slow
def test_random_sizes():
    """Every relation of two schedules: idle threads, rows of a warp or of several, blocks of few rows or of many."""
    generator = torch.Generator().manual_seed(0)
    for (first, second), dtype in itertools.product(torch.randint(1, 1025, (60, 2), generator=generator), DTYPES):
        sizes = 8 * int(first), 8 * (int(second) if second % 3 else int(second) // 16 + 1)
        _, a, b, w1, w2 = projection(131, (*sizes, 8), dtype, "cuda")
        for out, x, w in zip(dual_rmsnorm(a, b, w1, w2), (a, b), (w1, w2), strict=True):
            assert relative_error(out, rmsnorm_reference(x, w, 1e-6)) <= TOLERANCE[dtype] * 1.4, (sizes, dtype)
