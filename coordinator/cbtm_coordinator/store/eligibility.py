"""Who may take which task: conditions of the claim, over accounts and not workers, since those cost nothing to make.

A check is for another account than the one whose work it is, once for each account. Held-out text of a cluster is not
for an account that trained it. The other way round is allowed, or a small community could not redo what it rejected;
whoever saw the text and trains on the cluster is audited at every segment (`sees_held_out`).
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Boolean, ColumnElement, Connection, FromClause, String, and_, bindparam, func, or_, select

from cbtm_coordinator.lifecycle import TRAINING, LeaseState, TaskKind, Verification, WorkerState
from cbtm_coordinator.store.records import CheckRecord, RunRecord
from cbtm_coordinator.store.refusals import PRESENT
from cbtm_coordinator.tables import checks, leases, runs, tasks, workers
from cbtm_coordinator.verification.quorum import Others
from cbtm_coordinator.verification.trust import PROVEN

_ACCOUNT = bindparam("of_account", type_=String)


def may_take(task: FromClause) -> ColumnElement[bool]:
    """Of a row of `tasks` with its run: parameters `of_kinds`, `of_account`, `of_trusted`."""
    return and_(
        task.c.kind.in_(bindparam("of_kinds", expanding=True)),
        or_(task.c.kind.in_(sorted(TRAINING)), _may_check(task)),
    )


def _may_check(task: FromClause) -> ColumnElement[bool]:
    mine = checks.alias("mine")
    other, lease, worker = checks.alias("other"), leases.alias("other_lease"), workers.alias("other_worker")
    # One that it held and gave back without a report does not count.
    holds = (
        select(lease.c.id)
        .join(worker, worker.c.id == lease.c.worker_id)
        .where(
            lease.c.task_id == other.c.task_id,
            lease.c.state == LeaseState.LIVE.value,
            worker.c.account_id == _ACCOUNT,
        )
        .exists()
    )
    took_part = (
        select(other.c.task_id)
        .where(
            other.c.checkpoint_id == mine.c.checkpoint_id,
            other.c.kind == mine.c.kind,
            other.c.task_id != mine.c.task_id,
            or_(other.c.reporter_account_id == _ACCOUNT, holds),
        )
        .exists()
    )
    return and_(
        select(mine.c.task_id).where(mine.c.task_id == task.c.id, mine.c.account_id != _ACCOUNT, ~took_part).exists(),
        or_(task.c.kind != TaskKind.EVALUATE.value, ~_leased(task.c.cluster_id, TaskKind.EXPERT, _ACCOUNT)),
        or_(~_confirms(task), bindparam("of_trusted", type_=Boolean), _is_proven(_ACCOUNT)),
        or_(runs.c.verification != Verification.TRUSTED.value, bindparam("of_trusted", type_=Boolean)),
    )


def _confirms(task: FromClause) -> ColumnElement[bool]:
    asked = checks.alias("asked")
    return select(asked.c.task_id).where(asked.c.task_id == task.c.id, asked.c.confirms).exists()


def _is_proven(account: ColumnElement[str]) -> ColumnElement[bool]:
    """Of all its workers, as `identities.account_standing`."""
    worker = workers.alias("proven_worker")
    return select(worker.c.id).where(worker.c.account_id == account, worker.c.trust >= PROVEN).exists()


def _leased(cluster_id: ColumnElement[str], kind: TaskKind, account: ColumnElement[str]) -> ColumnElement[bool]:
    """Whether an account ever held a task of this kind on a cluster."""
    task, lease, worker = tasks.alias("held"), leases.alias("held_lease"), workers.alias("held_worker")
    return (
        select(task.c.id)
        .join(lease, lease.c.task_id == task.c.id)
        .join(worker, worker.c.id == lease.c.worker_id)
        .where(task.c.cluster_id == cluster_id, task.c.kind == kind.value, worker.c.account_id == account)
        .exists()
    )


_CLUSTER = bindparam("of_cluster", type_=String)
_SEES = select(_leased(_CLUSTER, TaskKind.EVALUATE, _ACCOUNT))
_TRAINED = select(_leased(_CLUSTER, TaskKind.EXPERT, _ACCOUNT))


def sees_held_out(tx: Connection, account_id: str, cluster_id: str) -> bool:
    """Whether an account was given a cluster's held-out text."""
    return bool(tx.execute(_SEES, {"of_cluster": cluster_id, "of_account": account_id}).scalar_one())


def has_trained(tx: Connection, account_id: str, cluster_id: str) -> bool:
    return bool(tx.execute(_TRAINED, {"of_cluster": cluster_id, "of_account": account_id}).scalar_one())


def others(tx: Connection, now: datetime, run: RunRecord, check: CheckRecord, cluster_id: str | None) -> Others:
    """Accounts present that could still take a check like this one: not its subject's, and not those that reported."""
    reported = select(checks.c.reporter_account_id).where(
        checks.c.checkpoint_id == check.checkpoint_id,
        checks.c.kind == check.kind.value,
        checks.c.reporter_account_id.is_not(None),
    )
    live = select(leases.c.id).where(leases.c.worker_id == workers.c.id, leases.c.state == LeaseState.LIVE.value)
    query = select(func.count(workers.c.account_id.distinct())).where(
        workers.c.state == WorkerState.ACTIVE.value,
        workers.c.account_id != check.account_id,
        workers.c.account_id.not_in(reported),
        or_(workers.c.last_seen_time >= now - PRESENT, live.exists()),
    )
    if check.kind is TaskKind.EVALUATE:
        trained = (
            select(workers.c.account_id)
            .join(leases, leases.c.worker_id == workers.c.id)
            .join(tasks, tasks.c.id == leases.c.task_id)
            .where(tasks.c.cluster_id == cluster_id, tasks.c.kind == TaskKind.EXPERT.value)
        )
        query = query.where(workers.c.account_id.not_in(trained))
    if run.verification is Verification.TRUSTED:
        query = query.where(workers.c.trusted.is_(True))
    proven = query.where(or_(workers.c.trusted, _is_proven(workers.c.account_id)))
    return Others(all=int(tx.execute(query).scalar_one()), proven=int(tx.execute(proven).scalar_one()))
