"""Answers to requests already answered: a retry with the same request_id gets the first answer.

The answer is written in the transaction of what it answers, so that either both are there or neither.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy import Connection, delete, select
from sqlalchemy.dialects import postgresql, sqlite

from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.tables import requests

# A client gives up long before.
KEEP = timedelta(days=7)


def once(
    tx: Connection,
    now: datetime,
    *,
    request_id: str,
    method: str,
    principal: str,
    answer: Callable[[], bytes],
) -> bytes:
    """`answer()` the first time, its stored result after that. A concurrent duplicate waits for the first."""
    if not request_id or len(request_id) > 64:
        raise InvalidArgument("request_id: a UUID is needed in every mutation", field="request_id")
    key = {"request_id": request_id, "method": method, "principal": principal}
    dialect = postgresql if tx.dialect.name == "postgresql" else sqlite
    # Asked by a returned row: what drivers count for an insertion that did nothing differs.
    claim = (
        dialect.insert(requests)
        .values(**key, response=b"", create_time=now)
        .on_conflict_do_nothing()
        .returning(requests.c.request_id)
    )
    claimed = tx.execute(claim).first() is not None
    where = [column == key[column.name] for column in requests.primary_key.columns]
    if not claimed:
        return bytes(tx.execute(select(requests.c.response).where(*where)).scalar_one())
    response = answer()
    tx.execute(requests.update().where(*where).values(response=response))
    return response


def find(tx: Connection, *, request_id: str, method: str, principal: str) -> bytes | None:
    """The answer given before, if there was one."""
    key = {"request_id": request_id, "method": method, "principal": principal}
    where = [column == key[column.name] for column in requests.primary_key.columns]
    answer = tx.execute(select(requests.c.response).where(*where)).scalar_one_or_none()
    return None if answer is None else bytes(answer)


def forget_old(tx: Connection, now: datetime) -> int:
    return tx.execute(delete(requests).where(requests.c.create_time < now - KEEP)).rowcount
