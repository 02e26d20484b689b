"""One SQLite registry shared by several processes: the embedded default with a coordinator and commands beside it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from cbtm_coordinator import migrations
from cbtm_coordinator.lifecycle import TaskState
from cbtm_coordinator.tables import leases
from tests.support.registry import Registry

pytestmark = pytest.mark.integration
_PROCESSES = 3
_TURNS = 15


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    made = Registry(f"sqlite:///{tmp_path / 'registry.db'}")
    migrations.upgrade(made.store.engine)
    yield made
    made.store.close()


def _take_and_leave(url: str, worker_id: str) -> list[tuple[str, int]]:
    """(task, epoch) of every lease this process got; a short checkpoint in each."""
    registry = Registry(url)
    held = []
    for _ in range(_TURNS):
        lease = registry.acquire(worker_id)
        if lease is None:
            continue
        held.append((lease.task_id, lease.epoch))
        registry.renew(lease)
        registry.save(lease, registry.task(lease.task_id).committed_step + 1)
        registry.release(lease)
    registry.store.close()
    return held


def test_processes_that_share_the_file_never_hold_one_epoch_twice(registry: Registry) -> None:
    run = registry.run(clusters=2)
    url = registry.store.engine.url.render_as_string()
    arguments = [(url, registry.worker(f"w{i}")) for i in range(_PROCESSES)]
    with multiprocessing.get_context("spawn").Pool(_PROCESSES) as pool:
        held = [pair for found in pool.starmap(_take_and_leave, arguments) for pair in found]
    assert len(held) == len(set(held)) > 0
    with registry.store.reading() as tx:
        rows = {(row.task_id, row.epoch) for row in tx.execute(select(leases.c.task_id, leases.c.epoch))}
    assert rows == set(held)
    for task in registry.tasks(run):
        assert task.state is TaskState.PENDING
        assert task.epoch == task.committed_step == sum(found == task.id for found, _ in held)


def test_processes_that_upgrade_one_file_at_once_all_succeed(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new.db'}"
    with multiprocessing.get_context("spawn").Pool(_PROCESSES) as pool:
        assert pool.map(_upgrade, [url] * _PROCESSES) == [True] * _PROCESSES


def _upgrade(url: str) -> bool:
    registry = Registry(url)
    migrations.upgrade(registry.store.engine)
    current, head = migrations.current_and_head(registry.store.engine)
    registry.store.close()
    return current == head
