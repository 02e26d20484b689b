"""What the weights of runs and checkpoints look like

Revision: 0006
Revises: 0005
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "architectures",
        sa.Column("run_id", sa.String(length=64), nullable=False),
        sa.Column("architecture_json", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_architectures_run_id_runs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_architectures")),
    )
    op.create_table(
        "checkpoint_sizes",
        sa.Column("checkpoint_id", sa.String(length=64), nullable=False),
        sa.Column("sizes_json", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"],
            ["checkpoints.id"],
            name=op.f("fk_checkpoint_sizes_checkpoint_id_checkpoints"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", name=op.f("pk_checkpoint_sizes")),
    )


def downgrade() -> None:
    op.drop_table("checkpoint_sizes")
    op.drop_table("architectures")
