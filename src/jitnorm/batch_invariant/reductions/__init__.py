"""Softmax, its logarithm, means and RMSNorm, with an order of additions that follows from a row's length alone."""

from jitnorm.batch_invariant.reductions.rms_norm import rms_norm_batch_invariant
from jitnorm.batch_invariant.reductions.softmax_mean import log_softmax, mean_dim, softmax

__all__ = ["log_softmax", "mean_dim", "rms_norm_batch_invariant", "softmax"]
