"""Just-in-time compiled CUDA and CPU kernels for the small, memory-bound operators of LLM inference."""

from jitnorm._version import __version__
from jitnorm.rmsnorm import rmsnorm
from jitnorm.warmup import warmup

__all__ = ["__version__", "rmsnorm", "warmup"]
