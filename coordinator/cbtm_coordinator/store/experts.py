"""Experts: the accepted models of a run, each version of each cluster, and the seed.

Rows are added only; one whose makers are not believed any more is quarantined, and the version before it is current.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection, bindparam, func, insert, select, update

from cbtm_common.files import FileSpec
from cbtm_common.ids import new_id
from cbtm_coordinator.store import events
from cbtm_coordinator.store.records import ExpertRecord, files_to_json
from cbtm_coordinator.tables import experts


def add(
    tx: Connection,
    now: datetime,
    *,
    run_id: str,
    cluster_id: str | None,
    cluster_index: int,
    files: Sequence[FileSpec],
    checkpoint_id: str | None = None,
    metrics_json: str = "",
) -> ExpertRecord:
    """The next version of a cluster's expert; of the seed with `cluster_index` -1."""
    newest = tx.execute(
        select(func.max(experts.c.version)).where(experts.c.run_id == run_id, experts.c.cluster_index == cluster_index)
    ).scalar()
    expert_id = new_id("expert")
    tx.execute(
        insert(experts).values(
            id=expert_id,
            run_id=run_id,
            cluster_id=cluster_id,
            cluster_index=cluster_index,
            version=(newest or 0) + 1,
            checkpoint_id=checkpoint_id,
            files_json=files_to_json(files),
            metrics_json=metrics_json,
            create_time=now,
        )
    )
    events.append(tx, now, "expert.registered", run_id=run_id, detail={"cluster": cluster_index, "expert": expert_id})
    return ExpertRecord.of(tx.execute(select(experts).where(experts.c.id == expert_id)).one())


_NEWEST = (
    select(experts)
    .where(
        experts.c.run_id == bindparam("of_run"),
        experts.c.cluster_index == bindparam("of_cluster_index"),
        experts.c.quarantined.is_(False),
    )
    .order_by(experts.c.version.desc())
    .limit(1)
)


def seed(tx: Connection, run_id: str) -> ExpertRecord | None:
    """The newest version of the run's seed, once there is one."""
    row = tx.execute(_NEWEST, {"of_run": run_id, "of_cluster_index": -1}).one_or_none()
    return None if row is None else ExpertRecord.of(row)


def current(tx: Connection, run_id: str) -> list[ExpertRecord]:
    """The newest version of each cluster's expert, the seed (index -1) first."""
    newest = (
        select(experts.c.cluster_index, func.max(experts.c.version).label("version"))
        .where(experts.c.run_id == run_id, experts.c.quarantined.is_(False))
        .group_by(experts.c.cluster_index)
        .subquery()
    )
    query = (
        select(experts)
        .join(
            newest,
            (experts.c.cluster_index == newest.c.cluster_index) & (experts.c.version == newest.c.version),
        )
        .where(experts.c.run_id == run_id)
        .order_by(experts.c.cluster_index)
    )
    return [ExpertRecord.of(row) for row in tx.execute(query)]


def versions(tx: Connection, run_id: str, cluster_index: int) -> list[ExpertRecord]:
    """Those not quarantined, the newest first."""
    where = (
        experts.c.run_id == run_id,
        experts.c.cluster_index == cluster_index,
        experts.c.quarantined.is_(False),
    )
    return [
        ExpertRecord.of(row) for row in tx.execute(select(experts).where(*where).order_by(experts.c.version.desc()))
    ]


def quarantine(tx: Connection, now: datetime, found: Sequence[ExpertRecord], reason: str) -> None:
    """They are not current any more."""
    tx.execute(update(experts).where(experts.c.id.in_([e.id for e in found])).values(quarantined=True))
    for expert in found:
        detail = {"cluster": expert.cluster_index, "expert": expert.id, "version": expert.version}
        events.append(tx, now, "expert.quarantined", run_id=expert.run_id, reason=reason, detail=detail)
