"""Open tasks are indexed in the order of work

Revision: 0002
Revises: 0001
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_PENDING = sa.text("state = 'PENDING'")


def upgrade() -> None:
    op.drop_index("ix_tasks_open", table_name="tasks")
    op.create_index(
        "ix_tasks_open",
        "tasks",
        [sa.text("kind DESC"), "attempts", sa.text("(committed_step - total_steps)"), "id"],
        sqlite_where=_PENDING,
        postgresql_where=_PENDING,
    )


def downgrade() -> None:
    op.drop_index("ix_tasks_open", table_name="tasks")
    op.create_index("ix_tasks_open", "tasks", ["run_id", "kind"], sqlite_where=_PENDING, postgresql_where=_PENDING)
