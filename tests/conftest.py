"""Fixtures that several folders of tests share; a module may put its own in their place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.coordinator import RunningCoordinator, running_coordinator


@pytest.fixture(scope="module")
def coordinator(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningCoordinator]:
    with running_coordinator(tmp_path_factory.mktemp(request.path.stem)) as running:
        yield running
