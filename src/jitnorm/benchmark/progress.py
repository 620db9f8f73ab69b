"""The progress bar of benchmarks and commands."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm


class ProgressBar(tqdm):  # type: ignore[type-arg]
    """A progress bar that is shown on a terminal only, and removed at the end."""

    # tqdm would start a thread, and Thread.start waits forever for a thread that runs out of memory before its first
    # line.
    monitor_interval = 0

    def __init__(self, iterable: Any = None, **options: Any) -> None:
        super().__init__(iterable, **options, disable=None, leave=False)
