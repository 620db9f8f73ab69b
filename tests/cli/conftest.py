"""What tests of several commands use."""

from __future__ import annotations

import pytest

from jitnorm.cli.trial_build import TrialBuild


@pytest.fixture
def trial_builds(monkeypatch) -> list[dict]:
    """Replace the builds of `jitnorm doctor`, which take seconds, and return the arguments of each call."""
    calls: list[dict] = []

    def try_builds(archs):
        calls.append(archs)
        return {device: TrialBuild(True, 0.1) for device in archs}

    monkeypatch.setattr("jitnorm.cli.diagnostics.try_builds", try_builds)
    return calls
