"""Rejection: a checkpoint is refused on its content, and its task goes on from the last good one.

The lease ends with it and an attempt is counted, of the task and of the worker: nobody gets to try the same thing for
ever. The evidence is in the event log.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from sqlalchemy import Connection, update

from cbtm_common.errors import InvalidState
from cbtm_coordinator.lifecycle import CheckpointState, LeaseState, TaskState, sources
from cbtm_coordinator.store import events, leases, refusals
from cbtm_coordinator.store.checkpoints import get
from cbtm_coordinator.store.records import CheckpointRecord, TaskRecord
from cbtm_coordinator.store.tasks import get_task, reopen
from cbtm_coordinator.tables import checkpoints


def reject(
    tx: Connection, now: datetime, checkpoint: CheckpointRecord, *, reason: str, evidence: Mapping[str, str]
) -> TaskRecord | None:
    """The task as it is then; None when a duplicate of this call was first.

    Raises InvalidState when other files were announced for it since they were checked.
    """
    current = get(tx, checkpoint.id)
    if current.state is CheckpointState.REJECTED:
        return None
    # In the order in which releases and commits lock them: lease, task, checkpoint.
    lease = leases.get_lease(tx, checkpoint.lease_id)
    leases.end_lease(tx, now, lease, "reject", LeaseState.REVOKED, reason)
    task = get_task(tx, checkpoint.task_id, lock=True)
    refused = tx.execute(
        update(checkpoints)
        .where(
            checkpoints.c.id == checkpoint.id,
            checkpoints.c.state.in_(sources(CheckpointState, "reject")),
            checkpoints.c.files_json == checkpoint.files_json,
        )
        .values(state=CheckpointState.REJECTED.value, reason=reason)
    )
    if refused.rowcount != 1:
        raise InvalidState(f"checkpoint {checkpoint.id} is {current.state}, or has other files now: commit again")
    events.append(
        tx,
        now,
        "checkpoint.rejected",
        run_id=task.run_id,
        task_id=task.id,
        lease_id=lease.id,
        worker_id=lease.worker_id,
        reason=reason,
        detail={"checkpoint_id": checkpoint.id, "step": checkpoint.step, "evidence": dict(evidence)},
    )
    counts = refusals.count_failure(tx, now, lease.worker_id, task.id, reason)
    if task.epoch == lease.epoch and task.state in (TaskState.LEASED, TaskState.PENDING):
        return reopen(tx, now, task, event="reject", reason=reason, counts=counts)
    return task
