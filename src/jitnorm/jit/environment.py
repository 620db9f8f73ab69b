"""Read environment variables and the versions of installed packages."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from importlib import metadata


def is_on(variable: str) -> bool:
    """Return whether an environment variable is set to anything but "", 0, false, no or off."""
    return os.environ.get(variable, "").lower() not in ("", "0", "false", "no", "off")


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each package in `names`, without those that are not installed."""
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions
