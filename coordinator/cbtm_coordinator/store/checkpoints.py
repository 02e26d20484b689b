"""Checkpoints: begun, committed whole, accepted, pruned.

Invariant 3: a checkpoint is UPLOADING, seen by nobody, until `commit`; the services call that only after they have
checked every object. A commit is refused when the task has a newer epoch, so a zombie can make nothing visible; one
whose lease expired but that nobody has succeeded is kept, for its work is as good as any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import Connection, and_, bindparam, case, func, literal, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from cbtm_common.errors import CheckpointRejected, InvalidArgument, InvalidState, LeaseLost, NotFound, PermissionDenied
from cbtm_common.files import FileSpec, strip_prefix
from cbtm_common.ids import new_id
from cbtm_coordinator.lifecycle import (
    TRAINING,
    CheckpointState,
    LeaseState,
    RunState,
    TaskKind,
    TaskState,
    Verification,
    sources,
)
from cbtm_coordinator.store import credits, events, experts, leases, refusals, runs, tasks
from cbtm_coordinator.store.records import (
    CheckpointRecord,
    ExpertRecord,
    LeaseRecord,
    TaskRecord,
    files_from_json,
    files_to_json,
    prefixed,
)
from cbtm_coordinator.tables import checkpoints, checks, workers
from cbtm_coordinator.tables import leases as leases_table
from cbtm_coordinator.tables import runs as runs_table
from cbtm_coordinator.tables import tasks as tasks_table

MODEL_PREFIX = "model"
# Committed checkpoints kept of a task that is not done, the newest included.
KEEP_COMMITTED = 2


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
    _prune_superseded(tx, task.id)
    committed = CheckpointRecord.of(row)
    if not checkpoint.final or _is_checked_first(tx, task, worker_id):
        return committed, task
    accept(tx, now, committed)
    return get(tx, checkpoint.id), tasks.get_task(tx, task.id)


def _is_checked_first(tx: Connection, task: TaskRecord, worker_id: str) -> bool:
    """A run that verifies nothing believes everybody, and any run its trusted workers."""
    verification = tx.execute(select(runs_table.c.verification).where(runs_table.c.id == task.run_id)).scalar_one()
    if verification == Verification.OFF.value:
        return False
    return not tx.execute(select(workers.c.trusted).where(workers.c.id == worker_id)).scalar_one()


def submitted(tx: Connection, task: TaskRecord) -> CheckpointRecord:
    """The final checkpoint of a SUBMITTED task."""
    query = select(checkpoints).where(
        checkpoints.c.task_id == task.id,
        checkpoints.c.step == task.total_steps,
        checkpoints.c.state == CheckpointState.COMMITTED.value,
    )
    return CheckpointRecord.of(tx.execute(query).one())


def accept(tx: Connection, now: datetime, checkpoint: CheckpointRecord) -> ExpertRecord:
    """A SUBMITTED task's final checkpoint becomes the newest version of its expert; the task is DONE.

    It counts for those who trained it.
    """
    changed = tx.execute(
        update(tasks_table)
        .where(tasks_table.c.id == checkpoint.task_id, tasks_table.c.state.in_(sources(TaskState, "accept")))
        .values(state=TaskState.DONE.value, reason="", update_time=now)
    )
    if changed.rowcount != 1:
        raise InvalidState(f"the task of checkpoint {checkpoint.id} is not SUBMITTED")
    tx.execute(
        update(checkpoints).where(checkpoints.c.id == checkpoint.id).values(state=CheckpointState.ACCEPTED.value)
    )
    task = tasks.get_task(tx, checkpoint.task_id)
    files = strip_prefix(checkpoint.files, MODEL_PREFIX)
    expert = experts.add(
        tx,
        now,
        run_id=task.run_id,
        cluster_id=task.cluster_id,
        cluster_index=task.cluster_index,
        files=files,
        checkpoint_id=checkpoint.id,
        metrics_json=checkpoint.metrics_json,
    )
    credits.earn(tx, now, task, checkpoint)
    events.append(tx, now, "task.done", run_id=task.run_id, task_id=task.id)
    _advance_run(tx, now, task)
    return expert


def _advance_run(tx: Connection, now: datetime, task: TaskRecord) -> None:
    """An accepted seed opens the experts; the last accepted expert completes the run."""
    # Locked: of two last experts accepted at once, the second must see the first, or neither completes the run.
    run = runs.get(tx, task.run_id, lock=True)
    if task.kind is TaskKind.SEED:
        tx.execute(
            update(tasks_table)
            .where(tasks_table.c.run_id == run.id, tasks_table.c.state.in_(sources(TaskState, "seed_accepted")))
            .values(state=TaskState.PENDING.value, not_before_time=now, update_time=now)
        )
        runs.change_state(tx, now, run, "seed_accepted", "")
        return
    left = tx.execute(
        select(func.count())
        .select_from(tasks_table)
        .where(
            tasks_table.c.run_id == run.id,
            tasks_table.c.kind.in_(sorted(TRAINING)),
            tasks_table.c.state != TaskState.DONE.value,
        )
    ).scalar_one()
    if left == 0 and run.state is RunState.TRAINING:
        runs.change_state(tx, now, run, "all_accepted", "")


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


def _prune_superseded(tx: Connection, task_id: str) -> None:
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
