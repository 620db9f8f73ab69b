"""Just-in-time compiled CUDA and CPU kernels for the small, memory-bound operators of LLM inference."""

import sys

from jitnorm._version import __version__

# The command `jitnorm` starts quickly because each of its commands imports only what it needs. An application imports
# everything, so that torch.ops.jitnorm exists for the models that it loads. A module-level __getattr__, which could
# import on demand, would cost every call 30 ns: with one, Python no longer specialises the look-up of jitnorm.rmsnorm.
if "_jitnorm_command" not in sys.modules:
    from jitnorm.jit.environment import collector_disabled

    with collector_disabled():
        from jitnorm import cache, nn
        from jitnorm.activation import (
            fatrelu_and_mul,
            gelu_and_mul,
            gelu_fast,
            gelu_new,
            gelu_tanh_and_mul,
            mul_and_silu,
            quick_gelu,
            relu2,
            silu_and_mul,
            silu_and_mul_with_clamp,
            swigluoai_and_mul,
        )
        from jitnorm.dual_rmsnorm import dual_rmsnorm
        from jitnorm.fused_add_rmsnorm import fused_add_rmsnorm, gemma_fused_add_rmsnorm
        from jitnorm.gated_rmsnorm import gated_rmsnorm
        from jitnorm.general_rmsnorm import general_fused_add_rmsnorm, general_rmsnorm
        from jitnorm.integrations.transformers import patch_transformers, unpatch_transformers
        from jitnorm.jit import log as _log  # noqa: F401 (its import configures the logger)
        from jitnorm.layernorm import layernorm, layernorm_quant_fp8
        from jitnorm.qknorm import can_use_fused_inplace_qknorm, fused_inplace_qknorm
        from jitnorm.qknorm_rope_store import qk_norm_rope_store, rope, rope_and_store
        from jitnorm.quant_fp8 import per_tensor_quant_fp8, per_token_quant_fp8
        from jitnorm.rmsnorm import gemma_rmsnorm, rmsnorm
        from jitnorm.rmsnorm_quant_fp8 import fused_add_rmsnorm_quant_fp8, rmsnorm_quant_fp8
        from jitnorm.store_cache import store_cache
        from jitnorm.warmup import warmup

__all__ = [
    "__version__",
    "cache",
    "can_use_fused_inplace_qknorm",
    "dual_rmsnorm",
    "fatrelu_and_mul",
    "fused_add_rmsnorm",
    "fused_add_rmsnorm_quant_fp8",
    "fused_inplace_qknorm",
    "gated_rmsnorm",
    "gelu_and_mul",
    "gelu_fast",
    "gelu_new",
    "gelu_tanh_and_mul",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "general_fused_add_rmsnorm",
    "general_rmsnorm",
    "layernorm",
    "layernorm_quant_fp8",
    "mul_and_silu",
    "nn",
    "patch_transformers",
    "per_tensor_quant_fp8",
    "per_token_quant_fp8",
    "qk_norm_rope_store",
    "quick_gelu",
    "relu2",
    "rmsnorm",
    "rmsnorm_quant_fp8",
    "rope",
    "rope_and_store",
    "silu_and_mul",
    "silu_and_mul_with_clamp",
    "store_cache",
    "swigluoai_and_mul",
    "unpatch_transformers",
    "warmup",
]
