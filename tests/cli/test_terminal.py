"""Progress bars and questions on a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

import pytest

from jitnorm.jit.cache import Cache

_COMMAND = "import _jitnorm_command; _jitnorm_command.main()"


@pytest.mark.slow
def test_terminal(cache_dir):
    """`warmup` shows a bar while it builds, and `cache clear` asks before it removes."""
    output, status = on_a_terminal("warmup", "--hidden-size", "64", "--device", "cpu")
    assert status == 0 and "built    rmsnorm_64_bf16" in output and re.search(r"\r +\d+%\|", output), output
    output, status = on_a_terminal("cache", "clear", answer="n\n")
    assert status == 1 and "nothing removed" in output and len([*Cache(cache_dir).entries()]) == 1
    output, status = on_a_terminal("cache", "clear", answer="y\n")
    assert status == 0 and "removed 1 kernel" in output and not [*Cache(cache_dir).entries()]


def on_a_terminal(*words: str, answer: str = "") -> tuple[str, int]:
    """Run `jitnorm WORDS` on a terminal of its own, type `answer` when it asks, return its output and status."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    run = subprocess.Popen([sys.executable, "-c", _COMMAND, *words], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    output = b""
    deadline = time.monotonic() + 300  # only so that a hang ends
    while select.select([ours], [], [], max(0, deadline - time.monotonic()))[0]:
        try:
            output += os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
        if answer and output.endswith(b"[y/N]: "):
            os.write(ours, answer.encode())
            answer = ""
    os.close(ours)
    return output.decode(), run.wait(timeout=60)
