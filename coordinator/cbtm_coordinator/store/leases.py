"""Leases: claiming a task, renewing, giving back, expiring, taking away.

Invariants 1 and 2: a claim is one guarded update that raises the task's epoch; every later write names that epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache

from sqlalchemy import Connection, and_, bindparam, case, exists, func, insert, or_, select, update

from cbtm_common.errors import LeaseLost, PermissionDenied
from cbtm_common.faults import point
from cbtm_common.ids import new_id
from cbtm_common.recipe import LeaseRecipe, Recipe
from cbtm_coordinator.lifecycle import LeaseState, TaskKind, TaskState, sources
from cbtm_coordinator.scheduler import (
    Candidate,
    DirectiveDecision,
    Measured,
    expiry_reason,
    lease_directive,
    pace,
    rank,
)
from cbtm_coordinator.store import events, identities
from cbtm_coordinator.store.records import LeaseRecord, Progress, TaskRecord
from cbtm_coordinator.store.tasks import WORKING, get_task, reopen
from cbtm_coordinator.tables import checkpoints, leases, tasks, unfit
from cbtm_coordinator.tables import runs as runs_table

# Candidates looked at in one query; when other workers take all of them at this moment, the next ones are.
_CANDIDATES = 16


def acquire(
    tx: Connection, now: datetime, worker_id: str, *, run_id: str | None = None
) -> tuple[LeaseRecord, TaskRecord] | None:
    """Claims the best open task for a worker, or None. Invariant 1: one winner, whoever races."""
    passed: list[str] = []
    while found := rank(_candidates(tx, now, worker_id, run_id, passed)):
        for candidate in found:
            task = _claim(tx, now, candidate.task_id)
            if task is not None:
                return _new_lease(tx, now, task, worker_id), task
        passed += [candidate.task_id for candidate in found]
    return None


def _claim(tx: Connection, now: datetime, task_id: str) -> TaskRecord | None:
    """One guarded update. PostgreSQL passes over a row that another claim holds at this moment instead of waiting for
    it; SQLite leaves that clause out, its writers come one by one.
    """
    free = (
        select(tasks.c.id)
        .where(tasks.c.id == task_id, tasks.c.state.in_(sources(TaskState, "acquire")))
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )
    row = tx.execute(
        update(tasks)
        .where(tasks.c.id == free, tasks.c.state.in_(sources(TaskState, "acquire")))
        .values(state=TaskState.LEASED.value, epoch=tasks.c.epoch + 1, update_time=now, reason="")
        .returning(tasks)
    ).one_or_none()
    return None if row is None else TaskRecord.of(row)


def _new_lease(tx: Connection, now: datetime, task: TaskRecord, worker_id: str) -> LeaseRecord:
    lease_id = new_id("lease")
    begin = pace(lease_policy(tx, task.run_id), Measured())
    tx.execute(
        insert(leases).values(
            id=lease_id,
            task_id=task.id,
            worker_id=worker_id,
            epoch=task.epoch,
            state=LeaseState.LIVE.value,
            acquire_time=now,
            renew_time=now,
            expire_time=now + begin.lease,
            stall_time=now + begin.patience,
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
    return get_lease(tx, lease_id)


def _candidates(
    tx: Connection, now: datetime, worker_id: str, run_id: str | None, passed: Sequence[str]
) -> list[Candidate]:
    query = (
        select(tasks.c.id, tasks.c.run_id, tasks.c.kind, tasks.c.attempts, tasks.c.committed_step, tasks.c.total_steps)
        .join(runs_table, runs_table.c.id == tasks.c.run_id)
        .where(
            tasks.c.state == TaskState.PENDING.value,
            tasks.c.not_before_time <= now,
            tasks.c.id.not_in(passed),
            runs_table.c.paused.is_(False),
            runs_table.c.state.in_(WORKING),
            ~exists().where(unfit.c.worker_id == worker_id, unfit.c.task_id == tasks.c.id),
        )
        .order_by(
            case((tasks.c.kind == TaskKind.SEED.value, 0), else_=1),
            tasks.c.attempts,
            tasks.c.committed_step - tasks.c.total_steps,
            tasks.c.id,
        )
        .limit(_CANDIDATES)
    )
    if run_id is not None:
        query = query.where(tasks.c.run_id == run_id)
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


def lease_policy(tx: Connection, run_id: str) -> LeaseRecipe:
    text = tx.execute(select(runs_table.c.recipe_json).where(runs_table.c.id == run_id)).scalar_one()
    return _lease_recipe(text)


@lru_cache(maxsize=256)
def _lease_recipe(recipe_json: str) -> LeaseRecipe:
    """A coordinator has few recipes and many renewals."""
    return Recipe.from_json(recipe_json).lease


_BY_ID = select(leases).where(leases.c.id == bindparam("of_lease"))


def get_lease(tx: Connection, lease_id: str) -> LeaseRecord:
    row = tx.execute(_BY_ID, {"of_lease": lease_id}).one_or_none()
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


# Ten thousand workers renew every half minute: these two statements are built once.
_RENEWING = (
    select(
        runs_table.c.paused,
        runs_table.c.recipe_json,
        tasks.c.committed_step,
        leases.c.acquire_time,
        select(func.max(func.coalesce(checkpoints.c.commit_time, checkpoints.c.create_time)))
        .where(checkpoints.c.task_id == leases.c.task_id, checkpoints.c.epoch == leases.c.epoch)
        .scalar_subquery()
        .label("last_checkpoint"),
    )
    .select_from(leases.join(tasks, tasks.c.id == leases.c.task_id).join(runs_table, runs_table.c.id == tasks.c.run_id))
    .where(leases.c.id == bindparam("of_lease"))
)
_RENEW = (
    update(leases)
    .where(
        leases.c.id == bindparam("of_lease"),
        leases.c.epoch == bindparam("of_epoch"),
        leases.c.worker_id == bindparam("of_worker"),
        leases.c.state == LeaseState.LIVE.value,
    )
    .values(
        expire_time=bindparam("new_expire_time"),
        renew_time=bindparam("new_renew_time"),
        stall_time=case(
            (
                or_(
                    leases.c.step != bindparam("new_step"),
                    leases.c.transferred_bytes != bindparam("new_transferred_bytes"),
                ),
                bindparam("new_stall_time", type_=leases.c.stall_time.type),
            ),
            else_=leases.c.stall_time,
        ),
        step=bindparam("new_step"),
        loss=bindparam("new_loss"),
        tokens_per_second=bindparam("new_tokens_per_second"),
        phase=bindparam("new_phase"),
        transferred_bytes=bindparam("new_transferred_bytes"),
    )
    .returning(leases)
)


def renew(
    tx: Connection, now: datetime, *, lease_id: str, epoch: int, worker_id: str, progress: Progress
) -> tuple[LeaseRecord, DirectiveDecision]:
    """Extends a live lease and notes its progress: one guarded update. Raises LeaseLost.

    A lease past its end that nobody has expired yet still holds: there can be no successor.
    """
    row = tx.execute(_RENEWING, {"of_lease": lease_id}).one_or_none()
    if row is None:
        raise LeaseLost(f"there is no lease {lease_id}", metadata={"lease_id": lease_id})
    sized = pace(_lease_recipe(row.recipe_json), progress.measured)
    renewed = tx.execute(
        _RENEW,
        {
            "of_lease": lease_id,
            "of_epoch": epoch,
            "of_worker": worker_id,
            "new_expire_time": now + sized.lease,
            "new_renew_time": now,
            "new_stall_time": now + sized.patience,
            "new_step": progress.step,
            "new_loss": progress.loss,
            "new_tokens_per_second": progress.tokens_per_second,
            "new_phase": progress.phase,
            "new_transferred_bytes": progress.transferred_bytes,
        },
    ).one_or_none()
    if renewed is None:
        require(tx, lease_id, epoch, worker_id)
        raise LeaseLost(f"the lease {lease_id} is lost", metadata={"lease_id": lease_id})
    told = lease_directive(
        now=now,
        run_paused=bool(row.paused),
        training=progress.phase == "train",
        step=progress.step,
        committed_step=row.committed_step,
        last_checkpoint=row.last_checkpoint or row.acquire_time,
        pace=sized,
    )
    return LeaseRecord.of(renewed), told


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
    lease, _ = require(tx, lease_id, epoch, worker_id)
    if not end_lease(tx, now, lease, "release", LeaseState.RELEASED, detail):
        raise lost(get_lease(tx, lease_id), epoch)
    task = get_task(tx, lease.task_id, lock=True)
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


def due_leases(tx: Connection, now: datetime, *, limit: int = 200) -> list[LeaseRecord]:
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
    return [LeaseRecord.of(row) for row in tx.execute(query)]


def expire(tx: Connection, now: datetime, lease: LeaseRecord) -> LeaseRecord | None:
    """Expires one lease that `due_leases` found, if it is still due; its task is open again."""
    reason = expiry_reason(now=now, expire_time=lease.expire_time, stall_time=lease.stall_time)
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
    task = get_task(tx, lease.task_id, lock=True)
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
    hung = lease.expire_time > now
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
    ended = 0
    for lease in map(LeaseRecord.of, rows):
        if not end_lease(tx, now, lease, "revoke", LeaseState.REVOKED, reason):
            continue
        ended += 1
        task = get_task(tx, lease.task_id, lock=True)
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
    return ended
