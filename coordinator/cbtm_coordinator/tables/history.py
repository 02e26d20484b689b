"""What happened: requests with their answers, and events."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Integer, LargeBinary, String, Table, text

from cbtm_coordinator.tables.columns import metadata, time, words

requests = Table(
    "requests",
    metadata,
    Column("request_id", String(64), primary_key=True),
    Column("method", String(64), primary_key=True),
    Column("principal", String(64), primary_key=True),
    Column("response", LargeBinary, nullable=False),
    time("create_time"),
)
Index("ix_requests_create_time", requests.c.create_time)

events = Table(
    "events",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    time("event_time"),
    Column("kind", String(64), nullable=False),
    # Plain text, not references: the log outlives what it tells of.
    Column("run_id", String(64), nullable=False, server_default=text("''")),
    Column("task_id", String(64), nullable=False, server_default=text("''")),
    Column("lease_id", String(64), nullable=False, server_default=text("''")),
    Column("worker_id", String(64), nullable=False, server_default=text("''")),
    words("reason"),
    words("detail_json"),
    sqlite_autoincrement=True,
)
Index("ix_events_run", events.c.run_id, events.c.id)
Index("ix_events_task", events.c.task_id, events.c.id)
Index("ix_events_worker", events.c.worker_id, events.c.id)
