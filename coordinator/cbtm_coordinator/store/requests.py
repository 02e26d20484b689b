"""Answers to requests already answered: a retry with the same request_id gets the first answer.

The answer is written in the transaction of what it answers, so that either both are there or neither. Retries are
seldom: a request is served as if it were the first, and undone when an answer turns out to be there already.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

from sqlalchemy import Connection, Engine, bindparam, delete, insert, select
from sqlalchemy.exc import IntegrityError as ConstraintError

from cbtm_common.errors import CbtmError, InvalidArgument, Unavailable
from cbtm_coordinator.store.database import insert_later, reading, writing
from cbtm_coordinator.tables import requests

# A client gives up long before.
KEEP = timedelta(days=7)

_NAMES = [column.name for column in requests.primary_key.columns]
_FIND = select(requests.c.response).where(*(requests.c[name] == bindparam(name) for name in _NAMES))
_RECORD = insert(requests)


def once(
    engine: Engine,
    clock: Callable[[], datetime],
    *,
    request_id: str,
    method: str,
    principal: str,
    answer: Callable[[Connection], bytes],
    keep: Callable[[bytes], bool] = lambda _: True,
) -> bytes:
    """`answer(tx)` in one transaction the first time, its recorded result after that.

    Of two at once, the second waits for the first where both change the same rows, or at the record. An answer that
    `keep` refuses is not recorded: that of a request which changed nothing.
    """
    if not request_id or len(request_id) > 64:
        raise InvalidArgument("request_id: a UUID is needed in every mutation", field="request_id")
    key = {"request_id": request_id, "method": method, "principal": principal}
    try:
        with writing(engine) as tx:
            response = answer(tx)
            kept = keep(response)
            if kept:
                insert_later(tx, _RECORD, {**key, "response": response, "create_time": clock()})
    except Unavailable:
        raise
    except (CbtmError, ConstraintError):
        # The record is there already; or what the first one changed is why this one fails.
        first = find(engine, **key)
        if first is None:
            raise
        return first
    # It may also be why this one finds nothing to do.
    return response if kept else find(engine, **key) or response


def find(engine: Engine, *, request_id: str, method: str, principal: str) -> bytes | None:
    """The answer given before, if there was one."""
    with reading(engine) as tx:
        answer = tx.execute(
            _FIND, {"request_id": request_id, "method": method, "principal": principal}
        ).scalar_one_or_none()
    return None if answer is None else bytes(answer)


def forget_old(tx: Connection, now: datetime) -> int:
    return tx.execute(delete(requests).where(requests.c.create_time < now - KEEP)).rowcount
