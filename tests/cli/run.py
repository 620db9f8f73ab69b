"""Run the command `jitnorm` in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from jitnorm.cli import main


def run(*words: object, exit_code: int = 0) -> Result:
    """Run `jitnorm WORDS`, and assert that it exits with `exit_code` and not with a traceback."""
    result = CliRunner().invoke(main, [*map(str, words)])
    assert isinstance(result.exception, (SystemExit, type(None))), result.exception
    assert result.exit_code == exit_code, result.output
    return result
