"""Fixtures of the tests that replace FlashInfer and the GPU."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from dispatch.calls import OPS, reference
from jitnorm.dispatch import flashinfer_backend, selection


@pytest.fixture
def fresh(monkeypatch):
    """A process that has not read JITNORM_BACKEND, and where importing FlashInfer has not been tried and will fail."""
    monkeypatch.delenv("JITNORM_BACKEND", raising=False)
    monkeypatch.setattr(flashinfer_backend, "_unavailable_reason", None)
    monkeypatch.setattr(flashinfer_backend, "_norm", None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)  # what get_device() returns on the CPU
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "flashinfer"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flashinfer", None)  # not importable, whatever this machine has
    selection._backend_from_environment.cache_clear()
    yield
    selection._backend_from_environment.cache_clear()


@pytest.fixture
def flashinfer(fresh, monkeypatch) -> list:
    """A FlashInfer that works. Its calls: (name, the tensors' ids, eps, enable_pdl)."""
    calls = []

    def rmsnorm_of(name):
        def function(input, weight, eps=1e-6, out=None, enable_pdl=None):
            calls.append((name, (id(input), id(weight), id(out)), eps, enable_pdl))
            out = torch.empty_like(input) if out is None else out
            return out.copy_(reference(name, input, None, weight, eps)[0])

        return function

    def fused_of(name):
        def function(input, residual, weight, eps=1e-6, enable_pdl=None):
            calls.append((name, (id(input), id(residual), id(weight)), eps, enable_pdl))
            normalised, total = reference(name, input, residual, weight, eps)
            residual.copy_(total)
            input.copy_(normalised)

        return function

    package, norm = types.ModuleType("flashinfer"), types.ModuleType("flashinfer.norm")
    package.norm = norm
    for name in OPS:
        setattr(norm, name, (fused_of if "fused" in name else rmsnorm_of)(name))
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.norm", norm)
    return calls
