"""Fixtures of the tests of batch-invariant mode."""

from __future__ import annotations

import pytest

from jitnorm.batch_invariant import set_batch_invariant_mode


@pytest.fixture
def mode():
    """Run a test in batch-invariant mode."""
    with set_batch_invariant_mode():
        yield
