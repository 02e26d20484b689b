"""Pruning: checkpoints that nothing resumes from become PRUNED; then their objects are deleted."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, and_, bindparam, or_, select, update

from cbtm_coordinator.lifecycle import CheckpointState, LeaseState, TaskState, Verification
from cbtm_coordinator.store.records import CheckpointRecord
from cbtm_coordinator.tables import checkpoints, checks
from cbtm_coordinator.tables import leases as leases_table
from cbtm_coordinator.tables import runs as runs_table
from cbtm_coordinator.tables import tasks as tasks_table

# Committed checkpoints kept of a task that is not done, the newest included.
KEEP_COMMITTED = 2

# Both ends of a segment that is being replayed stay.
_PINNED = and_(
    runs_table.c.verification != Verification.OFF.value,
    select(checks.c.task_id)
    .where(
        checks.c.settled.is_(False),
        or_(checks.c.checkpoint_id == checkpoints.c.id, checks.c.base_id == checkpoints.c.id),
    )
    .exists(),
)
_OPEN_CHECKPOINTS = (
    select(
        checkpoints.c.id,
        checkpoints.c.step,
        checkpoints.c.epoch,
        checkpoints.c.state,
        runs_table.c.verification,
        _PINNED.label("is_pinned"),
    )
    .join(tasks_table, tasks_table.c.id == checkpoints.c.task_id)
    .join(runs_table, runs_table.c.id == tasks_table.c.run_id)
    .where(
        checkpoints.c.task_id == bindparam("of_task"),
        checkpoints.c.state.in_([CheckpointState.COMMITTED.value, CheckpointState.UPLOADING.value]),
    )
    .order_by(checkpoints.c.step.desc(), checkpoints.c.epoch.desc())
)


def prune_superseded(tx: Connection, task_id: str) -> None:
    """All but the newest committed checkpoints become PRUNED, and so do uploads that they overtook.

    Where work is verified, each lease's last one stays too: to go on from, should what came after not be believed.
    """
    rows = tx.execute(_OPEN_CHECKPOINTS, {"of_task": task_id}).all()
    committed = [row for row in rows if row.state == CheckpointState.COMMITTED.value]
    newest = committed[0].step if committed else 0
    last_of_lease: dict[int, str] = {}
    for row in committed:
        if row.verification != Verification.OFF.value:
            last_of_lease.setdefault(row.epoch, row.id)
    kept = {row.id for row in committed if row.is_pinned} | set(last_of_lease.values())
    stale = [row for row in committed[KEEP_COMMITTED:] if row.id not in kept] + [
        row for row in rows if row.state == CheckpointState.UPLOADING.value and row.step <= newest
    ]
    if stale:
        tx.execute(
            update(checkpoints)
            .where(checkpoints.c.id.in_([row.id for row in stale]))
            .values(state=CheckpointState.PRUNED.value, reason="superseded by a newer checkpoint")
        )


def drop(tx: Connection, task_id: str) -> None:
    """The task starts from step 0: nothing of its earlier life is resumed from, or counted as newer."""
    tx.execute(
        update(checkpoints)
        .where(
            checkpoints.c.task_id == task_id,
            checkpoints.c.state.in_([CheckpointState.COMMITTED.value, CheckpointState.UPLOADING.value]),
        )
        .values(state=CheckpointState.PRUNED.value, reason="its owner started the task anew")
    )


def prune_finished(tx: Connection) -> None:
    """Committed checkpoints of DONE tasks are no longer needed: their experts hold the final one."""
    done = select(tasks_table.c.id).where(tasks_table.c.state == TaskState.DONE.value)
    tx.execute(
        update(checkpoints)
        .where(
            checkpoints.c.task_id.in_(done),
            checkpoints.c.state.in_([CheckpointState.COMMITTED.value, CheckpointState.UPLOADING.value]),
        )
        .values(state=CheckpointState.PRUNED.value, reason="its task is done")
    )


def prune_abandoned(tx: Connection, before: datetime) -> None:
    """Uploads begun before `before` whose lease is over."""
    over = select(leases_table.c.id).where(leases_table.c.state != LeaseState.LIVE.value)
    tx.execute(
        update(checkpoints)
        .where(
            checkpoints.c.state == CheckpointState.UPLOADING.value,
            checkpoints.c.create_time < before,
            checkpoints.c.lease_id.in_(over),
        )
        .values(state=CheckpointState.PRUNED.value, reason="its lease ended before it was committed")
    )


def deletable(tx: Connection, *, limit: int = 50) -> list[CheckpointRecord]:
    """PRUNED and REJECTED checkpoints whose objects are still there."""
    states = [CheckpointState.PRUNED.value, CheckpointState.REJECTED.value]
    query = (
        select(checkpoints)
        .where(checkpoints.c.state.in_(states), checkpoints.c.objects_deleted.is_(False))
        .limit(limit)
    )
    return [CheckpointRecord.of(row) for row in tx.execute(query)]


def mark_deleted(tx: Connection, checkpoint_id: str) -> None:
    tx.execute(update(checkpoints).where(checkpoints.c.id == checkpoint_id).values(objects_deleted=True))


def needs_pruning(tx: Connection, before: datetime) -> bool:
    """Whether `prune_finished` or `prune_abandoned` would change anything."""
    open_states = [CheckpointState.COMMITTED.value, CheckpointState.UPLOADING.value]
    abandoned = and_(
        checkpoints.c.state == CheckpointState.UPLOADING.value,
        checkpoints.c.create_time < before,
        leases_table.c.state != LeaseState.LIVE.value,
    )
    query = (
        select(checkpoints.c.id)
        .join(tasks_table, tasks_table.c.id == checkpoints.c.task_id)
        .join(leases_table, leases_table.c.id == checkpoints.c.lease_id)
        .where(
            checkpoints.c.state.in_(open_states),
            or_(tasks_table.c.state == TaskState.DONE.value, abandoned),
        )
        .limit(1)
    )
    return tx.execute(query).first() is not None
