"""Fixtures that several modules share; a module may put its own in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.support.coordinator import RunningCoordinator
from tests.support.raw_run import RawWorker


@pytest.fixture
def worker(coordinator: RunningCoordinator) -> Iterator[RawWorker]:
    with contextlib.closing(RawWorker(coordinator, name="honest")) as made:
        yield made
