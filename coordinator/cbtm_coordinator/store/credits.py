"""Credit: tokens of accepted work, in a ledger that is only ever added to.

A segment, the steps between two commits, is credited to whoever trained it, once, when a model with it in it is
accepted: also when its task is later done again from there. What an account is shut out for is taken back by entries
of their own; nobody else loses by it. `workers.verified_tokens` is the sum of a worker's entries, kept beside them in
the same transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sqlalchemy import BigInteger, Connection, and_, cast, func, literal, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from cbtm_common.recipe import Recipe
from cbtm_coordinator.lifecycle import CreditKind, TaskKind
from cbtm_coordinator.store import runs
from cbtm_coordinator.store.lineage import lineage
from cbtm_coordinator.store.records import CheckpointRecord, TaskRecord
from cbtm_coordinator.tables import accounts, credits, workers

_ADD = {
    dialect.__name__.rpartition(".")[2]: dialect.insert(credits)
    .on_conflict_do_nothing(index_elements=[credits.c.checkpoint_id, credits.c.kind])
    .returning(credits.c.worker_id, credits.c.tokens)
    for dialect in (postgresql, sqlite)
}


class LeaderboardBy(StrEnum):
    ACCOUNT = "ACCOUNT"
    WORKER = "WORKER"


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One line of the leaderboard. `workers` counts an account's, those that are shut out included."""

    id: str
    name: str
    account: str
    verified_tokens: int
    workers: int


@dataclass(frozen=True, kw_only=True)
class StatementLine:
    """What one worker has of one task: the sum of entries of one kind; `tokens` is negative when they were taken back.

    `cluster_index` is -1 for the seed.
    """

    kind: CreditKind
    run_id: str
    run_name: str
    task_id: str
    cluster_index: int
    worker_id: str
    verification: str
    tokens: int
    last_time: datetime


def earn(tx: Connection, now: datetime, task: TaskRecord, checkpoint: CheckpointRecord) -> None:
    """Credits the segments that an accepted checkpoint is made of, but for those that were before."""
    run = runs.get_by_id(tx, task.run_id)
    recipe = Recipe.from_json(run.recipe_json)
    step_tokens = recipe.of_task(seed=task.kind is TaskKind.SEED).step_tokens()
    entries = [
        {
            "kind": CreditKind.EARNED.value,
            "account_id": segment.account_id,
            "worker_id": segment.worker_id,
            "run_id": run.id,
            "run_name": run.name,
            "task_id": task.id,
            "cluster_index": task.cluster_index,
            "checkpoint_id": segment.checkpoint_id,
            "verification": run.verification.value,
            "tokens": (segment.to_step - segment.from_step) * step_tokens,
            "create_time": now,
        }
        for segment in lineage(tx, task.id, epoch=checkpoint.epoch, step=checkpoint.step)
    ]
    _add(tx, entries)


def take_back(tx: Connection, now: datetime, account_id: str, reason: str) -> None:
    """Takes back all that an account has earned so far."""
    back = credits.alias("back")
    query = select(credits).where(
        credits.c.account_id == account_id,
        credits.c.kind == CreditKind.EARNED.value,
        ~select(back.c.id)
        .where(back.c.checkpoint_id == credits.c.checkpoint_id, back.c.kind == CreditKind.TAKEN_BACK.value)
        .exists(),
    )
    taken = {"kind": CreditKind.TAKEN_BACK.value, "reason": reason, "create_time": now}
    entries = []
    for row in tx.execute(query).mappings().all():
        entry = {name: value for name, value in row.items() if name != "id"}
        entries.append({**entry, **taken, "tokens": -row["tokens"]})
    _add(tx, entries)


def _add(tx: Connection, entries: Sequence[Mapping[str, object]]) -> None:
    """What is in the ledger already is left as it is, and counts no second time."""
    for entry in entries:
        added = tx.execute(_ADD[tx.dialect.name], entry).one_or_none()
        if added is not None:
            tx.execute(
                update(workers)
                .where(workers.c.id == added.worker_id)
                .values(verified_tokens=workers.c.verified_tokens + added.tokens)
            )


def leaderboard(
    tx: Connection, by: LeaderboardBy, *, after: tuple[int, str] | None = None, limit: int = 100
) -> list[Standing]:
    """Most tokens first; ties by id. `after`: (tokens, id) of the last line before."""
    # PostgreSQL sums BIGINT to NUMERIC.
    summed = cast(func.sum(workers.c.verified_tokens), BigInteger)
    identity, name, tokens, count = (
        (workers.c.id, workers.c.name, workers.c.verified_tokens, literal(1))
        if by is LeaderboardBy.WORKER
        else (accounts.c.id, accounts.c.name, summed, func.count())
    )
    query = select(
        identity.label("id"),
        name.label("name"),
        accounts.c.name.label("account"),
        tokens.label("verified_tokens"),
        count.label("workers"),
    ).join_from(workers, accounts, accounts.c.id == workers.c.account_id)
    if by is LeaderboardBy.ACCOUNT:
        query = query.group_by(accounts.c.id, accounts.c.name)
    board = query.subquery()
    page = select(board).order_by(board.c.verified_tokens.desc(), board.c.id).limit(limit)
    if after is not None:
        least, last = after
        page = page.where(
            or_(board.c.verified_tokens < least, and_(board.c.verified_tokens == least, board.c.id > last))
        )
    return [Standing(**row) for row in tx.execute(page).mappings()]


def statement(tx: Connection, account_id: str) -> list[StatementLine]:
    """All that an account's workers earned and lost, by task, in the order of time."""
    keys = (
        credits.c.kind,
        credits.c.run_id,
        credits.c.run_name,
        credits.c.task_id,
        credits.c.cluster_index,
        credits.c.worker_id,
        credits.c.verification,
    )
    query = (
        select(
            *keys,
            cast(func.sum(credits.c.tokens), BigInteger).label("tokens"),
            func.max(credits.c.create_time).label("last_time"),
        )
        .where(credits.c.account_id == account_id)
        .group_by(*keys)
        .order_by(func.max(credits.c.id))
    )
    return [StatementLine(**{**row, "kind": CreditKind(row["kind"])}) for row in tx.execute(query).mappings()]
