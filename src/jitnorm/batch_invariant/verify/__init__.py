"""Check on this machine that every operator gives a row the same bits alone and in any batch."""

from jitnorm.batch_invariant.verify.cases import EXEMPT, OPERATORS, Case, Operator
from jitnorm.batch_invariant.verify.compare import MODES, Result, verify

__all__ = ["EXEMPT", "MODES", "OPERATORS", "Case", "Operator", "Result", "verify"]
