"""Measure kernels end to end: send one batch to an inference server, and read its count of cached tokens."""

try:
    import httpx as _httpx  # noqa: F401
    import httpx_sse as _httpx_sse  # noqa: F401
except ImportError as error:
    raise ImportError("jitnorm.benchmark.server needs httpx and httpx-sse: pip install 'jitnorm[bench]'") from error

from jitnorm.benchmark.server.batch import BatchResult, Request, run_batch
from jitnorm.benchmark.server.client import get_cache_tokens_from_metrics

__all__ = ["BatchResult", "Request", "get_cache_tokens_from_metrics", "run_batch"]
