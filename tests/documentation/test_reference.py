"""The generated reference has every public name, and docstrings agree with signatures."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator

import pytest
import torch

import jitnorm
from documentation.pages import PAGES, load

hooks = load("docs/hooks.py")

# A page's marker: a module, and the names that it documents; all of its `__all__` where there are none.
MARKERS = [
    (module, names.split())
    for page in PAGES.values()
    for module, names in re.findall(r"<!-- api: ([\w.]+)((?: \w+)*) -->", page)
]
PUBLIC_MODULES = [
    "jitnorm",
    "jitnorm.batch_invariant",
    "jitnorm.benchmark.marker",
    "jitnorm.benchmark.server",
    "jitnorm.cache",
    "jitnorm.dispatch",
    "jitnorm.layers",
]


def public(module: str, names: list[str]) -> Iterator[Callable[..., object]]:
    members = importlib.import_module(module)
    for name in names or members.__all__:
        member = getattr(members, name)
        if inspect.isfunction(member) or inspect.isclass(member):
            yield member


DOCUMENTED = {member: None for module, names in MARKERS for member in public(module, names)}


def sections(docstring: str) -> dict[str, str]:
    """Return the text under each heading; under "" the text before them."""
    parts = re.split(r"^(\w+):\n(?=    )", docstring, flags=re.MULTILINE)
    return dict(zip(["", *parts[1::2]], parts[::2], strict=True))


def entry_names(section: str) -> list[str]:
    """Return the names of the entries `name: text` and `name, other: text`."""
    entries = re.split(r"^    (?! )", section, flags=re.MULTILINE)[1:]
    return [name for entry in entries for name in entry.partition(": ")[0].split(", ")]


def problem_of(member: Callable[..., object]) -> str | None:
    """Return how a docstring differs from its signature, if it does."""
    doc = sections(inspect.getdoc(member) or "")
    if not doc[""].strip():
        return "has no docstring"
    documented = set(entry_names(doc.get("Args", "")))
    parameters = set(inspect.signature(member).parameters)
    if documented and documented != parameters:
        return f"differs from its signature in {', '.join(sorted(documented ^ parameters))}"
    return None


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_every_public_name_has_a_place(module):
    assert not [m.__qualname__ for m in public(module, []) if m not in DOCUMENTED]


def test_every_marker_is_rendered():
    for module, names in MARKERS:
        assert len(list(hooks._api(module, *names))) == len(list(public(module, names)))


def operators() -> dict[str, Callable[..., object]]:
    """Return the public functions that torch.ops.jitnorm has under the same name."""
    return {m.__name__: m for m in public("jitnorm", []) if hasattr(torch.ops.jitnorm, m.__name__)}


def test_every_operator_is_public():
    """Every name of torch.ops.jitnorm but the forms of one operator, such as rmsnorm_out."""
    named = set(operators())
    assert {"rmsnorm", "silu_and_mul", "store_cache"} <= named <= set(jitnorm.__all__)
    registered = {s.name.partition("::")[2] for s in torch._C._jit_get_all_schemas() if s.name.startswith("jitnorm::")}
    forms = {name for name in registered if any(name.startswith(f"{operator}_") for operator in named)}
    assert registered - forms <= named


@pytest.mark.parametrize("member", DOCUMENTED, ids=lambda member: member.__qualname__)
def test_docstrings_agree_with_signatures(member):
    assert problem_of(member) is None


@pytest.mark.parametrize("name", operators())
def test_operators_document_arguments_and_errors(name):
    doc = sections(inspect.getdoc(operators()[name]))
    assert set(entry_names(doc["Args"])) == set(inspect.signature(operators()[name]).parameters)
    assert entry_names(doc["Raises"])


def test_a_docstring_that_differs_from_its_signature_is_found():
    def wrong(input, out=None):
        """Do nothing.

        Args:
            input: a tensor.
        """

    assert problem_of(wrong) == "differs from its signature in out"


def test_links_of_root_files_are_those_of_the_site():
    markdown = "[a](docs/guides/fp8.md#x) [b](CONTRIBUTING.md) [c](https://example.invalid/) [d](#y)"
    assert hooks.site_links(markdown, "contributing/index.md") == (
        "[a](../guides/fp8.md#x) [b](index.md) [c](https://example.invalid/) [d](#y)"
    )
