"""The documentation is held to the code: its commands, snippets, tables and steps."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from jitnorm.benchmark import marker
from jitnorm.benchmark.marker import Benchmark
from jitnorm.benchmark.options import command
from jitnorm.cli import diagnostics, main
from jitnorm.jit import toolchain

ROOT = Path(__file__).parents[1]
DOCS = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "docs/benchmarking.md")}
README = DOCS["README.md"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def unfolded(block: str) -> list[str]:
    return block.replace("\\\n", "").splitlines()


def commands() -> list[str]:
    """What the documentation has people type: in shell blocks, and in code that begins with jitnorm or make."""
    lines = [line for text in DOCS.values() for block in blocks(text, "sh") for line in unfolded(block)]
    inline = [c for text in DOCS.values() for c in re.findall(r"`((?:jitnorm|make) [^`]*)`", text)]
    return sorted({re.sub(r"\s+#.*", "", line) for line in [*lines, *inline]} - {""})


def words_after(name: str) -> list[list[str]]:
    split = [shlex.split(command) for command in commands()]
    return [words[words.index(name) + 1 :] for words in split if name in words]


@pytest.mark.parametrize("words", words_after("jitnorm"), ids=" ".join)
def test_commands_and_options_exist(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in (tmp_path / word for word in words if word.endswith(".json")):  # which some ask to be there
        file.parent.mkdir(exist_ok=True)
        file.touch()
    command: click.Command = main
    while isinstance(command, click.Group):
        assert words and words[0] in command.commands, words
        command, words = command.commands[words[0]], words[1:]
    command.make_context("jitnorm", list(words))  # parses, and refuses what does not exist


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {words[0] for words in words_after("make")}
    assert {"demo", "test", "lint"} <= named <= set(targets)


BENCHMARKING = (ROOT / "docs" / "benchmarking.md").read_text()


@pytest.mark.filterwarnings("ignore:no cache metrics")
@pytest.mark.parametrize("snippet", blocks(BENCHMARKING, "python"))
def test_snippets_about_benchmarks_run(snippet):
    """And the benchmarks that they define."""
    names: dict[str, object] = {}
    exec(compile(snippet, "benchmarking.md", "exec"), names)
    for bench in names.values():
        if isinstance(bench, Benchmark):
            assert not bench.run(full=False, device="cpu", cold=False, seconds=0.0).failed


def test_options_of_benchmarks_are_documented():
    """Every option of the command line and of do_bench, and nothing else."""

    @marker.benchmark("impl", ["a"])
    def bench(impl): ...

    options = {o for p in command(bench, copy=False).params for o in (*p.opts, *p.secondary_opts)}
    said = set(re.findall(r"`(--[a-z]+)", BENCHMARKING.partition("## The decorators")[0]))
    assert said == options - {"--no-copy"}
    table = BENCHMARKING.partition("| option | meaning |")[2].partition("\n\n")[0]
    first_column = "".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE))
    named = set(re.findall(r"`(\w+)[=`]", first_column))
    assert named == {*inspect.signature(marker.do_bench).parameters} - {"fn"}


@pytest.mark.parametrize("snippet", blocks(README, "python"))
def test_snippets_run(snippet, capsys):
    exec(compile(snippet, "README.md", "exec"), {})
    for said in re.findall(r"^# (.*)$", snippet, re.MULTILINE):
        assert said in capsys.readouterr().out


def test_environment_table_is_complete():
    table = set(re.findall(r"^\| `(\w+)` \|", README.partition("## Environment variables")[2], re.MULTILINE))
    readers = [f for f in (ROOT / "src").rglob("*.py") if f != Path(diagnostics.__file__)]
    read = set(re.findall(r'"(JITNORM_[A-Z_]+)"', "".join(f.read_text() for f in readers)))
    assert {name for name in table if name.startswith("JITNORM_")} == read == set(diagnostics._OWN_VARIABLES)
    section = README.partition("## Environment variables")[2].partition("\n## ")[0]
    assert not [name for name in toolchain._ENVIRONMENT if f"`{name}`" not in section]


def test_tables_are_those_of_the_results():
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks" / "readme_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.with_tables(README) == README, "to write them: python benchmarks/readme_table.py"


def test_links_lead_somewhere():
    for file in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob(".cache-example/*.md")):
        prose = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\((?!http)([^)#]+)", prose):
            assert (file.parent / link).exists(), f"{file.name}: {link}"


def test_adding_a_kernel_works_as_it_is_written(tmp_path):
    """Its steps, in a copy of the repository."""
    text = (ROOT / "docs" / "adding-a-kernel.md").read_text()
    for name in ("src", "csrc", "tests", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    files = re.findall(r"^`([\w/.]+)`\n\n```\w+\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(files) == 6
    (tmp_path / "benchmarks").mkdir()
    for name, content in files:
        assert not (tmp_path / name).exists()
        (tmp_path / name).write_text(content)
    package, warmup = tmp_path / "src/jitnorm/__init__.py", tmp_path / "src/jitnorm/warmup/__init__.py"
    package.write_text(package.read_text() + "\nfrom jitnorm.scale import scale\n\n__all__ += ['scale']\n")
    warmup.write_text(warmup.read_text() + "\nfrom jitnorm.scale import SCALE\n\nOPS['scale'] = SCALE.spec\n")

    def run(*words: str) -> None:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "src")}
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_scale.py")
    run(sys.executable, "-m", "jitnorm", "warmup", "--op", "scale", "--hidden-size", "4096", "--device", "cpu")
    run(sys.executable, "benchmarks/bench_scale.py", "--short", "--device", "cpu", "--warm", "--seconds", "0")
