"""The append-only log of what happened to every run, task, lease, checkpoint and worker, when and why."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, insert, select

from cbtm_coordinator.store.database import flush, insert_later
from cbtm_coordinator.store.records import EventRecord
from cbtm_coordinator.tables import events

_APPEND = insert(events).inline()


def append(
    tx: Connection,
    now: datetime,
    kind: str,
    *,
    run_id: str = "",
    task_id: str = "",
    lease_id: str = "",
    worker_id: str = "",
    reason: str = "",
    detail: Mapping[str, object] | None = None,
) -> None:
    """Adds one line, in the transaction of what it tells of."""
    insert_later(
        tx,
        _APPEND,
        {
            "event_time": now,
            "kind": kind,
            "run_id": run_id,
            "task_id": task_id,
            "lease_id": lease_id,
            "worker_id": worker_id,
            "reason": reason,
            "detail_json": json.dumps(detail) if detail else "",
        },
    )


def plain(value: Any) -> Any:
    """A detail as JSON has it: numbers that are none as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def list_events(
    tx: Connection, *, run_id: str = "", task_id: str = "", worker_id: str = "", after_id: int = 0, limit: int = 100
) -> list[EventRecord]:
    """Oldest first, with an id greater than `after_id`. With `after_id` 0: the newest `limit`, oldest first."""
    flush(tx)
    query = select(events)
    for column, value in ((events.c.run_id, run_id), (events.c.task_id, task_id), (events.c.worker_id, worker_id)):
        if value:
            query = query.where(column == value)
    if after_id:
        rows = tx.execute(query.where(events.c.id > after_id).order_by(events.c.id).limit(limit)).all()
    else:
        rows = tx.execute(query.order_by(events.c.id.desc()).limit(limit)).all()[::-1]
    return [EventRecord.of(row) for row in rows]
