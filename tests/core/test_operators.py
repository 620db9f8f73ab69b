"""What is true of every operator of the registry."""

from __future__ import annotations

import pytest
import torch
from operator_calls import FORMS

from jitnorm.core.operators import Operator


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_second_call_takes_the_fast_path(form, monkeypatch):
    """The result would not show it: the slow path is right as well, and takes twenty times as long."""
    arguments = form.make()
    form.call(arguments)
    monkeypatch.setattr(Operator, "kernel", lambda *_: pytest.fail("the call took the slow path"))
    form.call(arguments)
    with torch.inference_mode():
        form.call(form.make())
