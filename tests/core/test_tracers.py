"""Raw functions under what traces or intercepts torch: the first call and every later one are seen, and are right."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from helpers import relative_error, rmsnorm_reference
from operator_calls import FORMS, Form, bits, forget_kernels
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import jitnorm
from core.intercept import Negated, Seen, real
from jitnorm.core import torch_modes

pytestmark = pytest.mark.slow

forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
# The first call of a kernel takes the slow path and every later one the fast path.
first_and_later = pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])


def prepare(form: Form, warm: bool) -> None:
    forget_kernels()
    if warm:
        for _ in range(2):
            form.call(form.make())


def split(arguments):
    tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in arguments.items() if name not in tensors}


def by_position(form: Form, arguments):
    """The call as a function of its tensors alone, which is what tracers take."""
    tensors, rest = split(arguments)
    return lambda *values: form.call(dict(zip(tensors, values, strict=True)) | rest), tuple(tensors.values())


def assert_same(got, want) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and bits(a) == bits(b)


@forms
@first_and_later
@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_on_real_tensors(form, warm, pre_dispatch):
    prepare(form, warm)
    function, traced_with = by_position(form, form.make())
    graph = make_fx(function, pre_dispatch=pre_dispatch)(*traced_with)
    assert "torch.ops.jitnorm" in graph.code
    arguments = form.make()
    want = form.call(copy.deepcopy(arguments))
    assert_same(graph(*split(arguments)[0].values()), want)


@forms
@first_and_later
def test_jit_trace(form, warm):
    prepare(form, warm)
    function, traced_with = by_position(form, form.make())
    traced = torch.jit.trace(function, traced_with, check_trace=False)
    assert "jitnorm::" in str(traced.graph)
    arguments = form.make()
    want = form.call(copy.deepcopy(arguments))
    assert_same(traced(*split(arguments)[0].values()), want)


@forms
@first_and_later
def test_dispatch_modes_see_the_call(form, warm):
    prepare(form, warm)
    arguments = form.make()
    want = form.call(copy.deepcopy(arguments))
    if not warm:
        forget_kernels()
    with Seen() as mode:
        got = form.call(arguments)
    assert any(name.startswith("jitnorm.") for name in mode.names)
    assert_same(got, want)


@forms
@first_and_later
def test_fake_tensors(form, warm):
    """As vLLM traces, with no dynamo around: neither real memory nor the kernel is touched."""
    prepare(form, warm)
    want = form.call(form.make())
    with FakeTensorMode() as mode:
        tensors, rest = split(form.make())
    for inside in (False, True):
        fake = {
            name: mode.from_tensor(value) if type(value) is torch.Tensor else value for name, value in tensors.items()
        }
        if inside:
            with mode:
                got = form.call(fake | rest)
        else:
            got = form.call(fake | rest)
        assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want]
        assert all(isinstance(t, torch._subclasses.FakeTensor) for t in got)


@forms
@first_and_later
def test_subclasses_with_storage_of_their_own(form, warm):
    prepare(form, warm)
    tensors, rest = split(form.make())
    for name, value in tensors.items():
        if not value.is_floating_point() or value.dtype.itemsize < 2:
            continue
        given = {other: t.clone() for other, t in tensors.items()}
        want = form.call({other: t.clone() for other, t in tensors.items()} | rest)
        if not warm:
            forget_kernels()
        got = form.call(given | {name: Negated(value)} | rest)
        assert_same([real(t) if isinstance(t, Negated) else t for t in got], want)


def test_without_torchs_function_every_call_takes_the_slow_path(cache_dir, monkeypatch):
    monkeypatch.setattr(torch_modes, "_is_key_included", lambda: 0)
    x, w = torch.randn(4, 64), torch.randn(64)
    want = rmsnorm_reference(x, w, 1e-6)
    for _ in range(2):
        assert relative_error(jitnorm.rmsnorm(x, w), want) < 1e-6
        graph = make_fx(lambda x: jitnorm.rmsnorm(x, w))(x)
        assert "torch.ops.jitnorm" in graph.code


def test_modes_are_asked_for_by_thread():
    x, w = torch.randn(4, 64), torch.randn(64)
    jitnorm.rmsnorm(x, w)
    with Seen() as mode:
        thread = threading.Thread(target=jitnorm.rmsnorm, args=(x, w))
        thread.start()
        thread.join()
        assert mode.names == []
        jitnorm.rmsnorm(x, w)
        assert "jitnorm.rmsnorm.default" in mode.names
