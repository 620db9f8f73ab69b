"""The parts of a model that choose, for the device and the compiler in force, which of several forms runs."""

from jitnorm.layers.compiler import set_compiler

__all__ = ["set_compiler"]
