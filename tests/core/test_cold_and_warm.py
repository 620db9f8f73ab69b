"""The first call and a later one agree: the same exception or none, the same bytes written and returned.

Calls of every form of every operator are drawn at random, good and bad. What is refused before a kernel is cached must
be refused by the fast path as well, whatever object is passed for a tensor or a number.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction

import numpy as np
import pytest
import torch
import tvm_ffi
from operator_calls import FORMS, Form, bits, forget_kernels

from core.intercept import Negated, Seen, real

DRAWS = 45
NUMBERS = {
    "eps": (1e-6, 1e-5, 0, 1, 0.0),
    "enable_pdl": (None, True, False),
    "expert_step": (1, 2, 4),
    "row_bytes": (0, 256),
    "num_split": (0, 1, 2, 4),
    "skip_index": (None, 0, 1, -1),
    "head_dim": (0, 64),
    "is_static": (True, False),
    "weight_offset": (0.0, 1.0, 1, 0),
    "is_neox": (True, False),
    "mrope_interleaved": (True, False),
    "rounding": ("once", "each_step"),
    "mrope_section": (None, [16, 8, 8], (32, 0, 0), [8, 8, 8], (0, 0, 0), (32, 0), {32, 0, 1}, np.array([16, 8, 8])),
}


class Small(IntEnum):
    TWO = 2


class Opaque:
    pass


ODD = (
    *(kind(2) for kind in (np.uint8, np.int8, np.int64, np.uint64, np.float16, np.float32, np.float64, np.bool_)),
    *(np.float32("nan"), np.float64("inf"), np.complex64(1), np.array(1), np.array([1.0])),
    *(Fraction(1, 3), Fraction(10**400), Fraction(2), Decimal("0.1"), Decimal(2), Small.TWO),
    *(10**400, 2**63, 2**64, 2**63 - 1, -(2**63) - 1, -(2**63), -1, -1.0, float("nan"), float("inf"), 1e39, 5e-324),
    *(None, True, False, "1", b"1", [], {}, (1,), 1j, Opaque(), torch.tensor(2), torch.tensor(1e-6), torch.float32),
)


class Foreign:
    """An object of another library, by DLPack alone."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack__(self, **keywords):
        return self.tensor.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.tensor.__dlpack_device__()


class Marked(torch.Tensor):
    """A subclass whose values are those of its storage."""


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def inference(tensor):
    with torch.inference_mode():
        return tensor.clone()


def quantised(tensor):
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


def negative(tensor):
    if tensor.dtype != torch.float32:
        raise TypeError("of others torch computes no negative")
    return torch._neg_view(tensor)


VARIANTS = {
    "numpy": lambda t: t.numpy(),
    "foreign": Foreign,
    "tvm": tvm_ffi.from_dlpack,
    "memory": lambda t: memoryview(t.numpy()),
    "list": lambda t: t.float().tolist(),
    "none": lambda t: None,
    "number": lambda t: 1.0,
    "type": lambda t: torch.Tensor,
    "scalar": lambda t: t.flatten()[0],
    "empty": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "one more": lambda t: torch.cat((t, t[:1])),
    "one more dimension": lambda t: t[None],
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "integers": lambda t: t.int(),
    "flags": lambda t: t.bool(),
    "complex": lambda t: t.cfloat(),
    "conjugate": lambda t: t.cfloat().conj(),
    "imaginary": lambda t: t.cfloat().conj().imag,
    "quantised": quantised,
    "sparse": lambda t: t.float().to_sparse(),
    "meta": lambda t: t.to("meta"),
    "freed": freed,
    "negative": negative,
    "marked": lambda t: t.as_subclass(Marked),
    "negated": lambda t: Negated(t.float()),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
    "leaf": lambda t: t.requires_grad_(),
    "view of a leaf": lambda t: t.requires_grad_()[:],
    "inference": inference,
    "strided": lambda t: torch.stack((t, t), -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
    "transposed": lambda t: t.transpose(0, -1),
}


def made(form: Form, seed: int, changes):
    torch.manual_seed(seed)
    arguments = form.make()
    for name, change in changes:
        with contextlib.suppress(RuntimeError, TypeError, IndexError, AttributeError):  # no such variant of this one
            arguments[name] = change(arguments[name]) if callable(change) else change
    return arguments


def content(value):
    if isinstance(value, Negated):
        value = real(value)
    if isinstance(value, torch.Tensor):
        if value.is_meta or value.layout != torch.strided or value.is_quantized or not value.untyped_storage().size():
            return str(value.dtype), tuple(value.shape)
        value = value.detach()
        return bits(torch.atleast_1d(value.resolve_conj().resolve_neg())), tuple(value.shape)
    if isinstance(value, Foreign):
        return content(value.tensor)
    if isinstance(value, tvm_ffi.Tensor):
        return content(torch.from_dlpack(value))
    return value.tobytes() if isinstance(value, (np.ndarray, memoryview)) else None


def outcome(form: Form, arguments):
    """What a call came to: the kind of its exception, and the content of what it returned and of its arguments."""
    try:
        result = form.function(**arguments)
        kind = None
    except (TypeError, ValueError, RuntimeError) as error:
        result, kind = None, type(error)
        assert "\n" not in str(error) and "report this" not in str(error), error
    results = result if isinstance(result, tuple) else (result,)
    return kind, [content(value) for value in (*results, *arguments.values())]


def draw(pick: random.Random, form: Form):
    arguments = form.make()
    tensors = [name for name, value in arguments.items() if isinstance(value, torch.Tensor)]
    numbers = [name for name in NUMBERS if name in form.function.__annotations__]
    for name in pick.sample(tensors + numbers, pick.choice((1, 1, 1, 2))):
        if name in tensors:
            yield name, VARIANTS[pick.choice([*VARIANTS])]
        else:
            value = pick.choice(NUMBERS[name] if pick.random() < 0.3 else ODD)
            yield name, (lambda _, value=value: value) if callable(value) else value


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_the_first_call_and_a_later_one(form):
    pick, decisions = random.Random(form.name), Counter()
    for seed in range(DRAWS):
        changes = [*draw(pick, form)]
        changed = [(name, getattr(change, "__name__", change)) for name, change in changes]
        forget_kernels()
        first = outcome(form, made(form, seed, changes))
        form.call(form.make())
        later = outcome(form, made(form, seed, changes))
        assert first == later, (changed, first[0], later[0])
        with Seen():  # through torch's dispatcher, which raises exceptions of its own
            outcome(form, made(form, seed, changes))
        decisions[first[0] is None] += 1
    assert min(decisions.values()) > DRAWS // 20, decisions
