"""Workers are known by their keys, and recovered by tokens that replace them

Revision: 0008
Revises: 0007
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("tokens") as batch_op:
        batch_op.add_column(
            sa.Column("recovers_worker_id", sa.String(length=64), server_default=sa.text("''"), nullable=False)
        )
    with op.batch_alter_table("workers") as batch_op:
        batch_op.add_column(sa.Column("public_key", sa.String(length=64), nullable=True))
        batch_op.add_column(sa.Column("signed_time_us", sa.BigInteger(), server_default=sa.text("0"), nullable=False))
        batch_op.drop_constraint(op.f("uq_workers_credential_hash"), type_="unique")
        batch_op.drop_column("credential_hash")
        batch_op.create_unique_constraint(op.f("uq_workers_public_key"), ["public_key"])


def downgrade() -> None:
    # A worker of before has no key, and one of after no credential: each registers again.
    with op.batch_alter_table("workers") as batch_op:
        batch_op.drop_constraint(op.f("uq_workers_public_key"), type_="unique")
        batch_op.drop_column("public_key")
        batch_op.drop_column("signed_time_us")
        batch_op.add_column(sa.Column("credential_hash", sa.String(length=64), nullable=True))
    op.execute("UPDATE workers SET credential_hash = id")
    with op.batch_alter_table("workers") as batch_op:
        batch_op.alter_column("credential_hash", existing_type=sa.String(length=64), nullable=False)
        batch_op.create_unique_constraint(op.f("uq_workers_credential_hash"), ["credential_hash"])
    with op.batch_alter_table("tokens") as batch_op:
        batch_op.drop_column("recovers_worker_id")
