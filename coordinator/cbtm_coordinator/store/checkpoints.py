"""Checkpoints: begun by the holder of a lease, and found again.

Invariant 3: a checkpoint is UPLOADING, seen by nobody, until `commits.commit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, bindparam, literal, select, update
from sqlalchemy.dialects import postgresql, sqlite

from cbtm_common.errors import InvalidArgument, NotFound
from cbtm_common.files import FileSpec
from cbtm_common.ids import new_id
from cbtm_coordinator.lifecycle import CheckpointState, LeaseState
from cbtm_coordinator.store import leases
from cbtm_coordinator.store.records import CheckpointRecord, LeaseRecord, TaskRecord, files_from_json, files_to_json
from cbtm_coordinator.tables import checkpoints
from cbtm_coordinator.tables import leases as leases_table
from cbtm_coordinator.tables import tasks as tasks_table

# In the order of the statement below.
_NEW_COLUMNS = ("id", "task_id", "lease_id", "epoch", "step", "state", "final", "files_json", "create_time")
_NEW = (
    select(
        bindparam("new_id", type_=checkpoints.c.id.type),
        leases_table.c.task_id,
        leases_table.c.id,
        leases_table.c.epoch,
        bindparam("new_step", type_=checkpoints.c.step.type),
        literal(CheckpointState.UPLOADING.value, checkpoints.c.state.type),
        tasks_table.c.total_steps == bindparam("new_step", type_=checkpoints.c.step.type),
        bindparam("new_files_json", type_=checkpoints.c.files_json.type),
        bindparam("new_create_time", type_=checkpoints.c.create_time.type),
    )
    .join_from(leases_table, tasks_table, tasks_table.c.id == leases_table.c.task_id)
    .where(
        leases_table.c.id == bindparam("of_lease"),
        leases_table.c.state == LeaseState.LIVE.value,
        tasks_table.c.committed_step < bindparam("new_step"),
        tasks_table.c.total_steps >= bindparam("new_step"),
    )
)
_BEGIN = {
    dialect.__name__.rpartition(".")[2]: dialect.insert(checkpoints)
    .from_select(_NEW_COLUMNS, _NEW)
    .on_conflict_do_nothing(index_elements=[checkpoints.c.task_id, checkpoints.c.epoch, checkpoints.c.step])
    .returning(checkpoints)
    for dialect in (postgresql, sqlite)
}


def begin(
    tx: Connection,
    now: datetime,
    *,
    lease: LeaseRecord,
    task: TaskRecord,
    step: int,
    files: Sequence[FileSpec],
) -> CheckpointRecord:
    """Opens a checkpoint of a live lease, or finds it again when the same one was begun before.

    Each statement stands for itself (`Store.writing(by_statement=True)`). Raises LeaseLost, InvalidArgument.
    """
    files_json = files_to_json(files)
    new = {
        "new_id": new_id("ckpt"),
        "new_step": step,
        "new_files_json": files_json,
        "new_create_time": now,
        "of_lease": lease.id,
    }
    row = tx.execute(_BEGIN[tx.dialect.name], new).one_or_none()
    if row is not None:
        return CheckpointRecord.of(row)
    where = (checkpoints.c.task_id == task.id, checkpoints.c.epoch == lease.epoch, checkpoints.c.step == step)
    present = tx.execute(select(checkpoints).where(*where)).one_or_none()
    if present is None:
        _, task = leases.require(tx, lease.id, lease.epoch, lease.worker_id)
        raise InvalidArgument(
            f"step: {step} is not after the committed step {task.committed_step} and at most {task.total_steps}",
            field="step",
        )
    if present.state != CheckpointState.UPLOADING.value or present.files_json == files_json:
        return CheckpointRecord.of(present)
    # Written anew after a crash, with other bytes (a time in a header, say): nobody has seen the first.
    tx.execute(
        update(checkpoints)
        .where(*where, checkpoints.c.state == CheckpointState.UPLOADING.value)
        .values(files_json=files_json)
    )
    return get(tx, present.id)


def bytes_on_the_way(tx: Connection, *, worker_id: str, run_id: str, besides: tuple[str, int, int]) -> int:
    """Of checkpoints that a worker began in a run and has not committed, without that of a (task id, epoch, step)."""
    query = (
        select(checkpoints.c.task_id, checkpoints.c.epoch, checkpoints.c.step, checkpoints.c.files_json)
        .join(leases_table, leases_table.c.id == checkpoints.c.lease_id)
        .join(tasks_table, tasks_table.c.id == checkpoints.c.task_id)
        .where(
            checkpoints.c.state == CheckpointState.UPLOADING.value,
            leases_table.c.worker_id == worker_id,
            tasks_table.c.run_id == run_id,
        )
    )
    rows = (row for row in tx.execute(query) if (row.task_id, row.epoch, row.step) != besides)
    return sum(file.size for row in rows for file in files_from_json(row.files_json))


def get(tx: Connection, checkpoint_id: str) -> CheckpointRecord:
    row = tx.execute(select(checkpoints).where(checkpoints.c.id == checkpoint_id)).one_or_none()
    if row is None:
        raise unknown(checkpoint_id)
    return CheckpointRecord.of(row)


def unknown(checkpoint_id: str) -> NotFound:
    return NotFound(f"there is no checkpoint {checkpoint_id}")


def submitted(tx: Connection, task: TaskRecord) -> CheckpointRecord:
    """The final checkpoint of a SUBMITTED task."""
    query = select(checkpoints).where(
        checkpoints.c.task_id == task.id,
        checkpoints.c.step == task.total_steps,
        checkpoints.c.state == CheckpointState.COMMITTED.value,
    )
    return CheckpointRecord.of(tx.execute(query).one())


def latest_good(tx: Connection, task: TaskRecord) -> CheckpointRecord | None:
    """Where work on the task resumes: its committed checkpoint at the task's committed step."""
    if task.committed_step == 0:
        return None
    query = (
        select(checkpoints)
        .where(
            checkpoints.c.task_id == task.id,
            checkpoints.c.step == task.committed_step,
            checkpoints.c.state == CheckpointState.COMMITTED.value,
        )
        .order_by(checkpoints.c.epoch.desc())
        .limit(1)
    )
    row = tx.execute(query).one_or_none()
    return None if row is None else CheckpointRecord.of(row)


def newest_committed(tx: Connection, task_ids: Sequence[str]) -> dict[str, CheckpointRecord]:
    """The newest committed or accepted checkpoint by task id."""
    states = [CheckpointState.COMMITTED.value, CheckpointState.ACCEPTED.value]
    query = (
        select(checkpoints)
        .where(checkpoints.c.task_id.in_(task_ids), checkpoints.c.state.in_(states))
        .order_by(checkpoints.c.commit_time)
    )
    return {row.task_id: CheckpointRecord.of(row) for row in tx.execute(query)}


def holds_objects(tx: Connection, task_id: str, epoch: int, step: int) -> bool:
    """Whether a checkpoint's objects are wanted: it is there, and not pruned or rejected."""
    gone = [CheckpointState.PRUNED.value, CheckpointState.REJECTED.value]
    query = select(checkpoints.c.id).where(
        checkpoints.c.task_id == task_id,
        checkpoints.c.epoch == epoch,
        checkpoints.c.step == step,
        checkpoints.c.state.not_in(gone),
    )
    return tx.execute(query).first() is not None
