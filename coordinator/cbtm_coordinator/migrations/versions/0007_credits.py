"""A ledger of accepted work

Revision: 0007
Revises: 0006
"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "credits",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("account_id", sa.String(length=64), nullable=False),
        sa.Column("worker_id", sa.String(length=64), nullable=False),
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("run_name", sa.String(length=200), nullable=False),
        sa.Column("task_id", sa.String(length=64), nullable=False),
        sa.Column("cluster_index", sa.Integer(), nullable=False),
        sa.Column("checkpoint_id", sa.String(length=64), nullable=False),
        sa.Column("verification", sa.String(length=16), nullable=False),
        sa.Column("tokens", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("kind IN ('EARNED', 'TAKEN_BACK')", name=op.f("ck_credits_kind")),
        sa.CheckConstraint(
            "(kind = 'EARNED' AND tokens > 0) OR (kind = 'TAKEN_BACK' AND tokens < 0)", name=op.f("ck_credits_tokens")
        ),
        sa.ForeignKeyConstraint(["account_id"], ["accounts.id"], name=op.f("fk_credits_account_id_accounts")),
        sa.ForeignKeyConstraint(["worker_id"], ["workers.id"], name=op.f("fk_credits_worker_id_workers")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_credits")),
        sa.UniqueConstraint("checkpoint_id", "kind", name=op.f("uq_credits_checkpoint_id_kind")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_credits_account_id", "credits", ["account_id"])


def downgrade() -> None:
    op.drop_table("credits")
