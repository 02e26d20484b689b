"""Tokens and workers: who may do what. Secrets are known by their hashes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, bindparam, func, insert, or_, select, update

from cbtm_common.errors import NotFound, Unauthenticated
from cbtm_coordinator.lifecycle import WorkerState
from cbtm_coordinator.scheduler import backoff
from cbtm_coordinator.store import accounts, events
from cbtm_coordinator.store.records import TokenRecord, WorkerRecord
from cbtm_coordinator.tables import leases, tokens, workers
from cbtm_coordinator.verification.trust import Standing


def create_token(
    tx: Connection,
    now: datetime,
    *,
    token_id: str,
    role: str,
    secret_hash: str,
    label: str = "",
    account: str = "",
    recovers_worker_id: str = "",
    expire_time: datetime | None = None,
    max_uses: int = 0,
    trusted: bool = False,
) -> TokenRecord:
    """Who joins with it belongs to the account named, or one named as the label, or one of the token's own."""
    account_id = accounts.named(tx, now, account or label or token_id)
    tx.execute(
        insert(tokens).values(
            id=token_id,
            account_id=account_id,
            role=role,
            secret_hash=secret_hash,
            label=label,
            create_time=now,
            expire_time=expire_time,
            max_uses=max_uses,
            trusted=trusted,
            recovers_worker_id=recovers_worker_id,
        )
    )
    events.append(tx, now, "token.created", detail={"token_id": token_id, "role": role, "account_id": account_id})
    return get_token(tx, token_id)


def get_token(tx: Connection, token_id: str) -> TokenRecord:
    row = tx.execute(select(tokens).where(tokens.c.id == token_id)).one_or_none()
    if row is None:
        raise NotFound(f"there is no token {token_id}; `cbtm-coord token list` shows them")
    return TokenRecord.of(row)


def find_token(tx: Connection, now: datetime, secret_hash: str) -> TokenRecord | None:
    """A token that is good now, without using it up."""
    row = tx.execute(
        select(tokens).where(
            tokens.c.secret_hash == secret_hash,
            tokens.c.revoked.is_(False),
            or_(tokens.c.expire_time.is_(None), tokens.c.expire_time > now),
        )
    ).one_or_none()
    return None if row is None else TokenRecord.of(row)


def knows_secret(tx: Connection, secret_hash: str) -> bool:
    """Whether a token with this secret was ever made here, be it revoked or expired."""
    return tx.execute(select(tokens.c.id).where(tokens.c.secret_hash == secret_hash)).first() is not None


def use_token(tx: Connection, now: datetime, token_id: str) -> TokenRecord:
    """Counts one use, if one is left.

    One guarded update, so that a use count is exact among many processes.
    """
    used = tx.execute(
        update(tokens)
        .where(
            tokens.c.id == token_id,
            tokens.c.revoked.is_(False),
            or_(tokens.c.expire_time.is_(None), tokens.c.expire_time > now),
            or_(tokens.c.max_uses == 0, tokens.c.uses < tokens.c.max_uses),
        )
        .values(uses=tokens.c.uses + 1)
        .returning(tokens)
    ).one_or_none()
    if used is None:
        raise Unauthenticated("this join token is used up, expired or revoked; ask the run's owner for a new one")
    return TokenRecord.of(used)


def list_tokens(tx: Connection, *, after_id: str = "", limit: int = 100) -> list[TokenRecord]:
    rows = tx.execute(select(tokens).where(tokens.c.id > after_id).order_by(tokens.c.id).limit(limit))
    return [TokenRecord.of(row) for row in rows]


def revoke_token(tx: Connection, now: datetime, token_id: str) -> TokenRecord:
    tx.execute(update(tokens).where(tokens.c.id == token_id).values(revoked=True))
    token = get_token(tx, token_id)
    events.append(tx, now, "token.revoked", detail={"token_id": token_id, "label": token.label})
    return token


def create_worker(
    tx: Connection,
    now: datetime,
    *,
    worker_id: str,
    account_id: str,
    name: str,
    public_key: str,
    token_id: str | None,
    hardware_json: str,
    version: str,
) -> WorkerRecord:
    tx.execute(
        insert(workers).values(
            id=worker_id,
            account_id=account_id,
            name=name,
            state=WorkerState.ACTIVE.value,
            public_key=public_key,
            token_id=token_id,
            trusted=func.coalesce(select(tokens.c.trusted).where(tokens.c.id == token_id).scalar_subquery(), False),
            hardware_json=hardware_json,
            version=version,
            register_time=now,
            last_seen_time=now,
        )
    )
    detail = {"name": name, "version": version, "account_id": account_id}
    events.append(tx, now, "worker.registered", worker_id=worker_id, detail=detail)
    return get_worker(tx, worker_id)


def get_worker(tx: Connection, worker_id: str) -> WorkerRecord:
    row = tx.execute(_WORKERS.where(workers.c.id == worker_id)).one_or_none()
    if row is None:
        raise NotFound(f"there is no worker {worker_id}; `cbtm-coord worker list` shows them")
    return _worker(row)


# A renewal writes its lease alone, so a worker was last seen when its newest lease was renewed.
_WORKERS = select(
    workers,
    select(func.max(leases.c.renew_time))
    .where(leases.c.worker_id == workers.c.id)
    .scalar_subquery()
    .label("renew_time"),
)


def _worker(row: Row[Any]) -> WorkerRecord:
    worker = WorkerRecord.of(row)
    return replace(worker, last_seen_time=max(worker.last_seen_time, row.renew_time or worker.last_seen_time))


_BY_ID = select(workers).where(workers.c.id == bindparam("of_worker"))


def find_worker(tx: Connection, worker_id: str) -> WorkerRecord | None:
    row = tx.execute(_BY_ID, {"of_worker": worker_id}).one_or_none()
    return None if row is None else WorkerRecord.of(row)


def note_signed(tx: Connection, worker_id: str, public_key: str, time_us: int) -> bool:
    """Whether what was signed at this time is new; one guarded update, so of two that show it one is refused."""
    noted = tx.execute(
        update(workers)
        .where(workers.c.id == worker_id, workers.c.public_key == public_key, workers.c.signed_time_us < time_us)
        .values(signed_time_us=time_us)
    )
    return noted.rowcount == 1


def replace_key(tx: Connection, now: datetime, worker_id: str, public_key: str) -> WorkerRecord:
    """The same worker with another key; the former one is good for nothing from now on."""
    tx.execute(update(workers).where(workers.c.id == worker_id).values(public_key=public_key, signed_time_us=0))
    events.append(tx, now, "worker.recovered", worker_id=worker_id, reason="it registered a new key")
    return get_worker(tx, worker_id)


def list_workers(tx: Connection, *, after_id: str = "", limit: int = 100) -> list[WorkerRecord]:
    rows = tx.execute(_WORKERS.where(workers.c.id > after_id).order_by(workers.c.id).limit(limit))
    return [_worker(row) for row in rows]


def backed_off_workers(tx: Connection, now: datetime, *, limit: int = 100) -> list[WorkerRecord]:
    """Those that failed and are given no work now; the longest wait first."""
    waiting = workers.c.not_before_time > now, workers.c.state == WorkerState.ACTIVE.value
    rows = tx.execute(_WORKERS.where(*waiting).order_by(workers.c.not_before_time.desc()).limit(limit))
    return [_worker(row) for row in rows]


def worker_names(tx: Connection, worker_ids: Sequence[str]) -> dict[str, str]:
    rows = tx.execute(select(workers.c.id, workers.c.name).where(workers.c.id.in_(worker_ids)))
    return {row.id: row.name for row in rows}


_SEEN = (
    update(workers)
    .where(workers.c.id == bindparam("of_worker"))
    .values(last_seen_time=bindparam("new_time"))
    .returning(workers)
)
_SEEN_WITH_HARDWARE = _SEEN.values(hardware_json=bindparam("new_hardware_json"))


def seen(tx: Connection, now: datetime, worker_id: str, *, hardware_json: str = "") -> WorkerRecord:
    """Notes that a worker was heard of, and what it says it has."""
    given = {"of_worker": worker_id, "new_time": now}
    if hardware_json:
        found = tx.execute(_SEEN_WITH_HARDWARE, given | {"new_hardware_json": hardware_json})
    else:
        found = tx.execute(_SEEN, given)
    return WorkerRecord.of(found.one())


def count_success(tx: Connection, worker_id: str) -> None:
    tx.execute(
        update(workers)
        .where(workers.c.id == worker_id)
        .values(finished_tasks=workers.c.finished_tasks + 1, failures=0, not_before_time=None, reason="")
    )


def count_failure(tx: Connection, now: datetime, worker_id: str) -> None:
    """One more failure in a row: the worker waits, longer each time, and `status` says why."""
    row = tx.execute(
        update(workers)
        .where(workers.c.id == worker_id)
        .values(failed_tasks=workers.c.failed_tasks + 1, failures=workers.c.failures + 1)
        .returning(workers.c.failures)
    ).one()
    decision = backoff(now=now, failures=int(row.failures), what="this worker")
    tx.execute(
        update(workers).where(workers.c.id == worker_id).values(not_before_time=decision.until, reason=decision.reason)
    )


def change_standing(tx: Connection, worker_id: str, change: Callable[[Standing], Standing]) -> Standing:
    """What a check says of a worker."""
    row = tx.execute(
        select(workers.c.trust, workers.c.strikes).where(workers.c.id == worker_id).with_for_update(key_share=True)
    ).one()
    standing = change(Standing(trust=row.trust, strikes=row.strikes))
    tx.execute(update(workers).where(workers.c.id == worker_id).values(trust=standing.trust, strikes=standing.strikes))
    return standing


def set_at_risk(tx: Connection, worker_id: str, at_risk: float) -> None:
    """Replays that its work was worth since its last one."""
    tx.execute(update(workers).where(workers.c.id == worker_id).values(at_risk=at_risk))


def account_standing(tx: Connection, account_id: str) -> Standing:
    """Of all workers of an account: one that is shut out does not come back as another."""
    query = select(func.max(workers.c.trust).label("trust"), func.sum(workers.c.strikes).label("strikes"))
    row = tx.execute(query.where(workers.c.account_id == account_id)).one()
    return Standing(trust=row.trust or 0.0, strikes=int(row.strikes or 0))


def set_revoked(tx: Connection, now: datetime, worker_id: str, reason: str) -> None:
    get_worker(tx, worker_id)
    tx.execute(update(workers).where(workers.c.id == worker_id).values(state=WorkerState.REVOKED.value, reason=reason))
    events.append(tx, now, "worker.revoked", worker_id=worker_id, reason=reason)
