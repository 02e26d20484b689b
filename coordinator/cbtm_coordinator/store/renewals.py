"""Renewals of leases, many in one transaction (`store.grouping`).

The leases are locked first, in the order of their ids, and then written as decided from what was read: nothing comes
between. Invariant 2: a renewal names lease, epoch and worker, and each is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sqlalchemy import Connection, Row, bindparam, func, select, update

from cbtm_common.errors import LeaseLost, PermissionDenied
from cbtm_common.faults import point
from cbtm_coordinator.scheduler import DirectiveDecision, Pace, lease_directive, pace
from cbtm_coordinator.store.leases import check_holds, lease_policy, unknown
from cbtm_coordinator.store.records import LeaseRecord, Progress
from cbtm_coordinator.tables import checkpoints, leases, runs, tasks


@dataclass(frozen=True, kw_only=True)
class Renewal:
    """What the holder of a lease says."""

    lease_id: str
    epoch: int
    worker_id: str
    progress: Progress


@dataclass(frozen=True, kw_only=True)
class Renewed:
    """What it is told."""

    lease: LeaseRecord
    told: DirectiveDecision


_HELD = (
    select(
        leases,
        runs.c.paused,
        runs.c.recipe_json,
        tasks.c.committed_step,
        select(func.max(func.coalesce(checkpoints.c.commit_time, checkpoints.c.create_time)))
        .where(checkpoints.c.task_id == leases.c.task_id, checkpoints.c.epoch == leases.c.epoch)
        .scalar_subquery()
        .label("last_checkpoint"),
    )
    .select_from(leases.join(tasks, tasks.c.id == leases.c.task_id).join(runs, runs.c.id == tasks.c.run_id))
    .where(leases.c.id.in_(bindparam("of_leases", expanding=True)))
    .order_by(leases.c.id)
    .with_for_update(of=leases, key_share=True)
)
_WRITTEN = (
    "expire_time",
    "renew_time",
    "stall_time",
    "step",
    "loss",
    "tokens_per_second",
    "phase",
    "transferred_bytes",
)
_RENEW = (
    update(leases)
    .where(leases.c.id == bindparam("of_lease"))
    .values({name: bindparam(f"new_{name}") for name in _WRITTEN})
)


def renew(tx: Connection, now: datetime, renewals: Sequence[Renewal]) -> list[Renewed | Exception]:
    """Extends live leases and notes their progress; for each its outcome, in order: LeaseLost for one that is over.

    A lease past its end that nobody has expired yet still holds: there can be no successor.
    """
    held = {row.id: row for row in tx.execute(_HELD, {"of_leases": sorted({r.lease_id for r in renewals})})}
    outcomes: list[Renewed | Exception] = []
    for renewal in renewals:
        try:
            outcomes.append(_renew(now, held.get(renewal.lease_id), renewal))
        except (LeaseLost, PermissionDenied) as error:
            outcomes.append(error)
    # Of two renewals of one lease the later one stays.
    written = {outcome.lease.id: outcome.lease for outcome in outcomes if isinstance(outcome, Renewed)}
    if written:
        tx.execute(_RENEW, [_parameters(lease) for lease in written.values()])
    point("coordinator.renew.before_commit")
    return outcomes


def _renew(now: datetime, row: Row[tuple[object, ...]] | None, renewal: Renewal) -> Renewed:
    if row is None:
        raise unknown(renewal.lease_id)
    lease = LeaseRecord.of(row)
    check_holds(lease, renewal.epoch, renewal.worker_id)
    progress = renewal.progress
    sized = pace(lease_policy(row.recipe_json), progress.measured)
    told = lease_directive(
        now=now,
        run_paused=bool(row.paused),
        training=progress.phase == "train",
        step=progress.step,
        committed_step=row.committed_step,
        last_checkpoint=row.last_checkpoint or row.acquire_time,
        pace=sized,
    )
    return Renewed(lease=_extended(lease, now, sized, progress), told=told)


def _extended(lease: LeaseRecord, now: datetime, sized: Pace, progress: Progress) -> LeaseRecord:
    moved = (progress.step, progress.transferred_bytes) != (lease.step, lease.transferred_bytes)
    return replace(
        lease,
        renew_time=now,
        expire_time=now + sized.lease,
        stall_time=now + sized.patience if moved else lease.stall_time,
        step=progress.step,
        loss=progress.loss,
        tokens_per_second=progress.tokens_per_second,
        phase=progress.phase,
        transferred_bytes=progress.transferred_bytes,
    )


def _parameters(lease: LeaseRecord) -> dict[str, str | int | float | datetime | timedelta | None]:
    return {"of_lease": lease.id, **{f"new_{name}": getattr(lease, name) for name in _WRITTEN}}
