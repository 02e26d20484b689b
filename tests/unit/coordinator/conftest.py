"""The registry that these tests run on: SQLite in a file. `tests/integration` runs the same tests on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import event

from tests.support.registry import Registry


@pytest.fixture(scope="session")
def sqlite_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    from cbtm_coordinator import migrations

    made = Registry(f"sqlite:///{tmp_path_factory.mktemp('registry') / 'registry.db'}")
    migrations.upgrade(made.store.engine)

    @event.listens_for(made.store.engine, "connect")
    def _without_waiting_for_the_disk(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    made.store.engine.dispose()
    yield made
    made.store.close()


@pytest.fixture
def registry(sqlite_registry: Registry) -> Registry:
    """Empty, and its clock at the first instant."""
    sqlite_registry.wipe()
    return sqlite_registry
