"""The activations against their definitions in float64, and the promises of their docstrings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, TOLERANCE, assert_refused, compiled, relative_error, same_bits

import jitnorm
from jitnorm import gelu_and_mul, gelu_tanh_and_mul, silu_and_mul
from jitnorm.activation import SILU_AND_MUL, Activation
from jitnorm.core.operators import OPERATORS

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


class Form:
    """A public function with its parameters, and its definition in float64: of gate and up, or of the input alone."""

    def __init__(
        self, function: Callable[..., Any], definition: Callable[..., Any], operands: str = "halves", **arguments: Any
    ) -> None:
        self.function, self.definition, self.operands, self.arguments = function, definition, operands, arguments

    def __call__(self, x, out=None, enable_pdl=None, **more):
        return self.function(x, out=out, enable_pdl=enable_pdl, **self.arguments, **more)

    def pack(self, gate, up):
        """Return the input of these gates and factors."""
        if self.operands == "single":
            return gate
        return torch.stack((gate, up), -1).flatten(-2) if self.operands == "pairs" else torch.cat((gate, up), -1)

    def inputs(self, rows, width, dtype, device):
        return self.pack(*((torch.randn(rows, width, device=device) * 3).to(dtype) for _ in range(2)))

    def width(self, x):
        return x.shape[-1] if self.operands == "single" else x.shape[-1] // 2

    def out(self, x, value):
        """Return an output whose elements are `value`."""
        return torch.full((*x.shape[:-1], self.width(x)), value, dtype=x.dtype, device=x.device)

    def reference(self, x):
        x = x.double()
        if self.operands == "single":
            return self.definition(x)
        return self.definition(*((x[..., ::2], x[..., 1::2]) if self.operands == "pairs" else x.chunk(2, dim=-1)))


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return x * torch.special.erfc(-x / 2**0.5) / 2  # 1 + erf would lose its digits far below zero


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def clamped(alpha, limit, beta):
    def definition(gate, up):
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + beta)

    return definition


FIRST = {
    "silu_and_mul": Form(silu_and_mul, lambda gate, up: silu(gate) * up),
    "gelu_and_mul": Form(gelu_and_mul, lambda gate, up: gelu(gate) * up),
    "gelu_tanh_and_mul": Form(gelu_tanh_and_mul, lambda gate, up: gelu_tanh(gate) * up),
}
# With limits and a threshold that a third of the elements exceed or more.
FORMS = FIRST | {
    "mul_and_silu": Form(jitnorm.mul_and_silu, lambda gate, up: gate * silu(up)),
    "fatrelu_and_mul": Form(jitnorm.fatrelu_and_mul, lambda gate, up: F.threshold(gate, 0.5, 0.0) * up, threshold=0.5),
    "silu_and_mul_with_clamp": Form(jitnorm.silu_and_mul_with_clamp, clamped(1.0, 1.5, 0.0), limit=1.5),
    "silu_and_mul_with_clamp_alpha": Form(
        jitnorm.silu_and_mul_with_clamp, clamped(1.7, 2.0, -0.5), limit=2, alpha=1.7, beta=-0.5
    ),
    "swigluoai_and_mul": Form(jitnorm.swigluoai_and_mul, clamped(1.702, 7.0, 1.0), "pairs"),
    "swigluoai_and_mul_limit": Form(jitnorm.swigluoai_and_mul, clamped(0.5, 1.5, 1.0), "pairs", alpha=0.5, limit=1.5),
    "gelu_new": Form(jitnorm.gelu_new, gelu_tanh, "single"),
    "gelu_fast": Form(
        jitnorm.gelu_fast, lambda x: x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))) / 2, "single"
    ),
    "quick_gelu": Form(jitnorm.quick_gelu, lambda x: x * torch.sigmoid(1.702 * x), "single"),
    "relu2": Form(jitnorm.relu2, lambda x: torch.square(F.relu(x)), "single"),
}
# Each is a build: `make test` has one of each kind of input, and `make test-slow` the others.
QUICK = {*FIRST, "swigluoai_and_mul", "gelu_new"}
operators = pytest.mark.parametrize(
    "op", [pytest.param(op, marks=() if name in QUICK else pytest.mark.slow) for name, op in FORMS.items()], ids=FORMS
)
# Accesses of every width, rows that share a block and rows of several blocks, and the widths of models: Qwen2.5-VL's
# 3420 has accesses of 8 bytes, 11008 fills its last block in part, 28672 is the widest.
WIDTHS = (2, 4, 8, 768, 3420, 4104, 11008, 28672)
# Of the others each access once, of 16, 8 and 4 bytes: all have the schedule of the first.
FEW_WIDTHS = ((24, BF16), (3420, F16), (2050, BF16), (3, F32))
WIDTHS_AND_DTYPES = [
    *(  # float16 is converted in the same places as bfloat16: one function of it is not slow
        pytest.param(op, width, dtype, marks=pytest.mark.slow if i and dtype == F16 else ())
        for i, op in enumerate(FIRST.values())
        for width in WIDTHS
        for dtype in DTYPES
    ),
    *(
        pytest.param(op, *pair, marks=() if i == 0 and name in QUICK else pytest.mark.slow)
        for name, op in FORMS.items()
        if name not in FIRST
        for i, pair in enumerate(FEW_WIDTHS)
    ),
]


def inputs(rows, width, dtype, device):
    return FORMS["silu_and_mul"].inputs(rows, width, dtype, device)


def poisoned(x):
    return FORMS["silu_and_mul"].out(x, float("nan"))


@pytest.mark.parametrize(("op", "width", "dtype"), WIDTHS_AND_DTYPES)
def test_matches_the_definition(device, op, dtype, width):
    outs, exact = [], []
    for rows in (1, 3, 257 if width < 4000 else 33):  # one, fewer than share a block, odd
        x = op.inputs(rows, width, dtype, device)
        out = op.out(x, float("nan"))
        assert op(x, out) is out
        assert same_bits(op(x), out)
        outs.append(out)
        exact.append(op.reference(x))
    # Over all elements: a single rounding may be off by more.
    assert relative_error(torch.cat(outs), torch.cat(exact)) <= TOLERANCE[dtype]


@operators
def test_every_float16_number_is_rounded_as_well_as_can_be(device, op):
    """Each result is the rounded definition or the number next to it, with PyTorch's infinities and NaNs."""
    gate = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    gate = gate.view(256, 256).to(device)
    x = op.pack(gate, torch.ones_like(gate))
    out, exact = op(x), op.reference(x)
    expected = exact.to(torch.float16)
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())
    finite = expected.isfinite()
    step = torch.abs(out.view(torch.int16)[finite].int() - expected.view(torch.int16)[finite].int())
    assert step.max() <= 1
    assert (step > 0).double().mean() < 0.02


@operators
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exchanged", [False, True], ids=["gates", "factors"])
def test_special_numbers(device, op, dtype, exchanged):
    numbers = [float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e30, -1e30, -1e38, -88.5, -104.0, 1e-40, -1e-40]
    special = torch.tensor(numbers * 3)  # several SIMD registers, the last one in part
    pair = special, torch.full_like(special, 2.0)
    x = op.pack(*(reversed(pair) if exchanged else pair))[None].to(dtype).to(device)
    out, exact = op(x).float(), op.reference(x).to(dtype).float()
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isinf(), exact.isinf())
    assert torch.allclose(out.nan_to_num(), exact.nan_to_num(), rtol=1e-2, atol=1e-39)


@pytest.mark.parametrize("name", ["gelu_and_mul", "silu_and_mul", "quick_gelu", "silu_and_mul_with_clamp"])
def test_the_tail_keeps_its_digits(device, name):
    """1 + erf has none there; the error is at most one in the last place of the exponent."""
    op, gate = FORMS[name], torch.linspace(-12, -2, 4096, device=device)
    x = op.pack(gate, torch.ones_like(gate))[None]
    error = (op(x).double() - op.reference(x)).abs() / op.reference(x).abs()
    assert error.max() < 1e-5


@operators
@pytest.mark.parametrize("width", [64, 3420])
def test_shapes_and_strides(device, op, width):
    x = op.inputs(24, width, torch.bfloat16, device)
    expected, columns = op(x), x.shape[1]
    wide = torch.randn(24, 4 * width, device=device).bfloat16()
    strided, out = wide[:, :columns], wide[:, 3 * width :]
    strided.copy_(x)
    out.fill_(float("nan"))
    before = wide.clone()
    assert op(strided, out) is out
    assert same_bits(out, expected)
    before[:, 3 * width :] = expected
    assert same_bits(wide, before)  # nothing beside the output was written
    assert same_bits(op(x.view(2, 3, 4, -1)), expected.view(2, 3, 4, -1))
    assert same_bits(op(strided.unflatten(0, (4, 6))), expected.unflatten(0, (4, 6)))
    assert same_bits(op(x[5]), expected[5])
    assert same_bits(op(x[7].expand(3, -1)), expected[7].expand(3, -1))


def test_no_rows(device):
    for shape in ((0, 512), (0, 3, 512), (3, 0, 512)):
        assert silu_and_mul(torch.empty(shape, device=device)).shape == (*shape[:-1], 256)


@pytest.mark.parametrize(
    ("op", "width", "dtype"),
    [
        *((op, *pair) for op in FIRST.values() for pair in ((24, BF16), (1376, F32), (2050, F16))),
        *((op, 24, BF16) for name, op in FORMS.items() if name not in FIRST),
    ],
)
def test_the_same_bits_in_any_batch(device, op, width, dtype):
    x = op.inputs(1024, width, dtype, device)
    everything = op(x)
    for batch in (1, 2, 7, 64, 255, 1023):
        for first in (0, (1024 - batch) // 2, 1024 - batch):
            rows = slice(first, first + batch)
            assert same_bits(op(x[rows]), everything[rows])
            assert same_bits(op(x[rows].clone(), enable_pdl=False), everything[rows])
    for neighbour in (float("inf"), float("nan"), 6e4):
        others = torch.full_like(x[:9], neighbour)
        others[4] = x[17]
        assert same_bits(op(others)[4], everything[17])


# The three ways in which gates and factors lie: which rows are skipped does not depend on the formula.
layouts = pytest.mark.parametrize("name", ["silu_and_mul", "swigluoai_and_mul", "relu2"])


@layouts
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("step", [1, 5, 64])
def test_rows_of_no_expert_are_not_written(device, name, ids_dtype, step):
    op, rows = FORMS[name], 203
    x = op.inputs(rows, 72, torch.bfloat16, device)
    ids = torch.randint(-1, 3, (-(-rows // step) + 2,), device=device).to(ids_dtype)  # more than are needed
    ids[0], ids[1] = -1, 2
    skipped = (ids == -1).repeat_interleave(step)[:rows]
    assert skipped.any() and not skipped.all()
    out = op.out(x, 7.0)
    assert op(x, out, expert_ids=ids, expert_step=step) is out
    assert (out[skipped] == 7).all()
    assert same_bits(out[~skipped], op(x)[~skipped])
    fresh = op(x, expert_ids=ids, expert_step=step)
    assert (fresh[skipped] == 0).all()
    assert same_bits(fresh[~skipped], out[~skipped])
    folded = op(x.view(7, 29, -1), expert_ids=ids, expert_step=step)
    assert same_bits(folded.view(rows, -1), fresh)


@layouts
@pytest.mark.parametrize("counts_dtype", [torch.int32, torch.int64])
def test_rows_beyond_the_count_of_an_expert_are_neither_read_nor_written(device, name, counts_dtype):
    op, tokens = FORMS[name], 7
    given = torch.tensor([3, 0, tokens, 1, tokens + 2, -1], dtype=counts_dtype, device=device)  # beyond both limits
    x = op.inputs(6 * tokens, 72, torch.bfloat16, device).view(6, tokens, -1)
    skipped = torch.arange(tokens, device=device) >= given[:, None]
    expected = op(x)
    wide = torch.full((6, tokens, 2 * x.shape[-1]), float("nan"), dtype=x.dtype, device=device)
    for poisoned_x in (x.clone(), wide[..., : x.shape[-1]].copy_(x)):  # contiguous, and with rows apart
        poisoned_x[skipped] = float("nan")
        out = op.out(x, 7.0)
        for _ in range(2):  # the first call and another take different paths
            assert op(poisoned_x, out, num_tokens_per_expert=given) is out
            assert (out[skipped] == 7).all() and same_bits(out[~skipped], expected[~skipped])
        fresh = op(poisoned_x, num_tokens_per_expert=given)
        assert (fresh[skipped] == 0).all() and same_bits(fresh[~skipped], out[~skipped])


def test_no_tokens_of_experts(device):
    counts = torch.zeros(3, dtype=torch.int32, device=device)
    for shape in ((3, 0, 512), (3, 5, 0)):
        x = torch.empty(shape, device=device)
        assert silu_and_mul(x, num_tokens_per_expert=counts).shape == (*shape[:-1], shape[-1] // 2)
    assert silu_and_mul(torch.empty(0, 5, 512, device=device), num_tokens_per_expert=counts[:0]).shape == (0, 5, 256)


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_as_two_operators(device, name, dtype):
    """With rounding="hf" the bits are those of the activation as one operator and the product as another."""
    op = FIRST[name]
    gate, up = op.inputs(33, 104, dtype, device).chunk(2, -1)
    x = op.pack(gate, up)
    expected = op(op.pack(gate, torch.ones_like(up))) * up
    out = op.out(x, float("nan"))
    for _ in range(2):  # the first call and another take different paths
        assert op(x, out, rounding="hf") is out and same_bits(out, expected)
        assert same_bits(op(x, rounding="hf"), expected)
    assert same_bits(op(x, rounding="".join(("on", "ce"))), op(x))  # an equal string
    assert same_bits(op(x), expected) == (dtype == torch.float32)
    counts = torch.tensor([2, 11, 0], device=device)
    masked = op(x.view(3, 11, -1), rounding="hf", num_tokens_per_expert=counts)
    assert same_bits(masked[0, :2], expected[:2]) and same_bits(masked[1], expected[11:22])
    assert not masked[0, 2:].any() and not masked[2].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_as_hugging_face(device, dtype):
    """The result has PyTorch's bits where the activation has, whose GELU in half precision is off by a bit at times."""
    x = inputs(64, 512, dtype, device)
    gate, up = x.chunk(2, -1)
    for name, activation, share in (
        *(("silu_and_mul", F.silu, 0.001), ("gelu_and_mul", F.gelu, 0.1), ("gelu_tanh_and_mul", gelu_tanh, 0.1)),
    ):
        eager = activation(gate) * up
        shares = [(FIRST[name](x, rounding=r) != eager).double().mean() for r in ("hf", "once")]
        assert shares[0] < share < 0.2 < shares[1]


def test_a_limit_of_zero_and_of_infinity(device):
    gate, up = torch.randn(5, 64, device=device), torch.randn(5, 64, device=device)
    x = torch.cat((gate, up), -1)
    unlimited = jitnorm.silu_and_mul_with_clamp(x, float("inf"))
    assert relative_error(unlimited, FIRST["silu_and_mul"].reference(x)) < 1e-6
    assert (jitnorm.silu_and_mul_with_clamp(x, 0) == 0).all()


def test_interleaved_and_side_by_side_have_the_same_bits(device):
    for dtype in DTYPES:
        gate, up = ((torch.randn(5, 72, device=device) * 5).to(dtype) for _ in range(2))
        pairs = jitnorm.swigluoai_and_mul(torch.stack((gate, up), -1).flatten(-2))
        halves = jitnorm.silu_and_mul_with_clamp(torch.cat((gate, up), -1), 7.0, alpha=1.702, beta=1.0)
        assert same_bits(pairs, halves)


def test_a_row_is_skipped_whatever_its_values(device):
    x = torch.full((4, 16), float("nan"), device=device)
    out = torch.ones(4, 8, device=device)
    silu_and_mul(x, out, expert_ids=torch.tensor([-1], device=device), expert_step=4)
    assert (out == 1).all()


def bad_calls(device):
    """Return calls: (name, exception, pattern of the message, call)."""
    x = inputs(4, 256, torch.float32, device)
    wide = torch.randn(4, 2048, device=device)
    out = torch.empty(4, 256, device=device)
    flat = torch.randn(4096, device=device)
    ids = torch.zeros(4, dtype=torch.int32, device=device)
    f = silu_and_mul
    experts, counts = x.view(2, 2, 512), torch.ones(2, dtype=torch.int32, device=device)
    clamp, pairs = jitnorm.silu_and_mul_with_clamp, jitnorm.swigluoai_and_mul

    def masked(given, *more, input=experts, **keywords):
        return f(input, *more, num_tokens_per_expert=given, **keywords)

    calls = [
        ("input is a list", TypeError, "input must be a torch.Tensor, got list", lambda: f([1.0])),
        ("input is a scalar", ValueError, "at least one dimension", lambda: f(x[0, 0])),
        ("sparse", TypeError, "input must be a dense tensor", lambda: f(x.to_sparse())),
        ("float64", TypeError, "input must be .* got float64", lambda: f(x.double())),
        ("integers", TypeError, "input must be .* got int32", lambda: f(x.int())),
        ("odd columns", ValueError, r"even last dimension.*got shape \[4, 511\]", lambda: f(x[:, :511])),
        ("odd width", RuntimeError, "does not support d = 7 in bfloat16: .* of 2", lambda: f(x.bfloat16()[:, :14])),
        ("input strided", ValueError, "last stride of 1", lambda: f(wide[:, ::2])),
        (
            "no one row stride",
            ValueError,
            "collapse to one row",
            lambda: f(wide.view(2, 2, 2048)[:, :1, :8].expand(2, 3, 8)),
        ),
        ("out is a number", TypeError, "out must be a torch.Tensor", lambda: f(x, 3)),
        ("out of other dtype", TypeError, "out must be float32, got float16", lambda: f(x, out.half())),
        ("out as wide as input", ValueError, r"out must have shape \[4, 256\]", lambda: f(x, torch.empty_like(x))),
        ("out of other rank", ValueError, "out must have shape", lambda: f(x, out.view(2, 2, 256))),
        ("out strided", ValueError, "out must have a last stride", lambda: f(x, wide[:, :512:2])),
        ("out over itself", ValueError, "out must not overlap itself", lambda: f(x, out[0].expand(4, 256))),
        ("out over the gates", ValueError, "out must share no memory with input", lambda: f(x, x[:, :256])),
        ("out over the factors", ValueError, "share no memory with input", lambda: f(wide[:, :512], wide[:, 504:760])),
        (
            "out of another stride",
            ValueError,
            "no memory with input",
            lambda: f(flat[:2048].view(4, 512), flat[2000:3024].view(4, 256)),
        ),
        ("enable_pdl is a number", TypeError, "enable_pdl must be", lambda: f(x, out, 1)),
        ("ids are a list", TypeError, "expert_ids must be a torch.Tensor", lambda: f(x, expert_ids=[0] * 4)),
        ("ids are floats", TypeError, "expert_ids must be int32 or int64", lambda: f(x, expert_ids=ids.float())),
        ("ids have two dimensions", ValueError, "must have one dimension", lambda: f(x, expert_ids=ids[None])),
        ("ids are strided", ValueError, "must be contiguous", lambda: f(x, expert_ids=ids.repeat(2)[::2])),
        ("too few ids", ValueError, "4 elements or more, for 4 rows", lambda: f(x, expert_ids=ids[:3])),
        ("too few ids for a step", ValueError, "must have 2 elements", lambda: f(x, expert_ids=ids[:1], expert_step=3)),
        (
            "no ids for a huge step",
            ValueError,
            "must have 1 element or more",
            lambda: f(x, expert_ids=ids[:0], expert_step=2**63 - 1),
        ),
        ("step of zero", ValueError, "expert_step must be 1 or more", lambda: f(x, expert_step=0)),
        ("step is True", TypeError, "expert_step must be an int, got bool", lambda: f(x, expert_step=True)),
        ("step is a float", TypeError, "expert_step must be an int", lambda: f(x, expert_ids=ids, expert_step=2.0)),
        ("step is huge", ValueError, "fit 64 bits", lambda: f(x, expert_ids=ids, expert_step=2**70)),
        (
            "ids in out",
            ValueError,
            "out must share no memory with expert_ids",
            lambda: f(x, out, expert_ids=out[2].view(torch.int32)),
        ),
        ("counts are a list", TypeError, "num_tokens_per_expert must be a torch.Tensor", lambda: masked([1, 1])),
        ("counts are floats", TypeError, "num_tokens_per_expert must be int32 or", lambda: masked(counts.float())),
        ("counts have two dimensions", ValueError, "must have one dimension", lambda: masked(counts[None])),
        ("counts are strided", ValueError, "must be contiguous", lambda: masked(counts.repeat(2)[::2])),
        (
            "too many counts",
            ValueError,
            r"num_tokens_per_expert must have shape \[2\] \(one number for each expert\), got \[4\]",
            lambda: masked(counts.repeat(2)),
        ),
        ("counts and ids", ValueError, "without expert_ids, got both", lambda: masked(counts, expert_ids=ids)),
        ("counts of rows", ValueError, r"shape \[experts, max_tokens", lambda: masked(counts, input=x)),
        (
            "counts in out",
            ValueError,
            "out must share no memory with num_tokens_per_expert",
            lambda: masked(out[0, :2].view(torch.int32), out.view(2, 2, 256)),
        ),
        ("rounding is a number", TypeError, "rounding must be a str, got int", lambda: f(x, rounding=1)),
        ("other rounding", ValueError, "must be 'once' or 'hf', got 'each_step'", lambda: f(x, rounding="each_step")),
        ("limit is a string", TypeError, "limit must be a float, got str", lambda: clamp(x, "7")),
        ("limit is missing", TypeError, "limit", lambda: clamp(x)),
        ("limit below zero", ValueError, "limit must be zero or more, got -1.0", lambda: pairs(x, limit=-1.0)),
        ("limit is NaN", ValueError, "limit must be zero or more, got nan", lambda: clamp(x, float("nan"))),
        ("alpha is True", TypeError, "alpha must be a float, got bool", lambda: pairs(x, True)),
        ("beta is None", TypeError, "beta must be a float, got NoneType", lambda: clamp(x, 7.0, beta=None)),
        ("threshold is huge", ValueError, "64-bit integer", lambda: jitnorm.fatrelu_and_mul(x, 2**70)),
        (
            "threshold is a tensor",
            TypeError,
            "threshold must be a float, got Tensor",
            lambda: jitnorm.fatrelu_and_mul(x, out),
        ),
        ("odd columns in pairs", ValueError, "even last dimension", lambda: pairs(x[:, :511])),
        ("out of another width", ValueError, r"shape \[4, 512\] \(like input\)", lambda: jitnorm.relu2(x, out)),
        ("out is input", ValueError, "share no memory with input", lambda: jitnorm.gelu_new(x, x)),
        ("odd width of one", RuntimeError, "relu2 does not support d = 7", lambda: jitnorm.relu2(x.half()[:, :7])),
    ]
    if device == "cuda":
        calls += [
            ("out elsewhere", ValueError, "out must be on cuda:0", lambda: f(x, out.cpu())),
            ("ids elsewhere", ValueError, "expert_ids must be on cuda:0", lambda: f(x, expert_ids=ids.cpu())),
            ("counts elsewhere", ValueError, "must be on cuda:0", lambda: masked(counts.cpu())),
            ("misaligned", ValueError, "aligned to 16 bytes", lambda: f(flat[1:2049].view(4, 512))),
            ("misaligned by 8", ValueError, "aligned to 8 bytes", lambda: f(flat[1:2041].view(4, 510)[:, :508])),
            ("out misaligned", ValueError, "out must be aligned", lambda: f(x, flat[1:1025].view(4, 256))),
        ]
    return calls


NAMES = [name for name, *_ in bad_calls("cpu")]


@pytest.mark.parametrize("name", NAMES)
def test_refused_before_anything_is_built(name, cache_dir):
    assert_refused(bad_calls("cpu"), name)
    assert not cache_dir.exists()


@pytest.mark.parametrize("name", NAMES)
def test_refused_by_a_kernel_that_is_there(name):
    for dtype in DTYPES:
        silu_and_mul(inputs(4, 256, dtype, "cpu"))
    for form in FORMS.values():
        form(inputs(4, 256, torch.float32, "cpu"))
    assert_refused(bad_calls("cpu"), name)


@pytest.mark.gpu
def test_refused_on_a_gpu(cache_dir):
    for _ in range(2):
        for name, error, pattern, call in bad_calls("cuda"):
            with pytest.raises(error, match=pattern):
                call()
            assert cache_dir.exists() == (SILU_AND_MUL.fast_cache != {}), name
        for dtype in DTYPES:
            silu_and_mul(inputs(4, 256, dtype, "cuda"))
        for form in FORMS.values():
            form(inputs(4, 256, torch.float32, "cuda"))
    torch.cuda.synchronize()


def test_a_refused_call_writes_nothing():
    x, out = inputs(4, 256, torch.float32, "cpu"), torch.full((4, 256), 7.0)
    for arguments in ((x[:, :511], out), (x.half(), out), (x, out, 3)):
        with pytest.raises((TypeError, ValueError)):
            silu_and_mul(*arguments)
    assert (out == 7).all()


def test_widths_share_a_kernel(cache_dir):
    """A kernel is for the bytes of one access, not for a width."""
    for width in (256, 11008, 8):
        silu_and_mul(inputs(2, width, torch.bfloat16, "cpu"))
    assert len(list(cache_dir.glob("kernels/*/*/*.so"))) == 1
    silu_and_mul(inputs(2, 3420, torch.bfloat16, "cpu"))
    silu_and_mul(inputs(2, 256, torch.bfloat16, "cpu"))
    assert len(list(cache_dir.glob("kernels/*/*/*.so"))) == 2


GRADIENTS = FORMS | {f"{name}_hf": Form(op.function, op.definition, rounding="hf") for name, op in FIRST.items()}


@pytest.mark.parametrize("op", GRADIENTS.values(), ids=GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients(device, op, dtype):
    x = op.inputs(6, 24, dtype, device).view(2, 3, -1).requires_grad_()
    ids, counts = torch.tensor([0, -1, 3], device=device), torch.tensor([1, 5], device=device)
    for more, skipped in (
        ({}, slice(0)),
        ({"expert_ids": ids, "expert_step": 2}, slice(2, 4)),
        ({"num_tokens_per_expert": counts}, slice(1, 3)),
    ):
        grad = torch.randn(2, 3, 24, device=device).to(dtype)
        x64 = x.detach().double().requires_grad_()
        x.grad = None
        op(x, **more).backward(grad)
        kept = torch.ones(2, 3, 1, device=device, dtype=torch.float64)
        kept.view(6)[skipped] = 0
        (op.reference(x64) * kept).backward(grad.double())
        assert x.grad.dtype == dtype
        assert relative_error(x.grad, x64.grad) < (1e-6 if dtype == torch.float32 else 4e-3)


@operators
def test_second_derivatives(device, op):
    x, direction = op.inputs(5, 24, torch.float32, device).requires_grad_(), op.inputs(5, 24, torch.float32, device)
    x64 = x.detach().double().requires_grad_()
    for leaf, out in ((x, op(x)), (x64, op.reference(x64))):
        (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        (grad * direction).sum().backward()
    assert relative_error(x.grad, x64.grad) < 1e-5


def test_out_has_no_gradient():
    x = inputs(2, 16, torch.float32, "cpu").requires_grad_()
    with pytest.raises(RuntimeError, match="silu_and_mul with out= has no gradient"):
        silu_and_mul(x, torch.empty(2, 16))
    with torch.no_grad():
        silu_and_mul(x, torch.empty(2, 16))


def test_an_out_that_requires_a_gradient_is_data(cache_dir):
    for _ in range(2):  # the first call and another take different paths
        silu_and_mul(inputs(2, 16, torch.float32, "cpu"), torch.empty(2, 16).requires_grad_())


@pytest.mark.slow
@pytest.mark.parametrize("activation", [a for a in OPERATORS.values() if isinstance(a, Activation)], ids=lambda a: a.op)
def test_opcheck(device, activation):
    op, op_out = (getattr(torch.ops.jitnorm, activation.op + form) for form in ("", "_out"))
    x = torch.randn(3, activation.operands * 16, device=device)
    out, parameters = torch.zeros(3, 16, device=device), [1.5] * len(activation.parameters)
    ids, counts = torch.tensor([1, -1, 0], device=device), torch.tensor([1, 0, 1], device=device)
    torch.library.opcheck(op.default, (x, *parameters))
    torch.library.opcheck(op_out.default, (x, out, *parameters, ids))
    torch.library.opcheck(op_out.default, (x[:, None], out[:, None], *parameters, None, 1, None, counts))
    torch.library.opcheck(op.default, (x.requires_grad_(), *parameters, ids, 1, False))
    torch.library.opcheck(op.default, (x[:, None].detach().requires_grad_(), *parameters, None, 1, None, counts))


def test_compiles_without_a_graph_break(device):
    def block(x, out, ids):
        silu_and_mul(x + 1, out, expert_ids=ids)
        return gelu_and_mul(x) + out, gelu_tanh_and_mul(x, expert_ids=ids, expert_step=2)

    run = compiled(block)
    for rows in (3, 5, 64):
        x, ids = inputs(rows, 32, torch.float32, device), torch.randint(-1, 2, (rows,), device=device)
        out = torch.randn(rows, 32, device=device)
        expected_out = out.clone()
        expected = block(x, expected_out, ids)
        for got, want in zip((*run(x, out, ids), out), (*expected, expected_out), strict=True):
            assert same_bits(got, want)


def test_all_forms_compile_without_a_graph_break(device):
    def block(x, counts):
        results = [op(x) for op in FORMS.values()] + [op(x, rounding="hf") for op in FIRST.values()]
        masked = [op(x[None], num_tokens_per_expert=counts)[0] for op in FORMS.values()]
        return *results, *masked

    run = compiled(block)
    for rows in (3, 5, 64):
        x, counts = inputs(rows, 32, torch.float32, device), torch.tensor([rows // 2], device=device)
        for got, want in zip(run(x, counts), block(x, counts), strict=True):
            assert same_bits(got, want)


def test_kernels_are_built_while_tracing(cache_dir):
    with torch._subclasses.FakeTensorMode() as mode:
        fake = silu_and_mul(mode.from_tensor(torch.randn(2, 512)))
    assert fake.shape == (2, 256)
    assert len(list(cache_dir.glob("kernels/*/*/*.so"))) == 1
    assert silu_and_mul(torch.empty(2, 512, device="meta")).shape == (2, 256)
    with pytest.raises(RuntimeError, match="d = 7 in bfloat16"):
        compiled(silu_and_mul)(torch.randn(2, 14).bfloat16())
    with pytest.raises(Exception, match="limit must be zero or more"):
        compiled(lambda x: jitnorm.swigluoai_and_mul(x, limit=-1.0))(torch.randn(2, 14))


def test_forward_mode_is_refused_not_lost():
    x = inputs(2, 16, torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="silu_and_mul has no forward-mode derivative"):
        torch.func.jvp(silu_and_mul, (x,), (torch.ones_like(x),))


def test_module_and_function_can_be_imported():
    from jitnorm.activation import silu_and_mul as imported

    assert jitnorm.silu_and_mul is imported


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 11008])
def test_in_a_graph(width):
    x = inputs(65, width, torch.bfloat16, "cuda")
    ids = torch.randint(-1, 2, (65,), device="cuda")
    out, graph = poisoned(x), torch.cuda.CUDAGraph()
    silu_and_mul(x, out)
    with torch.cuda.graph(graph):
        silu_and_mul(x, out, expert_ids=ids)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        ids.copy_(torch.randint(-1, 2, (65,), device="cuda"))
        out.fill_(7)
        graph.replay()
        expected = torch.where((ids == -1)[:, None], 7, silu_and_mul(x))
        assert same_bits(out, expected)


@pytest.mark.gpu
def test_reads_nothing_before_the_kernel_before_it_has_written():
    """Each call's output is half of the next one's input: with PDL they overlap."""
    x, y = (inputs(1, 8192, torch.bfloat16, "cuda") for _ in range(2))
    for _ in range(20):
        results = []
        for pdl in (True, False):
            a, b = x.clone(), y.clone()
            for _ in range(10):
                silu_and_mul(a, b[:, :8192], enable_pdl=pdl)
                silu_and_mul(b, a[:, 8192:], enable_pdl=pdl)
            results.append(torch.cat((a, b)))
        assert same_bits(*results)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    rows = 2**31 // 16384 + 5
    x = torch.zeros(rows, 16384, device="cuda", dtype=torch.bfloat16)
    some = inputs(5, 8192, torch.bfloat16, "cuda")
    x[:5], x[-5:] = some, some
    out = torch.full((rows, 8192), float("nan"), device="cuda", dtype=torch.bfloat16)
    expected = silu_and_mul(some)
    silu_and_mul(x, out)
    assert same_bits(out[:5], expected) and same_bits(out[-5:], expected)
    assert (out[5:-5] == 0).all()


@pytest.mark.gpu
def test_more_rows_than_the_second_dimension_of_a_grid_has_blocks():
    x = inputs(70_001, 4096, torch.bfloat16, "cuda")
    out = poisoned(x)
    silu_and_mul(x, out)
    for rows in (slice(0, 9), slice(35_000, 35_009), slice(65_530, 65_540), slice(-9, None)):
        assert same_bits(out[rows], silu_and_mul(x[rows]))
    assert not out.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@operators
def test_no_columns(op, dtype, device):
    """As in torch.nn.functional, the result has no columns either."""
    x, ids = torch.randn(4, 0, device=device).to(dtype), torch.zeros(4, dtype=torch.int64, device=device)
    for _ in range(2):
        assert op(x).shape == (4, 0) and op(x).dtype == dtype
        assert op(x[0], expert_ids=ids[:1]).shape == (0,)
        assert op(x, out := x.clone(), expert_ids=ids) is out
        with pytest.raises(ValueError, match="expert_ids must have 4 elements"):
            op(x, expert_ids=ids[:3])
    leaf = x.clone().requires_grad_()
    op(leaf).sum().backward()
    assert leaf.grad.shape == (4, 0)
    assert compiled(op)(x).shape == (4, 0)
