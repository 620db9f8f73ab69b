"""Base classes of all commands, which print expected errors as one line on stderr, and options of several values."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click


class BadValue(click.ClickException):
    """An argument was invalid: one line on stderr, and the exit status of a usage error."""

    exit_code = 2


class Command(click.Command):
    """A command that prints the errors which jitnorm raises as one line, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # Exit and Abort are RuntimeErrors; a broken pipe, as by head(1), is no error
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            raise click.ClickException(str(error)) from error


class Group(click.Group):
    """A group of such commands."""

    command_class = Command
    group_class = type

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command. Characters that the terminal's encoding lacks are printed as escapes."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)


class _LazyCommands(Mapping[str, click.Command]):
    """Commands by name, each imported when it is looked up."""

    def __init__(self, paths: Mapping[str, str]) -> None:
        self._paths = paths

    def __getitem__(self, name: str) -> click.Command:
        module, _, attribute = self._paths[name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


class LazyGroup(Group):
    """A group that imports a command when it is run, so that `--help` and the other commands do not wait for it."""

    def __init__(self, *args: Any, lazy_commands: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        """Create the group.

        Args:
            lazy_commands: for each command where it is, as "module:attribute", and its line in the group's help.
        """
        super().__init__(*args, **kwargs)
        self.commands = _LazyCommands({name: path for name, (path, _) in lazy_commands.items()})  # type: ignore[assignment]
        self._help_lines = [(name, line) for name, (_, line) in sorted(lazy_commands.items())]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands into the help, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(self._help_lines)


class _List(click.ParamType):  # type: ignore[type-arg]
    """Several values of a type, with commas between them."""

    def __init__(self, of: click.ParamType) -> None:  # type: ignore[type-arg]
        self._of, self.name = of, of.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        parts = value.split(",") if isinstance(value, str) else [value]
        return [self._of.convert(part.strip() if isinstance(part, str) else part, param, ctx) for part in parts]

    def get_metavar(self, *args: Any, **kwargs: Any) -> str | None:
        return self._of.get_metavar(*args, **kwargs)


def several(of: click.ParamType) -> dict[str, Any]:  # type: ignore[type-arg]
    """Return the arguments of `click.option` for several values of a type: by commas, and by repeating the option."""
    return {
        "type": _List(of),
        "multiple": True,
        "callback": lambda ctx, param, lists: tuple(value for values in lists for value in values),
    }
