"""The gated norms against their definitions in float64: every kind of size, groups, roundings, layouts."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, TOLERANCE, compiled, relative_error, same_bits
from operator_calls import forget_kernels
from references import gated_norm

import jitnorm
from jitnorm.core.operators import OPERATORS
from jitnorm.gated_rmsnorm import GatedForm, gated_rmsnorm, gated_rmsnorm_in_torch, has_kernel
from jitnorm.jit.load import load
from jitnorm.jit.spec import Target

# By vector width in 16 bits: 1 (one element, odd sizes), 2, 4 and 8 elements; both kernel classes; and, on CUDA, rows
# in shared memory and of clusters.
SIZES = [1, 3, 100, 128, 250, 300, 1001, 2880, 5000, 12288, 16384, 20481, 40004, 65536]
# Of input, gate and weight.
TRIPLES = [
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16),
]
FORMS = list(itertools.product((True, False), ("silu", "sigmoid"), ("once", "hf")))


def sizes_and_dtypes(cpu_sizes):
    """Parametrise by device, size and dtypes. A CPU kernel is one loop for all sizes: the first two are not slow."""
    cpu = [
        pytest.param("cpu", size, TRIPLES[i % len(TRIPLES)], marks=pytest.mark.slow if i > 1 else ())
        for i, size in enumerate(cpu_sizes)
    ]
    cuda = [pytest.param("cuda", size, triple, marks=pytest.mark.gpu) for size in SIZES for triple in TRIPLES]
    return pytest.mark.parametrize(("device", "size", "dtypes"), [*cpu, *cuda])


def tolerance(dtype, rounding="once", size=4096):
    """Return that of TOLERANCE, for up to three roundings, or the bound of one for rows of so few numbers."""
    factor = 1.8 if rounding == "hf" else 1
    return TOLERANCE[dtype] * factor * (1.4 if size < 8 else 1)


def inputs(*shape, dtype, device, gate_dtype=None, weight_dtype=None):
    scale = torch.rand(*shape[:-1], 1, device=device).mul(4).exp()
    x = (torch.randn(shape, device=device) * scale).to(dtype)
    gate = torch.randn(shape, device=device).mul(3).to(gate_dtype or dtype)
    return x, gate, torch.randn(shape[-1], device=device).to(weight_dtype or dtype)


def reference(x, gate, weight=None, **options):
    return gated_norm({"input": x, "gate": gate, "weight": weight, **options})[0]


def poisoned(x):
    return torch.full_like(x, float("nan"), memory_format=torch.contiguous_format)


@pytest.mark.parametrize("norm_before_gate", [True, False])
@sizes_and_dtypes([1, 100, 1001])
def test_matches_the_definition(device, size, dtypes, norm_before_gate):
    """Over whole rows, and over three groups of a longer row with a weight for all of it and for each group alike."""
    dtype, gate_dtype, weight_dtype = dtypes
    for num_rows, groups in ((1, 1), (67, 1), (5, 3)):
        options = {"norm_before_gate": norm_before_gate, "group_size": size if groups > 1 else None}
        shape = num_rows, groups * size
        x, gate, w = inputs(*shape, dtype=dtype, device=device, gate_dtype=gate_dtype, weight_dtype=weight_dtype)
        for weight in (w, w[:size].clone()):
            out, before = poisoned(x), gate.clone()
            assert gated_rmsnorm(x, gate, weight, out=out, **options) is out
            assert same_bits(gate, before)
            expected = reference(x, gate, weight, **options)
            assert relative_error(out, expected) <= tolerance(dtype, size=size)


# On the GPU a size of each kernel class, and one of a cluster.
@pytest.mark.parametrize(
    ("device", "size"),
    [
        pytest.param("cpu", 60, marks=pytest.mark.slow),
        *(pytest.param("cuda", n, marks=pytest.mark.gpu) for n in (128, 300, 16384)),
    ],
)
@pytest.mark.parametrize(("norm_before_gate", "activation", "rounding"), FORMS)
def test_forms(device, size, norm_before_gate, activation, rounding):
    options = {"norm_before_gate": norm_before_gate, "activation": activation, "rounding": rounding}
    for dtype in (torch.bfloat16, torch.float32)[: 1 + (device == "cuda")]:
        x, gate, w = inputs(7, size, dtype=dtype, device=device)
        for weight in (w, None):
            out = gated_rmsnorm(x, gate, weight, 1e-3, **options)
            expected = reference(x, gate, weight, eps=1e-3, **options)
            assert relative_error(out, expected) <= tolerance(dtype, rounding)
            by_torch = gated_rmsnorm_in_torch(x, gate, weight, 1e-3, **options)
            assert relative_error(by_torch, expected) <= tolerance(dtype, rounding)


def qwen3_next(x, gate, weight):
    """Compute as Qwen3NextRMSNormGated of transformers."""
    normalised = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return ((weight * normalised.to(x.dtype)) * F.silu(gate.float())).to(x.dtype)


def mamba_2(x, gate, weight):
    """Compute as MambaRMSNormGated of transformers, with groups of 128 elements."""
    y = (x.float() * F.silu(gate.float())).unflatten(-1, (-1, 128))
    y = (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).flatten(-2)
    return weight * y.to(x.dtype)


@pytest.mark.parametrize(
    ("class_of_transformers", "size", "options"),
    [
        (qwen3_next, 128, {}),
        pytest.param(mamba_2, 384, {"norm_before_gate": False, "group_size": 128}, marks=pytest.mark.slow),
    ],
)
def test_the_roundings_of_transformers(device, class_of_transformers, size, options):
    """rounding="hf" has every bit of the class but where rsqrt or the exponential is off by a bit; "once" has not."""
    x, gate, w = inputs(300, size, dtype=torch.bfloat16, device=device)
    expected = class_of_transformers(x, gate, w)
    equal = {
        rounding: float((gated_rmsnorm(x, gate, w, rounding=rounding, **options) == expected).float().mean())
        for rounding in ("once", "hf")
    }
    assert equal["hf"] > 0.998 > 0.9 > equal["once"]


def test_groups_are_rows(device):
    x, gate, w = inputs(5, 300, dtype=torch.bfloat16, device=device)
    w = w[:100].clone()
    for norm_before_gate in (True, False):
        rows = gated_rmsnorm(x.view(15, 100), gate.view(15, 100), w, norm_before_gate=norm_before_gate)
        for weight in (w, w.repeat(3)):
            out = gated_rmsnorm(x, gate, weight, group_size=100, norm_before_gate=norm_before_gate)
            assert same_bits(out.view(15, 100), rows)
    assert same_bits(gated_rmsnorm(x[0], gate[0], w, group_size=100), gated_rmsnorm(x, gate, w, group_size=100)[0])


@pytest.mark.parametrize(("size", "groups"), [(128, 3), (1001, 1)])  # vectors of 16 bytes, and of one element
def test_slices_of_one_projection(device, size, groups):
    """Input and gate in one tensor, at every alignment, with two leading dimensions that do not merge; and in place."""
    width = size * groups
    x, gate, w = inputs(4, 6, width, dtype=torch.bfloat16, device=device)
    options = {"group_size": size, "norm_before_gate": False}
    expected = gated_rmsnorm(x, gate, w, **options)
    wide = torch.randn(4, 6, 3 * width + 40, device=device).bfloat16()
    for first in (0, 8, 1):  # aligned as far as the size is, and not at all
        y, z = wide[..., first : first + width], wide[..., width + 16 + first : 2 * width + 16 + first]
        y.copy_(x)
        z.copy_(gate)
        before = wide.clone()
        assert same_bits(gated_rmsnorm(y, z, w, **options), expected)
        assert same_bits(gated_rmsnorm(y.transpose(0, 1), z.transpose(0, 1), w, **options), expected.transpose(0, 1))
        assert same_bits(gated_rmsnorm(x, z, w, **options), expected)
        assert same_bits(wide, before)
        assert gated_rmsnorm(y, z, w, out=y, **options) is y
        before[..., first : first + width] = expected
        assert same_bits(wide, before)  # nothing beside the rows was written
    one = torch.randn(width, device=device).bfloat16().expand(4, 6, width)  # a gate of all rows
    assert same_bits(gated_rmsnorm(x, one, w, **options), gated_rmsnorm(x, one.contiguous(), w, **options))


@pytest.mark.parametrize(
    ("size", "dtype"), [(300, torch.bfloat16), pytest.param(20481, torch.float32, marks=pytest.mark.slow)]
)
def test_the_same_bits_in_any_batch(device, size, dtype):
    x, gate, w = inputs(131, size, dtype=dtype, device=device)
    everything = gated_rmsnorm(x, gate, w, norm_before_gate=False)
    for rows in (slice(0, 1), slice(130, 131), slice(7, 40), slice(1, 131)):
        assert same_bits(gated_rmsnorm(x[rows], gate[rows], w, norm_before_gate=False), everything[rows])
        again = gated_rmsnorm(x[rows].clone(), gate[rows], w, norm_before_gate=False, enable_pdl=False)
        assert same_bits(again, everything[rows])


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "gate_dtype", "weight_dtype"), [*TRIPLES, (torch.float32,) * 3])
def test_unaligned_tensors_beside_others(dtype, gate_dtype, weight_dtype):
    """Each tensor alone is unaligned, beside others of its own dtype and of wider and narrower ones."""
    tensors = inputs(5, 64, dtype=dtype, device="cuda", gate_dtype=gate_dtype, weight_dtype=weight_dtype)
    expected = reference(*tensors)
    for i, tensor in enumerate(tensors):
        shifted = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")[1:].view(tensor.shape)
        arguments = [*tensors[:i], shifted.copy_(tensor), *tensors[i + 1 :]]
        assert relative_error(gated_rmsnorm(*arguments), expected) <= tolerance(dtype)


def test_a_layout_does_not_keep_the_kernel_of_another(device):
    """After an unaligned call, aligned rows have their own kernel, which is the faster one."""
    forget_kernels()
    x, gate, w = inputs(6, 128, dtype=torch.bfloat16, device=device)
    gated_rmsnorm(torch.randn(6 * 128 + 1, device=device).bfloat16()[1:].view(6, 128), gate, w)
    for _ in range(2):
        gated_rmsnorm(x, gate, w)
    layouts = {key[3].layout for key in OPERATORS["gated_rmsnorm"].kernels_by_spec}
    assert layouts == {"strided", *(["unaligned"] if device == "cuda" else [])}


def test_a_first_call_in_place(device):
    def through_torch(x, gate, w, out):
        torch.ops.jitnorm.gated_rmsnorm_out(x, gate, w, out, 1e-6, None, True, "silu", "once")

    for call in (gated_rmsnorm, through_torch):
        forget_kernels()
        x, gate, w = inputs(5, 100, dtype=torch.float32, device=device)
        expected = reference(x, gate, w)
        call(x, gate, w, out=x)
        assert relative_error(x, expected) <= 1e-6


def test_no_rows(device):
    for shape in ((0, 300), (0, 3, 300), (3, 0, 300)):
        x = torch.empty(shape, device=device)
        assert gated_rmsnorm(x, x.clone(), torch.ones(300, device=device), group_size=100).shape == shape
    # Without elements the strides do not matter.
    x = torch.empty(0, 600, device=device)[:, ::2]
    assert gated_rmsnorm(x, x, group_size=100).shape == x.shape


def test_special_values_stay_in_their_group(device):
    x, gate, w = inputs(5, 300, dtype=torch.float32, device=device)
    gate[2, :3] = torch.tensor([-1e4, 1e4, -0.0])
    for norm_before_gate in (True, False):
        options = {"group_size": 100, "norm_before_gate": norm_before_gate}
        expected = gated_rmsnorm(x, gate, w, **options)
        assert expected.isfinite().all() and relative_error(expected, reference(x, gate, w, **options)) <= 1e-6
        bad_x, bad_gate = x.clone(), gate.clone()
        bad_x[1, 7], bad_gate[3, 150] = float("inf"), float("nan")
        out = gated_rmsnorm(bad_x, bad_gate, w, **options)
        assert same_bits(out[[0, 2, 4]], expected[[0, 2, 4]]) and same_bits(out[1, 100:], expected[1, 100:])
        assert out[1, 7].isnan() and out[3, 150].isnan()
        assert int(out[3].isnan().sum()) == (1 if norm_before_gate else 100)


@pytest.mark.parametrize(
    ("norm_before_gate", "activation"),
    [(True, "silu"), *(pytest.param(*form[:2], marks=pytest.mark.slow) for form in FORMS[2::2])],
)
def test_gradients(device, norm_before_gate, activation):
    x, gate, w = inputs(4, 3, 60, dtype=torch.float32, device=device)
    for weight, group_size in ((w, None), (w, 20), (w[:20].clone(), 20), (None, 20)):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, gate, weight)]
        options = {"norm_before_gate": norm_before_gate, "activation": activation, "group_size": group_size}
        grad = torch.randn_like(x)
        (gated_rmsnorm(*leaves, **options) * grad).sum().backward()
        doubles = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
        (reference(*doubles, **options) * grad).sum().backward()
        for found, expected in zip(leaves, doubles, strict=True):
            assert found is None or relative_error(found.grad, expected.grad) <= 1e-5


def test_gradients_have_the_dtypes_of_their_tensors(device):
    """float16 has fewer bits than the float32 in which the gradient is computed."""
    x, gate, w = inputs(
        4, 60, dtype=torch.float16, device=device, gate_dtype=torch.float32, weight_dtype=torch.bfloat16
    )
    leaves = [t.requires_grad_() for t in (x, gate, w)]
    gated_rmsnorm(*leaves).sum().backward()
    assert [t.grad.dtype for t in leaves] == [t.dtype for t in leaves]
    with pytest.raises(RuntimeError, match="gated_rmsnorm with out= has no gradient"):
        gated_rmsnorm(*leaves, out=torch.empty_like(x))


@pytest.mark.slow
def test_second_derivatives(device):
    leaves = [torch.randn(shape, device=device).requires_grad_() for shape in ((3, 20), (3, 20), (20,))]
    second = []
    for function in (gated_rmsnorm, lambda *t, **options: reference(*t, **options).float()):
        result = sum(function(*leaves, norm_before_gate=before, group_size=10) for before in (True, False))
        grads = torch.autograd.grad(result.square().sum(), leaves[:2], create_graph=True)
        second.append(torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves))
    for a, b in zip(*second, strict=True):
        assert relative_error(a, b.double()) <= 1e-4


@pytest.mark.slow
def test_compiles_into_one_graph(device):
    x, gate, w = inputs(6, 300, dtype=torch.bfloat16, device=device)
    for options in ({"rounding": "hf"}, {"group_size": 100, "norm_before_gate": False}):

        def call(x, gate, w, options=options):
            out = torch.empty_like(x)
            gated_rmsnorm(x, gate, w, out=out, **options)
            return gated_rmsnorm(x + x, gate, w, **options), out

        for a, b in zip(compiled(call)(x, gate, w), call(x, gate, w), strict=True):
            assert same_bits(a, b)


@pytest.mark.slow
def test_opcheck(device):
    """Schema, fake implementation, autograd and dynamic shapes agree with what the operators do."""

    def rows(*shape):
        return torch.randn(*shape, device=device).bfloat16()

    ops = torch.ops.jitnorm
    leaves = [rows(3, 5, 60).requires_grad_(), rows(3, 5, 60).requires_grad_(), rows(60).requires_grad_()]
    for before, group_size in ((True, None), (False, 20)):
        options = 1e-6, group_size, before, "silu", "hf"
        torch.library.opcheck(ops.gated_rmsnorm.default, (*leaves, *options))
        torch.library.opcheck(ops.gated_rmsnorm.default, (rows(3, 60), rows(3, 60).float(), None, *options))
        torch.library.opcheck(
            ops.gated_rmsnorm_out.default, (rows(3, 60), rows(3, 60), rows(60), rows(3, 60), *options)
        )


def with_options(**options):
    return lambda x, g, w: ((x, g, w), options)


def with_arguments(make, **options):
    return lambda x, g, w: (make(x, g, w), options)


SIZES_REFUSED = "supported are 1 to 65536"
GROUP_REFUSED = "group_size must divide input's last dimension of 300, got"
REFUSED = {
    "too long": (
        RuntimeError,
        f"does not support hidden_size 65537: {SIZES_REFUSED}",
        with_arguments(lambda x, g, w: (x.new_empty(2, 65537),) * 2),
    ),
    "a long group": (
        RuntimeError,
        f"does not support group_size 65537: {SIZES_REFUSED}",
        with_arguments(lambda x, g, w: (x.new_empty(2, 2 * 65537),) * 2, group_size=65537),
    ),
    "no elements": (
        RuntimeError,
        "does not support hidden_size 0",
        with_arguments(lambda x, g, w: (x[:, :0], g[:, :0])),
    ),
    "no tensor": (TypeError, "gate must be a torch.Tensor, got NoneType", with_arguments(lambda x, g, w: (x, None))),
    "dtype": (
        TypeError,
        "input must be float16 or bfloat16 or float32, got float64",
        with_arguments(lambda x, g, w: (x.double(), g)),
    ),
    "gate's dtype": (
        TypeError,
        "gate must be bfloat16 or float32, got float16",
        with_arguments(lambda x, g, w: (x.bfloat16(), g.half())),
    ),
    "a narrower gate": (
        TypeError,
        "gate must be float32, got bfloat16",
        with_arguments(lambda x, g, w: (x, g.bfloat16())),
    ),
    "weight's dtype": (
        TypeError,
        "weight must be float16 or .* got float64",
        with_arguments(lambda x, g, w: (x, g, w.double())),
    ),
    "gate's shape": (
        ValueError,
        r"gate must have shape \[4, 300\] \(like input\)",
        with_arguments(lambda x, g, w: (x, g[:3])),
    ),
    "weight": (ValueError, r"weight must have shape \[300\]", with_arguments(lambda x, g, w: (x, g, w[:7]))),
    "weight of a group": (
        ValueError,
        r"weight must have shape \[300\] .* or of a group of it",
        with_arguments(lambda x, g, w: (x, g, w[:50]), group_size=100),
    ),
    "group": (ValueError, f"{GROUP_REFUSED} 7", with_options(group_size=7)),
    "no group": (ValueError, f"{GROUP_REFUSED} 0", with_options(group_size=0)),
    "a negative group": (ValueError, f"{GROUP_REFUSED} -100", with_options(group_size=-100)),
    "a group in words": (TypeError, "group_size must be an int, got str", with_options(group_size="100")),
    "a bool as a group": (TypeError, "group_size must be an int, got bool", with_options(group_size=True)),
    "an order": (TypeError, "norm_before_gate must be True or False, got int", with_options(norm_before_gate=1)),
    "activation": (ValueError, "activation must be 'silu' or 'sigmoid', got 'relu'", with_options(activation="relu")),
    "rounding": (ValueError, "rounding must be 'once' or 'hf', got 'twice'", with_options(rounding="twice")),
    "columns apart": (
        ValueError,
        "gate must have a last stride of 1, got shape .4, 300.",
        with_arguments(lambda x, g, w: (x, g.t().contiguous().t()), group_size=100),
    ),
    "out": (
        ValueError,
        "out must be input itself or share no memory",
        with_arguments(lambda x, g, w: (x[1:], g[1:], w, 1e-6, x[:-1])),
    ),
    "out is the gate": (
        ValueError,
        "out must share no memory with gate",
        with_arguments(lambda x, g, w: (x, g, w, 1e-6, g)),
    ),
    "out repeats": (
        ValueError,
        "out must not overlap itself",
        with_arguments(lambda x, g, w: (x, g, w, 1e-6, w.clone().expand(4, 300))),
    ),
    "out is the weight": (
        ValueError,
        "out must share no memory with weight",
        with_arguments(lambda x, g, w: (x[:1], g[:1], w, 1e-6, w.view(1, 300))),
    ),
    "eps": (ValueError, "eps must be zero or more, got -1", with_arguments(lambda x, g, w: (x, g, w, -1))),
    "pdl": (
        TypeError,
        "enable_pdl must be True, False or None",
        with_arguments(lambda x, g, w: (x, g, w, 1e-6, None, 1)),
    ),
    "strides": (
        ValueError,
        "leading dimensions that merge to at most 3 strides",
        with_arguments(lambda x, g, w: (torch.zeros(3, 3, 3, 300).permute(2, 1, 0, 3),) * 2, group_size=100),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_before_anything_is_built(name, cache_dir):
    kind, pattern, make = REFUSED[name]
    arguments, options = make(*inputs(4, 300, dtype=torch.float32, device="cpu"))
    with pytest.raises(kind, match=pattern) as caught:
        gated_rmsnorm(*arguments, **options)
    assert "\n" not in str(caught.value) and not list(cache_dir.glob("kernels/*"))


def test_a_later_call_refuses_what_a_first_call_refuses():
    x, gate, w = inputs(4, 300, dtype=torch.float32, device="cpu")
    for options in ({}, {"group_size": 100}):
        gated_rmsnorm(x, gate, w, **options)
    before = x.clone()
    for name, (kind, pattern, make) in REFUSED.items():
        arguments, options = make(x, gate, w)
        with pytest.raises(kind, match=pattern):
            gated_rmsnorm(*arguments, **options)
        assert same_bits(x, before), name


def test_which_strides_have_a_kernel():
    x = torch.zeros(4, 3, 5, 300)
    assert has_kernel(x, 100, x) and has_kernel(x.transpose(0, 1), 100, x.transpose(0, 1))
    assert has_kernel(x.permute(2, 1, 0, 3), None, x.permute(2, 1, 0, 3))
    assert not has_kernel(x.permute(2, 1, 0, 3), 100)
    assert not has_kernel(torch.zeros(300, 4).t(), None)


@pytest.mark.parametrize("text", ["strided", "unaligned+no_weight", "strided+fp32_gate+sigmoid"])
def test_a_form_has_a_name(text):
    assert str(GatedForm.parse(text)) == text


@pytest.mark.parametrize("text", ["", "rows", "strided+bias", "strided,sigmoid"])
def test_names_of_no_form(text):
    with pytest.raises(ValueError, match="form must be strided or unaligned"):
        GatedForm.parse(text)


@pytest.mark.slow
def test_warm_up_builds_what_calls_load(cache_dir, monkeypatch):
    forget_kernels()
    forms = ["strided", "strided+no_weight", "strided+fp32_gate"]
    ops = ["gated_rmsnorm", "gated_rmsnorm_gate_first"]
    result = jitnorm.warmup(ops, 100, "bf16", device="cpu", form=forms, rounding=["once", "hf"])
    assert len(result.built) == 12 and not result.failed
    monkeypatch.setenv("JITNORM_DISABLE_JIT", "1")
    x, gate, w = inputs(4, 300, dtype=torch.bfloat16, device="cpu")
    for norm_before_gate, rounding in itertools.product((True, False), ("once", "hf")):
        options = {"group_size": 100, "norm_before_gate": norm_before_gate, "rounding": rounding}
        for gate_or_float, weight in ((gate, w), (gate, None), (gate.float(), w)):
            gated_rmsnorm(x, gate_or_float, weight, **options)
    with pytest.raises(RuntimeError, match="jitnorm warmup --op gated_rmsnorm --hidden-size 50 --dtype bf16"):
        gated_rmsnorm(x, gate, w, group_size=50)


@pytest.mark.nvcc
@pytest.mark.parametrize(  # the oldest architecture, the first with clusters, and the newest; each with a dtype
    ("arch", "size", "dtype", "form"),
    [
        pytest.param("7.5", 128, torch.float16, "strided", marks=pytest.mark.slow),
        ("9.0a", 65536, torch.bfloat16, "unaligned+fp32_gate"),
        pytest.param("12.0a", 1001, torch.float32, "strided+no_weight+sigmoid", marks=pytest.mark.slow),
    ],
)
def test_compiles_for(arch, size, dtype, form):
    for op, rounding in (("gated_rmsnorm", "hf"), ("gated_rmsnorm_gate_first", "once")):
        kernel = load(OPERATORS[op].warmup_spec(size, dtype, dtype, Target.cuda(arch), rounding, form))
        x = torch.randn(2, size, dtype=dtype)
        assert kernel.gated_rmsnorm(x, x.clone(), None, x, 1e-6, None) == 1  # refused: the tensors are on the CPU


@pytest.mark.gpu
@pytest.mark.parametrize("size", [128, 300, 65536])  # the last is that of a cluster
def test_reads_nothing_before_the_kernel_before_it_has_written(size):
    x, _, w = inputs(3, size, dtype=torch.bfloat16, device="cuda")
    for _ in range(10):
        results = []
        for pdl in (True, False):
            a, b, c = x.clone(), x.flip(0).contiguous(), poisoned(x)

            def chain(a=a, b=b, c=c, pdl=pdl):
                for _ in range(20):
                    for source, gate, to in ((a, b, c), (b, c, a), (c, a, b)):
                        gated_rmsnorm(source, gate, w, out=to, norm_before_gate=False, enable_pdl=pdl)

            chain()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                chain()
            graph.replay()
            results.append(torch.stack([a, b, c]))
        assert same_bits(*results)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    x = torch.empty(2**31 // 12288 + 5, 12288, device="cuda", dtype=torch.bfloat16)
    first, gate, w = inputs(5, 12288, dtype=torch.bfloat16, device="cuda")
    expected = gated_rmsnorm(first, gate, w, group_size=128)
    gates = torch.empty_like(x)
    for rows in (slice(0, 5), slice(-5, None)):
        x[rows], gates[rows] = first, gate
    gated_rmsnorm(x, gates, w, out=x, group_size=128)
    assert same_bits(x[:5], expected) and same_bits(x[-5:], expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_many_sizes():
    """The error is that of rounding for random sizes of both kernel classes, with the gate before and after."""
    generator = torch.Generator().manual_seed(0)
    sizes = [*range(1, 260, 7), *torch.randint(260, 65537, (30,), generator=generator).tolist()]
    jitnorm.warmup(["gated_rmsnorm", "gated_rmsnorm_gate_first"], sizes, DTYPES, device="cuda")
    for size, dtype, norm_before_gate in itertools.product(sizes, DTYPES, (True, False)):
        x, gate, w = inputs(3, size, dtype=dtype, device="cuda")
        out = gated_rmsnorm(x, gate, w, out=poisoned(x), norm_before_gate=norm_before_gate)
        expected = reference(x, gate, w, norm_before_gate=norm_before_gate)
        assert relative_error(out, expected) <= tolerance(dtype, size=size), (size, dtype, norm_before_gate)
