"""The steps of docs/contributing/adding-a-kernel.md work as they are written, in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from documentation.pages import ADDING, ROOT

# A file's name on a line of its own, then the file.
FILES = re.findall(r"^`([\w/.]+)`\n\n```\w+\n(.*?)^```", ADDING, re.DOTALL | re.MULTILINE)
# A sentence that ends with "in `file`:" or "in the family's module `file`. ...:", then what is appended to the file.
ADDITIONS = re.findall(r"`([\w/.]+\.(?:py|h))`(?:\.[^`]*)?:\n\n```\w+\n(.*?)^```", ADDING, re.DOTALL | re.MULTILINE)


@pytest.fixture
def copy(tmp_path):
    for name in ("src", "csrc", "tests", "pyproject.toml"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    (tmp_path / "benchmarks").mkdir()
    return tmp_path


def append(folder: Path, additions: list[tuple[str, str]]) -> None:
    for name, text in additions:
        file = folder / name
        file.write_text(f"{file.read_text()}\n\n{text}")


def run(folder: Path, *words: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


def pytest_in(folder: Path, *words: str) -> None:
    run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *words)


def test_the_page_has_all_steps():
    assert len(FILES) == 6
    assert len({name for name, _ in ADDITIONS[:4]}) == 4, "a variant of a norm is changed in at most four places"
    assert [name for name, _ in ADDITIONS[4:]] == ["src/jitnorm/__init__.py"]


def test_a_variant_of_a_norm(copy):
    append(copy, ADDITIONS[:4])
    pytest_in(copy, "tests/test_rmsnorm.py", "tests/core/test_operators.py", "-k", "half_rmsnorm")
    run(copy, "-m", "jitnorm", "warmup", "--op", "half_rmsnorm", "--hidden-size", "512", "--device", "cpu")


def test_an_operator(copy):
    for name, content in FILES:
        assert not (copy / name).exists()
        (copy / name).write_text(content)
    append(copy, ADDITIONS[4:])
    pytest_in(copy, "tests/test_scale.py", "tests/core/test_operators.py", "-k", "scale and not scales")
    run(copy, "-m", "jitnorm", "warmup", "--op", "scale", "--hidden-size", "4096", "--device", "cpu")
    run(copy, "benchmarks/bench_scale.py", "--short", "--device", "cpu", "--warm", "--seconds", "0")
