"""Work is checked by other workers: checks, standing, trusted tokens

Revision: 0004
Revises: 0003
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_PENDING = sa.text("state = 'PENDING'")
_TRAINS = sa.text("kind IN ('EXPERT', 'SEED')")


def _flag(name: str) -> sa.Column[bool]:
    return sa.Column(name, sa.Boolean(), server_default=sa.text("false"), nullable=False)


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), server_default=sa.text("0"), nullable=False)


def _words(name: str) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), server_default=sa.text("''"), nullable=False)


def upgrade() -> None:
    with op.batch_alter_table("runs") as runs:
        runs.add_column(
            sa.Column("verification", sa.String(length=16), server_default=sa.text("'OFF'"), nullable=False)
        )
        runs.create_check_constraint(op.f("ck_runs_verification"), "verification IN ('OFF', 'PEERS', 'TRUSTED')")
    op.drop_index("ix_tasks_open", table_name="tasks")
    with op.batch_alter_table("tasks") as tasks:
        tasks.add_column(sa.Column("priority", sa.Integer(), server_default=sa.text("0"), nullable=False))
        tasks.drop_constraint("uq_tasks_run_id_kind_cluster_index", type_="unique")
        tasks.drop_constraint(op.f("ck_tasks_kind"), type_="check")
        tasks.create_check_constraint(op.f("ck_tasks_kind"), "kind IN ('SEED', 'EXPERT', 'EVALUATE', 'AUDIT')")
    op.execute("UPDATE tasks SET priority = 1 WHERE kind = 'SEED'")
    op.create_index(
        "uq_tasks_training",
        "tasks",
        ["run_id", "kind", "cluster_index"],
        unique=True,
        sqlite_where=_TRAINS,
        postgresql_where=_TRAINS,
    )
    op.create_index("ix_tasks_cluster", "tasks", ["cluster_id", "kind"])
    _index_open("priority DESC")
    op.add_column("tokens", _flag("trusted"))
    op.add_column("experts", _flag("quarantined"))
    op.add_column("workers", _flag("trusted"))
    op.add_column("workers", sa.Column("trust", sa.Float(), server_default=sa.text("0"), nullable=False))
    op.add_column("workers", _count("strikes"))
    op.add_column("workers", _count("verified_tokens"))
    _create_checks()


def _index_open(first: str) -> None:
    op.create_index(
        "ix_tasks_open",
        "tasks",
        [sa.text(first), "attempts", sa.text("(committed_step - total_steps)"), "id"],
        sqlite_where=_PENDING,
        postgresql_where=_PENDING,
    )


def _create_checks() -> None:
    def ref(name: str, target: str, *, nullable: bool = False) -> list[sa.schema.SchemaItem]:
        constraint = op.f(f"fk_checks_{name}_{target}")
        return [
            sa.Column(name, sa.String(length=64), nullable=nullable),
            sa.ForeignKeyConstraint([name], [f"{target}.id"], name=constraint, ondelete="CASCADE"),
        ]

    def account(name: str, *, nullable: bool = False) -> list[sa.schema.SchemaItem]:
        return [
            sa.Column(name, sa.String(length=64), nullable=nullable),
            sa.ForeignKeyConstraint([name], ["accounts.id"], name=op.f(f"fk_checks_{name}_accounts")),
        ]

    op.create_table(
        "checks",
        *ref("task_id", "tasks"),
        sa.Column("kind", sa.String(length=16), nullable=False),
        *ref("subject_id", "tasks"),
        *ref("checkpoint_id", "checkpoints"),
        *ref("base_id", "checkpoints", nullable=True),
        *ref("worker_id", "workers"),
        *account("account_id"),
        sa.Column("sample_key", sa.String(length=64), nullable=False),
        _words("digests_json"),
        _words("report_json"),
        *ref("reporter_id", "workers", nullable=True),
        *account("reporter_account_id", nullable=True),
        _flag("settled"),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("task_id", name=op.f("pk_checks")),
        sa.CheckConstraint("kind IN ('EVALUATE', 'AUDIT')", name=op.f("ck_checks_kind")),
    )
    op.create_index("ix_checks_subject", "checks", ["subject_id"])
    op.create_index("ix_checks_checkpoint", "checks", ["checkpoint_id"])
    op.create_index("ix_checks_base", "checks", ["base_id"])


def downgrade() -> None:
    op.drop_table("checks")
    op.execute("DELETE FROM tasks WHERE kind IN ('EVALUATE', 'AUDIT')")
    for name in ("verified_tokens", "strikes", "trust", "trusted"):
        op.drop_column("workers", name)
    op.drop_column("experts", "quarantined")
    op.drop_column("tokens", "trusted")
    for index in ("ix_tasks_open", "ix_tasks_cluster", "uq_tasks_training"):
        op.drop_index(index, table_name="tasks")
    with op.batch_alter_table("tasks") as tasks:
        tasks.drop_column("priority")
        tasks.create_unique_constraint("uq_tasks_run_id_kind_cluster_index", ["run_id", "kind", "cluster_index"])
        tasks.drop_constraint(op.f("ck_tasks_kind"), type_="check")
        tasks.create_check_constraint(op.f("ck_tasks_kind"), "kind IN ('SEED', 'EXPERT')")
    _index_open("kind DESC")
    with op.batch_alter_table("runs") as runs:
        runs.drop_constraint(op.f("ck_runs_verification"), type_="check")
        runs.drop_column("verification")
