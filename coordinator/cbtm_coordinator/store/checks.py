"""Checks: EVALUATE and AUDIT tasks about a checkpoint of another task, and what was reported of it.

Opened, found, reported and dropped here; what follows from reports is `acceptance`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime

from sqlalchemy import Connection, bindparam, insert, select, update

from cbtm_common.errors import InvalidState, NotFound
from cbtm_common.files import FileSpec
from cbtm_common.ids import new_id
from cbtm_coordinator.lifecycle import CheckpointState, LeaseState, TaskKind, TaskState, sources
from cbtm_coordinator.store import events
from cbtm_coordinator.store.leases import end_lease, live_leases
from cbtm_coordinator.store.records import (
    CheckpointRecord,
    CheckRecord,
    LeaseRecord,
    TaskRecord,
    WorkerRecord,
    files_to_json,
)
from cbtm_coordinator.store.tasks import PRIORITY
from cbtm_coordinator.tables import checkpoints, checks, tasks

# Sequences of each set that an evaluator scores, with two models: 384 forward passes, about a third of training on
# them. The standard error of a gain is an eighth of its deviation between sequences.
EVALUATION_SEQUENCES = 64
_MAX_ATTEMPTS = 3
# A check in one of these may still be reported.
OPEN = (TaskState.PENDING, TaskState.LEASED)


def open_evaluation(
    tx: Connection,
    now: datetime,
    subject: TaskRecord,
    checkpoint: CheckpointRecord,
    worker: WorkerRecord,
    cluster: str,
    *,
    confirms: bool = False,
) -> None:
    """One more EVALUATE of a submitted model, on the held-out text of `cluster`; `confirms`: by a proven account."""
    steps = 6 * EVALUATION_SEQUENCES
    _open(tx, now, TaskKind.EVALUATE, subject, checkpoint, worker, None, cluster, steps, confirms)


def open_audit(
    tx: Connection,
    now: datetime,
    subject: TaskRecord,
    checkpoint: CheckpointRecord,
    worker: WorkerRecord,
    *,
    confirms: bool = False,
) -> None:
    """One more AUDIT of the segment that ends at `checkpoint`; `confirms`: by a proven account."""
    base_id, steps = segment(tx, subject, checkpoint)
    _open(tx, now, TaskKind.AUDIT, subject, checkpoint, worker, base_id, subject.cluster_id, steps, confirms)


def segment(tx: Connection, subject: TaskRecord, checkpoint: CheckpointRecord) -> tuple[str | None, int]:
    """Where the segment that ends at `checkpoint` begins, and its steps: at the commit before, or at the beginning."""
    base = tx.execute(
        select(checkpoints.c.id, checkpoints.c.step)
        .where(
            checkpoints.c.task_id == subject.id,
            checkpoints.c.step < checkpoint.step,
            checkpoints.c.state == CheckpointState.COMMITTED.value,
        )
        .order_by(checkpoints.c.step.desc(), checkpoints.c.epoch.desc())
        .limit(1)
    ).one_or_none()
    return (base.id, checkpoint.step - base.step) if base else (None, checkpoint.step)


def _open(
    tx: Connection,
    now: datetime,
    kind: TaskKind,
    subject: TaskRecord,
    checkpoint: CheckpointRecord,
    worker: WorkerRecord,
    base_id: str | None,
    cluster_id: str | None,
    steps: int,
    confirms: bool,
) -> None:
    task_id = new_id("task")
    first = tx.execute(
        select(checks.c.sample_key).where(checks.c.checkpoint_id == checkpoint.id, checks.c.kind == kind.value).limit(1)
    ).scalar_one_or_none()
    tx.execute(
        insert(tasks).values(
            id=task_id,
            run_id=subject.run_id,
            kind=kind.value,
            priority=PRIORITY[kind],
            cluster_id=cluster_id,
            cluster_index=subject.cluster_index,
            state=TaskState.PENDING.value,
            total_steps=steps,
            max_attempts=_MAX_ATTEMPTS,
            not_before_time=now,
            create_time=now,
            update_time=now,
        )
    )
    tx.execute(
        insert(checks).values(
            task_id=task_id,
            kind=kind.value,
            subject_id=subject.id,
            checkpoint_id=checkpoint.id,
            base_id=base_id,
            worker_id=worker.id,
            account_id=worker.account_id,
            confirms=confirms,
            # All who score a checkpoint score the same; nobody knows what before it is committed.
            sample_key=first or secrets.token_hex(16),
            create_time=now,
        )
    )
    events.append(
        tx,
        now,
        f"{kind.value.lower()}.opened",
        run_id=subject.run_id,
        task_id=task_id,
        worker_id=worker.id,
        detail={"subject": subject.id, "checkpoint_id": checkpoint.id, "step": checkpoint.step},
    )


_CHECKS = (
    select(checks, tasks.c.state.label("task_state"), checkpoints.c.step)
    .join(tasks, tasks.c.id == checks.c.task_id)
    .join(checkpoints, checkpoints.c.id == checks.c.checkpoint_id)
)
_BY_TASK = _CHECKS.where(checks.c.task_id == bindparam("of_task"))


def get(tx: Connection, task_id: str) -> CheckRecord:
    row = tx.execute(_BY_TASK, {"of_task": task_id}).one_or_none()
    if row is None:
        raise NotFound(f"there is no check {task_id}")
    return CheckRecord.of(row)


_OF_SUBJECT = _CHECKS.where(checks.c.subject_id == bindparam("of_subject")).order_by(
    checks.c.create_time, checks.c.task_id
)


def of_subject(tx: Connection, subject_id: str) -> list[CheckRecord]:
    """All checks of a task's work, the oldest first."""
    return [CheckRecord.of(row) for row in tx.execute(_OF_SUBJECT, {"of_subject": subject_id})]


def are_open_for(tx: Connection, checkpoint_id: str) -> bool:
    """Whether checks of a checkpoint were opened."""
    query = select(checks.c.task_id).where(checks.c.checkpoint_id == checkpoint_id).limit(1)
    return tx.execute(query).first() is not None


def stalled(tx: Connection, *, limit: int = 100) -> list[str]:
    """Tasks of which an undecided check ended without a report, so that another must be opened or all given up."""
    query = (
        select(checks.c.subject_id)
        .join(tasks, tasks.c.id == checks.c.task_id)
        .where(
            checks.c.settled.is_(False),
            checks.c.report_json == "",
            tasks.c.state.in_([TaskState.FAILED.value, TaskState.DONE.value]),
        )
        .distinct()
        .limit(limit)
    )
    return list(tx.execute(query).scalars())


def discard_reports_of(tx: Connection, account_id: str) -> None:
    """What an account said that is not decided yet counts no more; the log keeps it."""
    tx.execute(
        update(checks)
        .where(checks.c.reporter_account_id == account_id, checks.c.settled.is_(False))
        .values(report_json="")
    )


def note_replay(tx: Connection, check: CheckRecord, files: Sequence[FileSpec], moved_json: str) -> None:
    """What a replay wrote, before its worker may read what it is compared with. What was said first stays."""
    tx.execute(
        update(checks)
        .where(checks.c.task_id == check.task_id, checks.c.digests_json == "")
        .values(digests_json=files_to_json(files), moved_json=moved_json)
    )


def report(
    tx: Connection,
    now: datetime,
    lease: LeaseRecord,
    check: CheckRecord,
    reporter: WorkerRecord,
    content: Mapping[str, object],
) -> None:
    """The finding of a leased check: its task is DONE. Raises InvalidState when it was dropped meanwhile."""
    done = tx.execute(
        update(tasks)
        .where(
            tasks.c.id == check.task_id,
            tasks.c.epoch == lease.epoch,
            tasks.c.state.in_(sources(TaskState, "report")),
        )
        .values(state=TaskState.DONE.value, committed_step=tasks.c.total_steps, reason="", update_time=now)
        .returning(tasks.c.run_id)
    ).one_or_none()
    if done is None:
        raise InvalidState(f"check {check.task_id} is not leased any more")
    tx.execute(
        update(checks)
        .where(checks.c.task_id == check.task_id)
        .values(report_json=json.dumps(content), reporter_id=reporter.id, reporter_account_id=reporter.account_id)
    )
    events.append(
        tx,
        now,
        f"{check.kind.value.lower()}.reported",
        run_id=done.run_id,
        task_id=check.task_id,
        lease_id=lease.id,
        worker_id=reporter.id,
        detail={"subject": check.subject_id, "checkpoint_id": check.checkpoint_id, "report": events.plain(content)},
    )


def settle(tx: Connection, now: datetime, records: Sequence[CheckRecord], reason: str) -> None:
    """Nothing more is asked of these; those still open are dropped."""
    _drop(tx, now, [record for record in records if record.task_state in OPEN], reason)
    ids = [record.task_id for record in records]
    tx.execute(update(checks).where(checks.c.task_id.in_(ids)).values(settled=True))


def _drop(tx: Connection, now: datetime, records: Sequence[CheckRecord], reason: str) -> None:
    """Ends checks that are open, and the leases on them."""
    ids = [record.task_id for record in records]
    for lease in live_leases(tx, ids).values():
        end_lease(tx, now, lease, "reject", LeaseState.REVOKED, reason)
    tx.execute(
        update(tasks)
        .where(tasks.c.id.in_(ids), tasks.c.state.in_(sources(TaskState, "drop")))
        .values(state=TaskState.FAILED.value, reason=reason, update_time=now)
    )
