"""Just-in-time compiled CUDA and CPU kernels for the small, memory-bound operators of LLM inference."""

# No module-level __getattr__ here: with one, Python no longer specialises the look-up of jitnorm.rmsnorm, which costs
# every call 30 ns.
from jitnorm import batch_invariant, nn
from jitnorm._version import __version__
from jitnorm.fused_add_rmsnorm import fused_add_rmsnorm
from jitnorm.gemma_fused_add_rmsnorm import gemma_fused_add_rmsnorm
from jitnorm.gemma_rmsnorm import gemma_rmsnorm
from jitnorm.rmsnorm import rmsnorm
from jitnorm.transformers_patch import patch_transformers
from jitnorm.warmup import warmup

__all__ = [
    "__version__",
    "batch_invariant",
    "fused_add_rmsnorm",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "nn",
    "patch_transformers",
    "rmsnorm",
    "warmup",
]
