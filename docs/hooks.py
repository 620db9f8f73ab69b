"""Generate what the site takes from elsewhere: pages from the repository's root, the API and the commands.

MkDocs calls the `on_` functions. In a page, `<!-- api: jitnorm.nn RMSNorm -->` becomes the documentation of these
members of a module, of all in its `__all__` where none is named; `<!-- commands -->` becomes that of `jitnorm`.
"""

from __future__ import annotations

import importlib
import inspect
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# The site's pages that are files of the repository's root, so that nothing is written twice.
_ROOT_PAGES = {"index.md": "README.md", "contributing/index.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_PLOTS = "benchmarks/results"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the repository's root, and the plots of `benchmarks/results`."""
    from mkdocs.structure.files import File

    for page, source in _ROOT_PAGES.items():
        files.append(File.generated(config, page, content=site_links((ROOT / source).read_text(), page)))
    for plot in sorted((ROOT / _PLOTS).glob("*.png")):
        files.append(File.generated(config, f"results/{plot.name}", abs_src_path=str(plot)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the markers of generated sections; point links at plots to where the site has them."""
    markdown = markdown.replace(f"../{_PLOTS}/", "results/")
    markdown = re.sub(r"<!-- api: (.*?) -->", lambda match: "\n".join(_api(*match[1].split())), markdown)
    return (
        markdown.replace("<!-- commands -->", "\n".join(_commands())) if "<!-- commands -->" in markdown else markdown
    )


def on_post_build(config: MkDocsConfig) -> None:
    """Raise if the site lacks a generated section, or a page of it would load something from a network."""
    from mkdocs.exceptions import PluginError

    if problems := problems_of_site(Path(config.site_dir)):
        raise PluginError("\n".join(problems))


def problems_of_site(site: Path) -> list[str]:
    """Return what is wrong with the HTML files of `site`, a line each."""
    pages = {page.relative_to(site).as_posix(): page.read_text() for page in sorted(site.rglob("*.html"))}
    # The address of the site itself is in links to the canonical address of each page.
    loads = r'<(?:script|link|img)[^>]*(?:src|href)="((?:https?:)?//(?!jitnorm\.example\.invalid)[^"]*)'
    problems = [f"{name} loads {match[1]}" for name, text in pages.items() for match in re.finditer(loads, text)]
    # A section of mkdocstrings and one of `_commands`: neither warns if it generates nothing.
    sections = {"reference/operators.html": 'id="jitnorm.rmsnorm', "reference/commands.html": "jitnorm cache ls"}
    return problems + [f"{name} lacks {text}" for name, text in sections.items() if text not in pages.get(name, "")]


def site_links(markdown: str, page: str) -> str:
    """Return the text of a root file with the links that its page on the site needs."""
    pages = {source: target for target, source in _ROOT_PAGES.items()}

    def link(match: re.Match[str]) -> str:
        target = pages.get(match[1], match[1].removeprefix("docs/"))
        return f"]({posixpath.relpath(target, posixpath.dirname(page) or '.')}{match[2] or ''})"

    return re.sub(r"\]\((?!\w+:|#)([^)#]+)(#[^)]*)?\)", link, markdown)


def _api(module: str, *names: str) -> Iterator[str]:
    """Yield an instruction for mkdocstrings for each function and class, at the place where it is defined."""
    members = importlib.import_module(module)
    for name in names or members.__all__:
        member = getattr(members, name)
        if inspect.isfunction(member) or inspect.isclass(member):
            yield f"::: {member.__module__}.{member.__qualname__}\n"


def _commands() -> Iterator[str]:
    from jitnorm.cli import main

    return _command(main, click.Context(main, info_name="jitnorm"))


def _command(command: click.Command, context: click.Context) -> Iterator[str]:
    """Yield the Markdown of a command and of those below it, from the texts of `--help`."""
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            if child := command.get_command(context, name):
                yield from _command(child, click.Context(child, context, name))
        return
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield f"## {context.command_path}\n\n```\n{usage}\n```\n"
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b\n"):  # click's mark for lines that stay as they are
            yield f"```\n{paragraph.removeprefix(chr(8)).strip()}\n```\n"
        else:
            yield f"{_escaped(' '.join(paragraph.split()))}\n"
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    if records := [record for option in options if (record := option.get_help_record(context))]:
        yield "| option | meaning |\n|---|---|"
        yield from (f"| `{option}` | {_escaped(' '.join(meaning.split()))} |" for option, meaning in records)
        yield ""


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
