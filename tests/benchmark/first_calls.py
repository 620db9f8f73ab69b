"""First calls of peers that end as their names say, for test_scripts.py: they run in spawned processes."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path


def end_as_named(name: str) -> None:
    if name == "bad":
        raise ValueError(f"no compiler for {name}\nand a second line")
    if name == "dead":
        os._exit(3)


def never_end(name: str) -> None:
    threading.Event().wait()


def start_a_compiler(file: str) -> None:
    """Start a process, write its id to `file`, and do not end."""
    compiler = subprocess.Popen(["sleep", "3600"])
    written = Path(f"{file}.new")
    written.write_text(str(compiler.pid))
    written.rename(file)
    never_end(file)
