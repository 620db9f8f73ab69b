"""Switches among the environment variables."""

from __future__ import annotations

import os


def is_on(variable: str) -> bool:
    """Whether it is set, and not to what people write for no."""
    return os.environ.get(variable, "").lower() not in ("", "0", "false", "no", "off")
