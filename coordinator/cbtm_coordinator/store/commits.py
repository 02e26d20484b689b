"""Commits: a checkpoint whose every object was checked becomes visible, whole.

The services call `commit` only after that check. A commit is refused when the task has a newer epoch, so a zombie can
make nothing visible; one whose lease expired but that nobody has succeeded is kept, for its work is as good as any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import Connection, bindparam, case, select, update

from cbtm_common.errors import CheckpointRejected, InvalidState, LeaseLost, PermissionDenied
from cbtm_coordinator.lifecycle import CheckpointState, LeaseState, TaskState, Verification, sources
from cbtm_coordinator.store import completion, events, leases, pruning, refusals, tasks
from cbtm_coordinator.store.checkpoints import get, unknown
from cbtm_coordinator.store.records import CheckpointRecord, LeaseRecord, TaskRecord, prefixed
from cbtm_coordinator.tables import checkpoints, workers
from cbtm_coordinator.tables import leases as leases_table
from cbtm_coordinator.tables import runs as runs_table
from cbtm_coordinator.tables import tasks as tasks_table

_COMMITTABLE = (
    select(*prefixed(checkpoints), *prefixed(leases_table), *prefixed(tasks_table))
    .join_from(checkpoints, leases_table, leases_table.c.id == checkpoints.c.lease_id)
    .join(tasks_table, tasks_table.c.id == checkpoints.c.task_id)
    .where(checkpoints.c.id == bindparam("of_checkpoint"))
)


def committable(
    tx: Connection, *, checkpoint_id: str, lease_id: str, epoch: int, worker_id: str
) -> tuple[CheckpointRecord, TaskRecord]:
    """The checkpoint that a worker wants to commit, if it still may. Raises LeaseLost when somebody succeeded it."""
    row = tx.execute(_COMMITTABLE, {"of_checkpoint": checkpoint_id}).one_or_none()
    if row is None:
        raise unknown(checkpoint_id)
    checkpoint = CheckpointRecord.of(row, prefix="checkpoints_")
    lease = LeaseRecord.of(row, prefix="leases_")
    task = TaskRecord.of(row, prefix="tasks_")
    if lease.worker_id != worker_id or lease.id != lease_id:
        raise PermissionDenied("this checkpoint belongs to another lease")
    if checkpoint.state is CheckpointState.REJECTED:
        # Its lease ended with it; this tells more.
        raise CheckpointRejected(f"checkpoint {checkpoint.id} is REJECTED: {checkpoint.reason}")
    done = checkpoint.state in (CheckpointState.COMMITTED, CheckpointState.ACCEPTED)
    if not done and (
        lease.epoch != epoch or task.epoch != epoch or lease.state not in (LeaseState.LIVE, LeaseState.EXPIRED)
    ):
        raise (
            leases.lost(lease, epoch)
            if task.epoch == epoch
            else LeaseLost(
                f"the lease {lease.id} is lost: the task is at epoch {task.epoch}, this lease was {epoch}",
                metadata={"lease_id": lease.id},
            )
        )
    if checkpoint.state is CheckpointState.PRUNED:
        raise InvalidState(f"checkpoint {checkpoint.id} is {checkpoint.state}: {checkpoint.reason}")
    return checkpoint, task


_ADVANCE = (
    update(tasks_table)
    .where(
        tasks_table.c.id == bindparam("of_task"),
        tasks_table.c.epoch == bindparam("of_epoch"),
        tasks_table.c.state.in_(sources(TaskState, "submit")),
        tasks_table.c.committed_step < bindparam("new_step"),
    )
    .values(
        state=case(
            (tasks_table.c.total_steps == bindparam("new_step"), TaskState.SUBMITTED.value), else_=tasks_table.c.state
        ),
        committed_step=bindparam("new_step"),
        attempts=0,
        update_time=bindparam("new_update_time"),
    )
    .returning(tasks_table)
)
_COMMIT = (
    update(checkpoints)
    .where(
        checkpoints.c.id == bindparam("of_checkpoint"),
        checkpoints.c.state.in_(sources(CheckpointState, "commit")),
        checkpoints.c.files_json == bindparam("of_files_json"),
    )
    .values(
        state=CheckpointState.COMMITTED.value,
        commit_time=bindparam("new_commit_time"),
        metrics_json=bindparam("new_metrics_json"),
    )
    .returning(checkpoints)
)


def commit(
    tx: Connection,
    now: datetime,
    *,
    checkpoint: CheckpointRecord,
    worker_id: str,
    epoch: int,
    metrics: Mapping[str, object],
) -> tuple[CheckpointRecord, TaskRecord]:
    """Makes a checkpoint visible, if its worker still may: guarded by states and epoch.

    The final one becomes an expert, unless the run has it checked first: then its task stays SUBMITTED.

    `checkpoint` is the record whose files were verified; when its worker announced other files since, it is refused.
    """
    # First, for it locks the task: a duplicate of this call waits here, and then sees what the first one did.
    advanced = tx.execute(
        _ADVANCE,
        {
            "of_task": checkpoint.task_id,
            "of_epoch": checkpoint.epoch,
            "new_step": checkpoint.step,
            "new_update_time": now,
        },
    ).one_or_none()
    current, task = committable(
        tx, checkpoint_id=checkpoint.id, lease_id=checkpoint.lease_id, epoch=epoch, worker_id=worker_id
    )
    if advanced is None:
        if current.state in (CheckpointState.COMMITTED, CheckpointState.ACCEPTED):
            return current, task
        raise LeaseLost(
            f"checkpoint {checkpoint.id} at step {checkpoint.step} came too late: the task is {task.state} at epoch "
            f"{task.epoch}, committed to step {task.committed_step}",
            metadata={"lease_id": checkpoint.lease_id},
        )
    row = tx.execute(
        _COMMIT,
        {
            "of_checkpoint": checkpoint.id,
            "of_files_json": checkpoint.files_json,
            "new_commit_time": now,
            "new_metrics_json": json.dumps(dict(metrics)),
        },
    ).one_or_none()
    if row is None:
        raise InvalidState(f"checkpoint {checkpoint.id} is {current.state}, or has other files now: commit again")
    events.append(
        tx,
        now,
        "checkpoint.committed",
        run_id=task.run_id,
        task_id=task.id,
        lease_id=checkpoint.lease_id,
        detail={"checkpoint_id": checkpoint.id, "step": checkpoint.step, "final": checkpoint.final},
    )
    refusals.forget_failures(tx, task.id)
    pruning.prune_superseded(tx, task.id)
    committed = CheckpointRecord.of(row)
    if not checkpoint.final or _is_checked_first(tx, task, worker_id):
        return committed, task
    completion.accept(tx, now, committed)
    return get(tx, checkpoint.id), tasks.get_task(tx, task.id)


def _is_checked_first(tx: Connection, task: TaskRecord, worker_id: str) -> bool:
    """A run that verifies nothing believes everybody, and any run its trusted workers."""
    verification = tx.execute(select(runs_table.c.verification).where(runs_table.c.id == task.run_id)).scalar_one()
    if verification == Verification.OFF.value:
        return False
    return not tx.execute(select(workers.c.trusted).where(workers.c.id == worker_id)).scalar_one()
