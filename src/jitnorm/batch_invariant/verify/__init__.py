"""Proof on this machine: every operator gives a row the same bits alone and in any batch."""

from jitnorm.batch_invariant.verify.compare import WAYS, Result, verify
from jitnorm.batch_invariant.verify.operators import OPERATORS, Case, Operator

__all__ = ["OPERATORS", "WAYS", "Case", "Operator", "Result", "verify"]
