"""What every command shares: an error that was expected is one line on stderr and a non-zero exit, not a traceback."""

from __future__ import annotations

import io
import sys
from typing import Any

import click


class BadValue(click.ClickException):
    """What was typed cannot be: one line, and the exit status of a usage error."""

    exit_code = 2


class Command(click.Command):
    """A command whose expected errors, those that jitnorm raises on purpose, are for people to read."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own signals are RuntimeErrors; a reader such as head(1) that went away is no error
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            raise click.ClickException(str(error)) from error


class Group(click.Group):
    """A group of such commands."""

    command_class = Command
    group_class = type

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command. What the terminal's encoding lacks, such as a path that is no UTF-8, is escaped."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        return super().main(*args, **kwargs)


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


json_option = click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json"]),
    default="table",
    show_default=True,
    help="For people or programs.",
)
