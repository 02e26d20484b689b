"""Tasks and leases: starting a run, claiming, renewing, giving back, expiring.

Invariants 1 and 2: a claim is one guarded update that raises the task's epoch; every later write names that epoch.
An attempt is counted when a worker says that the task failed, or hangs; a machine that vanishes or is preempted does
not count. Attempts are counted since the last committed checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, and_, case, exists, func, insert, or_, select, update

from cbtm_common.errors import InvalidState, LeaseLost, NotFound, PermissionDenied
from cbtm_common.faults import point
from cbtm_common.ids import new_id
from cbtm_common.recipe import LeaseRecipe, Recipe
from cbtm_coordinator.lifecycle import LeaseState, RunState, TaskKind, TaskState, sources
from cbtm_coordinator.scheduler import (
    Candidate,
    DirectiveDecision,
    backoff,
    directive,
    expiry_reason,
    rank,
    stall_deadline,
)
from cbtm_coordinator.store import events, identities, runs
from cbtm_coordinator.store.records import LeaseRecord, Progress, RunRecord, TaskRecord
from cbtm_coordinator.tables import experts, leases, tasks, unfit
from cbtm_coordinator.tables import runs as runs_table

# Candidates looked at for one claim: enough to find one that no other worker takes at this moment.
_CANDIDATES = 16


def create_tasks(tx: Connection, now: datetime, run: RunRecord, *, seed_steps: int, expert_steps: int) -> None:
    """The run's tasks: a PENDING seed with BLOCKED experts, or PENDING experts."""
    recipe = Recipe.from_json(run.recipe_json)
    rows = []
    if seed_steps:
        rows.append(_new_task(now, run, TaskKind.SEED, None, -1, TaskState.PENDING, seed_steps, recipe))
    state = TaskState.BLOCKED if seed_steps else TaskState.PENDING
    rows += [
        _new_task(now, run, TaskKind.EXPERT, cluster.id, cluster.cluster_index, state, expert_steps, recipe)
        for cluster in runs.list_clusters(tx, run, limit=run.cluster_count)
    ]
    tx.execute(insert(tasks), rows)
    for row in rows:
        events.append(tx, now, f"task.{row['state'].lower()}", run_id=run.id, task_id=row["id"])


def _new_task(
    now: datetime,
    run: RunRecord,
    kind: TaskKind,
    cluster_id: str | None,
    cluster_index: int,
    state: TaskState,
    steps: int,
    recipe: Recipe,
) -> dict[str, Any]:
    return {
        "id": new_id("task"),
        "run_id": run.id,
        "kind": kind.value,
        "cluster_id": cluster_id,
        "cluster_index": cluster_index,
        "state": state.value,
        "total_steps": steps,
        "max_attempts": recipe.lease.max_attempts,
        "not_before_time": now,
        "create_time": now,
        "update_time": now,
    }


def get_task(tx: Connection, task_id: str) -> TaskRecord:
    row = tx.execute(select(tasks).where(tasks.c.id == task_id)).one_or_none()
    if row is None:
        raise NotFound(f"there is no task {task_id}")
    return TaskRecord.of(row)


def list_tasks(tx: Connection, run_id: str) -> list[TaskRecord]:
    """The seed first, then by cluster index."""
    query = select(tasks).where(tasks.c.run_id == run_id).order_by(tasks.c.cluster_index)
    return [TaskRecord.of(row) for row in tx.execute(query)]


def task_of(tx: Connection, run: RunRecord, cluster_index: int) -> TaskRecord:
    row = tx.execute(
        select(tasks).where(tasks.c.run_id == run.id, tasks.c.cluster_index == cluster_index)
    ).one_or_none()
    if row is None:
        what = "no seed task" if cluster_index < 0 else f"no cluster {cluster_index}"
        raise NotFound(f"run {run.name} has {what}; `cbtm-coord status {run.name}` shows its tasks")
    return TaskRecord.of(row)


def acquire(
    tx: Connection, now: datetime, worker_id: str, *, run_id: str | None = None
) -> tuple[LeaseRecord, TaskRecord] | None:
    """Claims the best open task for a worker, or None. Invariant 1: one winner, whoever races."""
    for candidate in rank(_candidates(tx, now, worker_id, run_id)):
        claimed = tx.execute(
            update(tasks)
            .where(tasks.c.id == candidate.task_id, tasks.c.state.in_(sources(TaskState, "acquire")))
            .values(state=TaskState.LEASED.value, epoch=tasks.c.epoch + 1, update_time=now, reason="")
            .returning(tasks)
        ).one_or_none()
        if claimed is None:
            continue
        task = TaskRecord.of(claimed)
        policy = lease_policy(tx, task.run_id)
        lease_id = new_id("lease")
        lease = timedelta(seconds=policy.lease_seconds)
        tx.execute(
            insert(leases).values(
                id=lease_id,
                task_id=task.id,
                worker_id=worker_id,
                epoch=task.epoch,
                state=LeaseState.LIVE.value,
                acquire_time=now,
                expire_time=now + lease,
                stall_time=stall_deadline(now=now, lease=lease),
                step=task.committed_step,
            )
        )
        events.append(
            tx,
            now,
            "task.leased",
            run_id=task.run_id,
            task_id=task.id,
            lease_id=lease_id,
            worker_id=worker_id,
            detail={"epoch": task.epoch, "from_step": task.committed_step},
        )
        return get_lease(tx, lease_id), task
    return None


def _candidates(tx: Connection, now: datetime, worker_id: str, run_id: str | None) -> list[Candidate]:
    query = (
        select(tasks.c.id, tasks.c.run_id, tasks.c.kind, tasks.c.attempts, tasks.c.committed_step, tasks.c.total_steps)
        .join(runs_table, runs_table.c.id == tasks.c.run_id)
        .where(
            tasks.c.state == TaskState.PENDING.value,
            tasks.c.not_before_time <= now,
            runs_table.c.paused.is_(False),
            runs_table.c.state.in_([RunState.SEEDING.value, RunState.TRAINING.value]),
            ~exists().where(unfit.c.worker_id == worker_id, unfit.c.task_id == tasks.c.id),
        )
        .order_by(tasks.c.kind.desc(), tasks.c.attempts, tasks.c.id)
        .limit(_CANDIDATES)
    )
    if run_id is not None:
        query = query.where(tasks.c.run_id == run_id)
    # PostgreSQL: pass over rows that another claim holds. SQLite leaves this out; its writers come one by one.
    query = query.with_for_update(of=tasks, skip_locked=True)
    return [
        Candidate(
            task_id=row.id,
            run_id=row.run_id,
            kind=TaskKind(row.kind),
            attempts=row.attempts,
            committed_step=row.committed_step,
            total_steps=row.total_steps,
        )
        for row in tx.execute(query)
    ]


def count_open(tx: Connection, *, run_id: str | None = None) -> int:
    """Tasks that are not finished, in runs that are not over: work that may come free."""
    query = (
        select(func.count())
        .select_from(tasks.join(runs_table, runs_table.c.id == tasks.c.run_id))
        .where(
            tasks.c.state.in_([s.value for s in TaskState if s not in (TaskState.DONE, TaskState.FAILED)]),
            runs_table.c.state.in_([RunState.SEEDING.value, RunState.TRAINING.value, RunState.DRAFT.value]),
        )
    )
    if run_id is not None:
        query = query.where(tasks.c.run_id == run_id)
    return int(tx.execute(query).scalar_one())


def lease_policy(tx: Connection, run_id: str) -> LeaseRecipe:
    text = tx.execute(select(runs_table.c.recipe_json).where(runs_table.c.id == run_id)).scalar_one()
    return Recipe.from_json(text).lease


def get_lease(tx: Connection, lease_id: str) -> LeaseRecord:
    row = tx.execute(select(leases).where(leases.c.id == lease_id)).one_or_none()
    if row is None:
        raise LeaseLost(f"there is no lease {lease_id}", metadata={"lease_id": lease_id})
    return LeaseRecord.of(row)


def live_leases(tx: Connection, task_ids: Sequence[str]) -> dict[str, LeaseRecord]:
    """By task id."""
    query = select(leases).where(leases.c.task_id.in_(task_ids), leases.c.state == LeaseState.LIVE.value)
    return {row.task_id: LeaseRecord.of(row) for row in tx.execute(query)}


def live_leases_of_workers(tx: Connection, worker_ids: Sequence[str]) -> dict[str, LeaseRecord]:
    query = select(leases).where(leases.c.worker_id.in_(worker_ids), leases.c.state == LeaseState.LIVE.value)
    return {row.worker_id: LeaseRecord.of(row) for row in tx.execute(query)}


def require(tx: Connection, lease_id: str, epoch: int, worker_id: str) -> tuple[LeaseRecord, TaskRecord]:
    """The live lease and its task, or LeaseLost with the reason it ended. Invariant 2."""
    lease = get_lease(tx, lease_id)
    if lease.worker_id != worker_id:
        raise PermissionDenied("this lease belongs to another worker")
    if lease.epoch != epoch or lease.state is not LeaseState.LIVE:
        raise lost(lease, epoch)
    return lease, get_task(tx, lease.task_id)


def lost(lease: LeaseRecord, epoch: int) -> LeaseLost:
    """The error for a write under a lease that no longer holds."""
    if lease.epoch != epoch:
        why = f"its epoch is {lease.epoch}, not {epoch}"
    else:
        why = f"it is {lease.state}" + (f": {lease.reason}" if lease.reason else "")
    return LeaseLost(f"the lease {lease.id} is lost: {why}", metadata={"lease_id": lease.id, "state": lease.state})


def renew(
    tx: Connection, now: datetime, *, lease_id: str, epoch: int, worker_id: str, progress: Progress
) -> tuple[LeaseRecord, DirectiveDecision]:
    """Extends a live lease and notes its progress: one guarded update. Raises LeaseLost.

    A lease past its end that nobody has expired yet still holds: there can be no successor.
    """
    row = tx.execute(
        select(runs_table.c.paused, runs_table.c.recipe_json)
        .select_from(
            leases.join(tasks, tasks.c.id == leases.c.task_id).join(runs_table, runs_table.c.id == tasks.c.run_id)
        )
        .where(leases.c.id == lease_id)
    ).one_or_none()
    if row is None:
        raise LeaseLost(f"there is no lease {lease_id}", metadata={"lease_id": lease_id})
    lease = timedelta(seconds=Recipe.from_json(row.recipe_json).lease.lease_seconds)
    moved = or_(leases.c.step != progress.step, leases.c.transferred_bytes != progress.transferred_bytes)
    renewed = tx.execute(
        update(leases)
        .where(
            leases.c.id == lease_id,
            leases.c.epoch == epoch,
            leases.c.worker_id == worker_id,
            leases.c.state == LeaseState.LIVE.value,
        )
        .values(
            expire_time=now + lease,
            stall_time=case((moved, stall_deadline(now=now, lease=lease)), else_=leases.c.stall_time),
            step=progress.step,
            loss=progress.loss,
            tokens_per_second=progress.tokens_per_second,
            phase=progress.phase,
            transferred_bytes=progress.transferred_bytes,
        )
        .returning(leases)
    ).one_or_none()
    if renewed is None:
        require(tx, lease_id, epoch, worker_id)
        raise LeaseLost(f"the lease {lease_id} is lost", metadata={"lease_id": lease_id})
    return LeaseRecord.of(renewed), directive(run_paused=bool(row.paused), draining=False)


def end_lease(tx: Connection, now: datetime, lease: LeaseRecord, event: str, target: LeaseState, reason: str) -> bool:
    """Ends a live lease by one guarded update; False when it had ended already."""
    ended = tx.execute(
        update(leases)
        .where(leases.c.id == lease.id, leases.c.state.in_(sources(LeaseState, event)))
        .values(state=target.value, end_time=now, reason=reason)
    )
    return ended.rowcount == 1


def release(
    tx: Connection,
    now: datetime,
    *,
    lease_id: str,
    epoch: int,
    worker_id: str,
    failed: bool = False,
    is_unfit: bool = False,
    detail: str = "",
) -> tuple[LeaseRecord, TaskRecord]:
    """Gives a task back. A failure counts an attempt, and the last one fails the task and its run."""
    lease, task = require(tx, lease_id, epoch, worker_id)
    end_lease(tx, now, lease, "release", LeaseState.RELEASED, detail)
    events.append(
        tx,
        now,
        "lease.released",
        run_id=task.run_id,
        task_id=task.id,
        lease_id=lease.id,
        worker_id=worker_id,
        reason=detail,
        detail={"failed": failed, "unfit": is_unfit, "committed_step": task.committed_step},
    )
    if is_unfit:
        tx.execute(insert(unfit).values(worker_id=worker_id, task_id=task.id, reason=detail))
    if failed:
        identities.count_failure(tx, now, worker_id)
    elif task.state is TaskState.DONE:
        identities.count_success(tx, worker_id)
    if task.state is TaskState.LEASED:
        reopen(tx, now, task, event="release", reason=detail, counts=failed)
    return get_lease(tx, lease_id), get_task(tx, task.id)


def reopen(tx: Connection, now: datetime, task: TaskRecord, *, event: str, reason: str, counts: bool) -> None:
    """A leased task back to PENDING, from its last good checkpoint; or to FAILED when its attempts are used up."""
    attempts = task.attempts + (1 if counts else 0)
    failed = attempts >= task.max_attempts
    wait = backoff(now=now, failures=attempts if counts else 0, what="this task")
    changed = tx.execute(
        update(tasks)
        .where(tasks.c.id == task.id, tasks.c.epoch == task.epoch, tasks.c.state.in_(sources(TaskState, event)))
        .values(
            state=(TaskState.FAILED if failed else TaskState.PENDING).value,
            attempts=attempts,
            not_before_time=wait.until or now,
            reason=reason,
            update_time=now,
        )
    )
    if changed.rowcount != 1:
        return
    kind = "task.failed" if failed else "task.pending"
    events.append(tx, now, kind, run_id=task.run_id, task_id=task.id, reason=reason, detail={"attempts": attempts})
    if failed:
        run = runs.get(tx, task.run_id)
        if run.state in (RunState.SEEDING, RunState.TRAINING):
            why = f"cluster {task.cluster_index}" if task.kind is TaskKind.EXPERT else "the seed"
            runs.change_state(tx, now, run, "task_failed", f"{why} failed {attempts} times, last: {reason}")


def due_leases(tx: Connection, now: datetime, *, limit: int = 200) -> Sequence[Row[Any]]:
    """Live leases past their end, or hung."""
    query = (
        select(leases)
        .where(
            leases.c.state == LeaseState.LIVE.value,
            or_(leases.c.expire_time <= now, leases.c.stall_time <= now),
        )
        .order_by(leases.c.expire_time)
        .limit(limit)
    )
    return tx.execute(query).all()


def expire(tx: Connection, now: datetime, row: Row[Any]) -> LeaseRecord | None:
    """Expires one lease that `due_leases` found, if it is still due; its task is open again."""
    lease = LeaseRecord.of(row)
    reason = expiry_reason(now=now, expire_time=row.expire_time, stall_time=row.stall_time)
    if reason is None:
        return None
    ended = tx.execute(
        update(leases)
        .where(
            leases.c.id == lease.id,
            leases.c.state.in_(sources(LeaseState, "expire")),
            or_(leases.c.expire_time <= now, leases.c.stall_time <= now),
        )
        .values(state=LeaseState.EXPIRED.value, end_time=now, reason=reason)
    )
    if ended.rowcount != 1:
        return None
    task = get_task(tx, lease.task_id)
    events.append(
        tx,
        now,
        "lease.expired",
        run_id=task.run_id,
        task_id=task.id,
        lease_id=lease.id,
        worker_id=lease.worker_id,
        reason=reason,
        detail={"step": lease.step, "committed_step": task.committed_step},
    )
    hung = row.expire_time > now
    if hung:
        identities.count_failure(tx, now, lease.worker_id)
    if task.state is TaskState.LEASED:
        reopen(tx, now, task, event="expire", reason=reason, counts=hung)
    point("coordinator.expire.before_commit")
    return get_lease(tx, lease.id)


def revoke_leases(tx: Connection, now: datetime, *, reason: str, worker_id: str = "", task_id: str = "") -> int:
    """Takes away the live leases of a worker or of a task; their tasks are open again, no attempt counted."""
    condition = leases.c.worker_id == worker_id if worker_id else leases.c.task_id == task_id
    rows = tx.execute(select(leases).where(and_(condition, leases.c.state == LeaseState.LIVE.value))).all()
    for lease in map(LeaseRecord.of, rows):
        end_lease(tx, now, lease, "revoke", LeaseState.REVOKED, reason)
        task = get_task(tx, lease.task_id)
        events.append(
            tx,
            now,
            "lease.revoked",
            run_id=task.run_id,
            task_id=task.id,
            lease_id=lease.id,
            worker_id=lease.worker_id,
            reason=reason,
        )
        if task.state is TaskState.LEASED:
            reopen(tx, now, task, event="revoke", reason=reason, counts=False)
    return len(rows)


def requeue(tx: Connection, now: datetime, run: RunRecord, task: TaskRecord, *, from_start: bool) -> TaskRecord:
    """Opens a task again with fresh attempts: from its last good checkpoint, or from step 0.

    A finished task is done anew, and its expert stays current until the new one is accepted.
    """
    if run.state in (RunState.DRAFT, RunState.CLUSTERED):
        raise InvalidState(f"run {run.name} is {run.state}: it has no tasks to requeue yet")
    if task.state is TaskState.DONE and task.kind is TaskKind.SEED:
        raise InvalidState("the seed is accepted and the experts branched from it; create a new run instead")
    if task.state is TaskState.DONE and not from_start:
        raise InvalidState(f"cluster {task.cluster_index} is DONE; `--from-start` trains its expert anew")
    revoke_leases(tx, now, reason="its owner put the task back", task_id=task.id)
    task = get_task(tx, task.id)
    if task.state is TaskState.BLOCKED:
        raise InvalidState(f"cluster {task.cluster_index} waits for the seed; it starts by itself")
    tx.execute(
        update(tasks)
        .where(tasks.c.id == task.id, tasks.c.state.in_(sources(TaskState, "requeue")))
        .values(
            state=TaskState.PENDING.value,
            attempts=0,
            # Epochs keep rising, so that objects of an earlier life are never written again.
            committed_step=0 if from_start else tasks.c.committed_step,
            not_before_time=now,
            reason="put back by its owner",
            update_time=now,
        )
    )
    events.append(tx, now, "task.requeued", run_id=run.id, task_id=task.id, detail={"from_start": from_start})
    if run.state in (RunState.FAILED, RunState.COMPLETE):
        event = "requeue_seed" if task.kind is TaskKind.SEED else "requeue_expert"
        others = [t for t in list_tasks(tx, run.id) if t.state is TaskState.FAILED]
        if not others:
            runs.change_state(tx, now, run, event, "")
    return get_task(tx, task.id)


def has_seed(tx: Connection, run_id: str) -> bool:
    return bool(tx.execute(select(exists().where(experts.c.run_id == run_id, experts.c.cluster_index == -1))).scalar())
