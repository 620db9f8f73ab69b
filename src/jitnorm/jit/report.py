"""What the engine says to a person, on stderr: it may not be silent for long, and has no logger to assume."""

from __future__ import annotations

import sys
from contextlib import suppress


def say(message: str) -> None:
    with suppress(OSError, ValueError, AttributeError):  # nobody listens, or there is no stderr
        print(f"jitnorm: {message}", file=sys.stderr, flush=True)
