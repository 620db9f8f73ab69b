"""Batch-invariant mode: a model's result for a sequence has the same bits whatever else is in the batch.

    from jitnorm.batch_invariant import set_batch_invariant_mode

    with set_batch_invariant_mode():
        model.generate(...)

docs/guides/batch-invariance.md says what is guaranteed. `jitnorm verify-invariance` checks it on a machine.
"""

from jitnorm.batch_invariant.matmul import bmm_batch_invariant, matmul_persistent
from jitnorm.batch_invariant.mode import (
    disable_batch_invariant_mode,
    enable_batch_invariant_mode,
    is_batch_invariant_mode_enabled,
    set_batch_invariant_mode,
)
from jitnorm.batch_invariant.reductions import log_softmax, mean_dim, rms_norm_batch_invariant, softmax

__all__ = [
    "bmm_batch_invariant",
    "disable_batch_invariant_mode",
    "enable_batch_invariant_mode",
    "is_batch_invariant_mode_enabled",
    "log_softmax",
    "matmul_persistent",
    "mean_dim",
    "rms_norm_batch_invariant",
    "set_batch_invariant_mode",
    "softmax",
]
