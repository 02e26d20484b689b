"""What runs are made of: their files, clusters and shards, and what their models look like."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from cbtm_coordinator.lifecycle import RunState, Verification
from cbtm_coordinator.tables.columns import count, identifier, metadata, one_of, ref, time, words

runs = Table(
    "runs",
    metadata,
    identifier(),
    Column("name", String(200), nullable=False, unique=True),
    Column("state", String(16), nullable=False),
    Column("paused", Boolean, nullable=False, server_default=text("false")),
    Column("cluster_count", Integer, nullable=False),
    Column("recipe_json", Text, nullable=False),
    Column("from_scratch", Boolean, nullable=False),
    # A dense baseline reads the files and shards of the run beside which it stands; that run outlives it.
    Column("baseline_of", String(64), ForeignKey("runs.id"), nullable=True),
    count("model_parameters"),
    count("train_tokens"),
    count("documents"),
    count("budget_tokens"),
    Column("verification", String(16), nullable=False, server_default=text("'OFF'")),
    words("routing_json"),
    words("reason"),
    time("create_time"),
    time("update_time"),
    one_of("state", RunState),
    one_of("verification", Verification),
    CheckConstraint("cluster_count > 0", name="cluster_count"),
)

run_files = Table(
    "run_files",
    metadata,
    ref("run_id", "runs", primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("path", String(1024), primary_key=True),
    Column("key", String(1024), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
)

clusters = Table(
    "clusters",
    metadata,
    identifier(),
    ref("run_id", "runs", nullable=False),
    Column("cluster_index", Integer, nullable=False),
    count("documents"),
    count("train_tokens"),
    count("held_out_tokens"),
    Column("top_terms_json", Text, nullable=False),
    Column("examples_json", Text, nullable=False),
    UniqueConstraint("run_id", "cluster_index"),
)

shards = Table(
    "shards",
    metadata,
    identifier(),
    ref("cluster_id", "clusters", nullable=False),
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

# What the models of a run look like, as learned from its base model (`structure.architecture`).
architectures = Table(
    "architectures",
    metadata,
    ref("run_id", "runs", primary_key=True),
    Column("architecture_json", Text, nullable=False),
)
