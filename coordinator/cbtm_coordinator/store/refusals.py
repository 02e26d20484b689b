"""Which tasks are not offered to which worker: for ever, when it is unfit for one, or for a while, when it failed it.

A worker's failures of a task count once between two commits, so that nobody uses up a task's attempts alone. Where no
other account is there, each counts: nobody else can show whose fault it is, and its owner should hear of it.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, bindparam, delete, exists, func, or_, select
from sqlalchemy.dialects import postgresql, sqlite

from cbtm_coordinator.lifecycle import LeaseState, WorkerState
from cbtm_coordinator.store import identities
from cbtm_coordinator.tables import leases, unfit, workers

# How long a task is not offered to a worker that failed it.
_WHILE = timedelta(hours=1)
# An account without a live lease that asked for work in this time is there.
PRESENT = timedelta(hours=1)


def _refusal(dialect: Any) -> Any:
    put = dialect.insert(unfit)
    given = {"reason": put.excluded.reason, "until_time": put.excluded.until_time}
    # What is for ever stays so.
    where = or_(unfit.c.until_time.is_not(None), put.excluded.until_time.is_(None))
    return put.on_conflict_do_update(index_elements=["worker_id", "task_id"], set_=given, where=where)


_REFUSE = {dialect.__name__.rpartition(".")[2]: _refusal(dialect) for dialect in (postgresql, sqlite)}
_FAILED = select(exists().where(unfit.c.worker_id == bindparam("of_worker"), unfit.c.task_id == bindparam("of_task")))


def refuse(tx: Connection, worker_id: str, task_id: str, reason: str, *, until: datetime | None = None) -> None:
    """No more offers of this task to this worker, until a time or for ever."""
    given = {"worker_id": worker_id, "task_id": task_id, "reason": reason, "until_time": until}
    tx.execute(_REFUSE[tx.dialect.name], given)


def forget_failures(tx: Connection, task_id: str) -> None:
    """Something was committed: from here on failures count anew."""
    tx.execute(delete(unfit).where(unfit.c.task_id == task_id, unfit.c.until_time.is_not(None)))


def count_failure(tx: Connection, now: datetime, worker_id: str, task_id: str, reason: str) -> bool:
    """A worker failed a task, and waits; whether it is one more of the task's attempts."""
    identities.count_failure(tx, now, worker_id)
    if not _others_are_there(tx, now, worker_id):
        return True
    failed_before = bool(tx.execute(_FAILED, {"of_worker": worker_id, "of_task": task_id}).scalar_one())
    refuse(tx, worker_id, task_id, reason, until=now + _WHILE)
    return not failed_before


def _others_are_there(tx: Connection, now: datetime, worker_id: str) -> bool:
    live = select(leases.c.id).where(leases.c.worker_id == workers.c.id, leases.c.state == LeaseState.LIVE.value)
    account = select(workers.c.account_id).where(workers.c.id == worker_id).scalar_subquery()
    found = select(func.count()).where(
        workers.c.state == WorkerState.ACTIVE.value,
        workers.c.account_id != account,
        or_(workers.c.last_seen_time >= now - PRESENT, live.exists()),
    )
    return int(tx.execute(found).scalar_one()) > 0
