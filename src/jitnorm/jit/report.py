"""What the engine says to a person, on stderr: it may not be silent for long, and has no logger to assume."""

from __future__ import annotations

import sys


def say(message: str) -> None:
    print(f"jitnorm: {message}", file=sys.stderr, flush=True)
