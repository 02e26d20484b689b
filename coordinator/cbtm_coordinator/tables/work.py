"""Work: tasks, who holds them, what they brought, and the checks of that."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from cbtm_coordinator.lifecycle import TRAINING, CheckpointState, LeaseState, TaskKind, TaskState
from cbtm_coordinator.tables.columns import count, identifier, metadata, one_of, ref, time, words

tasks = Table(
    "tasks",
    metadata,
    identifier(),
    ref("run_id", "runs", nullable=False),
    Column("kind", String(16), nullable=False),
    # Checks come first: they are short, and work waits for them. Then the seed, for which everything waits.
    Column("priority", Integer, nullable=False, server_default=text("0")),
    # Of an EVALUATE: the cluster whose held-out text it scores.
    ref("cluster_id", "clusters", nullable=True),
    Column("cluster_index", Integer, nullable=False, server_default=text("-1")),
    Column("state", String(16), nullable=False),
    Column("total_steps", BigInteger, nullable=False),
    count("committed_step"),
    count("attempts"),
    Column("max_attempts", Integer, nullable=False),
    count("epoch"),
    time("not_before_time"),
    words("reason"),
    time("create_time"),
    time("update_time"),
    one_of("kind", TaskKind),
    one_of("state", TaskState),
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
    identifier(),
    ref("task_id", "tasks", nullable=False),
    ref("worker_id", "workers", nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    time("acquire_time"),
    time("expire_time"),
    # When its worker was last heard of.
    time("renew_time"),
    # When it counts as hung unless it shows progress before.
    time("stall_time"),
    time("end_time", nullable=True),
    words("reason"),
    count("step"),
    Column("loss", Float, nullable=True),
    Column("tokens_per_second", Float, nullable=False, server_default=text("0")),
    words("phase"),
    count("transferred_bytes"),
    one_of("state", LeaseState),
    CheckConstraint("(state = 'LIVE') = (end_time IS NULL)", name="end_time"),
    UniqueConstraint("task_id", "epoch"),
)
_LIVE = leases.c.state == LeaseState.LIVE.value
Index("uq_leases_live_task", leases.c.task_id, unique=True, sqlite_where=_LIVE, postgresql_where=_LIVE)
Index("ix_leases_live_expiry", leases.c.expire_time, sqlite_where=_LIVE, postgresql_where=_LIVE)
Index("ix_leases_worker", leases.c.worker_id, leases.c.state)

# Tasks that are not offered to a worker: for ever, or until a time, for it failed them.
unfit = Table(
    "unfit",
    metadata,
    ref("worker_id", "workers", primary_key=True),
    ref("task_id", "tasks", primary_key=True),
    words("reason"),
    time("until_time", nullable=True),
)
Index("ix_unfit_task", unfit.c.task_id)

checkpoints = Table(
    "checkpoints",
    metadata,
    identifier(),
    ref("task_id", "tasks", nullable=False),
    ref("lease_id", "leases", nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("final", Boolean, nullable=False),
    Column("files_json", Text, nullable=False),
    words("metrics_json"),
    words("reason"),
    # A PRUNED or REJECTED one whose objects are gone.
    Column("objects_deleted", Boolean, nullable=False, server_default=text("false")),
    time("create_time"),
    time("commit_time", nullable=True),
    one_of("state", CheckpointState),
    UniqueConstraint("task_id", "epoch", "step"),
)
Index("ix_checkpoints_state", checkpoints.c.state, checkpoints.c.objects_deleted)
Index("ix_checkpoints_lease", checkpoints.c.lease_id)

# How large the weights of a committed checkpoint are, tensor by tensor: the next one is compared with them.
checkpoint_sizes = Table(
    "checkpoint_sizes",
    metadata,
    ref("checkpoint_id", "checkpoints", primary_key=True),
    Column("sizes_json", Text, nullable=False),
)

# What an EVALUATE or AUDIT task is about, and what was reported of it.
checks = Table(
    "checks",
    metadata,
    ref("task_id", "tasks", primary_key=True),
    Column("kind", String(16), nullable=False),
    # The task whose work it is, and the checkpoint that is checked.
    ref("subject_id", "tasks", nullable=False),
    ref("checkpoint_id", "checkpoints", nullable=False),
    # Of an AUDIT: where its segment begins; none: at the model that the task branched from.
    ref("base_id", "checkpoints", nullable=True),
    # Whose work it is: nobody of that account may check it.
    ref("worker_id", "workers", nullable=False),
    Column("account_id", String(64), ForeignKey("accounts.id"), nullable=False),
    # Only proven or trusted accounts may do it: a question was raised.
    Column("confirms", Boolean, nullable=False, server_default=text("false")),
    # Draws what is scored.
    Column("sample_key", String(64), nullable=False),
    # Files that an auditor wrote, reported before it could read those it was to compare with.
    words("digests_json"),
    # How the weights moved, by its replay and by the coordinator, noted with them.
    words("moved_json"),
    # The report, its worker and account, once there is one.
    words("report_json"),
    ref("reporter_id", "workers", nullable=True),
    Column("reporter_account_id", String(64), ForeignKey("accounts.id"), nullable=True),
    # Whether what was reported of this checkpoint, in this way, is decided.
    Column("settled", Boolean, nullable=False, server_default=text("false")),
    time("create_time"),
    CheckConstraint("kind IN ('EVALUATE', 'AUDIT')", name="kind"),
)
Index("ix_checks_subject", checks.c.subject_id)
Index("ix_checks_checkpoint", checks.c.checkpoint_id)
Index("ix_checks_base", checks.c.base_id)

experts = Table(
    "experts",
    metadata,
    identifier(),
    ref("run_id", "runs", nullable=False),
    ref("cluster_id", "clusters", nullable=True),
    # -1 for the seed, so that the constraint below holds for it too (NULLs are distinct).
    Column("cluster_index", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("checkpoint_id", String(64), ForeignKey("checkpoints.id", ondelete="CASCADE"), nullable=True),
    Column("files_json", Text, nullable=False),
    words("metrics_json"),
    # Made, or made in part, by a worker that is not believed any more: no longer current.
    Column("quarantined", Boolean, nullable=False, server_default=text("false")),
    time("create_time"),
    UniqueConstraint("run_id", "cluster_index", "version"),
)
Index("ix_experts_checkpoint", experts.c.checkpoint_id)
