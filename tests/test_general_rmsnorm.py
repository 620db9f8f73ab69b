"""The general norms against their definitions in float64: every kind of size, every layout, every form."""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, TOLERANCE, compiled, relative_error, same_bits
from operator_calls import forget_kernels

import jitnorm
from jitnorm.core.norms import MAX_HIDDEN_SIZE
from jitnorm.core.operators import OPERATORS
from jitnorm.general_rmsnorm import Form, general_fused_add_rmsnorm, general_rmsnorm
from jitnorm.jit.build import build
from jitnorm.jit.spec import Target

# By vector width in 16 bits: 1 (one element, odd sizes), 2, 4 and 8 elements; sizes of both kernel classes; and, on
# CUDA, rows in the registers of clusters of 2 and 8 blocks, of sizes that divide among the threads and that do not; and
# 3001, whose accesses of 2 bytes have a schedule of their own.
SIZES = [1, 3, 100, 250, 257, 300, 576, 1001, 2880, 5000, 12288]
LONG_SIZES = [3001, 16384, 20480, 20481, 31000, 32768, 36000, 40004, 40008, 53248, 65535, 65536]
PAIRS = [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)]


def sizes_and_dtypes(cpu_sizes):
    """Parametrise by device, size and dtypes. A CPU kernel is one loop for all sizes: the first three are not slow."""
    cpu = [
        pytest.param("cpu", size, PAIRS[i % len(PAIRS)], marks=pytest.mark.slow if i > 2 else ())
        for i, size in enumerate(cpu_sizes)
    ]
    cuda = [pytest.param("cuda", size, pair, marks=pytest.mark.gpu) for size in SIZES + LONG_SIZES for pair in PAIRS]
    return pytest.mark.parametrize(("device", "hidden_size", "dtypes"), [*cpu, *cuda])


def tolerance(dtype, hidden_size):
    """Return that of TOLERANCE, or the bound of one rounding for rows of so few numbers that errors do not average."""
    return TOLERANCE[dtype] * (1.4 if hidden_size < 8 else 1)


def reference(x, weight=None, bias=None, eps=1e-6, offset=0.0, rounding="once"):
    """Return the result and rstd in float64."""
    y = x.double()
    rstd = 1 / torch.sqrt(y.square().mean(-1) + eps)
    y = y * rstd.unsqueeze(-1)
    if rounding == "hf":
        y = y.to(x.dtype).double()
    if weight is not None:
        y = y * (weight.double() + offset)
    return (y if bias is None else y + bias.double()), rstd


def inputs(*shape, dtype, device, weight_dtype=None):
    scale = torch.rand(*shape[:-1], 1, device=device).mul(4).exp()
    x = (torch.randn(shape, device=device) * scale).to(dtype)
    return x, torch.randn(shape[-1], device=device).to(weight_dtype or dtype)


def poisoned(x):
    return torch.full_like(x, float("nan"), memory_format=torch.contiguous_format)


@sizes_and_dtypes([1, 7, 300, 1001, 65536])
def test_matches_the_definition(device, hidden_size, dtypes):
    dtype, weight_dtype = dtypes
    for num_rows in (1, 3, 67):
        x, w = inputs(num_rows, hidden_size, dtype=dtype, device=device, weight_dtype=weight_dtype)
        out = poisoned(x)
        assert general_rmsnorm(x, w, out=out) is out
        assert relative_error(out, reference(x, w)[0]) <= tolerance(dtype, hidden_size)


@sizes_and_dtypes([3, 300, 2880])
def test_with_a_residual(device, hidden_size, dtypes):
    dtype, weight_dtype = dtypes
    for residual_dtype in {dtype, torch.float32}:
        x, w = inputs(5, hidden_size, dtype=dtype, device=device, weight_dtype=weight_dtype)
        residual = torch.randn(5, hidden_size, device=device).to(residual_dtype)
        total = x.double() + residual.double()
        general_fused_add_rmsnorm(x, residual, w, weight_offset=1.0)
        assert relative_error(residual, total) <= tolerance(residual_dtype, hidden_size)
        assert relative_error(x, reference(total, w, offset=1.0)[0]) <= tolerance(dtype, hidden_size)


# On the GPU each class of kernels, and a size that jitnorm.rmsnorm serves too.
@pytest.mark.parametrize(
    ("device", "hidden_size"),
    [
        pytest.param("cpu", 100, marks=pytest.mark.slow),
        *(pytest.param("cuda", n, marks=pytest.mark.gpu) for n in (64, 300, 4096)),
    ],
)
@pytest.mark.parametrize("rounding", ["once", "hf"])
def test_forms(device, hidden_size, rounding):
    for dtype in (torch.bfloat16, torch.float32)[: 1 + (device == "cuda")]:
        x, w = inputs(7, hidden_size, dtype=dtype, device=device)
        bias = torch.randn(hidden_size, device=device).to(dtype)
        for weight, b in ((w, None), (None, None), (None, bias), (w, bias)):
            expected, rstd = reference(x, weight, b, rounding=rounding)
            options = {"bias": b, "rounding": rounding}
            out = general_rmsnorm(x, weight, **options)
            assert relative_error(out, expected) <= TOLERANCE[dtype]
            again, found = general_rmsnorm(x, weight, return_rstd=True, **options)
            assert same_bits(again, out) and found.dtype == torch.float32 and found.shape == x.shape[:-1]
            assert relative_error(found, rstd) <= 1e-6
            one, residual = x.clone(), torch.zeros_like(x)
            found = general_fused_add_rmsnorm(one, residual, weight, return_rstd=True, **options)
            # On CUDA another schedule than without a residual, which holds more rows in flight.
            assert relative_error(one, expected) <= TOLERANCE[dtype]
            assert same_bits(residual, x) and relative_error(found, rstd) <= 1e-6


def test_the_rounding_of_transformers(device):
    """rounding="hf" has every bit of Llama's class but where rsqrt is off by a bit, and "once" has not."""
    x, w = inputs(300, 576, dtype=torch.bfloat16, device=device)
    normalised = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    llama = w * normalised.to(torch.bfloat16)
    equal = {r: float((general_rmsnorm(x, w, rounding=r) == llama).float().mean()) for r in ("once", "hf")}
    assert equal["hf"] > 0.999 > 0.9 > equal["once"]


def test_a_first_call_in_place(device):
    def through_torch(x, w, out, bias):
        torch.ops.jitnorm.general_rmsnorm_out(x, w, bias, out, None, 1e-6, 0.0, "once")

    for call in (general_rmsnorm, through_torch):
        forget_kernels()
        x, w = inputs(5, 100, dtype=torch.float32, device=device)
        expected = reference(x, w, w)[0]
        call(x, w, out=x, bias=w)
        assert relative_error(x, expected) <= 1e-6


def test_a_layout_does_not_keep_the_kernel_of_another(device):
    """After an unaligned and a strided call, rows have their own kernel, which is the faster one."""
    forget_kernels()
    x, w = inputs(4, 6, 128, dtype=torch.bfloat16, device=device)
    general_rmsnorm(torch.randn(6 * 128 + 1, device=device).bfloat16()[1:].view(6, 128), w)
    general_rmsnorm(x[:, :5].transpose(0, 1), w)
    for _ in range(2):
        general_rmsnorm(x, w)
    layouts = {key[3].layout for key in OPERATORS["general_rmsnorm"].kernels_by_spec}
    assert layouts == {"rows", "strided", *(["unaligned"] if device == "cuda" else [])}


@pytest.mark.gpu
def test_unaligned_rows_beside_a_weight_of_another_dtype():
    for dtype, weight_dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        x, _ = inputs(5, 64, dtype=dtype, device="cuda")
        w = torch.randn(65, device="cuda").to(weight_dtype)[1:]
        assert relative_error(general_rmsnorm(x, w), reference(x, w)[0]) <= TOLERANCE[dtype]


def test_a_weight_for_each_head(device):
    x = torch.randn(5, 3, 6, 100, device=device).bfloat16()
    w = torch.randn(6, 100, device=device).bfloat16()
    assert relative_error(general_rmsnorm(x, w), reference(x, w)[0]) <= TOLERANCE[torch.bfloat16]
    heads_first = x.transpose(1, 2)
    with pytest.raises(ValueError, match="weight must have shape"):
        general_rmsnorm(heads_first, w)


# Whole vectors of 16 bytes, and one element in each; and, on CUDA, rows of a cluster, of 16-bit and 32-bit elements.
@pytest.mark.parametrize(
    ("hidden_size", "dtype"),
    [
        (128, torch.bfloat16),
        (1001, torch.bfloat16),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(40000, torch.bfloat16), (20480, torch.float32)]),
    ],
)
def test_the_same_bits_in_every_layout(device, hidden_size, dtype):
    x, w = inputs(4, 6, 5, hidden_size, dtype=dtype, device=device)
    expected = general_rmsnorm(x, w)
    wide = torch.randn(4, 6, 5, 2 * hidden_size + 24, device=device).to(dtype)
    for first in (0, 8, 1):  # aligned as far as the size is, and not at all
        view = wide[..., first : first + hidden_size]
        view.copy_(x)
        before = wide.clone()
        assert same_bits(general_rmsnorm(view, w), expected)
        moved = view.permute(2, 0, 1, 3)  # three leading dimensions that do not merge
        assert same_bits(general_rmsnorm(moved, w), expected.permute(2, 0, 1, 3))
        assert same_bits(wide, before)
        assert general_rmsnorm(view, w, out=view) is view
        before[..., first : first + hidden_size] = expected
        assert same_bits(wide, before)  # nothing beside the rows was written
    shifted = torch.empty(hidden_size + 1, device=device, dtype=dtype)[1:]
    assert same_bits(general_rmsnorm(x, shifted.copy_(w)), expected)


@pytest.mark.parametrize(("hidden_size", "dtype"), [(300, torch.bfloat16), (20481, torch.float32)])
def test_the_same_bits_in_any_batch(device, hidden_size, dtype):
    x, w = inputs(515, hidden_size, dtype=dtype, device=device)
    everything = general_rmsnorm(x, w)
    for rows in (slice(0, 1), slice(514, 515), slice(7, 40), slice(1, 515)):
        assert same_bits(general_rmsnorm(x[rows], w), everything[rows])
        assert same_bits(general_rmsnorm(x[rows].clone(), w, enable_pdl=False), everything[rows])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("hidden_size", "num_rows", "dtype", "residual_dtype"),
    [
        *(
            (size, num_rows, torch.bfloat16, residual_dtype)
            for size, num_rows in (
                *((300, 60001), (601, 60001), (602, 60001), (1001, 60001)),  # accesses of 8, 2, 4 and 2 bytes
                (24584, 2063),  # of clusters, whose blocks prefetch parts of unequal size
                (40012, 701),  # not prefetched: rows of the input are no whole vectors, those of a float32 residual are
            )
            for residual_dtype in (torch.bfloat16, torch.float32)
        ),
        (40968, 1031, torch.float16, torch.float16),
        (16412, 1031, torch.float32, torch.float32),
    ],
)
def test_large_grids(hidden_size, num_rows, dtype, residual_dtype):
    """Expect rows of grids large enough for prefetches to have the bits that they have in small grids.

    Under compute-sanitizer this checks the addresses of the prefetches too, if PyTorch caches no memory.
    """
    stride = hidden_size + 16 // dtype.itemsize  # rows are as aligned as contiguous ones; the last ends the memory
    memory = torch.randn((num_rows - 1) * stride + hidden_size, device="cuda").to(dtype)
    w = torch.randn(hidden_size, device="cuda").to(dtype)
    x, added = (m.as_strided((num_rows, hidden_size), (stride, 1)) for m in (memory, memory.clone()))
    residual = torch.randn(num_rows, hidden_size, device="cuda").to(residual_dtype)
    out, sums = general_rmsnorm(x, w, out=poisoned(x)), residual.clone()
    general_fused_add_rmsnorm(added, sums, w)
    assert relative_error(out, reference(x, w)[0]) <= TOLERANCE[dtype]
    assert relative_error(added, reference(x.double() + residual.double(), w)[0]) <= TOLERANCE[dtype]
    for rows in (slice(0, 5), slice(num_rows // 2, num_rows // 2 + 5), slice(num_rows - 5, num_rows)):
        assert same_bits(general_rmsnorm(x[rows], w), out[rows])
        expected, total = x[rows].clone(), residual[rows].clone()
        general_fused_add_rmsnorm(expected, total, w)
        assert same_bits(expected, added[rows]) and same_bits(total, sums[rows])


def test_is_rmsnorm_where_that_serves_the_size(device):
    x, w = inputs(5, 512, dtype=torch.float16, device=device)
    assert same_bits(general_rmsnorm(x, w), jitnorm.rmsnorm(x, w))
    assert same_bits(general_rmsnorm(x, w, return_rstd=True)[0], jitnorm.rmsnorm(x, w))


def test_no_rows(device):
    for shape in ((0, 300), (0, 3, 300), (3, 0, 300)):
        out, rstd = general_rmsnorm(torch.empty(shape, device=device), return_rstd=True)
        assert out.shape == shape and rstd.shape == shape[:-1]
    # Without elements the strides do not matter.
    four = (slice(None, None, 2),) * 4
    for x in (
        torch.empty(4, 4, 4, 4, 0, 8)[four],
        torch.empty(0, 4, 4, 4, 4, 8)[(slice(None), *four)],
        torch.empty(0, 16)[:, ::2],
    ):
        assert general_rmsnorm(x.to(device), torch.ones(8, device=device)).shape == x.shape


def test_special_values_stay_in_their_row(device):
    x, w = inputs(5, 300, dtype=torch.float32, device=device)
    expected = general_rmsnorm(x, w)
    x[1, 7], x[3, 9] = float("inf"), float("nan")
    out = general_rmsnorm(x, w)
    assert same_bits(out[[0, 2, 4]], expected[[0, 2, 4]])
    assert out[1, 7].isnan() and out[3].isnan().all()


@pytest.mark.parametrize("has_weight", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_gradients(device, has_weight):
    hidden_size = 60
    x, w = inputs(4, 3, hidden_size, dtype=torch.float32, device=device)
    leaves = [
        x,
        torch.randn_like(x),
        torch.randn(3, hidden_size, device=device) if has_weight else None,
        torch.randn_like(w),
    ]
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    x, residual, w, bias = leaves
    grad = torch.randn_like(x)
    out, rstd = general_rmsnorm(x, w, bias=bias, weight_offset=1.0, return_rstd=True)
    assert not rstd.requires_grad
    (out * grad).sum().backward()
    doubles = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    (reference(doubles[0], doubles[2], doubles[3], offset=1.0)[0] * grad).sum().backward()
    for found, expected in zip((x, w, bias), (doubles[0], doubles[2], doubles[3]), strict=True):
        assert found is None or relative_error(found.grad, expected.grad) <= 1e-5

    for t in [*leaves, *doubles]:
        if t is not None:
            t.grad = None
    one, two = x * 1, residual * 1
    general_fused_add_rmsnorm(one, two, w, bias=bias)
    (one * grad + two.square()).sum().backward()
    total = doubles[0] + doubles[1]
    (reference(total, doubles[2], doubles[3])[0] * grad + total.square()).sum().backward()
    for found, expected in zip(leaves, doubles, strict=True):
        assert found is None or relative_error(found.grad, expected.grad) <= 1e-5


@pytest.mark.slow
def test_second_derivatives(device):
    x, w = (torch.randn(shape, device=device).requires_grad_() for shape in ((3, 20), (20,)))

    def norm(x, w):
        fused = torch.ops.jitnorm.general_fused_add_rmsnorm_functional
        normalised, _, _ = fused(x, torch.zeros_like(x), w, None, 1e-6, 0.0, "once", False)
        return general_rmsnorm(x, w) + normalised

    for function in (norm, lambda x, w: 2 * reference(x, w)[0].float()):
        (grad,) = torch.autograd.grad(function(x, w).square().sum(), x, create_graph=True)
        second = torch.autograd.grad(grad.square().sum(), (x, w))
        if function is norm:
            found = second
    for a, b in zip(found, second, strict=True):
        assert relative_error(a, b.double()) <= 1e-4


@pytest.mark.slow
def test_compiles_into_one_graph(device):
    x, w = inputs(6, 300, dtype=torch.bfloat16, device=device)
    expected, rstd = general_rmsnorm(x + x, w, rounding="hf", return_rstd=True)
    function = compiled(lambda x, w: general_rmsnorm(x + x, w, rounding="hf", return_rstd=True))
    out, found = function(x, w)
    assert same_bits(out, expected) and same_bits(found, rstd)

    def add_and_normalise(x, residual):
        x, residual = x.clone(), residual.clone()
        general_fused_add_rmsnorm(x, residual)
        return x, residual

    residual = torch.randn_like(x)
    for a, b in zip(compiled(add_and_normalise)(x, residual), add_and_normalise(x, residual), strict=True):
        assert same_bits(a, b)


@pytest.mark.slow
def test_opcheck(device):
    """Schema, fake implementation, autograd and dynamic shapes agree with what the operators do."""

    def check(name, *arguments):
        torch.library.opcheck(getattr(torch.ops.jitnorm, name).default, arguments)

    def rows(*shape):
        return torch.randn(*shape, device=device).bfloat16()

    w, options, rstd = rows(60), (1e-6, 1.0, "hf"), torch.empty(3, 5, device=device)
    check("general_rmsnorm", rows(3, 5, 60), None, None, 1e-6, 0.0, "once", True)
    check("general_rmsnorm", rows(3, 5, 60).requires_grad_(), rows(5, 60).requires_grad_(), w, *options, False)
    check("general_rmsnorm_out", rows(3, 5, 60), w, None, rows(3, 5, 60), rstd, *options)
    check("general_fused_add_rmsnorm", rows(3, 5, 60), rows(3, 5, 60), w, None, rstd, *options, True)
    check("general_fused_add_rmsnorm", rows(3, 5, 60), rows(3, 5, 60).float(), None, w, None, *options, False)
    leaves = [rows(3, 5, 60).requires_grad_(), rows(3, 5, 60).requires_grad_(), w.clone().requires_grad_()]
    check("general_fused_add_rmsnorm_functional", *leaves, None, *options, False)


REFUSED = {
    "too long": (RuntimeError, "hidden_size 65537: supported are 1 to 65536", lambda x, w: (x.new_empty(2, 65537),)),
    "no elements": (RuntimeError, "does not support hidden_size 0", lambda x, w: (x[:, :0],)),
    "dtype": (TypeError, "input must be float16 or bfloat16 or float32, got float64", lambda x, w: (x.double(),)),
    "weight": (ValueError, r"weight must have shape \[300\]", lambda x, w: (x, w[:7])),
    "columns apart": (ValueError, "input must have a last stride of 1", lambda x, w: (x.t().contiguous().t(), w)),
    "out": (ValueError, "out must be input itself or share no memory", lambda x, w: (x[1:], w, 1e-6, x[:-1])),
    "out repeats": (ValueError, "out must not overlap itself", lambda x, w: (x, w, 1e-6, w.clone().expand(4, 300))),
    "eps": (ValueError, "eps must be zero or more, got -1", lambda x, w: (x, w, -1)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_before_anything_is_built(name, cache_dir):
    kind, pattern, make = REFUSED[name]
    x, w = inputs(4, 300, dtype=torch.float32, device="cpu")
    with pytest.raises(kind, match=pattern) as caught:
        general_rmsnorm(*make(x, w))
    assert "\n" not in str(caught.value) and not list(cache_dir.glob("kernels/*"))


def test_options_are_refused(cache_dir):
    x, w = inputs(4, 300, dtype=torch.float32, device="cpu")
    for options, pattern in (
        ({"rounding": "twice"}, "rounding must be 'once' or 'hf', got 'twice'"),
        ({"weight_offset": 0.5}, "weight_offset must be 0.0 or 1.0, got 0.5"),
        ({"bias": w[:5]}, r"bias must have shape \[300\]"),
    ):
        with pytest.raises(ValueError, match=pattern):
            general_rmsnorm(x, w, **options)
    with pytest.raises(TypeError, match="bias must be float32, got bfloat16"):
        general_rmsnorm(x, w, bias=w.bfloat16())
    five = torch.zeros(3, 3, 3, 3, 300).permute(3, 1, 2, 0, 4)
    with pytest.raises(ValueError, match="leading dimensions that merge to at most 3 strides"):
        general_rmsnorm(five.permute(0, 2, 1, 3, 4))
    with pytest.raises(ValueError, match="residual must share no memory with input"):
        general_fused_add_rmsnorm(x, x)
    with pytest.raises(TypeError, match=r"residual must be a torch.Tensor, got NoneType"):
        general_fused_add_rmsnorm(x, None)
    assert not list(cache_dir.glob("kernels/*"))


def test_a_later_call_refuses_what_a_first_call_refuses():
    x, w = inputs(4, 100, dtype=torch.float32, device="cpu")
    general_rmsnorm(x, w, return_rstd=True)
    wide = torch.randn(4, 200)
    for kind, call in (
        (TypeError, lambda: general_rmsnorm(x, w, weight_offset=True, return_rstd=True)),
        (TypeError, lambda: general_fused_add_rmsnorm(x, None, w, return_rstd=True)),
        (ValueError, lambda: general_rmsnorm(x, wide[1, 100:], out=wide[:, :100], return_rstd=True)),
        (TypeError, lambda: torch.ops.jitnorm.general_rmsnorm_out(x, w, None, x, w.double(), 1e-6, 0.0, "once")),
        (ValueError, lambda: torch.ops.jitnorm.general_rmsnorm_out(x, w, None, x, w, 1e-6, 0.0, "once")),
    ):
        with pytest.raises(kind):
            call()


@pytest.mark.parametrize("text", ["rows", "strided+bias", "unaligned+no_weight", "strided+no_weight+bias"])
def test_a_form_has_a_name(text):
    assert str(Form.parse(text)) == text.replace("rows+", "strided+")


@pytest.mark.parametrize("text", ["", "row", "rows+weight", "strided,bias"])
def test_names_of_no_form(text):
    with pytest.raises(ValueError, match="form must be rows, strided, unaligned"):
        Form.parse(text)


@pytest.mark.slow
def test_warm_up_builds_what_calls_load(cache_dir, monkeypatch):
    for operator in jitnorm.core.operators.OPERATORS.values():
        for table in operator.tables:
            table.clear()
    forms = ["rows", "strided", "strided+bias", "strided+no_weight"]
    result = jitnorm.warmup("general_rmsnorm", 300, "fp32", device="cpu", form=forms, rounding=["once", "hf"])
    assert len(result.built) == 8 and not result.failed
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    x, w = inputs(4, 2, 300, dtype=torch.float32, device="cpu")
    for rounding in ("once", "hf"):
        for input in (x, x.transpose(0, 1)[:, :3]):
            general_rmsnorm(input, w, rounding=rounding)
        general_rmsnorm(x, w, rounding=rounding, return_rstd=True)
        general_rmsnorm(x, w, bias=w, rounding=rounding)
        general_rmsnorm(x, rounding=rounding)
    with pytest.raises(RuntimeError, match="jitnorm warmup --op general_rmsnorm --hidden-size 301 --dtype fp32"):
        general_rmsnorm(x.new_zeros(2, 301), x.new_zeros(301))


@pytest.mark.gpu
# The last three are rows of clusters, with four or eight vectors a thread.
@pytest.mark.parametrize(
    ("hidden_size", "dtype"),
    [
        *((300, torch.bfloat16), (1001, torch.bfloat16)),
        *((32768, torch.bfloat16), (65536, torch.bfloat16), (65536, torch.float32)),
    ],
)
def test_reads_nothing_before_the_kernel_before_it_has_written(hidden_size, dtype):
    x, w = inputs(3, hidden_size, dtype=dtype, device="cuda")
    for _ in range(10):
        results = []
        for pdl in (True, False):
            a, b = x.clone(), poisoned(x)

            def chain(a=a, b=b, pdl=pdl):
                for _ in range(20):
                    for source, to in ((a, b), (b, a)):
                        general_rmsnorm(source, w, out=to, enable_pdl=pdl)

            chain()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                chain()
            graph.replay()
            results.append(a)
        assert same_bits(*results)


@pytest.mark.gpu
@pytest.mark.parametrize(  # clusters of six, three and two blocks on an SM
    ("hidden_size", "residual_dtype"), [(20480, torch.bfloat16), (65536, torch.bfloat16), (65536, torch.float32)]
)
def test_clusters_with_a_residual_read_nothing_before_the_kernel_before_has_written(hidden_size, residual_dtype):
    x, w = inputs(3, hidden_size, dtype=torch.bfloat16, device="cuda")
    for _ in range(10):
        results = []
        for pdl in (True, False):
            a, residual = x.clone(), x.flip(0).to(residual_dtype)

            def chain(a=a, residual=residual, pdl=pdl):
                for _ in range(20):
                    general_fused_add_rmsnorm(a, residual, w, enable_pdl=pdl)

            chain()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                chain()
            graph.replay()
            results.append((a, residual))
        assert all(map(same_bits, *results))


@pytest.mark.slow
@pytest.mark.nvcc
@pytest.mark.parametrize(
    ("arch", "op", "hidden_size", "dtype"),
    [
        *(
            (arch, op, 65536, dtype)
            for arch in ("10.0a", "12.0a")
            for op, dtype in (
                *(("general_rmsnorm", torch.float32), ("general_rmsnorm", torch.bfloat16)),
                ("general_fused_add_rmsnorm_fp32_residual", torch.bfloat16),
            )
        ),
        # Without clusters; accesses of 16, 2, 4 and 8 bytes.
        *(("7.5", "general_rmsnorm", size, torch.float16) for size in (65536, 65535, 32770, 65532)),
    ],
)
def test_long_rows_compile_for(arch, op, hidden_size, dtype):
    build(OPERATORS[op].warmup_spec(hidden_size, dtype, dtype, Target.cuda(arch))).verify()


@pytest.mark.gpu
@pytest.mark.parametrize(  # whose kernels read the weight when they write the row
    ("hidden_size", "dtype"),
    [
        *((20480, torch.bfloat16), (24576, torch.bfloat16), (65536, torch.bfloat16)),
        *((20480, torch.float32), (65536, torch.float32)),
    ],
)
def test_reads_no_weight_before_the_kernel_before_it_has_written(hidden_size, dtype):
    x, first_weight = inputs(300, hidden_size, dtype=dtype, device="cuda")
    for _ in range(10):
        results = []
        for pdl in (True, False):
            w, out = first_weight.clone(), poisoned(x)
            for i in range(20):
                general_rmsnorm(x, w, out=out, enable_pdl=pdl)
                general_rmsnorm(out[i : i + 1], first_weight, out=w.unsqueeze(0), enable_pdl=pdl)
            results.append(out)
        assert same_bits(*results)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    x = torch.empty(2**31 // 12288 + 5, 12288, device="cuda", dtype=torch.bfloat16)
    first, w = inputs(5, 12288, dtype=torch.bfloat16, device="cuda")
    expected = general_rmsnorm(first, w)
    for rows in (x[:5], x[-5:]):
        rows.copy_(first)
    general_rmsnorm(x, w, out=x)
    assert same_bits(x[:5], expected) and same_bits(x[-5:], expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_every_size():
    """The error is that of rounding for every size to 1100, for random longer ones, and in each dtype."""
    generator = torch.Generator().manual_seed(0)
    sizes = [*range(1, 1101), *torch.randint(1101, MAX_HIDDEN_SIZE + 1, (40,), generator=generator).tolist()]
    jitnorm.warmup("general_rmsnorm", sizes, DTYPES, device="cuda")
    for size in sizes:
        for dtype in DTYPES:
            x, w = inputs(3, size, dtype=dtype, device="cuda")
            out = general_rmsnorm(x, w, out=poisoned(x))
            assert relative_error(out, reference(x, w)[0]) <= tolerance(dtype, size), (size, dtype)


def test_a_later_call_refuses_tensors_of_other_packages():
    """Which the bindings would take. The first call of a form always checks."""
    x, residual, w, bias = torch.randn(3, 100), torch.randn(3, 100), torch.randn(100), torch.randn(100)
    general_rmsnorm(x, w, bias=bias)
    general_fused_add_rmsnorm(x, residual, w)
    before = residual.clone()
    with pytest.raises(TypeError, match=r"bias must be a torch\.Tensor"):
        general_rmsnorm(x, w, bias=bias.numpy())
    with pytest.raises(TypeError, match=r"residual must be a torch\.Tensor"):
        general_fused_add_rmsnorm(x, residual.numpy(), w)
    assert same_bits(residual, before)
