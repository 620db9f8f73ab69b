"""What the plugins of vLLM and SGLang share, without either. Their own tests check that each part can be skipped."""

from __future__ import annotations

import pytest

from jitnorm.integrations import engine_plugins


@pytest.mark.parametrize(
    ("text", "parts"),
    [("", set()), ("norms", {"norms"}), (" attention, linear_layers,", {"attention", "linear_layers"})],
)
def test_parts_to_skip(text, parts, monkeypatch):
    monkeypatch.setenv("JITNORM_PLUGIN_SKIP", text)
    assert engine_plugins.skipped_parts() == parts
    for part in engine_plugins.PARTS:
        assert (engine_plugins.reason_to_skip(part) is not None) == (part in parts)


def test_an_unknown_part_is_refused(monkeypatch):
    monkeypatch.setenv("JITNORM_PLUGIN_SKIP", "norms,linear")
    with pytest.raises(ValueError, match=r"must be names of norms, activations, .*, got 'linear'"):
        engine_plugins.skipped_parts()
