"""The real store under random interleavings of workers, expiries, crashes and retries, against a small model.

The model knows of each task only its epoch, its committed step, who holds it, and whether it is done. After every rule
the registry must agree with it, and the invariants must hold as seen from outside. A crash is a transaction that is
rolled back at its end; a retry repeats a request with its id. The same machine runs on SQLite and on PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import func, select

from cbtm_common.errors import CbtmError, InvalidArgument, InvalidState, LeaseLost
from cbtm_common.ids import new_request_id
from cbtm_coordinator import migrations
from cbtm_coordinator.lifecycle import CheckpointState, LeaseState, RunState, TaskState
from cbtm_coordinator.store import leases, tasks
from cbtm_coordinator.store.records import CheckpointRecord, LeaseRecord
from cbtm_coordinator.tables import checkpoints as checkpoints_table
from cbtm_coordinator.tables import experts as experts_table
from cbtm_coordinator.tables import leases as leases_table
from tests.support.postgres import PostgresServer, postgres
from tests.support.registry import RECIPE, Registry

__all__ = ["postgres"]
CLUSTERS, WORKERS, STEPS = 3, 4, RECIPE.steps
LEASE_SECONDS = RECIPE.lease.lease_seconds


class Crash(Exception):
    """The process died before its transaction was committed."""


@dataclass
class Model:
    """What one task must look like."""

    epoch: int = 0
    committed: int = 0
    done: bool = False
    failed: bool = False
    holder: str | None = None
    # Highest epoch under which something was committed, with its step: it may never be lost.
    history: list[tuple[int, int]] = field(default_factory=list)


class Machine(RuleBasedStateMachine):
    registry: Registry

    held = Bundle("held")
    begun = Bundle("begun")

    @initialize()
    def start(self) -> None:
        self.registry.wipe()
        self.run = self.registry.run(clusters=CLUSTERS)
        self.workers = [self.registry.worker(f"w{i}") for i in range(WORKERS)]
        self.models = {task.id: Model() for task in self.registry.tasks(self.run)}
        self.leases: dict[str, LeaseRecord] = {}
        self.ended: set[str] = set()

    # Rules

    @rule(target=held, worker=st.integers(0, WORKERS - 1))
    def acquire(self, worker: int) -> object:
        lease = self.registry.acquire(self.workers[worker])
        if lease is None:
            return multiple()
        self._claimed(lease)
        return lease

    @rule(target=held, worker=st.integers(0, WORKERS - 1))
    def acquire_twice_with_one_request(self, worker: int) -> object:
        """A retry gets the first answer, and no second task."""
        request_id, found = new_request_id(), []
        for _ in range(2):
            answer = self.registry.store.once(
                request_id,
                "Acquire",
                self.workers[worker],
                lambda tx: (
                    claimed.lease.id.encode()
                    if (claimed := leases.acquire(tx, self.registry.clock(), self.workers[worker]))
                    else b""
                ),
                keep=bool,
            )
            found.append(answer.decode())
        assert found[0] == found[1]
        if not found[0]:
            return multiple()
        with self.registry.store.reading() as tx:
            lease = leases.get_lease(tx, found[0])
        self._claimed(lease)
        return lease

    @rule(worker=st.integers(0, WORKERS - 1))
    def acquire_and_crash(self, worker: int) -> None:
        def claim_and_die() -> None:
            with self.registry.store.writing() as tx:
                leases.acquire(tx, self.registry.clock(), self.workers[worker])
                raise Crash

        with pytest.raises(Crash):
            claim_and_die()

    @rule(lease=held)
    def renew(self, lease: LeaseRecord) -> None:
        live = self._is_live(lease)
        try:
            self.registry.renew(lease)
        except LeaseLost:
            assert not live
        else:
            assert live

    @rule(target=begun, lease=held, ahead=st.integers(1, 60))
    def begin(self, lease: LeaseRecord, ahead: int) -> object:
        model = self.models[lease.task_id]
        step = min(STEPS, model.committed + ahead)
        try:
            checkpoint = self.registry.begin(lease, step)
        except LeaseLost:
            assert not self._is_live(lease)
            return multiple()
        except (InvalidArgument, InvalidState):
            assert model.committed >= step
            return multiple()
        assert self._is_live(lease)
        return (lease, checkpoint)

    @rule(pair=begun)
    def commit(self, pair: tuple[LeaseRecord, CheckpointRecord]) -> None:
        lease, checkpoint = pair
        model = self.models[lease.task_id]
        before = self.registry.get_checkpoint(checkpoint)
        try:
            done, _ = self.registry.commit(lease, checkpoint)
        except CbtmError:
            # Refused only when somebody succeeded it, it was taken away, or the task is past it.
            state = self.registry.get_lease(lease).state
            assert (
                model.epoch != lease.epoch
                or model.committed >= checkpoint.step
                or state not in (LeaseState.LIVE, LeaseState.EXPIRED)
                or model.failed
            )
            return
        if before.state is not CheckpointState.UPLOADING:
            return
        assert done.state in (CheckpointState.COMMITTED, CheckpointState.ACCEPTED)
        # A late one of an expired lease is kept; what was taken away is not.
        assert self.registry.get_lease(lease).state is not LeaseState.REVOKED
        assert model.epoch == lease.epoch
        assert model.committed < checkpoint.step
        model.committed = checkpoint.step
        model.history.append((lease.epoch, checkpoint.step))
        model.done = checkpoint.step == STEPS

    @rule(pair=begun)
    def commit_and_crash(self, pair: tuple[LeaseRecord, CheckpointRecord]) -> None:
        lease, checkpoint = pair
        from cbtm_coordinator.store import commits

        try:
            with self.registry.store.writing() as tx:
                commits.commit(
                    tx,
                    self.registry.clock(),
                    checkpoint=checkpoint,
                    worker_id=lease.worker_id,
                    epoch=lease.epoch,
                    metrics={},
                )
                raise Crash
        except (Crash, CbtmError):
            return

    @rule(lease=held, failed=st.booleans())
    def release(self, lease: LeaseRecord, failed: bool) -> None:
        live = self._is_live(lease)
        try:
            _, task = self.registry.release(lease, failed=failed)
        except LeaseLost:
            assert not live
            return
        assert live
        model = self.models[lease.task_id]
        self._ended(lease)
        model.failed = task.state is TaskState.FAILED
        assert task.state in (TaskState.DONE if model.done else TaskState.PENDING, TaskState.FAILED)

    @rule(seconds=st.sampled_from([1.0, LEASE_SECONDS / 2, LEASE_SECONDS + 1, 3600.0]))
    def time_passes(self, seconds: float) -> None:
        self.registry.clock.advance(seconds)
        for lease in self.registry.expire_due():
            assert lease.state is LeaseState.EXPIRED
            assert lease.reason
            self._ended(lease)
            with self.registry.store.reading() as tx:
                self.models[lease.task_id].failed = tasks.get_task(tx, lease.task_id).state is TaskState.FAILED

    @rule(worker=st.integers(0, WORKERS - 1))
    def revoke_leases_of(self, worker: int) -> None:
        with self.registry.store.writing() as tx:
            leases.revoke_leases(tx, self.registry.clock(), reason="a test", worker_id=self.workers[worker])
        for lease in list(self.leases.values()):
            if lease.worker_id == self.workers[worker] and self._is_live(lease):
                self._ended(lease)

    # The model

    def _claimed(self, lease: LeaseRecord) -> None:
        model = self.models[lease.task_id]
        assert model.holder is None
        assert not model.done
        assert lease.epoch > model.epoch, "an epoch is never reused"
        model.epoch, model.holder = lease.epoch, lease.id
        self.leases[lease.id] = lease

    def _ended(self, lease: LeaseRecord) -> None:
        model = self.models[lease.task_id]
        if model.holder == lease.id:
            model.holder = None
        self.ended.add(lease.id)

    def _is_live(self, lease: LeaseRecord) -> bool:
        return lease.id not in self.ended

    # What must hold after every rule

    @invariant()
    def the_registry_agrees_with_the_model(self) -> None:
        for task in self.registry.tasks(self.run):
            model = self.models[task.id]
            assert task.epoch == model.epoch
            assert task.committed_step == model.committed
            if model.done:
                assert task.state is TaskState.DONE
            elif model.holder is not None:
                assert task.state is TaskState.LEASED
            else:
                assert task.state in (TaskState.PENDING, TaskState.FAILED)

    @invariant()
    def one_live_lease_a_task_and_no_committed_step_lost(self) -> None:
        live = leases_table.c.state == LeaseState.LIVE.value
        with self.registry.store.reading() as tx:
            counts = tx.execute(
                select(leases_table.c.task_id, func.count()).where(live).group_by(leases_table.c.task_id)
            ).all()
            kept = {
                (row.task_id, row.step)
                for row in tx.execute(
                    select(checkpoints_table.c.task_id, checkpoints_table.c.step).where(
                        checkpoints_table.c.state.in_([CheckpointState.COMMITTED.value, CheckpointState.ACCEPTED.value])
                    )
                )
            }
            versions = tx.execute(
                select(func.count()).select_from(experts_table).where(experts_table.c.cluster_index >= 0)
            ).scalar_one()
        assert all(count == 1 for _, count in counts)
        for task_id, model in self.models.items():
            if model.committed:
                assert (task_id, model.committed) in kept, "the last good checkpoint is always there"
        assert versions == sum(model.done for model in self.models.values())

    @invariant()
    def a_run_is_complete_when_all_its_tasks_are_done(self) -> None:
        state = self.registry.get_run(self.run).state
        all_done = all(model.done for model in self.models.values())
        assert (state is RunState.COMPLETE) == all_done


def machine_on(registry: Registry) -> type[Machine]:
    return type("MachineOn", (Machine,), {"registry": registry})


def check(registry: Registry, examples: int) -> None:
    run_state_machine_as_test(
        machine_on(registry),
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(f"sqlite:///{tmp_path / 'registry.db'}")
    migrations.upgrade(registry.store.engine)
    yield registry
    registry.store.close()


@pytest.fixture
def on_postgres(postgres: PostgresServer) -> Iterator[Registry]:
    import psycopg

    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        admin.execute("CREATE DATABASE stateful")
    registry = Registry(postgres.url("stateful"))
    migrations.upgrade(registry.store.engine)
    yield registry
    registry.store.close()


def test_random_interleavings_on_sqlite(sqlite: Registry) -> None:
    check(sqlite, 25)


@pytest.mark.integration
def test_random_interleavings_on_postgresql(on_postgres: Registry) -> None:
    check(on_postgres, 15)
