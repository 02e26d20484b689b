"""The registry's tables. Invariants live here, as constraints, and hold whatever a process does.

- one LIVE lease a task: partial unique index `uq_leases_live_task`;
- an epoch is never reused: UNIQUE (task_id, epoch);
- states are closed sets: CHECK;
- one training task a cluster: partial unique index `uq_tasks_training`;
- one expert a cluster and version: UNIQUE;
- a request is answered once: primary key (request_id, method, principal);
- a segment is credited once, and taken back once: UNIQUE (checkpoint_id, kind);
- events and credits are appended only: no statement in the store updates or deletes them.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.engine import Dialect

from cbtm_coordinator.lifecycle import (
    TRAINING,
    CheckpointState,
    CreditKind,
    LeaseState,
    RunState,
    TaskKind,
    TaskState,
    Verification,
    WorkerState,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(TypeDecorator[datetime]):
    """Aware datetimes in UTC on every database; SQLite alone would give naive ones back."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("a datetime without a time zone does not enter the registry")
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _one_of(column: str, states: type[StrEnum]) -> CheckConstraint:
    names = ", ".join(f"'{s.value}'" for s in states)
    return CheckConstraint(f"{column} IN ({names})", name=column)


def _id() -> Column[str]:
    return Column("id", String(64), primary_key=True)


def _ref(name: str, target: str, **options: Any) -> Column[str]:
    return Column(name, String(64), ForeignKey(f"{target}.id", ondelete="CASCADE"), **options)


def _count(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False, server_default=text("0"))


def _time(name: str, *, nullable: bool = False) -> Column[datetime]:
    return Column(name, UtcDateTime, nullable=nullable)


def _words(name: str) -> Column[str]:
    return Column(name, Text, nullable=False, server_default=text("''"))


runs = Table(
    "runs",
    metadata,
    _id(),
    Column("name", String(200), nullable=False, unique=True),
    Column("state", String(16), nullable=False),
    Column("paused", Boolean, nullable=False, server_default=text("false")),
    Column("cluster_count", Integer, nullable=False),
    Column("recipe_json", Text, nullable=False),
    Column("from_scratch", Boolean, nullable=False),
    # A dense baseline reads the files and shards of the run beside which it stands; that run outlives it.
    Column("baseline_of", String(64), ForeignKey("runs.id"), nullable=True),
    _count("model_parameters"),
    _count("train_tokens"),
    _count("documents"),
    _count("budget_tokens"),
    Column("verification", String(16), nullable=False, server_default=text("'OFF'")),
    _words("routing_json"),
    _words("reason"),
    _time("create_time"),
    _time("update_time"),
    _one_of("state", RunState),
    _one_of("verification", Verification),
    CheckConstraint("cluster_count > 0", name="cluster_count"),
)

run_files = Table(
    "run_files",
    metadata,
    _ref("run_id", "runs", primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("path", String(1024), primary_key=True),
    Column("key", String(1024), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
)

clusters = Table(
    "clusters",
    metadata,
    _id(),
    _ref("run_id", "runs", nullable=False),
    Column("cluster_index", Integer, nullable=False),
    _count("documents"),
    _count("train_tokens"),
    _count("held_out_tokens"),
    Column("top_terms_json", Text, nullable=False),
    Column("examples_json", Text, nullable=False),
    UniqueConstraint("run_id", "cluster_index"),
)

shards = Table(
    "shards",
    metadata,
    _id(),
    _ref("cluster_id", "clusters", nullable=False),
    Column("split", String(8), nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("key", String(1024), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("tokens", BigInteger, nullable=False),
    Column("documents", BigInteger, nullable=False),
    UniqueConstraint("cluster_id", "split", "ordinal"),
    CheckConstraint("split IN ('TRAIN', 'HELD_OUT')", name="split"),
)

accounts = Table(
    "accounts",
    metadata,
    _id(),
    Column("name", String(200), nullable=False, unique=True),
    _time("create_time"),
)

tokens = Table(
    "tokens",
    metadata,
    _id(),
    Column("account_id", String(64), ForeignKey("accounts.id"), nullable=False),
    Column("role", String(16), nullable=False),
    Column("secret_hash", String(64), nullable=False, unique=True),
    _words("label"),
    _time("create_time"),
    _time("expire_time", nullable=True),
    # 0: without limit.
    _count("max_uses"),
    _count("uses"),
    # The worker whose key it replaces; empty for one that lets in new workers.
    Column("recovers_worker_id", String(64), nullable=False, server_default=text("''")),
    Column("revoked", Boolean, nullable=False, server_default=text("false")),
    Column("trusted", Boolean, nullable=False, server_default=text("false")),
    CheckConstraint("role IN ('WORKER', 'CONSUMER', 'ADMIN')", name="role"),
    CheckConstraint("max_uses = 0 OR uses <= max_uses", name="uses"),
)

workers = Table(
    "workers",
    metadata,
    _id(),
    Column("name", String(200), nullable=False),
    Column("state", String(16), nullable=False),
    # Ed25519, in hexadecimal; none of a worker that registered before there were keys, until it is recovered.
    Column("public_key", String(64), nullable=True, unique=True),
    # The latest time that it signed, in microseconds since 1970: nothing signed is good twice.
    _count("signed_time_us"),
    Column("account_id", String(64), ForeignKey("accounts.id"), nullable=False, index=True),
    Column("token_id", String(64), ForeignKey("tokens.id"), nullable=True),
    Column("hardware_json", Text, nullable=False),
    Column("version", String(64), nullable=False),
    _time("register_time"),
    _time("last_seen_time"),
    _count("finished_tasks"),
    _count("failed_tasks"),
    # Failures in a row, and until when they keep it waiting.
    _count("failures"),
    _time("not_before_time", nullable=True),
    _words("reason"),
    # Its standing (`verification.trust`); with `trusted`, its owner vouches for it.
    Column("trusted", Boolean, nullable=False, server_default=text("false")),
    Column("trust", Float, nullable=False, server_default=text("0")),
    _count("strikes"),
    # Replays that its work was worth since its last one (`verification.audits`).
    Column("at_risk", Float, nullable=False, server_default=text("0")),
    _count("verified_tokens"),
    _one_of("state", WorkerState),
)

tasks = Table(
    "tasks",
    metadata,
    _id(),
    _ref("run_id", "runs", nullable=False),
    Column("kind", String(16), nullable=False),
    # Checks come first: they are short, and work waits for them. Then the seed, for which everything waits.
    Column("priority", Integer, nullable=False, server_default=text("0")),
    # Of an EVALUATE: the cluster whose held-out text it scores.
    _ref("cluster_id", "clusters", nullable=True),
    Column("cluster_index", Integer, nullable=False, server_default=text("-1")),
    Column("state", String(16), nullable=False),
    Column("total_steps", BigInteger, nullable=False),
    _count("committed_step"),
    _count("attempts"),
    Column("max_attempts", Integer, nullable=False),
    _count("epoch"),
    _time("not_before_time"),
    _words("reason"),
    _time("create_time"),
    _time("update_time"),
    _one_of("kind", TaskKind),
    _one_of("state", TaskState),
    CheckConstraint("committed_step <= total_steps", name="committed_step"),
)
_TRAINS = tasks.c.kind.in_(sorted(TRAINING))
Index(
    "uq_tasks_training",
    tasks.c.run_id,
    tasks.c.kind,
    tasks.c.cluster_index,
    unique=True,
    sqlite_where=_TRAINS,
    postgresql_where=_TRAINS,
)
Index("ix_tasks_cluster", tasks.c.cluster_id, tasks.c.kind)
# In the order of work (`store.leases`), so that the best of a hundred thousand open tasks is the first one found.
Index(
    "ix_tasks_open",
    tasks.c.priority.desc(),
    tasks.c.attempts,
    tasks.c.committed_step - tasks.c.total_steps,
    tasks.c.id,
    sqlite_where=tasks.c.state == "PENDING",
    postgresql_where=tasks.c.state == "PENDING",
)

leases = Table(
    "leases",
    metadata,
    _id(),
    _ref("task_id", "tasks", nullable=False),
    _ref("worker_id", "workers", nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    _time("acquire_time"),
    _time("expire_time"),
    # When its worker was last heard of.
    _time("renew_time"),
    # When it counts as hung unless it shows progress before.
    _time("stall_time"),
    _time("end_time", nullable=True),
    _words("reason"),
    _count("step"),
    Column("loss", Float, nullable=True),
    Column("tokens_per_second", Float, nullable=False, server_default=text("0")),
    _words("phase"),
    _count("transferred_bytes"),
    _one_of("state", LeaseState),
    CheckConstraint("(state = 'LIVE') = (end_time IS NULL)", name="end_time"),
    UniqueConstraint("task_id", "epoch"),
)
_LIVE = leases.c.state == LeaseState.LIVE.value
Index("uq_leases_live_task", leases.c.task_id, unique=True, sqlite_where=_LIVE, postgresql_where=_LIVE)
Index("ix_leases_live_expiry", leases.c.expire_time, sqlite_where=_LIVE, postgresql_where=_LIVE)
Index("ix_leases_worker", leases.c.worker_id, leases.c.state)

checkpoints = Table(
    "checkpoints",
    metadata,
    _id(),
    _ref("task_id", "tasks", nullable=False),
    _ref("lease_id", "leases", nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("final", Boolean, nullable=False),
    Column("files_json", Text, nullable=False),
    _words("metrics_json"),
    _words("reason"),
    # A PRUNED or REJECTED one whose objects are gone.
    Column("objects_deleted", Boolean, nullable=False, server_default=text("false")),
    _time("create_time"),
    _time("commit_time", nullable=True),
    _one_of("state", CheckpointState),
    UniqueConstraint("task_id", "epoch", "step"),
)
Index("ix_checkpoints_state", checkpoints.c.state, checkpoints.c.objects_deleted)
Index("ix_checkpoints_lease", checkpoints.c.lease_id)

# What an EVALUATE or AUDIT task is about, and what was reported of it.
checks = Table(
    "checks",
    metadata,
    _ref("task_id", "tasks", primary_key=True),
    Column("kind", String(16), nullable=False),
    # The task whose work it is, and the checkpoint that is checked.
    _ref("subject_id", "tasks", nullable=False),
    _ref("checkpoint_id", "checkpoints", nullable=False),
    # Of an AUDIT: where its segment begins; none: at the model that the task branched from.
    _ref("base_id", "checkpoints", nullable=True),
    # Whose work it is: nobody of that account may check it.
    _ref("worker_id", "workers", nullable=False),
    Column("account_id", String(64), ForeignKey("accounts.id"), nullable=False),
    # Only proven or trusted accounts may do it: a question was raised.
    Column("confirms", Boolean, nullable=False, server_default=text("false")),
    # Draws what is scored.
    Column("sample_key", String(64), nullable=False),
    # Files that an auditor wrote, reported before it could read those it was to compare with.
    _words("digests_json"),
    # How the weights moved, by its replay and by the coordinator, noted with them.
    _words("moved_json"),
    # The report, its worker and account, once there is one.
    _words("report_json"),
    _ref("reporter_id", "workers", nullable=True),
    Column("reporter_account_id", String(64), ForeignKey("accounts.id"), nullable=True),
    # Whether what was reported of this checkpoint, in this way, is decided.
    Column("settled", Boolean, nullable=False, server_default=text("false")),
    _time("create_time"),
    CheckConstraint("kind IN ('EVALUATE', 'AUDIT')", name="kind"),
)
Index("ix_checks_subject", checks.c.subject_id)
Index("ix_checks_checkpoint", checks.c.checkpoint_id)
Index("ix_checks_base", checks.c.base_id)

# What the models of a run look like, as learned from its base model (`structure.architecture`).
architectures = Table(
    "architectures",
    metadata,
    _ref("run_id", "runs", primary_key=True),
    Column("architecture_json", Text, nullable=False),
)

# How large the weights of a committed checkpoint are, tensor by tensor: the next one is compared with them.
checkpoint_sizes = Table(
    "checkpoint_sizes",
    metadata,
    _ref("checkpoint_id", "checkpoints", primary_key=True),
    Column("sizes_json", Text, nullable=False),
)

experts = Table(
    "experts",
    metadata,
    _id(),
    _ref("run_id", "runs", nullable=False),
    _ref("cluster_id", "clusters", nullable=True),
    # -1 for the seed, so that the constraint below holds for it too (NULLs are distinct).
    Column("cluster_index", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("checkpoint_id", String(64), ForeignKey("checkpoints.id", ondelete="CASCADE"), nullable=True),
    Column("files_json", Text, nullable=False),
    _words("metrics_json"),
    # Made, or made in part, by a worker that is not believed any more: no longer current.
    Column("quarantined", Boolean, nullable=False, server_default=text("false")),
    _time("create_time"),
    UniqueConstraint("run_id", "cluster_index", "version"),
)
Index("ix_experts_checkpoint", experts.c.checkpoint_id)

# Tokens of accepted work. Added to only, and with the names of the time: it outlives the runs that it tells of.
credits = Table(
    "credits",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    Column("kind", String(16), nullable=False),
    Column("account_id", String(64), ForeignKey("accounts.id"), nullable=False, index=True),
    Column("worker_id", String(64), ForeignKey("workers.id"), nullable=False),
    Column("run_id", String(64), nullable=False),
    Column("run_name", String(200), nullable=False),
    Column("task_id", String(64), nullable=False),
    Column("cluster_index", Integer, nullable=False),
    # Where its segment ends.
    Column("checkpoint_id", String(64), nullable=False),
    # Who checked it: the run's setting when it was accepted.
    Column("verification", String(16), nullable=False),
    Column("tokens", BigInteger, nullable=False),
    _words("reason"),
    _time("create_time"),
    _one_of("kind", CreditKind),
    CheckConstraint("(kind = 'EARNED' AND tokens > 0) OR (kind = 'TAKEN_BACK' AND tokens < 0)", name="tokens"),
    UniqueConstraint("checkpoint_id", "kind"),
    sqlite_autoincrement=True,
)

# Tasks that are not offered to a worker: for ever, or until a time, for it failed them.
unfit = Table(
    "unfit",
    metadata,
    _ref("worker_id", "workers", primary_key=True),
    _ref("task_id", "tasks", primary_key=True),
    _words("reason"),
    _time("until_time", nullable=True),
)
Index("ix_unfit_task", unfit.c.task_id)

requests = Table(
    "requests",
    metadata,
    Column("request_id", String(64), primary_key=True),
    Column("method", String(64), primary_key=True),
    Column("principal", String(64), primary_key=True),
    Column("response", LargeBinary, nullable=False),
    _time("create_time"),
)
Index("ix_requests_create_time", requests.c.create_time)

events = Table(
    "events",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True),
    _time("event_time"),
    Column("kind", String(64), nullable=False),
    # Plain text, not references: the log outlives what it tells of.
    Column("run_id", String(64), nullable=False, server_default=text("''")),
    Column("task_id", String(64), nullable=False, server_default=text("''")),
    Column("lease_id", String(64), nullable=False, server_default=text("''")),
    Column("worker_id", String(64), nullable=False, server_default=text("''")),
    _words("reason"),
    _words("detail_json"),
    sqlite_autoincrement=True,
)
Index("ix_events_run", events.c.run_id, events.c.id)
Index("ix_events_task", events.c.task_id, events.c.id)
Index("ix_events_worker", events.c.worker_id, events.c.id)
