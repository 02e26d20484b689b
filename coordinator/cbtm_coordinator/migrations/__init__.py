"""Schema migrations: upgrade a database to this version, and check that migrations and tables agree.

`python -m cbtm_coordinator.migrations check` upgrades a scratch SQLite database and fails when it differs from
`tables.metadata`. `… revision -m MESSAGE` writes a new one from the difference.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

from cbtm_coordinator.tables import metadata


def config(connection: Connection) -> Config:
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent))
    made.attributes["connection"] = connection
    return made


def upgrade(engine: Engine) -> None:
    """To the newest revision. On SQLite one transaction; run by one process at a time."""
    with engine.begin() as connection:
        command.upgrade(config(connection), "head")


def current_and_head(engine: Engine) -> tuple[str | None, str | None]:
    """(revision of the database, newest revision of this version)."""
    with engine.connect() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
        head = ScriptDirectory.from_config(config(connection)).get_current_head()
    return current, head


def differences(engine: Engine) -> list[object]:
    """What the tables have that the database has not, or the other way round."""
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, metadata))
