"""rmsnorm_quant_fp8 and fused_add_rmsnorm_quant_fp8 against float64."""

from __future__ import annotations

import pytest
import torch
from fp8_reference import check_operator, codes, encode, quotient
from helpers import rmsnorm_reference, same_bits

import jitnorm
from jitnorm import fused_add_rmsnorm_quant_fp8, rmsnorm_quant_fp8

E4M3 = torch.float8_e4m3fn
EPS = 1e-6
ERROR = 2e-6  # of the normalised float32 number: the sum of squares, the root, and two products
MIN_SCALE = float(torch.tensor(1 / (448 * 512)))

# Both kernel classes, sizes whose vectors do not divide evenly among threads, and the smallest and largest. Each dtype
# is tested at some of them, because each pair is a build.
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [(size, BF16, BF16) for size in (64, 256, 512, 1280, 4096, 8192)]
CASES += [(128, FP32, FP32), (2304, FP32, FP32), (512, FP16, FP16), (256, FP16, FP32), (4096, BF16, FP32)]
# On the CPU each is a build: every case is tested in one of the four variants. Four sizes and the other two dtypes are
# not slow.
_VARIANTS = [(has_residual, given) for has_residual in (False, True) for given in (0.013, None)]
cases = pytest.mark.parametrize(
    ("device", "hidden_size", "dtype", "weight_dtype", "has_residual", "given"),
    [
        pytest.param("cpu", *case, *_VARIANTS[i % 4], marks=() if i < 4 or i in (6, 8) else pytest.mark.slow)
        for i, case in enumerate(CASES)
    ]
    + [pytest.param("cuda", *case, *variant, marks=pytest.mark.gpu) for case in CASES for variant in _VARIANTS],
)
forms = pytest.mark.parametrize("has_residual", [False, True], ids=["plain", "fused_add"])
# For what takes long and concerns torch: the registrations differ in their arguments alone.
forms_for_torch = pytest.mark.parametrize(
    "has_residual", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "fused_add"]
)
scalings = pytest.mark.parametrize("given", [0.013, None], ids=["static", "dynamic"])


def rows(n, hidden_size, dtype, device, seed=0):
    """Return rows of all magnitudes, as columns of a wider tensor."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, hidden_size + 64, generator=generator) * torch.logspace(-2, 2, n)[:, None]
    return x.to(dtype).to(device)[:, :hidden_size]


def poisoned(*shape, device):
    return torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(E4M3)


def run(has_residual, x, residual, w, scale, **options):
    if has_residual:
        return fused_add_rmsnorm_quant_fp8(x, residual, w, scale, EPS, **options)
    return rmsnorm_quant_fp8(x, w, scale, EPS, **options)


def assert_quantised(q, normalised, scale):
    """Assert that each code is that of the reference, changed by no more than the error of float32 arithmetic."""
    one, other = (encode(quotient(normalised * (1 + sign * ERROR), scale)) for sign in (-1, 1))
    assert ((codes(q) == one) | (codes(q) == other)).all()
    assert (one == other).double().mean() > 0.99  # otherwise the comparison would be empty


@cases
def test_matches_the_definition(device, hidden_size, dtype, weight_dtype, has_residual, given):
    x = rows(33, hidden_size, dtype, device)
    residual = rows(33, hidden_size, dtype, device, seed=1) if has_residual else None
    w = torch.randn(hidden_size, generator=torch.Generator().manual_seed(2)).to(weight_dtype).to(device)
    before, total = x.clone(), x.double()
    if has_residual:
        total = total + residual.double()
    scale = None if given is None else torch.tensor([given], device=device)
    out = poisoned(33, hidden_size + 32, device=device)[:, :hidden_size]
    q, s = run(has_residual, x, residual, w, scale, out=out)
    assert q is out and same_bits(x, before)
    normalised = rmsnorm_reference(total, w, EPS)
    if given is None:
        assert s.shape == (33, 1) and s.dtype == torch.float32
        exact = normalised.abs().amax(dim=-1, keepdim=True) / 448
        assert ((s.double() - exact).abs() <= 2 * ERROR * exact).all()
        assert (codes(q).view(33, -1) & 127).amax(dim=-1).eq(0x7E).all()  # the largest became 448
    else:
        assert s is scale
    assert_quantised(q, normalised, s)
    if has_residual:
        assert same_bits(residual, total.float().to(dtype))


@forms
@scalings
@pytest.mark.parametrize("hidden_size", [128, pytest.param(4096, marks=pytest.mark.slow)])
def test_the_same_bits_in_any_batch(device, hidden_size, has_residual, given):
    x, residual = (rows(1025, hidden_size, torch.bfloat16, device, seed) for seed in (0, 1))
    w = torch.randn(hidden_size, device=device).bfloat16()
    scale = None if given is None else torch.tensor(given, device=device)
    q, s = run(has_residual, x, residual.clone(), w, scale)
    for first, last in ((0, 1), (1, 3), (500, 517), (1024, 1025), (3, 1022)):
        for pdl in (None, False):
            part = x[first:last].contiguous()  # another row stride
            alone, scales = run(has_residual, part, residual[first:last].clone(), w, scale, enable_pdl=pdl)
            assert same_bits(codes(alone), codes(q)[first:last])
            assert given is not None or same_bits(scales, s[first:last])


@forms
@scalings
def test_rows_with_zeros_nans_and_infinities(device, has_residual, given):
    x = torch.randn(5, 512, device=device)
    x[0] = 0
    x[1] = 1e-30
    x[2, 7] = torch.nan
    x[3, 7] = torch.inf
    w, residual = torch.ones(512, device=device), torch.zeros_like(x)
    scale = None if given is None else torch.tensor(given, device=device)
    q, s = run(has_residual, x, residual, w, scale)
    assert (codes(q)[0] == 0).all() and ((codes(q)[1] & 127) <= 1).all()
    assert (codes(q)[2] == 0x7F).all()  # the sum of squares is NaN as well
    assert codes(q)[3, 7] == 0x7F and ((codes(q)[3] & 127) == 0).sum() == 511  # as rmsnorm: infinity times zero
    if given is None:
        assert (s[:4] == MIN_SCALE).all()
        s = s[4:]
    assert_quantised(q[4:], rmsnorm_reference(x[4:], w, EPS), s)


def test_large_numbers_saturate_and_scales_of_zero_do(device):
    x, w = torch.randn(3, 256, device=device), torch.ones(256, device=device)
    x[x.abs() < 0.01] = 1
    for scale in (1e-6, 0.0):
        q, _ = rmsnorm_quant_fp8(x, w, torch.tensor(scale, device=device))
        assert torch.equal(codes(q), torch.where(x > 0, 0x7E, 0xFE).to(torch.uint8))
    q, _ = rmsnorm_quant_fp8(x, w * 1e38, torch.tensor(1.0, device=device))
    assert torch.equal(codes(q), torch.where(x > 0, 0x7E, 0xFE).to(torch.uint8))


@forms
@scalings
def test_no_rows_and_more_dimensions(device, has_residual, given):
    w = torch.ones(128, device=device)
    scale = None if given is None else torch.tensor(given, device=device)
    for shape in ((0, 128), (2, 0, 128), (128,), (2, 3, 128), (1, 1, 1, 128)):
        x = torch.randn(shape, device=device)
        q, s = run(has_residual, x, torch.zeros_like(x), w, scale)
        assert q.shape == x.shape and q.dtype == E4M3
        assert s.shape == (*shape[:-1], 1) if given is None else s is scale
        if x.numel():
            assert_quantised(q, rmsnorm_reference(x, w, EPS), s)


def test_scales_of_any_shape(device):
    x, w = torch.randn(6, 128, device=device), torch.ones(128, device=device)
    _, expected = rmsnorm_quant_fp8(x, w)
    for shape in ((6,), (6, 1), (2, 3), (1, 6)):
        scales = torch.full(shape, torch.nan, device=device)
        _, s = rmsnorm_quant_fp8(x, w, scales=scales)
        assert s is scales and same_bits(s.flatten(), expected.flatten())


@forms_for_torch
@scalings
def test_torch_sees_the_operators(device, has_residual, given):
    x, residual = torch.randn(3, 256, device=device), torch.randn(3, 256, device=device)
    w, scale = torch.randn(256, device=device), torch.ones(1 if given else 3, device=device)
    name = ("fused_add_" if has_residual else "") + "rmsnorm_quant_fp8" + ("" if given else "_dynamic")
    tensors = (x, residual, w) if has_residual else (x, w)
    operator = getattr(torch.ops.jitnorm, name).default
    check_operator(operator, (*tensors, poisoned(3, 256, device=device), scale, EPS, None))


@forms_for_torch
@scalings
def test_compiles_without_a_graph_break(device, has_residual, given):
    w = torch.randn(256, device=device)
    scale = None if given is None else torch.tensor(given, device=device)

    def block(x, residual):
        q, s = run(has_residual, x * 2, residual, w, scale)
        return q.float() * s, residual

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 17):
        x, residual = torch.randn(n, 256, device=device), torch.randn(n, 256, device=device)
        expected = block(x, other := residual.clone())
        got = compiled(x, residual)
        for a, b in zip((*got, residual), (*expected, other), strict=True):
            assert same_bits(a, b)


def test_kernels_are_built_while_tracing(cache_dir):
    with torch._subclasses.FakeTensorMode() as mode:
        q, s = rmsnorm_quant_fp8(mode.from_tensor(torch.randn(2, 512)), mode.from_tensor(torch.ones(512)))
        assert q.dtype == E4M3 and s.shape == (2, 1)
    assert len(list(cache_dir.glob("kernels/*/*/*.so"))) == 1


@forms
@scalings
def test_there_is_no_gradient(device, has_residual, given):
    x, residual = torch.randn(3, 256, device=device, requires_grad=True), torch.randn(3, 256, device=device)
    w, scale = torch.ones(256, device=device), None if given is None else torch.ones(1, device=device)
    before = residual.clone()
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match=r"rmsnorm_quant_fp8\w* has no gradient: call it under torch.no_grad\(\)"
        ):
            run(has_residual, x, residual, w, scale)
        assert same_bits(residual, before)
        with torch.no_grad():
            run(has_residual, x, residual.clone(), w, scale)
        if given is not None:
            with pytest.raises(RuntimeError, match="has no gradient"):
                run(has_residual, x.detach(), residual, w, scale.clone().requires_grad_())
            assert same_bits(residual, before)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="has no gradient"):
        torch.compile(lambda: run(has_residual, x, residual, w, scale), fullgraph=True, backend="eager")()
    with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
        scales_of = lambda a: run(has_residual, a, residual.clone(), w, scale)[1]  # noqa: E731
        torch.func.jvp(scales_of, (x.detach(),), (torch.ones_like(x),))


@pytest.mark.gpu
@forms
@scalings
def test_in_a_graph_and_in_chains(has_residual, given):
    """Each call reads what the one before it wrote: PDL must not let it start too early."""
    w = torch.randn(4096, device="cuda").bfloat16()
    scale = None if given is None else torch.tensor(given, device="cuda")
    x0, r0 = (rows(64, 4096, torch.bfloat16, "cuda", seed).contiguous() for seed in (0, 1))
    x, residual = x0.clone(), r0.clone()

    def chain(pdl):
        results = []
        for _ in range(10):
            q, s = run(has_residual, x, residual, w, scale, enable_pdl=pdl)
            jitnorm.rmsnorm(x, w, out=x, enable_pdl=pdl)
            results += [q, s]
        return results

    expected = [t.clone() for t in chain(False)]
    graph = torch.cuda.CUDAGraph()
    x.copy_(x0)
    residual.copy_(r0)
    with torch.cuda.graph(graph):
        captured = chain(None)
    for _ in range(5):
        x.copy_(x0)
        residual.copy_(r0)
        for t in captured[::2]:
            t.view(torch.uint8).fill_(0x7F)
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, expected, strict=True):
            assert same_bits(got, want)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    x = torch.randn(1, 4096, device="cuda").half().expand(2**19 + 3, 4096)
    w = torch.ones(4096, device="cuda").half()
    q, s = rmsnorm_quant_fp8(x, w)
    alone, scale = rmsnorm_quant_fp8(x[:1].clone(), w)
    assert (s == scale).all()
    for row in (0, 2**19 - 1, 2**19, 2**19 + 2):
        assert same_bits(codes(q[row]), codes(alone[0]))


def test_warm_up_builds_what_a_call_loads(cache_dir):
    ops = ["rmsnorm_quant_fp8", "rmsnorm_quant_fp8_dynamic"]
    assert len(jitnorm.warmup(ops, hidden_size=512, dtype="fp32", device="cpu").built) == 2
    x, w = torch.randn(2, 512), torch.ones(512)
    rmsnorm_quant_fp8(x, w)
    rmsnorm_quant_fp8(x, w, torch.ones(1))
    assert len(list(cache_dir.glob("kernels/*/*/*.so"))) == 2
