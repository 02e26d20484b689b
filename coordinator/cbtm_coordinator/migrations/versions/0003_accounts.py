"""Workers and tokens belong to accounts

Revision: 0003
Revises: 0002
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "accounts",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_accounts")),
        sa.UniqueConstraint("name", name=op.f("uq_accounts_name")),
    )
    for table in ("tokens", "workers"):
        op.add_column(table, sa.Column("account_id", sa.String(length=64), nullable=True))
    # Each token so far is an account of its own, and so is a worker of no token.
    op.execute(
        "INSERT INTO accounts (id, name, create_time) "
        "SELECT 'account' || substr(id, length('token') + 1), id, create_time FROM tokens"
    )
    op.execute(
        "INSERT INTO accounts (id, name, create_time) "
        "SELECT 'account' || substr(id, length('worker') + 1), id, register_time FROM workers WHERE token_id IS NULL"
    )
    op.execute("UPDATE tokens SET account_id = 'account' || substr(id, length('token') + 1)")
    op.execute(
        "UPDATE workers SET account_id = coalesce("
        "(SELECT tokens.account_id FROM tokens WHERE tokens.id = workers.token_id), "
        "'account' || substr(id, length('worker') + 1))"
    )
    for table in ("tokens", "workers"):
        with op.batch_alter_table(table) as batch_op:
            batch_op.alter_column("account_id", existing_type=sa.String(length=64), nullable=False)
            batch_op.create_foreign_key(op.f(f"fk_{table}_account_id_accounts"), "accounts", ["account_id"], ["id"])
    op.create_index("ix_workers_account_id", "workers", ["account_id"])


def downgrade() -> None:
    op.drop_index("ix_workers_account_id", table_name="workers")
    for table in ("workers", "tokens"):
        with op.batch_alter_table(table) as batch_op:
            batch_op.drop_constraint(op.f(f"fk_{table}_account_id_accounts"), type_="foreignkey")
            batch_op.drop_column("account_id")
    op.drop_table("accounts")
