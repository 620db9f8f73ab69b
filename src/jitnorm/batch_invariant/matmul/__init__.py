"""GEMMs whose rows have the same bits alone and in any batch."""

from jitnorm.batch_invariant.matmul.gemm import bmm_batch_invariant, matmul_persistent

__all__ = ["bmm_batch_invariant", "matmul_persistent"]
