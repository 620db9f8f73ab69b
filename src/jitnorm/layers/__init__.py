"""The parts of a model that choose, for the device and the compiler in force, which of several forms runs."""

from jitnorm.layers.compiler import set_compiler
from jitnorm.layers.fp8_linear import apply_fp8_linear

__all__ = ["apply_fp8_linear", "set_compiler"]
