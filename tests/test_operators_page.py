"""docs/operators.md is what docs/make_operators.py makes of the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import jitnorm

spec = importlib.util.spec_from_file_location(
    "make_operators", Path(__file__).parents[1] / "docs" / "make_operators.py"
)
make_operators = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_operators)


def test_the_page_is_up_to_date():
    assert make_operators.PAGE.read_text() == make_operators.page(), "to write it: python docs/make_operators.py"


def test_every_operator_has_a_row():
    """Of torch.ops.jitnorm every name but the forms of one operator, such as rmsnorm_out."""
    named = set(make_operators.operators())
    assert {"rmsnorm", "silu_and_mul", "store_cache"} <= named <= set(jitnorm.__all__)
    registered = {s.name.partition("::")[2] for s in torch._C._jit_get_all_schemas() if s.name.startswith("jitnorm::")}
    forms = {name for name in registered if any(name.startswith(f"{operator}_") for operator in named)}
    assert registered - forms <= named


def test_a_docstring_that_differs_from_its_signature_is_refused():
    def wrong(input, out=None):
        """Does nothing.

        Args:
            input: a tensor.

        Raises:
            ValueError: always.
        """

    with pytest.raises(ValueError, match="the docstring of wrong and its signature differ in out"):
        make_operators._cells("wrong", wrong)

    def silent(input):
        """Does nothing.

        Args:
            input: a tensor.
        """

    with pytest.raises(ValueError, match="the docstring of silent does not say what is raised"):
        make_operators._cells("silent", silent)
