"""A short storm, always the same one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.__main__ import weather

pytestmark = pytest.mark.integration

_SEED = 20_230_326
_SECONDS = 18.0
_EVERY = 0.8
# Each of the two calm times takes 15 s on two idle cores. All waits together end before pytest ends the test.
_CALM_SECONDS = 75.0


def test_a_short_storm_violates_nothing(tmp_path: Path) -> None:
    outcome = weather(_SEED, seconds=_SECONDS, every=_EVERY, folder=tmp_path, calm_seconds=_CALM_SECONDS)
    assert not outcome.violations, "\n".join(outcome.violations)
    assert outcome.faults.total() >= 15, outcome.faults
    # The seed and each cluster at least once.
    assert outcome.tasks_done >= 5
