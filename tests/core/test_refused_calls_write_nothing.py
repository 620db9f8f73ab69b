"""A call that raises has written nothing: not to tensors that autograd guards either."""

from __future__ import annotations

import itertools

import pytest
import torch
from operator_calls import FORMS, Form, bits, forget_kernels

import jitnorm

WRITING = [form for form in FORMS if form.written]


def plain(value):
    return value


def leaf(value):
    return value.requires_grad_()


def view_of_a_leaf(value):
    return value.requires_grad_()[:]


def view_made_without_gradients(value):
    base = value.requires_grad_() * 1
    with torch.no_grad():
        return base[:]


def output_of_split(value):
    return (value.requires_grad_() * 1).split(len(value))[0]


def output_of_unbind(value):
    return torch.stack((value.requires_grad_(), value)).unbind()[0]


def output_of_a_function(value):
    return (value.requires_grad_() * 1)[:]


def output_of_split_without_gradient(value):
    return value.split(len(value))[0]


def inference_tensor(value):
    with torch.inference_mode():
        return value.clone()


GUARDED = (
    plain,
    leaf,
    view_of_a_leaf,
    view_made_without_gradients,
    output_of_split,
    output_of_unbind,
    output_of_a_function,
    output_of_split_without_gradient,
    inference_tensor,
)


def takes_gradients(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32


def torch_lets_write(tensor: torch.Tensor) -> bool:
    """Whether torch's own operator in place does, of a value that needs a gradient."""
    try:
        tensor.copy_(torch.zeros(tensor.shape, requires_grad=True))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("guard", GUARDED, ids=lambda guard: guard.__name__)
@pytest.mark.parametrize("form", WRITING, ids=lambda form: form.name)
def test_nothing_is_written(form: Form, guard):
    form.call(form.make())
    for name, with_grad, warm in itertools.product(form.written, ("weight", "q_weight", "input", None), (False, True)):
        arguments = form.make()
        if not takes_gradients(arguments[name]) or with_grad == name or (with_grad and with_grad not in arguments):
            continue
        arguments[name] = guard(arguments[name])
        if with_grad:
            arguments[with_grad] = arguments[with_grad].requires_grad_() * 1
        tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
        before = [bits(value) for value in tensors]
        if not warm:
            forget_kernels()
        try:
            form.call(arguments)
        except RuntimeError as error:
            assert "\n" not in str(error)
            assert [bits(value) for value in tensors] == before, (name, with_grad, error)


@pytest.mark.parametrize("guard", GUARDED, ids=lambda guard: guard.__name__)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "form",
    [form for form in WRITING if form.function in (jitnorm.fused_add_rmsnorm, jitnorm.fused_inplace_qknorm)],
    ids=lambda form: form.name,
)
def test_what_needs_a_gradient_is_written_where_torch_lets_it(form: Form, guard, which):
    name = form.written[which]
    arguments = form.make()
    for weight in (value for key, value in arguments.items() if key.endswith("weight")):
        weight.requires_grad_()
    lets = torch_lets_write(guard(arguments[name].clone()))
    arguments[name] = guard(arguments[name])
    if lets:
        form.call(arguments)
        assert arguments[name].grad_fn is not None
        return
    with pytest.raises(RuntimeError, match=f"^{name} is .*, which {form.op} cannot overwrite"):
        form.call(arguments)
