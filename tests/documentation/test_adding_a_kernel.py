"""The steps of docs/contributing/adding-a-kernel.md work as they are written, in a copy of the repository."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from processes import run_before_import

from documentation.pages import ADDING, ROOT

# A file's name on a line of its own, then the file.
FILES = re.findall(r"^`([\w/.]+)`\n\n```\w+\n(.*?)^```", ADDING, re.DOTALL | re.MULTILINE)
# A sentence that ends with "in `file`:" or "in the family's module `file`. ...:", then what is appended to the file.
ADDITIONS = re.findall(r"`([\w/.]+\.(?:py|h))`(?:\.[^`]*)?:\n\n```\w+\n(.*?)^```", ADDING, re.DOTALL | re.MULTILINE)
# A sentence that ends with "in `file`:", then lines to insert, with the lines around them.
INSERTIONS = re.findall(r"`([\w/.]+)`:\n\n```diff\n(.*?)^```", ADDING, re.DOTALL | re.MULTILINE)

TESTS = ("tests/test_rmsnorm.py", "tests/test_scale.py", "tests/core/test_operators.py")
BENCHMARK = "benchmarks/bench_scale.py"


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Return a copy of the repository in which both examples have been added."""
    folder = tmp_path_factory.mktemp("repository")
    for name in ("src", "csrc", "tests", "pyproject.toml"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    (folder / "benchmarks").mkdir()
    for name, content in FILES:
        assert not (folder / name).exists()
        (folder / name).write_text(content)
    for name, text in ADDITIONS:
        file = folder / name
        file.write_text(f"{file.read_text()}\n\n{text}")
    for name, diff in INSERTIONS:
        for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
            insert(folder / name, hunk.splitlines())
    return folder


def insert(file: Path, hunk: list[str]) -> None:
    """Insert the lines of a hunk that begin with "+"; the others must be in the file, once and together."""
    before, after = ("".join(f"{line[1:]}\n" for line in hunk if line[0] in marks) for marks in (" ", " +"))
    assert file.read_text().count(before) == 1, f"{file} has not the lines {before}"
    file.write_text(file.read_text().replace(before, after))


def run(folder: Path, script: str) -> str:
    """Run a script in the folder, whose package is imported, and return what it printed."""
    inside = f"import os, sys; os.chdir({str(folder)!r}); sys.path[0] = {str(folder / 'src')!r}"
    done = run_before_import(inside, script, PYTHONPATH=str(folder / "src"))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_all_steps():
    assert len(FILES) == 6
    assert len({name for name, _ in ADDITIONS[:4]}) == 4, "a variant of a norm is changed in at most four places"
    assert [name for name, _ in ADDITIONS[4:]] == ["src/jitnorm/__init__.py"]
    assert [(name, diff.count("\n+")) for name, diff in INSERTIONS] == [("csrc/launcher/launcher.cc", 2)]


@pytest.mark.slow
def test_the_tests_of_both_examples_pass(copy):
    """Those of the page, and those over all operators that find the examples."""
    chosen = "half_rmsnorm or (scale and not scales and not v_scale)"
    words = ["-q", "-rA", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", chosen, *TESTS]
    said = run(copy, f"import pytest; sys.exit(pytest.main({words}))")
    passed = re.findall(r"^PASSED (\S+?)::(.*)$", said, re.MULTILINE)
    for file, name in [(TESTS[0], "half_rmsnorm"), (TESTS[1], ""), (TESTS[2], "half_rmsnorm"), (TESTS[2], "scale")]:
        assert [1 for other, test in passed if other == file and name in test], (file, name, said)


@pytest.mark.slow
def test_the_commands_of_both_examples_succeed(copy):
    """The commands and the benchmark, in one process."""
    script = f"""
        import runpy, sys
        from jitnorm.cli import main
        for op, size in (("half_rmsnorm", 512), ("scale", 4096)):
            words = ["warmup", "--op", op, "--hidden-size", str(size), "--device", "cpu"]
            assert not main(words, standalone_mode=False)
        sys.argv = ["{BENCHMARK}", *"--short --device cpu --warm --seconds 0".split()]
        runpy.run_path(sys.argv[0], run_name="__main__")
    """
    said = run(copy, script)
    assert said.count("0 refused, 0 failed") == 2 and "hidden_size" in said, said
