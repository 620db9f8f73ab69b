"""The modules of the engine: what each imports, and which can be used without torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from processes import run_fresh

import jitnorm.jit

FOLDER = Path(jitnorm.jit.__file__).parent
LISTED = [line.split()[0] for line in jitnorm.jit.__doc__.splitlines() if line.startswith("    ")]


def test_every_module_is_listed():
    assert sorted(LISTED) == sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "__init__")


@pytest.mark.parametrize("module", LISTED)
def test_each_module_imports_only_those_listed_below_it(module):
    imported = set()
    for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "jitnorm.jit":
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("jitnorm."):
            imported.add(node.module.removeprefix("jitnorm.jit."))
    assert imported <= {*LISTED[LISTED.index(module) + 1 :], "jitnorm._version"}


def test_a_cache_can_be_managed_without_torch():
    """`jitnorm cache` imports these, and importing torch takes a second."""
    script = f"""
        import sys, types
        package = sys.modules["jitnorm"] = types.ModuleType("jitnorm")  # whose own imports are not the engine's
        package.__path__ = [{str(FOLDER.parent)!r}]
        import jitnorm.jit.cleanup, jitnorm.jit.environment, jitnorm.jit.locations, jitnorm.jit.toolchain
        print(sorted({{"torch", "tvm_ffi", "numpy"}} & set(sys.modules)))
    """
    done = run_fresh(script)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
