"""Rejection of a checkpoint: who pays, what stays, and that it ends."""

from __future__ import annotations

import pytest

from cbtm_common.errors import CheckpointRejected, InvalidState, LeaseLost
from cbtm_coordinator.lifecycle import CheckpointState, LeaseState, RunState, TaskState
from cbtm_coordinator.store import events, identities, pruning, rejections
from cbtm_coordinator.store.records import CheckpointRecord, TaskRecord
from tests.support.registry import Registry, file

EVIDENCE = {"check": "finite", "tensor": "weight"}


def reject(registry: Registry, checkpoint: CheckpointRecord) -> TaskRecord | None:
    with registry.store.writing() as tx:
        return rejections.reject(tx, registry.clock(), checkpoint, reason="NaN", evidence=EVIDENCE)


def test_the_task_goes_on_from_its_last_good_checkpoint_with_an_attempt_counted(registry: Registry) -> None:
    registry.run(clusters=1)
    worker = registry.worker()
    lease = registry.lease(worker)
    registry.save(lease, 10)
    bad = registry.begin(lease, 20)
    task = reject(registry, bad)
    assert task is not None
    assert (task.state, task.attempts, task.committed_step, task.reason) == (TaskState.PENDING, 1, 10, "NaN")
    assert registry.get_lease(lease).state is LeaseState.REVOKED
    found = registry.get_checkpoint(bad)
    assert (found.state, found.reason) == (CheckpointState.REJECTED, "NaN")
    with registry.store.reading() as tx:
        assert identities.get_worker(tx, worker).failures == 1
        assert bad.id in [checkpoint.id for checkpoint in pruning.deletable(tx)]
        told = next(e for e in events.list_events(tx, task_id=task.id) if e.kind == "checkpoint.rejected")
    assert '"check": "finite"' in told.detail_json
    assert told.worker_id == worker
    with pytest.raises(LeaseLost):
        registry.begin(lease, 30)
    resumed = registry.resume_from(task.id)
    assert resumed is not None
    assert resumed.step == 10


def test_its_worker_hears_that_it_is_rejected_and_not_only_that_the_lease_is_lost(registry: Registry) -> None:
    registry.run(clusters=1)
    lease = registry.lease()
    bad = registry.begin(lease, 20)
    reject(registry, bad)
    with pytest.raises(CheckpointRejected, match="NaN"):
        registry.commit(lease, bad)


def test_a_duplicate_changes_nothing(registry: Registry) -> None:
    registry.run(clusters=1)
    lease = registry.lease()
    bad = registry.begin(lease, 20)
    reject(registry, bad)
    assert reject(registry, bad) is None
    assert registry.task(bad.task_id).attempts == 1


def test_a_task_that_is_poisoned_again_and_again_fails_with_its_run(registry: Registry) -> None:
    run = registry.run(clusters=1)
    for attempt in range(1, 4):
        registry.clock.advance(10_000)
        bad = registry.begin(registry.lease(), 20)
        task = reject(registry, bad)
        assert task is not None
        assert task.attempts == attempt
    assert task.state is TaskState.FAILED
    assert registry.get_run(run).state is RunState.FAILED


def test_letting_the_lease_expire_first_does_not_save_the_attempt(registry: Registry) -> None:
    registry.run(clusters=1)
    lease = registry.lease()
    bad = registry.begin(lease, 20)
    registry.clock.advance(1000)
    registry.expire_due()
    task = reject(registry, bad)
    assert task is not None
    assert (task.state, task.attempts) == (TaskState.PENDING, 1)


def test_a_zombie_costs_its_successor_nothing(registry: Registry) -> None:
    registry.run(clusters=1)
    lease = registry.lease()
    bad = registry.begin(lease, 20)
    registry.clock.advance(1000)
    registry.expire_due()
    successor = registry.lease()
    task = reject(registry, bad)
    assert task is not None
    assert (task.state, task.attempts) == (TaskState.LEASED, 0)
    assert registry.get_lease(successor).state is LeaseState.LIVE


def test_what_was_announced_anew_is_not_rejected_for_what_was_before(registry: Registry) -> None:
    registry.run(clusters=1)
    lease = registry.lease()
    old = registry.begin(lease, 20)
    registry.begin(lease, 20, [file("state.json", "runs/other")])
    with pytest.raises(InvalidState, match="other files"):
        reject(registry, old)
    assert registry.get_lease(lease).state is LeaseState.LIVE
