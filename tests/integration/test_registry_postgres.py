"""The registry's unit tests once more, on a real PostgreSQL, and what only shows there: transactions that overlap."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import psycopg
import pytest
from sqlalchemy import select, text

from cbtm_common.errors import CbtmError, LeaseLost, Unavailable
from cbtm_coordinator import migrations
from cbtm_coordinator.lifecycle import RunState, TaskState
from cbtm_coordinator.store import Store, commits, leases, requeue, runs, tasks
from cbtm_coordinator.store.database import IDLE_SECONDS, open_engine, writing
from cbtm_coordinator.store.records import LeaseRecord
from cbtm_coordinator.tables import leases as leases_table
from tests.support.postgres import PostgresServer, postgres
from tests.support.registry import RECIPE, Registry, all_at_once
from tests.unit.coordinator import (
    test_store_checkpoints,
    test_store_credits,
    test_store_database,
    test_store_identities,
    test_store_leases,
    test_store_runs,
)
from tests.unit.coordinator.test_store_database import busy

__all__ = ["busy", "postgres"]
pytestmark = pytest.mark.integration


def _tests_on_the_registry(module: ModuleType) -> dict[str, object]:
    """Those that take the fixture `registry` (or `busy`): here it is one on PostgreSQL."""
    return {
        name: found
        for name, found in vars(module).items()
        if name.startswith("test_") and {"registry", "busy"} & set(inspect.signature(found).parameters)
    }


for _module in (
    test_store_checkpoints,
    test_store_credits,
    test_store_database,
    test_store_identities,
    test_store_leases,
    test_store_runs,
):
    globals().update(_tests_on_the_registry(_module))


def _create_database(server: PostgresServer, name: str) -> str:
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return server.url(name)


@pytest.fixture(scope="module")
def postgres_registry(postgres: PostgresServer) -> Iterator[Registry]:
    made = Registry(_create_database(postgres, "registry"))
    migrations.upgrade(made.store.engine)
    yield made
    made.store.close()


@pytest.fixture
def registry(postgres_registry: Registry) -> Registry:
    postgres_registry.wipe()
    return postgres_registry


def test_many_claims_of_many_tasks_leave_nobody_with_nothing_and_no_task_twice(registry: Registry) -> None:
    # More workers than one query's candidates: they stand in one another's way, and each still gets a task.
    run = registry.run(clusters=40)
    workers = [registry.worker(f"w{i}") for i in range(40)]
    results = all_at_once(40, lambda i: registry.acquire(workers[i]))
    won = [lease for lease in results if isinstance(lease, LeaseRecord)]
    assert len({lease.task_id for lease in won}) == len(won) == 40
    assert {task.state for task in registry.tasks(run)} == {TaskState.LEASED}


def test_a_claim_does_not_wait_for_another_that_is_not_finished(registry: Registry) -> None:
    registry.run(clusters=2)
    first, second = registry.worker("first"), registry.worker("second")
    with registry.store.writing() as slow:
        held = leases.acquire(slow, registry.clock(), first)
        with registry.store.writing() as fast:
            fast.execute(text("SET LOCAL lock_timeout = '100ms'"))
            other = leases.acquire(fast, registry.clock(), second)
    assert held is not None
    assert other is not None
    assert held.task.id != other.task.id


def test_a_claim_that_is_rolled_back_leaves_the_task_and_its_epoch(registry: Registry) -> None:
    run = registry.run(clusters=1)

    def claim_and_die() -> None:
        with registry.store.writing() as tx:
            leases.acquire(tx, registry.clock(), registry.worker())
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        claim_and_die()
    (task,) = registry.tasks(run)
    assert (task.state, task.epoch) == (TaskState.PENDING, 0)


def test_a_release_that_waits_for_the_same_leases_expiry_is_told_so(registry: Registry) -> None:
    registry.run(clusters=1)
    lease = registry.lease()
    registry.clock.advance(RECIPE.lease.lease_seconds)
    with ThreadPoolExecutor(1) as pool:
        with registry.store.writing() as tx:
            assert leases.expire(tx, registry.clock(), lease) is not None
            late = pool.submit(registry.release, lease, failed=True)
            _wait_until_somebody_waits_for_a_lock(registry)
        with pytest.raises(LeaseLost, match="not renewed in time"):
            late.result(timeout=30)
    assert registry.task(lease.task_id).attempts == 0


def test_the_two_last_experts_accepted_in_overlapping_transactions_complete_the_run(registry: Registry) -> None:
    run = registry.run(clusters=2)
    held = [registry.lease(), registry.lease()]
    last = [registry.begin(lease, RECIPE.steps) for lease in held]
    with ThreadPoolExecutor(1) as pool:
        with registry.store.writing() as tx:
            commits.commit(
                tx,
                registry.clock(),
                checkpoint=last[0],
                worker_id=held[0].worker_id,
                epoch=held[0].epoch,
                metrics={},
            )
            # Sees the first task as not DONE for as long as this transaction is open: it has to wait for its end.
            second = pool.submit(registry.commit, held[1], last[1])
            _wait_until_somebody_waits_for_a_lock(registry)
        second.result(timeout=30)
    assert registry.get_run(run).state is RunState.COMPLETE


def test_two_last_failures_in_overlapping_transactions_both_end(registry: Registry) -> None:
    run = registry.run(clusters=2)
    for _ in range(2 * (RECIPE.lease.max_attempts - 1)):
        registry.release(registry.lease(), failed=True)
        registry.clock.advance(3600)
    held = [registry.lease(), registry.lease()]
    with ThreadPoolExecutor(1) as pool:
        with registry.store.writing() as tx:
            leases.release(
                tx,
                registry.clock(),
                lease_id=held[0].id,
                epoch=held[0].epoch,
                worker_id=held[0].worker_id,
                failed=True,
            )
            second = pool.submit(registry.release, held[1], failed=True)
            _wait_until_somebody_waits_for_a_lock(registry)
        second.result(timeout=30)
    assert {task.state for task in registry.tasks(run)} == {TaskState.FAILED}
    assert registry.get_run(run).state is RunState.FAILED


def test_a_commit_that_waits_for_its_successors_claim_is_refused(registry: Registry) -> None:
    registry.run(clusters=1)
    zombie = registry.lease()
    sent = registry.begin(zombie, 10)
    registry.clock.advance(RECIPE.lease.lease_seconds)
    registry.expire_due()
    with ThreadPoolExecutor(1) as pool:
        with registry.store.writing() as tx:
            assert leases.acquire(tx, registry.clock(), registry.worker()) is not None
            late = pool.submit(registry.commit, zombie, sent)
            _wait_until_somebody_waits_for_a_lock(registry)
        with pytest.raises(LeaseLost):
            late.result(timeout=30)
    assert registry.task(zombie.task_id).committed_step == 0


def test_a_requeue_and_a_claim_that_race_leave_one_of_them_in_the_right(registry: Registry) -> None:
    run = registry.run(clusters=1)
    worker = registry.worker()
    for _ in range(10):
        gate = threading.Barrier(2)

        def claim(gate: threading.Barrier = gate) -> LeaseRecord | None:
            gate.wait()
            return registry.acquire(worker)

        def put_back(gate: threading.Barrier = gate) -> None:
            gate.wait()
            with registry.store.writing() as tx:
                (task,) = tasks.list_tasks(tx, run.id)
                requeue.requeue_task(tx, registry.clock(), runs.get(tx, run.id), task, from_start=True)

        with ThreadPoolExecutor(2) as pool:
            claimed, requeued = pool.submit(claim), pool.submit(put_back)
            lease = claimed.result(timeout=30)
            requeued.result(timeout=30)
        (task,) = registry.tasks(run)
        if lease is None or registry.get_lease(lease).end_time is not None:
            assert task.state is TaskState.PENDING
        else:
            assert (task.state, task.epoch) == (TaskState.LEASED, lease.epoch)
            registry.release(lease)


def test_everything_at_once_breaks_no_invariant(registry: Registry) -> None:
    """Workers that train, vanish and fail, beside two coordinators that expire and an owner that requeues."""
    run = registry.run(clusters=6)
    workers = [registry.worker(f"w{i}") for i in range(8)]
    stop = threading.Event()
    refused: list[CbtmError] = []

    def train(index: int) -> None:
        for turn in range(8):
            lease = registry.acquire(workers[index])
            if lease is None:
                continue
            try:
                registry.renew(lease)
                if turn % 3:
                    registry.save(lease, registry.task(lease.task_id).committed_step + 1)
                if turn % 4:
                    registry.release(lease)
            except (LeaseLost, Unavailable) as error:
                refused.append(error)

    def coordinate(_: int) -> None:
        while not stop.is_set():
            registry.clock.advance(RECIPE.lease.lease_seconds / 3)
            registry.expire_due()

    with ThreadPoolExecutor(10) as pool:
        coordinators = [pool.submit(coordinate, i) for i in range(2)]
        trained = [pool.submit(train, i) for i in range(8)]
        for future in trained:
            future.result(timeout=60)
        stop.set()
        for future in coordinators:
            future.result(timeout=60)
    with registry.store.reading() as tx:
        rows = tx.execute(select(leases_table.c.task_id, leases_table.c.epoch, leases_table.c.state)).all()
        found = tasks.list_tasks(tx, run.id)
    for task in found:
        epochs = sorted(row.epoch for row in rows if row.task_id == task.id)
        live = [row.epoch for row in rows if row.task_id == task.id and row.state == "LIVE"]
        assert epochs == list(range(1, task.epoch + 1))
        assert live == ([task.epoch] if task.state is TaskState.LEASED else [])
        resume = registry.resume_from(task.id)
        assert (resume.step if resume else 0) == task.committed_step


def test_a_deadlock_is_an_error_that_a_client_retries(registry: Registry) -> None:
    first, second = registry.run("first"), registry.run("second")
    gate = threading.Barrier(2)

    def lock_both(index: int) -> None:
        order = (first, second) if index else (second, first)
        with registry.store.writing() as tx:
            runs.get(tx, order[0].id, lock=True)
            gate.wait(timeout=30)
            runs.get(tx, order[1].id, lock=True)

    results = all_at_once(2, lock_both)
    assert [type(r) for r in results if r is not None] == [Unavailable]


def _terminate_connections(registry: Registry) -> None:
    with registry.store.writing() as tx:
        tx.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND datname = current_database()"
            )
        )


def test_a_connection_that_the_server_closed_while_it_lay_idle_is_replaced(registry: Registry) -> None:
    run = registry.run()
    all_at_once(3, lambda _: registry.get_run(run))
    time.sleep(IDLE_SECONDS)
    _terminate_connections(registry)
    assert all_at_once(3, lambda _: registry.get_run(run).name) == ["web"] * 3


def test_a_connection_that_the_server_closes_in_use_is_said_to_be_unavailable_and_replaced(registry: Registry) -> None:
    run = registry.run()

    def lose_it() -> None:
        with registry.store.writing() as tx:
            _terminate_connections(registry)
            runs.get(tx, run.id)

    with pytest.raises(Unavailable, match="cannot be used now"):
        lose_it()
    assert registry.get_run(run).name == "web"


def test_a_statement_that_takes_too_long_is_ended_and_said_to_be_unavailable(postgres: PostgresServer) -> None:
    engine = open_engine(postgres.url(), statement_seconds=0.1)
    with pytest.raises(Unavailable, match="statement timeout"), writing(engine) as tx:
        tx.execute(text("SELECT pg_sleep(30)"))
    engine.dispose()


def test_a_coordinator_that_stops_in_a_transaction_keeps_no_lock(registry: Registry, postgres: PostgresServer) -> None:
    registry.run(clusters=1)
    lease = registry.lease()
    stopped = open_engine(registry.store.engine.url.render_as_string(hide_password=False), idle_seconds=0.2)

    def hang() -> None:
        with writing(stopped) as tx:
            tasks.get_task(tx, lease.task_id, lock=True)
            # Longer than the server waits; meanwhile somebody needs the row.
            assert registry.release(lease)[1].state is TaskState.PENDING
            tasks.get_task(tx, lease.task_id)

    with pytest.raises(Unavailable):
        hang()
    stopped.dispose()


def test_coordinators_that_upgrade_at_once_wait_for_one_another(postgres: PostgresServer) -> None:
    url = _create_database(postgres, "upgraded")
    stores = [Store(url) for _ in range(3)]
    results = all_at_once(3, lambda i: migrations.upgrade(stores[i].engine))
    assert results == [None] * 3
    current, head = migrations.current_and_head(stores[0].engine)
    assert current == head
    for store in stores:
        store.close()


def _wait_until_somebody_waits_for_a_lock(registry: Registry) -> None:
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    pause = threading.Event()
    for _ in range(2000):
        with registry.store.reading() as tx:
            if tx.execute(waiting).scalar_one():
                return
        pause.wait(0.005)
    raise AssertionError("nobody waits for a lock")
