"""The server's own figures, in Prometheus' text format."""

from __future__ import annotations

import math
import re
import warnings

from jitnorm.benchmark.server.client import Deadline, get, one_line, split

_TIMEOUT = 5.0
_CACHED, _PROMPT = "cached_tokens_total", "prompt_tokens_total"
_NAME = re.compile(r"\s*([\w:]+)")
_MAX_LINE = 64 << 10  # characters: within a line nobody looks at the clock


def get_cache_tokens_from_metrics(url: str) -> tuple[float, float] | None:
    """(cached_tokens_total, prompt_tokens_total) of the server at `url`, from its `/metrics`, summed over labels.

    Names may have a prefix, as in `sglang:prompt_tokens_total`. A counter of cached tokens that does not appear yet is
    zero. None where the server answers with an HTTP error, which means that it serves no metrics; also, with one
    RuntimeWarning that says what happened, for anything else that goes wrong: it cannot be reached, its metrics are not
    received and read within 5 seconds or are longer than 16 MiB, or its text has no such counters. Raises nothing.
    """
    deadline = Deadline(_TIMEOUT)
    try:
        path = "" if split(url).path.rstrip("/").endswith("/metrics") else "/metrics"
        return deadline.call(lambda: _read(url, path, deadline))
    except Exception as error:
        what = one_line(str(error) or type(error).__name__)
        warnings.warn(f"no cache metrics from {one_line(url)}: {what}", RuntimeWarning, stacklevel=2)
        return None


def _read(url: str, path: str, deadline: Deadline) -> tuple[float, float] | None:
    status, body = get(url, path, deadline)
    if status >= 400:
        return None
    if status != 200:
        raise ValueError(f"HTTP status {status}")
    return _totals(body.decode(), deadline)


def _totals(text: str, deadline: Deadline) -> tuple[float, float]:
    """Sum both counters. Other metrics are passed over, as reading all of them takes a second for each megabyte."""
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise RuntimeError("they are read by prometheus_client: pip install 'jitnorm[bench]'") from error
    totals: dict[str, float] = {}
    for line in text.split("\n"):
        deadline.check()
        name = match[1].rpartition(":")[2] if (match := _NAME.match(line)) else ""
        if name not in (_CACHED, _PROMPT):
            continue
        if len(line) > _MAX_LINE:
            raise ValueError(f"/metrics has a line of {len(line)} characters")
        for family in text_string_to_metric_families(line):
            for sample in family.samples:
                totals[name] = totals.get(name, 0.0) + float(sample.value)
    if _PROMPT not in totals:
        raise ValueError(f"/metrics has no {_PROMPT}")
    if not all(map(math.isfinite, totals.values())):
        raise ValueError(f"/metrics has a counter that is not finite: {totals}")
    return totals.get(_CACHED, 0.0), totals[_PROMPT]
