"""What a kernel buys end to end: one batch against an inference server, and the server's own count of cached tokens."""

from jitnorm.benchmark.server.batch import BatchResult, Request, run_batch
from jitnorm.benchmark.server.metrics import get_cache_tokens_from_metrics

__all__ = ["BatchResult", "Request", "get_cache_tokens_from_metrics", "run_batch"]
