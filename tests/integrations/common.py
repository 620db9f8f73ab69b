"""What the tests of patched transformers models share."""

from __future__ import annotations

import copy

from helpers import rmsnorm_reference


def norms(model):
    return [m for m in model.modules() if "RMSNorm" in type(m).__name__]


def in_float64(model):
    """Return a copy that computes in float64, with norms from their definition: transformers' round to float32."""
    twin = copy.deepcopy(model).double()
    for module in norms(twin):
        gemma = type(module).__name__.startswith("Gemma")
        eps = module.eps if gemma else module.variance_epsilon
        weight = module.weight.detach() + (1 if gemma else 0)
        module.forward = lambda x, weight=weight, eps=eps: rmsnorm_reference(x, weight, eps)
    return twin
