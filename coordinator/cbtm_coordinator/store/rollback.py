"""Undoing: work that is not believed is rejected, its task goes on from what is, and its worker answers for it."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, select, update

from cbtm_coordinator.lifecycle import (
    CheckpointState,
    LeaseState,
    RunState,
    TaskKind,
    TaskState,
    WorkerState,
    sources,
)
from cbtm_coordinator.store import checks, credits, events, experts, identities, refusals, runs
from cbtm_coordinator.store.leases import end_lease, live_leases, revoke_leases
from cbtm_coordinator.store.lineage import Segment, clean_step, lineage
from cbtm_coordinator.store.records import TaskRecord
from cbtm_coordinator.store.tasks import get_task
from cbtm_coordinator.tables import checkpoints, leases, tasks, tokens, workers


def reject(
    tx: Connection,
    now: datetime,
    task: TaskRecord,
    *,
    worker_id: str,
    reason: str,
    is_proven: bool,
    all_of_it: bool = False,
) -> None:
    """Takes back a worker's work on a task that is not DONE. Proven false, it is a strike, and the second shuts out.

    `all_of_it`: what is wrong was seen at the end, so that it may be anybody's who trained before. With several
    accounts in it everything is trained anew, and all of them are looked at more closely, but nobody is struck.
    """
    worker = identities.get_worker(tx, worker_id)
    segments = _lineage(tx, task)
    accounts = frozenset(segment.account_id for segment in segments) if all_of_it else frozenset({worker.account_id})
    _reopen(tx, now, task, clean_step(segments, accounts), reason)
    if len(accounts) > 1:
        for contributor in sorted({segment.worker_id for segment in segments}):
            identities.change_standing(tx, contributor, lambda standing: standing.after_dissent())
        return
    refusals.refuse(tx, worker_id, task.id, reason)
    if is_proven:
        strike(tx, now, task, worker_id=worker_id, reason=reason)


def strike(tx: Connection, now: datetime, task: TaskRecord, *, worker_id: str, reason: str) -> None:
    """A verdict stands against what a worker handed in or reported on a task; the second shuts its account out."""
    worker = identities.get_worker(tx, worker_id)
    identities.change_standing(tx, worker_id, lambda standing: standing.after_falsehood())
    events.append(tx, now, "worker.struck", run_id=task.run_id, task_id=task.id, worker_id=worker_id, reason=reason)
    standing = identities.account_standing(tx, worker.account_id)
    if standing.is_out:
        quarantine(tx, now, worker.account_id, f"what it did was shown to be false {standing.strikes} times: {reason}")


def quarantine(tx: Connection, now: datetime, account_id: str, reason: str) -> int:
    """Shuts an account out and undoes what it contributed; the number of tasks that are trained anew.

    Experts fall back to the newest version without its work; where there is none, the task is opened again. What
    branched from a seed with its work in it cannot be mended: such a run is paused, for its owner to decide.
    """
    found = tx.execute(select(workers.c.id, workers.c.state).where(workers.c.account_id == account_id)).all()
    for worker in found:
        if worker.state == WorkerState.ACTIVE.value:
            identities.set_revoked(tx, now, worker.id, reason)
            revoke_leases(tx, now, reason=reason, worker_id=worker.id)
    join = tokens.c.account_id == account_id, tokens.c.role == "WORKER", tokens.c.revoked.is_(False)
    for token_id in tx.execute(select(tokens.c.id).where(*join)).scalars().all():
        identities.revoke_token(tx, now, token_id)
    query = (
        select(tasks.c.id)
        .join(leases, leases.c.task_id == tasks.c.id)
        .join(workers, workers.c.id == leases.c.worker_id)
        .where(workers.c.account_id == account_id, tasks.c.kind.in_([TaskKind.SEED.value, TaskKind.EXPERT.value]))
        .distinct()
        .order_by(tasks.c.id)
    )
    reopened = sum(_quarantine_task(tx, now, task_id, account_id, reason) for task_id in tx.execute(query).scalars())
    checks.discard_reports_of(tx, account_id)
    credits.take_back(tx, now, account_id, reason)
    events.append(
        tx, now, "account.quarantined", reason=reason, detail={"account_id": account_id, "reopened_tasks": reopened}
    )
    return reopened


def _quarantine_task(tx: Connection, now: datetime, task_id: str, account_id: str, reason: str) -> bool:
    """Whether the task was opened again."""
    task = get_task(tx, task_id, lock=True)
    segments = _lineage(tx, task)
    is_tainted = any(segment.account_id == account_id for segment in segments)
    if task.state is not TaskState.DONE:
        if is_tainted:
            _reopen(tx, now, task, clean_step(segments, frozenset({account_id})), reason)
        return is_tainted
    tainted = [
        expert
        for expert in experts.versions(tx, task.run_id, task.cluster_index)
        if expert.checkpoint_id is not None and _is_by(tx, task, expert.checkpoint_id, account_id)
    ]
    if not tainted:
        return False
    run = runs.get(tx, task.run_id, lock=True)
    if task.kind is TaskKind.SEED:
        why = f"its seed was trained in part by an account that is quarantined ({reason}): delete it, or resume it"
        if not run.paused and run.state is not RunState.COMPLETE:
            runs.set_paused(tx, now, run, True)
        events.append(tx, now, "seed.tainted", run_id=run.id, task_id=task.id, reason=why)
        return False
    experts.quarantine(tx, now, tainted, reason)
    if any(e.cluster_index == task.cluster_index for e in experts.current(tx, task.run_id)):
        return False
    _reopen(tx, now, task, clean_step(segments, frozenset({account_id})), reason)
    if run.state is RunState.COMPLETE:
        runs.change_state(tx, now, run, "expert_rejected", reason)
    return True


def _is_by(tx: Connection, task: TaskRecord, checkpoint_id: str, account_id: str) -> bool:
    row = tx.execute(select(checkpoints.c.epoch, checkpoints.c.step).where(checkpoints.c.id == checkpoint_id)).one()
    return any(s.account_id == account_id for s in lineage(tx, task.id, epoch=row.epoch, step=row.step))


def _lineage(tx: Connection, task: TaskRecord) -> list[Segment]:
    return lineage(tx, task.id, epoch=task.epoch, step=task.committed_step)


def _reopen(tx: Connection, now: datetime, task: TaskRecord, step: int, reason: str) -> None:
    """Back to PENDING at `step`: what is after it is rejected, whoever works on it is stopped, no attempt counts."""
    tx.execute(
        update(checkpoints)
        .where(
            checkpoints.c.task_id == task.id,
            checkpoints.c.step > step,
            checkpoints.c.state.in_(sources(CheckpointState, "reject")),
        )
        .values(state=CheckpointState.REJECTED.value, reason=reason)
    )
    for lease in live_leases(tx, [task.id]).values():
        end_lease(tx, now, lease, "reject", LeaseState.REVOKED, reason)
    after = [c for c in checks.of_subject(tx, task.id) if not c.settled and c.step > step]
    checks.settle(tx, now, after, "what it was about is rejected")
    tx.execute(
        update(tasks)
        .where(tasks.c.id == task.id, tasks.c.state.in_(sources(TaskState, "reject")))
        .values(
            state=TaskState.PENDING.value,
            committed_step=step,
            epoch=tasks.c.epoch + 1,
            not_before_time=now,
            reason=reason,
            update_time=now,
        )
    )
    events.append(
        tx, now, "task.rejected", run_id=task.run_id, task_id=task.id, reason=reason, detail={"from_step": step}
    )
