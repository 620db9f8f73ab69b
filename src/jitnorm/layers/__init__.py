"""Functions for parts of a model, which select an implementation for the device and the compiler in use."""

from jitnorm.layers.compiler import set_compiler
from jitnorm.layers.fp8_linear import apply_fp8_linear
from jitnorm.layers.qk_norm import _reshape_for_qk_norm as _reshape_for_qk_norm
from jitnorm.layers.qk_norm import apply_qk_norm
from jitnorm.layers.qk_norm_rope import apply_qk_norm_rope

__all__ = ["apply_fp8_linear", "apply_qk_norm", "apply_qk_norm_rope", "set_compiler"]
