"""The server's own figures, in Prometheus' text format."""

from __future__ import annotations

import math
import warnings

from jitnorm.benchmark.server.client import get, split

_TIMEOUT = 5.0
_CACHED, _PROMPT = "cached_tokens_total", "prompt_tokens_total"


def get_cache_tokens_from_metrics(url: str) -> tuple[float, float] | None:
    """(cached_tokens_total, prompt_tokens_total) of the server at `url`, from its `/metrics`, summed over labels.

    Names may have a prefix, as in `sglang:prompt_tokens_total`. A counter of cached tokens that does not appear yet is
    zero. None where the server answers with an HTTP error, which means that it serves no metrics; also, with one
    RuntimeWarning that says what happened, for anything else that goes wrong: it cannot be reached, does not answer
    within 5 seconds, or its text has no such counters. Raises nothing.
    """
    try:
        status, body = get(url, "" if split(url).path.endswith("/metrics") else "/metrics", _TIMEOUT)
        if status >= 400:
            return None
        if status != 200:
            raise ValueError(f"HTTP status {status}")
        return _totals(body.decode())
    except Exception as error:
        what = str(error) or type(error).__name__
        warnings.warn(f"no cache metrics from {url}: {what}", RuntimeWarning, stacklevel=2)
        return None


def _totals(text: str) -> tuple[float, float]:
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise RuntimeError("they are read by prometheus_client: pip install 'jitnorm[bench]'") from error
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.rpartition(":")[2]
            if name in (_CACHED, _PROMPT):
                totals[name] = totals.get(name, 0.0) + float(sample.value)
    if _PROMPT not in totals:
        raise ValueError(f"/metrics has no {_PROMPT}")
    if not all(map(math.isfinite, totals.values())):
        raise ValueError(f"/metrics has a counter that is not finite: {totals}")
    return totals.get(_CACHED, 0.0), totals[_PROMPT]
