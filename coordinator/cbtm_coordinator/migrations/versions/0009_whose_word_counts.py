"""Questions that only proven accounts settle; steps at risk; tasks that are not offered to a worker for a while

Revision: 0009
Revises: 0008
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("at_risk", sa.Float(), server_default=sa.text("0"), nullable=False))
    op.add_column("checks", sa.Column("confirms", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.add_column("checks", sa.Column("moved_json", sa.Text(), server_default=sa.text("''"), nullable=False))
    op.add_column("unfit", sa.Column("until_time", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    # Without a time they would be for ever.
    op.execute("DELETE FROM unfit WHERE until_time IS NOT NULL")
    for table, column in (
        ("unfit", "until_time"),
        ("checks", "moved_json"),
        ("checks", "confirms"),
        ("workers", "at_risk"),
    ):
        op.drop_column(table, column)
