"""Errors, help and characters that the terminal cannot show, of all commands."""

from __future__ import annotations

import io
import os
import sys

import pytest

from cli.run import run
from jitnorm.cli import main


def test_errors_are_one_line(cache_dir, monkeypatch):
    for kind in (RuntimeError, ValueError, TypeError, PermissionError):

        def fail(kind=kind):
            raise kind("what is wrong")

        monkeypatch.setattr("jitnorm.cli.diagnostics.collect_diagnostics", fail)
        assert run("doctor", exit_code=1).stderr == "Error: what is wrong\n"


def test_every_command_has_help():
    lines = run("--help").stdout
    groups = [(main, [])]
    for group, words in groups:
        for name, command in group.commands.items():
            text = run(*words, name, "--help").stdout
            assert command.help.split("\n")[0].rstrip(".") in " ".join(text.split())
            assert words or f"  {name} " in lines
            if hasattr(command, "commands"):
                groups.append((command, [*words, name]))


def test_an_unknown_command():
    assert "No such command 'cahce'" in run("cahce", exit_code=2).stderr


@pytest.mark.parametrize("words", [("cache", "ls"), ("cache", "show", "none")])
def test_a_path_that_the_terminal_cannot_show_is_escaped(tmp_path, monkeypatch, words):
    monkeypatch.setenv("JITNORM_CACHE_DIR", os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    streams = {
        name: io.TextIOWrapper(io.BytesIO(), encoding="latin-1", errors="strict") for name in ("stdout", "stderr")
    }
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit) as end:
        main(words)
    monkeypatch.undo()
    printed = {name: stream.buffer.getvalue() if not stream.flush() else b"" for name, stream in streams.items()}
    assert b"caf\\udce9" in printed["stderr" if words[1] == "show" else "stdout"], printed
    assert b"encode" not in printed["stdout"] + printed["stderr"]
    assert end.value.code == (words[1] == "show")
