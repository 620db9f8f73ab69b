"""examples/fp8_decoder_layer.py: all variants compute the same, and inductor fuses."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_FILE = Path(__file__).parents[2] / "examples" / "fp8_decoder_layer.py"


@pytest.fixture
def example():
    spec = importlib.util.spec_from_file_location("fp8_decoder_layer", _FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.slow
def test_every_variant(device, example):
    sizes = example.Sizes(hidden=512, heads=4, kv_heads=2, head_dim=128, intermediate=768)
    eager, quantising, custom, fused = example.measure(sizes, tokens=33, device=device, repeats=2)
    # A code that is off by one is off by an eighth; so are some where a norm is rounded to bfloat16 before, or is not.
    assert all(0 < m.difference < 0.05 for m in (quantising, custom, fused))
    if device == "cuda":
        assert quantising.kernels == eager.kernels - 2
    # Four inputs are quantised: two after norms, one after the attention, one after the gates.
    assert custom.kernels - fused.kernels >= 3, (custom, fused)
    assert all(m.microseconds > 0 for m in (eager, quantising, custom, fused))
