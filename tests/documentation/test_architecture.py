"""The table of docs/contributing/architecture.md is what the modules import."""

from __future__ import annotations

import ast
import re

from documentation.pages import PAGES, ROOT

SOURCES = ROOT / "src" / "jitnorm"
# What every unit may import, and units that import others by design.
EVERYWHERE, ANY = {"_version"}, {"cli", "__init__", "__main__"}


def unit(module: str) -> str:
    """Return the first name after jitnorm; "jitnorm" for the package itself, which has all operators."""
    return [*module.split(".")[1:], "jitnorm"][0]


def imported() -> dict[str, set[str]]:
    """Return the units that each unit imports: a module or a folder at the top of the package."""
    graph: dict[str, set[str]] = {}
    units = {"jitnorm", *(path.stem for path in SOURCES.iterdir())}
    for file in SOURCES.rglob("*.py"):
        own = file.relative_to(SOURCES).parts[0].removesuffix(".py")
        if own in ANY or file.name == "__main__.py":
            continue
        found = graph.setdefault(own, set())
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module == "jitnorm":
                names = [f"jitnorm.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            found.update(unit(name) for name in names if name.split(".")[0] == "jitnorm")
        found &= units - {own} - EVERYWHERE
    return graph


def drawn() -> dict[str, set[str]]:
    rows = re.findall(r"^\| (`.*?`) \| (`.*) \|$", PAGES["docs/contributing/architecture.md"], re.MULTILINE)
    names = re.compile(r"`(\w+)`")
    return {name: set(names.findall(imports)) for units, imports in rows for name in names.findall(units)}


def test_every_import_is_drawn_and_every_arrow_is_an_import():
    graph, table = imported(), drawn()
    for name, imports in graph.items():
        allowed = table.get(name, set())
        assert imports <= allowed, f"{name} imports {imports - allowed}, which the table lacks"
        surplus = allowed - imports - {"core", "jit"}  # which rows of several units name for all of them
        assert not surplus, f"{name} does not import {surplus}"


def test_no_arrow_points_back():
    """The table has an order in which each unit imports later ones only."""
    table, done = drawn(), set()
    while remaining := table.keys() - done:
        ready = {name for name in remaining if not (table[name] & table.keys()) - done}
        assert ready, f"a circle among {', '.join(sorted(remaining))}"
        done |= ready
