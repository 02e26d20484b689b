"""Schema migrations: upgrade a database to this version, and check that migrations and tables agree.

`python -m cbtm_coordinator.migrations check` upgrades a scratch SQLite database and fails when it differs from
`tables.metadata`. `… upgrade --url URL` upgrades a database; `… revision -m MESSAGE` writes a new revision from the
difference.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, func, select, text

from cbtm_common.errors import InternalError
from cbtm_coordinator.tables import metadata

# An arbitrary number, the same in every version.
_UPGRADE_LOCK = 0x6362746D


def config(connection: Connection) -> Config:
    made = Config()
    made.set_main_option("script_location", str(Path(__file__).parent))
    made.attributes["connection"] = connection
    return made


def upgrade(engine: Engine) -> None:
    """To the newest revision, in one transaction. Of several processes that do so at once, the others wait."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            # A batch migration replaces tables; with this on, dropping the old one would delete what refers to it.
            # It has no effect inside a transaction, so the driver is asked, before one begins.
            _pragma(connection, "foreign_keys=OFF")
        try:
            with connection.begin():
                if engine.dialect.name == "postgresql":
                    # A large table may take its time.
                    connection.execute(text("SET LOCAL statement_timeout = 0"))
                    connection.execute(select(func.pg_advisory_xact_lock(_UPGRADE_LOCK)))
                command.upgrade(config(connection), "head")
                if engine.dialect.name == "sqlite":
                    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
                    if broken:
                        raise InternalError(f"the upgrade leaves {len(broken)} dangling references: not applied")
        finally:
            if engine.dialect.name == "sqlite":
                _pragma(connection, "foreign_keys=ON")


def _pragma(connection: Connection, pragma: str) -> None:
    driver = connection.connection.driver_connection
    assert driver is not None
    driver.execute(f"PRAGMA {pragma}")


def current_and_head(engine: Engine) -> tuple[str | None, str | None]:
    """(revision of the database, newest revision of this version)."""
    with engine.connect() as connection:
        current = MigrationContext.configure(connection).get_current_revision()
        head = ScriptDirectory.from_config(config(connection)).get_current_head()
    return current, head


def differences(engine: Engine) -> list[object]:
    """What the tables have that the database has not, or the other way round."""
    with engine.connect() as connection, warnings.catch_warnings():
        # SQLite cannot be asked for them, PostgreSQL can.
        warnings.filterwarnings("ignore", message=".*expression-based index")
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, metadata))
