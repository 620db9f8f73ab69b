"""The README and the pages of docs agree with the code: commands, snippets, tables, links and variables."""

from __future__ import annotations

import inspect
import logging
import os
import re
import shlex
from pathlib import Path

import click
import pytest

from documentation.pages import FILES, PAGES, ROOT, load
from jitnorm.benchmark import marker
from jitnorm.benchmark.marker import Benchmark, command
from jitnorm.cli import main
from jitnorm.jit import environment, toolchain

README = PAGES["README.md"]
BENCHMARKING = PAGES["docs/guides/benchmarking.md"]
ENVIRONMENT = PAGES["docs/reference/environment.md"]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def unfolded(block: str) -> list[str]:
    return block.replace("\\\n", "").splitlines()


def commands() -> list[str]:
    """Return the commands of all pages: of shell blocks, and of code that begins with jitnorm or make."""
    lines = [line for text in PAGES.values() for block in blocks(text, "sh") for line in unfolded(block)]
    inline = [c for text in PAGES.values() for c in re.findall(r"`((?:jitnorm|make) [^`|]*)`(?! \|)", text)]
    return sorted({re.sub(r"\s+#.*", "", line) for line in [*lines, *inline]} - {""})


def words_after(name: str) -> list[list[str]]:
    split = [shlex.split(command) for command in commands()]
    return [words[words.index(name) + 1 :] for words in split if name in words]


@pytest.mark.parametrize("words", words_after("jitnorm"), ids=" ".join)
def test_commands_and_options_exist(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # Some commands require an existing file.
    for file in (tmp_path / word for word in words if word.endswith((".json", ".tar"))):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    command: click.Command = main
    context = click.Context(main, info_name="jitnorm")
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        child = command.get_command(context, words[0])
        assert child, words
        command, words = child, words[1:]
    if words in ([], ["--help"]):  # the command is only named
        return
    command.make_context("jitnorm", list(words))  # parses, and refuses unknown options


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = {words[0] for words in words_after("make") if not words[0].startswith(".venv/")}
    assert {"demo", "test", "lint", "docs"} <= named <= set(targets)


def test_python_files_of_commands_exist():
    scripts = {word for command in commands() for word in command.split() if re.match(r"\w+/[\w/]+\.py$", word)}
    examples = {"benchmarks/bench_NAME.py"}
    assert scripts and not [script for script in scripts - examples if not (ROOT / script).exists()]


SNIPPETS = [
    pytest.param(page, snippet, id=f"{page}-{number}")
    for page, text in PAGES.items()
    for number, snippet in enumerate(blocks(text, "python"))
]


@pytest.fixture
def log_level():
    """Restore the level of the package's logger, which the serving guide sets."""
    logger = logging.getLogger("jitnorm")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.slow
@pytest.mark.usefixtures("log_level")
@pytest.mark.filterwarnings("ignore:no cache metrics")  # the benchmarking guide asks a server that is not there
@pytest.mark.parametrize(("page", "snippet"), SNIPPETS)
def test_snippets_run(page, snippet, capsys):
    """Run each, compare its output with its lines that are comments, and run the benchmarks that it defines."""
    names: dict[str, object] = {"__name__": "snippet"}
    exec(compile(snippet, page, "exec"), names)
    out = capsys.readouterr().out
    assert not [text for text in re.findall(r"^# (.*[^:])$", snippet, re.MULTILINE) if text not in out]
    for bench in names.values():
        if isinstance(bench, Benchmark):
            assert not bench.run(full=False, device="cpu", cold=False, seconds=0.0).failed


def test_options_of_benchmarks_are_documented():
    """Every option of the command line and of do_bench, and nothing else."""

    @marker.benchmark("impl", ["a"])
    def bench(impl): ...

    options = {o for p in command(bench, copy=False).params for o in (*p.opts, *p.secondary_opts)}
    documented = set(re.findall(r"`(--[a-z]+)", BENCHMARKING.partition("## The decorators")[0]))
    assert documented == options - {"--no-copy"}
    table = BENCHMARKING.partition("| option | meaning |")[2].partition("\n\n")[0]
    table = BENCHMARKING.partition("## What do_bench measures")[2].partition("| option | meaning |")[2] or table
    first_column = "".join(re.findall(r"^\|([^|]*)\|", table.partition("\n\n")[0], re.MULTILINE))
    named = set(re.findall(r"`(\w+)[=`]", first_column))
    assert named == {*inspect.signature(marker.do_bench).parameters} - {"fn"}


def test_environment_table_is_complete():
    table = set(re.findall(r"^\| `(\w+)` \|", ENVIRONMENT, re.MULTILINE))
    readers = [f for f in (ROOT / "src").rglob("*.py") if f != Path(environment.__file__)]
    read = set(re.findall(r'"(JITNORM_[A-Z_]+)"', "".join(f.read_text() for f in readers)))
    assert {name for name in table if name.startswith("JITNORM_")} == read == set(environment.VARIABLES)
    searched = {name for names in toolchain._ENVIRONMENT.values() for name in names}
    assert not [name for name in searched if f"`{name}`" not in ENVIRONMENT]


def test_tables_are_those_of_the_results():
    tables = load("benchmarks/write_tables.py")
    places = [name for page in tables.PAGES for name in tables.names_in(page.read_text())]
    assert sorted(places) == sorted(tables.TABLES), "each table is in one page, once"
    for page in tables.PAGES:
        text = page.read_text()
        assert tables.with_tables(text) == text, "to write them: python benchmarks/write_tables.py"


def test_the_readme_is_short():
    assert len(README.split()) <= 1200


def test_links_lead_somewhere():
    for file in (*FILES, *ROOT.glob(".cache-example/*.md")):
        prose = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\((?!http)([^)#]+)", prose):
            target = {"index.md": ROOT / "README.md", "contributing/index.md": ROOT / "CONTRIBUTING.md"}
            generated = os.path.relpath(file.parent / link, ROOT / "docs")
            assert target.get(generated, file.parent / link).exists(), f"{file.name}: {link}"


def test_no_page_names_a_file_that_is_not_there():
    for page, text in PAGES.items():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        for name in re.findall(r"`((?:src|csrc|tests|benchmarks|examples|docs)/[a-z0-9_./-]+\.\w+)`", prose):
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_the_sanitizer_command_selects_tests():
    """Renaming a test must not silently take it out of the command."""
    text = PAGES["CONTRIBUTING.md"]
    names = re.search(r"tests/test_\{(.*?)\}\.py", text)[1].split(",")
    sources = "".join((ROOT / "tests" / f"test_{name}.py").read_text() for name in names)
    words = re.search(r'-k "(.*?)"', text)[1].split(" or ")
    assert not [word for word in words if not re.search(rf"def test_\w*{word}", sources)]


def test_the_site_is_built_strictly_and_checked():
    """`make docs` builds the site, which takes as long as a tenth of all tests: a warning is an error, as in a test."""
    settings = (ROOT / "mkdocs.yml").read_text()
    assert re.search("^strict: true$", settings, re.MULTILINE) and "hooks: [docs/hooks.py]" in settings
    assert "make docs" in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize(
    ("page", "html", "says"),
    [
        ("guides/a.html", '<script src="https://example.com/a.js">', "guides/a.html loads https://example.com/a.js"),
        ("guides/a.html", '<link rel="stylesheet" href="//example.com/a.css">', "loads //example.com/a.css"),
        ("guides/a.html", '<img alt="" src="http://example.com/a.png">', "loads http://example.com/a.png"),
        ("reference/operators.html", "<p>", "reference/operators.html lacks .*rmsnorm"),
        ("reference/commands.html", "<p>", "reference/commands.html lacks jitnorm cache ls"),
        ("guides/a.html", '<a href="https://example.com"><link rel="canonical" href="/a.html">', ""),
        ("reference/operators.html", '<h3 id="jitnorm.rmsnorm.rmsnorm">', ""),
        ("reference/commands.html", "jitnorm cache ls", ""),
    ],
)
def test_the_build_of_the_site_checks_its_pages(page, html, says, tmp_path):
    hooks = load("docs/hooks.py")
    file = tmp_path / page
    file.parent.mkdir()
    complete = {"reference/operators.html": 'id="jitnorm.rmsnorm', "reference/commands.html": "jitnorm cache ls"}
    for name, content in (complete | {page: html}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    problems = hooks.problems_of_site(tmp_path)
    assert len(problems) == bool(says) and re.search(says, "".join(problems)), problems
