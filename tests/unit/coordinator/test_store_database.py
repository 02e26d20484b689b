"""What the database refuses by itself, whatever a process does; how it is opened and migrated."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from sqlalchemy import delete, insert, select, update
from sqlalchemy.exc import DBAPIError, StatementError

from cbtm_common.errors import InvalidArgument, Unavailable
from cbtm_coordinator import migrations
from cbtm_coordinator.store import Store, identities, runs
from cbtm_coordinator.store.database import open_engine
from cbtm_coordinator.tables import checkpoints, clusters, experts, leases, tasks, tokens, workers
from cbtm_coordinator.tables import runs as runs_table
from tests.support.registry import Registry


def _copy(registry: Registry, table: Any, **changes: object) -> None:
    """Inserts the table's first row once more, with changes: past the store's own care."""
    with registry.store.engine.begin() as tx:
        row = dict(tx.execute(select(table)).mappings().first() or {})
        assert row, f"{table.name} is empty"
        tx.execute(insert(table).values({**row, "id": "copy", **changes}))


@pytest.fixture
def busy(registry: Registry) -> Registry:
    """A registry with a row in every table that matters."""
    registry.run()
    registry.save(registry.lease(), 10)
    return registry


@pytest.mark.parametrize(
    ("table", "changes"),
    [
        pytest.param(leases, {"epoch": 99}, id="a second live lease"),
        pytest.param(leases, {"state": "RELEASED", "end_time": "acquire_time"}, id="an epoch used again"),
        pytest.param(leases, {"epoch": 99, "state": "RELEASED"}, id="an ended lease without its end"),
        pytest.param(leases, {"epoch": 99, "task_id": "none", "state": "LIVE"}, id="a lease of no task"),
        pytest.param(tasks, {"cluster_index": 9, "state": "LOST"}, id="a task in no known state"),
        pytest.param(tasks, {"cluster_index": 9, "committed_step": 101}, id="more steps than the task has"),
        pytest.param(tasks, {}, id="a second task for a cluster"),
        pytest.param(runs_table, {}, id="a second run of a name"),
        pytest.param(runs_table, {"name": "x", "baseline_of": "none"}, id="a baseline of nothing"),
        pytest.param(checkpoints, {}, id="a second checkpoint at an epoch's step"),
        pytest.param(experts, {}, id="an expert's version twice, also the seed's"),
        pytest.param(clusters, {}, id="a place in the clustering twice"),
    ],
)
def test_the_database_refuses(busy: Registry, table: Any, changes: dict[str, Any]) -> None:
    if changes.get("end_time") == "acquire_time":
        changes = {**changes, "end_time": busy.clock()}
    with pytest.raises(DBAPIError):
        _copy(busy, table, **changes)


def test_the_database_refuses_a_token_used_too_often(registry: Registry) -> None:
    with registry.store.writing() as tx:
        identities.create_token(tx, registry.clock(), token_id="t", role="WORKER", secret_hash="h", max_uses=1)
    with pytest.raises(DBAPIError), registry.store.engine.begin() as tx:
        tx.execute(update(tokens).values(uses=2))


def test_a_lease_keeps_its_worker_in_the_database(busy: Registry) -> None:
    with busy.store.engine.begin() as tx:
        tx.execute(delete(workers))
        assert tx.execute(select(leases)).first() is None


def test_a_time_without_a_zone_does_not_enter(registry: Registry) -> None:
    with pytest.raises(StatementError, match="time zone"), registry.store.engine.begin() as tx:
        tx.execute(update(runs_table).values(update_time=datetime(2026, 1, 1)))


def test_what_failed_midway_is_not_there(registry: Registry) -> None:
    def write_and_fail() -> None:
        with registry.store.writing() as tx:
            identities.create_token(tx, registry.clock(), token_id="t", role="ADMIN", secret_hash="h")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_and_fail()
    with registry.store.reading() as tx:
        assert tx.execute(select(tokens)).first() is None


def test_the_migrations_make_exactly_the_tables(registry: Registry) -> None:
    assert migrations.differences(registry.store.engine) == []
    current, head = migrations.current_and_head(registry.store.engine)
    assert current == head is not None


def test_an_upgrade_of_a_database_in_use_keeps_its_rows_and_its_references(busy: Registry) -> None:
    migrations.upgrade(busy.store.engine)
    with busy.store.reading() as tx:
        assert len(runs.list_runs(tx)) == 1
    with pytest.raises(DBAPIError):
        _copy(busy, leases, task_id="none", epoch=99)


def test_tokens_and_workers_of_an_older_registry_get_accounts(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path / 'registry.db'}")
    with engine.begin() as tx:
        command.upgrade(migrations.config(tx), "0002")
        tx.exec_driver_sql(
            "INSERT INTO tokens (id, role, secret_hash, create_time) VALUES ('token_1', 'WORKER', 'h', 0)"
        )
        columns = "id, name, state, credential_hash, token_id, hardware_json, version, register_time, last_seen_time"
        for worker, token in [("worker_1", "'token_1'"), ("worker_2", "'token_1'"), ("worker_3", "NULL")]:
            values = f"'{worker}', 'gpu', 'ACTIVE', '{worker}', {token}, '{{}}', '0.1.0', 0, 0"
            tx.exec_driver_sql(f"INSERT INTO workers ({columns}) VALUES ({values})")
    migrations.upgrade(engine)
    with engine.begin() as tx:
        found = dict(
            tx.exec_driver_sql("SELECT id, account_id FROM workers UNION SELECT id, account_id FROM tokens").all()
        )
    engine.dispose()
    mine = "account_1"
    assert found == {"token_1": mine, "worker_1": mine, "worker_2": mine, "worker_3": "account_3"}


@pytest.mark.parametrize("url", ["mysql://h/d", "sqlite://", "not a url"])
def test_other_databases_are_refused_by_name(url: str) -> None:
    with pytest.raises(InvalidArgument, match="database_url"):
        open_engine(url)


def test_sqlite_on_a_network_file_system_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "stat"
    program.write_text("#!/bin/sh\necho nfs\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(InvalidArgument, match=r"nfs.*local disk, or use PostgreSQL"):
        open_engine(f"sqlite:///{tmp_path / 'registry.db'}")


def test_sqlite_is_opened_durable_and_with_references_on(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'registry.db'}")
    with store.writing() as tx:
        found = {
            name: tx.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "foreign_keys", "synchronous")
        }
    store.close()
    assert found == {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 2}


def test_readers_do_not_wait_for_a_writer(registry: Registry) -> None:
    run = registry.run()
    with registry.store.writing() as writer:
        runs.set_paused(writer, registry.clock(), run, True)
        with registry.store.reading() as reader:
            assert runs.get(reader, run.id).paused is False


def test_a_database_that_is_away_is_unavailable_and_not_a_defect(tmp_path: Path) -> None:
    (tmp_path / "registry.db").mkdir()
    store = Store(f"sqlite:///{tmp_path / 'registry.db'}")
    for opening in (store.writing, store.reading):
        with pytest.raises(Unavailable), opening() as tx:
            tx.execute(select(tokens))
    store.close()
