"""Who takes part: accounts, the tokens that let them in, their workers, and what each has earned."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from cbtm_coordinator.lifecycle import CreditKind, WorkerState
from cbtm_coordinator.tables.columns import count, identifier, metadata, one_of, time, words

accounts = Table(
    "accounts",
    metadata,
    identifier(),
    Column("name", String(200), nullable=False, unique=True),
    time("create_time"),
)

tokens = Table(
    "tokens",
    metadata,
    identifier(),
    Column("account_id", String(64), ForeignKey("accounts.id"), nullable=False),
    Column("role", String(16), nullable=False),
    Column("secret_hash", String(64), nullable=False, unique=True),
    words("label"),
    time("create_time"),
    time("expire_time", nullable=True),
    # 0: without limit.
    count("max_uses"),
    count("uses"),
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
    identifier(),
    Column("name", String(200), nullable=False),
    Column("state", String(16), nullable=False),
    # Ed25519, in hexadecimal; none of a worker that registered before there were keys, until it is recovered.
    Column("public_key", String(64), nullable=True, unique=True),
    # The latest time that it signed, in microseconds since 1970: nothing signed is good twice.
    count("signed_time_us"),
    Column("account_id", String(64), ForeignKey("accounts.id"), nullable=False, index=True),
    Column("token_id", String(64), ForeignKey("tokens.id"), nullable=True),
    Column("hardware_json", Text, nullable=False),
    Column("version", String(64), nullable=False),
    time("register_time"),
    time("last_seen_time"),
    count("finished_tasks"),
    count("failed_tasks"),
    # Failures in a row, and until when they keep it waiting.
    count("failures"),
    time("not_before_time", nullable=True),
    words("reason"),
    # Its standing (`verification.trust`); with `trusted`, its owner vouches for it.
    Column("trusted", Boolean, nullable=False, server_default=text("false")),
    Column("trust", Float, nullable=False, server_default=text("0")),
    count("strikes"),
    # Replays that its work was worth since its last one (`verification.audits`).
    Column("at_risk", Float, nullable=False, server_default=text("0")),
    count("verified_tokens"),
    one_of("state", WorkerState),
)

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
    words("reason"),
    time("create_time"),
    one_of("kind", CreditKind),
    CheckConstraint("(kind = 'EARNED' AND tokens > 0) OR (kind = 'TAKEN_BACK' AND tokens < 0)", name="tokens"),
    UniqueConstraint("checkpoint_id", "kind"),
    sqlite_autoincrement=True,
)
