"""Create the package's logger, `logging.getLogger("jitnorm")`, with a default for processes that configure no logging.

Builds that take long are logged at INFO, and problems that do not fail a call at WARNING. JITNORM_LOG sets the level.
In an application that configures logging, these messages are treated like any others.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from contextlib import suppress

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL + 1,
}


class DefaultHandler(logging.Handler):
    """Writes to the current sys.stderr while the application has configured nothing, like `logging.lastResort`.

    That handler omits INFO, but a build of several seconds should show a message on a terminal.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message, unless a handler of the application receives it. Never raises."""
        stream = sys.stderr  # looked up at each message, as programs and tests replace it
        if stream is None or self._is_configured():
            return
        with suppress(Exception):  # a closed terminal or a broken pipe is no reason to fail a call
            stream.write(f"jitnorm: {record.getMessage()}\n")
            stream.flush()

    def _is_configured(self) -> bool:
        """Return whether the application has configured logging for the package's messages."""
        return (
            not logger.propagate
            or bool(logging.getLogger().handlers)
            or any(handler is not self for handler in logger.handlers)
        )


def _create_logger() -> logging.Logger:
    created = logging.getLogger("jitnorm")
    name = os.environ.get("JITNORM_LOG", "").strip().lower()
    if name in LEVELS:
        created.setLevel(LEVELS[name])
    elif created.level == logging.NOTSET:  # else the application has set it before the import
        created.setLevel(logging.INFO)
    created.addHandler(DefaultHandler())
    return created


def _check_level() -> None:
    name = os.environ.get("JITNORM_LOG", "").strip()
    if name and name.lower() not in LEVELS:
        logger.warning("JITNORM_LOG must be %s, got %r: the level is info", ", ".join(LEVELS), name)


logger = _create_logger()
_check_level()


@functools.cache
def warn_once(message: str) -> None:
    """Log a message at WARNING, once per process."""
    logger.warning("%s", message)
