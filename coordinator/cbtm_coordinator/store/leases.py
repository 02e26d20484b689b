"""Leases: claiming a task, giving it back, expiring, taking away. Renewing is in `renewals`.

Invariants 1 and 2: a claim is one guarded update that raises the task's epoch; every later write names that epoch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, Update, bindparam, exists, func, insert, literal, or_, select, update

from cbtm_common.errors import LeaseLost, PermissionDenied
from cbtm_common.faults import point
from cbtm_common.ids import new_id
from cbtm_common.recipe import LeaseRecipe, Recipe
from cbtm_coordinator.lifecycle import TRAINING, LeaseState, TaskKind, TaskState, sources
from cbtm_coordinator.scheduler import Measured, expiry_reason, pace
from cbtm_coordinator.store import events, identities, refusals, runs
from cbtm_coordinator.store.eligibility import may_take
from cbtm_coordinator.store.records import LeaseRecord, RunRecord, TaskRecord, prefixed
from cbtm_coordinator.store.tasks import WORKING, get_task, reopen
from cbtm_coordinator.tables import UtcDateTime, leases, tasks, unfit
from cbtm_coordinator.tables import runs as runs_table

# The order of work: by priority (`store.tasks`), then the fewest failures, then the most steps left to do: the longest
# task first keeps the last worker of a run from being left alone with it. `ix_tasks_open` has the same order.
_OPEN = tasks.alias("open")
_ORDER = (_OPEN.c.priority.desc(), _OPEN.c.attempts, _OPEN.c.committed_step - _OPEN.c.total_steps, _OPEN.c.id)


class Claim(NamedTuple):
    """A task claimed for a worker."""

    lease: LeaseRecord
    task: TaskRecord
    run: RunRecord


def acquire(
    tx: Connection,
    now: datetime,
    worker_id: str,
    *,
    run_id: str | None = None,
    account_id: str = "",
    trusted: bool = False,
    kinds: Collection[TaskKind] = TRAINING,
) -> Claim | None:
    """Claims the best open task for a worker of an account, or None. Invariant 1: one winner, whoever races."""
    given = {
        "new_time": now,
        "of_worker": worker_id,
        "of_account": account_id,
        "of_trusted": trusted,
        "of_kinds": sorted(kinds),
    }
    if run_id is None:
        row = tx.execute(_CLAIM, given).one_or_none()
    else:
        row = tx.execute(_CLAIM_OF_RUN, given | {"of_run": run_id}).one_or_none()
    if row is None:
        return None
    task = TaskRecord.of(row)
    run = runs.get_by_id(tx, task.run_id)
    return Claim(_new_lease(tx, now, task, run, worker_id), task, run)


def _claim(*conditions: ColumnElement[bool]) -> Update:
    """One guarded update. PostgreSQL passes over a row that another claim holds at this moment instead of waiting for
    it; SQLite leaves that clause out, its writers come one by one.
    """
    best = (
        select(_OPEN.c.id)
        .join(runs_table, runs_table.c.id == _OPEN.c.run_id)
        .where(
            # A literal, as in the index: a prepared statement could not use that for a parameter.
            _OPEN.c.state == literal(TaskState.PENDING.value, literal_execute=True),
            _OPEN.c.not_before_time <= bindparam("new_time", type_=UtcDateTime),
            runs_table.c.paused.is_(False),
            runs_table.c.state.in_(WORKING),
            ~exists().where(
                unfit.c.worker_id == bindparam("of_worker"),
                unfit.c.task_id == _OPEN.c.id,
                or_(unfit.c.until_time.is_(None), unfit.c.until_time > bindparam("new_time", type_=UtcDateTime)),
            ),
            may_take(_OPEN),
            *conditions,
        )
        .order_by(*_ORDER)
        .limit(1)
        # NO KEY: a checkpoint being begun refers to its task, and is no reason to pass over it.
        .with_for_update(skip_locked=True, key_share=True, of=_OPEN)
        .scalar_subquery()
    )
    return (
        update(tasks)
        .where(tasks.c.id == best, tasks.c.state.in_(sources(TaskState, "acquire")))
        .values(
            state=TaskState.LEASED.value,
            epoch=tasks.c.epoch + 1,
            update_time=bindparam("new_time", type_=UtcDateTime),
            reason="",
        )
        .returning(tasks)
    )


_CLAIM = _claim()
_CLAIM_OF_RUN = _claim(_OPEN.c.run_id == bindparam("of_run"))
_NEW = insert(leases)


def _new_lease(tx: Connection, now: datetime, task: TaskRecord, run: RunRecord, worker_id: str) -> LeaseRecord:
    begin = pace(lease_policy(run.recipe_json), Measured())
    lease = LeaseRecord(
        id=new_id("lease"),
        task_id=task.id,
        worker_id=worker_id,
        epoch=task.epoch,
        state=LeaseState.LIVE,
        acquire_time=now,
        renew_time=now,
        expire_time=now + begin.lease,
        stall_time=now + begin.patience,
        end_time=None,
        reason="",
        step=task.committed_step,
        loss=None,
        tokens_per_second=0.0,
        phase="",
        transferred_bytes=0,
    )
    tx.execute(_NEW, vars(lease))
    events.append(
        tx,
        now,
        "task.leased",
        run_id=task.run_id,
        task_id=task.id,
        lease_id=lease.id,
        worker_id=worker_id,
        detail={"epoch": task.epoch, "from_step": task.committed_step},
    )
    return lease


@lru_cache(maxsize=256)
def lease_policy(recipe_json: str) -> LeaseRecipe:
    """A coordinator has few recipes, and reads them at every renewal."""
    return Recipe.from_json(recipe_json).lease


_BY_ID = select(leases).where(leases.c.id == bindparam("of_lease"))


def get_lease(tx: Connection, lease_id: str) -> LeaseRecord:
    row = tx.execute(_BY_ID, {"of_lease": lease_id}).one_or_none()
    if row is None:
        raise unknown(lease_id)
    return LeaseRecord.of(row)


def live_leases(tx: Connection, task_ids: Sequence[str]) -> dict[str, LeaseRecord]:
    """By task id."""
    query = select(leases).where(leases.c.task_id.in_(task_ids), leases.c.state == LeaseState.LIVE.value)
    return {row.task_id: LeaseRecord.of(row) for row in tx.execute(query)}


def count_live(tx: Connection, worker_id: str) -> int:
    """How many a worker holds. Exact in a transaction that has written the worker's row before."""
    query = select(func.count()).where(leases.c.worker_id == worker_id, leases.c.state == LeaseState.LIVE.value)
    return int(tx.execute(query).scalar_one())


def live_leases_of_workers(tx: Connection, worker_ids: Sequence[str]) -> dict[str, LeaseRecord]:
    query = select(leases).where(leases.c.worker_id.in_(worker_ids), leases.c.state == LeaseState.LIVE.value)
    return {row.worker_id: LeaseRecord.of(row) for row in tx.execute(query)}


_HELD = (
    select(*prefixed(leases), *prefixed(tasks))
    .join_from(leases, tasks, tasks.c.id == leases.c.task_id)
    .where(leases.c.id == bindparam("of_lease"))
)


def require(tx: Connection, lease_id: str, epoch: int, worker_id: str) -> tuple[LeaseRecord, TaskRecord]:
    """The live lease and its task, or LeaseLost with the reason it ended. Invariant 2."""
    row = tx.execute(_HELD, {"of_lease": lease_id}).one_or_none()
    if row is None:
        raise unknown(lease_id)
    lease = LeaseRecord.of(row, prefix="leases_")
    check_holds(lease, epoch, worker_id)
    return lease, TaskRecord.of(row, prefix="tasks_")


def check_holds(lease: LeaseRecord, epoch: int, worker_id: str) -> None:
    """Raises LeaseLost unless the lease is live and this epoch's, PermissionDenied when it is another worker's."""
    if lease.worker_id != worker_id:
        raise PermissionDenied("this lease belongs to another worker")
    if lease.epoch != epoch or lease.state is not LeaseState.LIVE:
        raise lost(lease, epoch)


def unknown(lease_id: str) -> LeaseLost:
    return LeaseLost(f"there is no lease {lease_id}", metadata={"lease_id": lease_id})


def lost(lease: LeaseRecord, epoch: int) -> LeaseLost:
    """The error for a write under a lease that no longer holds."""
    if lease.epoch != epoch:
        why = f"its epoch is {lease.epoch}, not {epoch}"
    else:
        why = f"it is {lease.state}" + (f": {lease.reason}" if lease.reason else "")
    return LeaseLost(f"the lease {lease.id} is lost: {why}", metadata={"lease_id": lease.id, "state": lease.state})


def end_lease(tx: Connection, now: datetime, lease: LeaseRecord, event: str, target: LeaseState, reason: str) -> bool:
    """Ends a live lease by one guarded update; False when it had ended already."""
    ended = tx.execute(
        update(leases)
        .where(leases.c.id == lease.id, leases.c.state.in_(sources(LeaseState, event)))
        .values(state=target.value, end_time=now, reason=reason)
    )
    return ended.rowcount == 1


_RELEASE = (
    update(leases)
    .where(
        leases.c.id == bindparam("of_lease"),
        leases.c.epoch == bindparam("of_epoch"),
        leases.c.worker_id == bindparam("of_worker"),
        leases.c.state.in_(sources(LeaseState, "release")),
    )
    .values(state=LeaseState.RELEASED.value, end_time=bindparam("new_end_time"), reason=bindparam("new_reason"))
    .returning(leases)
)


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
    given = {"of_lease": lease_id, "of_epoch": epoch, "of_worker": worker_id}
    row = tx.execute(_RELEASE, {**given, "new_end_time": now, "new_reason": detail}).one_or_none()
    if row is None:
        require(tx, lease_id, epoch, worker_id)
        raise lost(get_lease(tx, lease_id), epoch)
    lease = LeaseRecord.of(row)
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
        refusals.refuse(tx, worker_id, task.id, detail)
    counts = failed and refusals.count_failure(tx, now, worker_id, task.id, detail)
    if not failed and task.state is TaskState.DONE:
        identities.count_success(tx, worker_id)
    if task.state is TaskState.LEASED:
        task = reopen(tx, now, task, event="release", reason=detail, counts=counts)
    return lease, task


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
    counts = hung and refusals.count_failure(tx, now, lease.worker_id, task.id, reason)
    if task.state is TaskState.LEASED:
        reopen(tx, now, task, event="expire", reason=reason, counts=counts)
    point("coordinator.expire.before_commit")
    return get_lease(tx, lease.id)


def revoke_leases(tx: Connection, now: datetime, *, reason: str, worker_id: str = "", task_id: str = "") -> int:
    """Takes away the live leases of a worker or of a task; their tasks are open again, no attempt counted."""
    condition = leases.c.worker_id == worker_id if worker_id else leases.c.task_id == task_id
    # In the order in which renewals lock them.
    query = select(leases).where(condition, leases.c.state == LeaseState.LIVE.value).order_by(leases.c.id)
    rows = tx.execute(query).all()
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
