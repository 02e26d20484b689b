"""Runs, their files, clusters and shards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime

from sqlalchemy import Connection, bindparam, delete, func, insert, or_, select, tuple_, update
from sqlalchemy.exc import IntegrityError as ConstraintError

from cbtm_common.errors import AlreadyExists, InvalidArgument, InvalidState, NotFound
from cbtm_common.files import FileSpec
from cbtm_common.ids import cluster_id, new_id
from cbtm_common.recipe import Recipe
from cbtm_common.run_routing import RunRouting
from cbtm_coordinator.lifecycle import RunState, Verification, transition
from cbtm_coordinator.store import events
from cbtm_coordinator.store.records import ClusterRecord, NewCluster, NewShard, RunFile, RunRecord, ShardRecord
from cbtm_coordinator.tables import clusters, run_files, runs, shards

TRAIN, HELD_OUT = "TRAIN", "HELD_OUT"


def create(
    tx: Connection,
    now: datetime,
    *,
    name: str,
    cluster_count: int,
    recipe: Recipe,
    from_scratch: bool,
    baseline_of: str | None = None,
    verification: Verification = Verification.OFF,
) -> RunRecord:
    """A new run in DRAFT. Raises AlreadyExists when the name is taken."""
    run_id = new_id("run")
    if tx.execute(select(runs.c.id).where(runs.c.name == name)).first() is not None:
        raise AlreadyExists(f"name: a run named {name!r} exists already; choose another, or delete that run")
    try:
        tx.execute(
            insert(runs).values(
                id=run_id,
                name=name,
                state=RunState.DRAFT.value,
                cluster_count=cluster_count,
                recipe_json=recipe.to_json(),
                from_scratch=from_scratch,
                baseline_of=baseline_of,
                verification=verification.value,
                create_time=now,
                update_time=now,
            )
        )
    except ConstraintError as error:
        raise AlreadyExists(f"name: a run named {name!r} exists already") from error
    events.append(tx, now, "run.created", run_id=run_id, detail={"name": name, "clusters": cluster_count})
    return get(tx, run_id)


def get(tx: Connection, run: str, *, lock: bool = False) -> RunRecord:
    """By id or by name. `lock` holds its row to the transaction's end: its tasks cannot finish or fail meanwhile."""
    query = select(runs).where(or_(runs.c.id == run, runs.c.name == run)).order_by(runs.c.id != run)
    if lock:
        # NO KEY: rows that refer to the run may still be inserted, which is no reason to wait (or to deadlock).
        query = query.with_for_update(key_share=True)
    row = tx.execute(query).first()
    if row is None:
        raise NotFound(f"run: there is no run {run!r}; `cbtm-coord run list` shows them", metadata={"run": run})
    return RunRecord.of(row)


_BY_ID = select(runs).where(runs.c.id == bindparam("of_run"))


def get_by_id(tx: Connection, run_id: str) -> RunRecord:
    """A run that a row refers to, so that it must be there."""
    return RunRecord.of(tx.execute(_BY_ID, {"of_run": run_id}).one())


def list_runs(tx: Connection, *, after_id: str = "", limit: int = 100) -> list[RunRecord]:
    return [
        RunRecord.of(row)
        for row in tx.execute(select(runs).where(runs.c.id > after_id).order_by(runs.c.id).limit(limit))
    ]


def change_state(tx: Connection, now: datetime, run: RunRecord, event: str, reason: str) -> None:
    """One guarded update by the transition table. Raises InvalidState when another process was first."""
    target = transition(run.state, event)
    changed = tx.execute(
        update(runs)
        .where(runs.c.id == run.id, runs.c.state == run.state.value)
        .values(state=target.value, reason=reason, update_time=now)
    )
    if changed.rowcount != 1:
        raise InvalidState(f"run {run.name} is no longer {run.state}; look again with `cbtm-coord status`")
    events.append(tx, now, f"run.{target.value.lower()}", run_id=run.id, reason=reason)


def set_paused(tx: Connection, now: datetime, run: RunRecord, paused: bool) -> RunRecord:
    if run.state in (RunState.DRAFT, RunState.COMPLETE):
        raise InvalidState(f"run {run.name} is {run.state}: there is nothing to {'pause' if paused else 'resume'}")
    if run.paused != paused:
        tx.execute(update(runs).where(runs.c.id == run.id).values(paused=paused, update_time=now))
        events.append(tx, now, "run.paused" if paused else "run.resumed", run_id=run.id)
    return get(tx, run.id)


def set_verification(tx: Connection, now: datetime, run: RunRecord, verification: Verification) -> RunRecord:
    tx.execute(update(runs).where(runs.c.id == run.id).values(verification=verification.value, update_time=now))
    events.append(tx, now, "run.verification", run_id=run.id, detail={"verification": verification.value})
    return get(tx, run.id)


def set_routing(tx: Connection, now: datetime, run: RunRecord, routing: RunRouting | None) -> RunRecord:
    """How its experts are mixed by default; None: as the recipe says."""
    if run.state is RunState.DRAFT or run.baseline_of:
        raise InvalidState(f"run {run.name} is a DRAFT, or a baseline: there is nothing to route between")
    text = "" if routing is None else routing.to_json()
    if text != run.routing_json:
        tx.execute(update(runs).where(runs.c.id == run.id).values(routing_json=text, update_time=now))
        events.append(tx, now, "run.routing", run_id=run.id, detail={} if routing is None else routing.model_dump())
    return get(tx, run.id)


def remove(tx: Connection, now: datetime, run: RunRecord) -> None:
    """Forgets a run and all that hangs on it. Refused while a baseline reads its shards."""
    other = tx.execute(select(runs.c.name).where(runs.c.baseline_of == run.id)).scalar()
    if other is not None:
        raise InvalidState(f"run {run.name} lends its shards to its baseline {other!r}; delete that one first")
    tx.execute(delete(runs).where(runs.c.id == run.id))
    events.append(tx, now, "run.deleted", run_id=run.id, detail={"name": run.name})


def add_files(tx: Connection, run_id: str, kind: str, files: Iterable[FileSpec]) -> None:
    """Adds files of one kind; the same path again replaces it."""
    for file in files:
        where = (run_files.c.run_id == run_id, run_files.c.kind == kind, run_files.c.path == file.path)
        tx.execute(delete(run_files).where(*where))
        tx.execute(
            insert(run_files).values(
                run_id=run_id, kind=kind, path=file.path, key=file.key, size=file.size, sha256=file.sha256
            )
        )


_FILES = select(run_files).where(run_files.c.run_id == bindparam("of_run")).order_by(run_files.c.kind, run_files.c.path)
_FILES_OF_KIND = _FILES.where(run_files.c.kind == bindparam("of_kind"))


def files(tx: Connection, run: RunRecord, kind: str | None = None) -> list[RunFile]:
    if kind is None:
        rows = tx.execute(_FILES, {"of_run": run.data_run_id})
    else:
        rows = tx.execute(_FILES_OF_KIND, {"of_run": run.data_run_id, "of_kind": kind})
    return [RunFile.of(row) for row in rows]


def register_clusters(tx: Connection, run: RunRecord, new: Sequence[NewCluster]) -> list[ClusterRecord]:
    """Adds clusters with their shards to a DRAFT; may be called for some of them at a time."""
    if run.state is not RunState.DRAFT:
        raise InvalidState(f"run {run.name} is {run.state}; clusters are registered while it is DRAFT")
    for cluster in new:
        if not 0 <= cluster.cluster_index < run.cluster_count:
            raise InvalidArgument(
                f"clusters.index: {cluster.cluster_index} is not in 0..{run.cluster_count - 1}", field="clusters.index"
            )
    present = set(tx.execute(select(clusters.c.cluster_index).where(clusters.c.run_id == run.id)).scalars())
    taken = next((cluster.cluster_index for cluster in new if cluster.cluster_index in present), None)
    if taken is not None:
        raise AlreadyExists(f"cluster {taken} of run {run.name} is registered already")
    try:
        if new:
            tx.execute(insert(clusters), [_cluster_row(run, cluster) for cluster in new])
    except ConstraintError as error:
        raise AlreadyExists(
            f"clusters of run {run.name} were registered by another call: look, and try again"
        ) from error
    rows = [_shard_row(run, cluster, shard) for cluster in new for shard in cluster.shards]
    if rows:
        tx.execute(insert(shards), rows)
    tokens_of, documents_of = func.sum(clusters.c.train_tokens), func.sum(clusters.c.documents)
    total = tx.execute(
        select(tokens_of.label("tokens"), documents_of.label("documents")).where(clusters.c.run_id == run.id)
    ).one()
    tx.execute(
        update(runs).where(runs.c.id == run.id).values(train_tokens=int(total.tokens), documents=int(total.documents))
    )
    return list_clusters(tx, run)


def _cluster_row(run: RunRecord, cluster: NewCluster) -> dict[str, object]:
    return {
        "id": cluster_id(run.id, cluster.cluster_index),
        "run_id": run.id,
        "cluster_index": cluster.cluster_index,
        "documents": cluster.documents,
        "train_tokens": sum(s.tokens for s in cluster.shards if s.split == TRAIN),
        "held_out_tokens": sum(s.tokens for s in cluster.shards if s.split == HELD_OUT),
        "top_terms_json": json.dumps(list(cluster.top_terms)),
        "examples_json": json.dumps(list(cluster.examples)),
    }


def _shard_row(run: RunRecord, cluster: NewCluster, shard: NewShard) -> dict[str, object]:
    return {
        "id": new_id("shard"),
        "cluster_id": cluster_id(run.id, cluster.cluster_index),
        "split": shard.split,
        "ordinal": shard.ordinal,
        "key": shard.file.key,
        "size": shard.file.size,
        "sha256": shard.file.sha256,
        "tokens": shard.tokens,
        "documents": shard.documents,
    }


def list_clusters(tx: Connection, run: RunRecord, *, after: int = -1, limit: int = 2000) -> list[ClusterRecord]:
    """Of the run itself, in the order of the clustering model, with an index greater than `after`."""
    query = select(clusters).where(clusters.c.run_id == run.id, clusters.c.cluster_index > after)
    return [ClusterRecord.of(row) for row in tx.execute(query.order_by(clusters.c.cluster_index).limit(limit))]


def list_shards(
    tx: Connection,
    data_run_id: str,
    *,
    split: str | None = None,
    cluster_id: str | None = None,
    keys: Sequence[str] | None = None,
    after: tuple[int, str, int] | None = None,
    limit: int = 500,
) -> list[tuple[int, ShardRecord]]:
    """(cluster index, shard) in training order: by cluster index, split, ordinal; after the place `after`."""
    order = (clusters.c.cluster_index, shards.c.split, shards.c.ordinal)
    query = (
        select(clusters.c.cluster_index, shards)
        .join(clusters, shards.c.cluster_id == clusters.c.id)
        .where(clusters.c.run_id == data_run_id)
    )
    if split is not None:
        query = query.where(shards.c.split == split)
    if cluster_id is not None:
        query = query.where(shards.c.cluster_id == cluster_id)
    if keys is not None:
        query = query.where(shards.c.key.in_(keys))
    if after is not None:
        query = query.where(tuple_(*order) > tuple_(*after))
    return [(int(row.cluster_index), ShardRecord.of(row)) for row in tx.execute(query.order_by(*order).limit(limit))]


def set_train_tokens(tx: Connection, run_id: str, train_tokens: int) -> None:
    """For a baseline, whose shards are another run's."""
    tx.execute(update(runs).where(runs.c.id == run_id).values(train_tokens=train_tokens))


def set_budget(tx: Connection, run_id: str, *, tokens: int, parameters: int) -> None:
    """Tokens that all tasks of a run train on together, and the size of its model."""
    tx.execute(update(runs).where(runs.c.id == run_id).values(budget_tokens=tokens, model_parameters=parameters))


def knows_key(tx: Connection, run_id: str, key: str) -> bool:
    """Whether a file or shard of the run lies at this object key. All are wanted while the run is a DRAFT."""
    in_files = select(run_files.c.key).where(run_files.c.run_id == run_id, run_files.c.key == key)
    in_shards = (
        select(shards.c.key)
        .join(clusters, clusters.c.id == shards.c.cluster_id)
        .where(clusters.c.run_id == run_id, shards.c.key == key)
    )
    return tx.execute(in_files).first() is not None or tx.execute(in_shards).first() is not None
