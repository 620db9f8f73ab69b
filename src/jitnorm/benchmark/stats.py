"""Samples to figures: quantiles, and how far a median may be from the truth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

Metric = float | str  # a quantile between 0 and 1, or one of _NAMED

_NAMED: dict[str, Callable[[Sequence[float]], float]] = {"avg": statistics.fmean, "min": min, "max": max}
_NORMAL = 1.4826  # from the median absolute deviation to the standard deviation, for normal values
_OF_MEDIAN = 1.2533  # standard error of a median, relative to that of a mean


def quantile(samples: Sequence[float], q: float) -> float:
    """Interpolated between the two nearest samples."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def measure(samples: Sequence[float], metric: Metric) -> float:
    """One metric of the samples. ValueError for a metric that does not exist."""
    if isinstance(metric, str):
        if metric not in _NAMED:
            raise ValueError(f"a metric is a quantile between 0 and 1, or one of {', '.join(_NAMED)}; got {metric!r}")
        return _NAMED[metric](samples)
    if not 0 <= metric <= 1:
        raise ValueError(f"a metric that is a number is a quantile between 0 and 1, got {metric}")
    return quantile(samples, metric)


def metric_name(metric: Metric) -> str:
    """ "p50" for 0.5, "avg" for "avg"."""
    return metric if isinstance(metric, str) else f"p{100 * metric:g}"


def figure(rounds: Sequence[Sequence[float]]) -> float:
    """What a measurement comes to: the median of its rounds' medians, so that one odd round changes nothing."""
    return statistics.median(statistics.median(samples) for samples in rounds)


def noise(rounds: Sequence[Sequence[float]]) -> float:
    """How far `figure` may be off, relative to it: two standard errors, by what varies more.

    Within a round samples follow each other at once, on the same clocks, and agree too well: so the rounds' medians
    count, by their median absolute deviation, which one odd round does not change either. The samples count too, by
    the ranks between which their median lies in 95 of 100 cases: where these are few or scattered, so is the figure.
    """
    medians = [statistics.median(samples) for samples in rounds]
    middle = statistics.median(medians)
    deviation = statistics.median(abs(m - middle) for m in medians)
    between = 2 * _OF_MEDIAN * _NORMAL * deviation / math.sqrt(len(medians))
    ordered = sorted(sample for samples in rounds for sample in samples)
    reach = 0.98 * math.sqrt(len(ordered))
    low = max(0, math.floor(len(ordered) / 2 - reach))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + reach) - 1)
    within = (ordered[high] - ordered[low]) / 2
    return max(between, within) / middle if middle else math.inf
