"""Opens the registry's database: SQLite in WAL mode, or PostgreSQL.

A writing transaction on SQLite begins IMMEDIATE, so that what it read is what it changes; on PostgreSQL it is READ
COMMITTED and every change of state is a guarded update. Both give the same guarantees to the store above.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Dialect, Engine, Insert, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, DisconnectionError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from cbtm_common.errors import InvalidArgument, Unavailable
from cbtm_common.faults import point

_BUSY_SECONDS = 30
IDLE_SECONDS = 1.0
_LATER = "cbtm_insert_later"
_READING, _BY_STATEMENT = "cbtm_reading", "cbtm_by_statement"
_NETWORK_FILE_SYSTEMS = {
    "nfs",
    "nfs4",
    "cifs",
    "smb",
    "smb2",
    "smbfs",
    "fuse.sshfs",
    "9p",
    "afs",
    "ceph",
    "glusterfs",
    "lustre",
}


def open_engine(
    url: str, *, pool_size: int = 20, statement_seconds: float = 30.0, idle_seconds: float = 15.0
) -> Engine:
    """An engine for `sqlite:///PATH` or `postgresql+psycopg://…`. Connects lazily.

    PostgreSQL ends a statement after `statement_seconds`, and a transaction that nothing happens in after
    `idle_seconds`: a coordinator that is stopped, or cut off, keeps no lock that others need.

    Raises InvalidArgument for other databases, and for SQLite on a network file system.
    """
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise InvalidArgument(f"database_url: {error}", field="database_url") from error
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        engine = create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=30,
            connect_args={
                "options": _session(statement_seconds, idle_seconds),
                "connect_timeout": 10,
                # `_on_begin` begins transactions, where one is wanted.
                "autocommit": True,
            },
        )
        _prepare_postgresql(engine)
        return engine
    if backend != "sqlite" or not parsed.database:
        raise InvalidArgument(
            f"database_url: {backend} is neither sqlite (with a file) nor postgresql", field="database_url"
        )
    path = Path(parsed.database)
    _refuse_network_file_system(path)
    engine = create_engine(parsed, connect_args={"timeout": _BUSY_SECONDS, "check_same_thread": False})
    _prepare_sqlite(engine)
    return engine


def _session(statement_seconds: float, idle_seconds: float) -> str:
    settings = {
        "statement_timeout": int(1000 * statement_seconds),
        "idle_in_transaction_session_timeout": int(1000 * idle_seconds),
        # The other side of a link that broke silently is noticed within a minute.
        "tcp_keepalives_idle": 30,
        "tcp_keepalives_interval": 10,
        "tcp_keepalives_count": 3,
    }
    return " ".join(f"-c {name}={value}" for name, value in settings.items())


@contextmanager
def writing(engine: Engine, *, by_statement: bool = False) -> Iterator[Connection]:
    """A transaction that may write; commits at the end, rolls back on an exception.

    `by_statement`: on PostgreSQL each statement is a transaction of its own, two round trips cheaper. For writes that
    are one guarded statement.
    """
    try:
        with engine.connect().execution_options(**{_BY_STATEMENT: by_statement}) as connection, connection.begin():
            try:
                yield connection
                point("database.commit.before")
                flush(connection, commit=True)
            finally:
                if not connection.invalidated:
                    connection.info.pop(_LATER, None)
        point("database.commit.after")
    except PoolTimeout as error:
        raise Unavailable("the registry's database connections are all busy; try again") from error
    except DBAPIError as error:
        if isinstance(error, OperationalError) or error.connection_invalidated:
            raise _unavailable(error) from error
        raise


def insert_later(tx: Connection, statement: Insert, parameters: Mapping[str, object]) -> None:
    """Adds a row that nothing in this transaction reads, other than after `flush`.

    On PostgreSQL all such rows and the commit go out together, in one round trip; errors (IntegrityError) come then.
    """
    if tx.dialect.name != "postgresql":
        tx.execute(statement, parameters)
        return
    tx.info.setdefault(_LATER, []).append((_sql(statement, tx.dialect, tuple(parameters)), parameters))


def flush(tx: Connection, *, commit: bool = False) -> None:
    """Sends what was to be inserted later; with `commit`, the end of the transaction after it."""
    rows = tx.info.pop(_LATER, None)
    if not rows:
        return
    driver: Any = tx.connection.driver_connection
    try:
        with driver.pipeline(), driver.cursor() as cursor:
            for sql, parameters in rows:
                cursor.execute(sql, parameters)
            if commit:
                driver.commit()
    except _driver_error(tx) as error:
        raise DBAPIError.instance(None, None, error, _driver_error(tx), dialect=tx.dialect) from error


def _driver_error(tx: Connection) -> type[Exception]:
    errors: type[Exception] = tx.dialect.loaded_dbapi.Error
    return errors


@lru_cache(maxsize=64)
def _sql(statement: Insert, dialect: Dialect, columns: tuple[str, ...]) -> str:
    return str(statement.compile(dialect=dialect, column_keys=list(columns)))


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """A transaction that only reads: on SQLite it does not wait for writers.

    On PostgreSQL each statement is a transaction of its own, as it would be within a READ COMMITTED one, two round
    trips cheaper.
    """
    try:
        with engine.connect().execution_options(**{_READING: True}) as connection, connection.begin():
            yield connection
    except PoolTimeout as error:
        raise Unavailable("the registry's database connections are all busy; try again") from error
    except DBAPIError as error:
        if isinstance(error, OperationalError) or error.connection_invalidated:
            raise _unavailable(error) from error
        raise


def _unavailable(error: DBAPIError) -> Unavailable:
    return Unavailable(f"the registry's database cannot be used now: {error.orig}")


def _prepare_postgresql(engine: Engine) -> None:
    """Connections that lay idle are tried before they are used, for the server may have closed them meanwhile; one
    that was used a moment ago is not worth the round trip.
    """

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        options = connection.get_execution_options()
        if not options.get(_READING) and not options.get(_BY_STATEMENT):
            connection.exec_driver_sql("BEGIN")

    @event.listens_for(engine, "checkin")
    def _on_checkin(_: Any, record: ConnectionPoolEntry) -> None:
        record.info["idle_since"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def _on_checkout(connection: Any, record: ConnectionPoolEntry, _: Any) -> None:
        since = record.info.get("idle_since")
        if since is None or time.monotonic() - since < IDLE_SECONDS:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            # The pool puts a new one in its place.
            raise DisconnectionError from error


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _: Any) -> None:
        # The driver would begin transactions itself, DEFERRED; `_on_begin` does it instead.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            f"busy_timeout={_BUSY_SECONDS * 1000}",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        deferred = connection.get_execution_options().get(_READING)
        connection.exec_driver_sql("BEGIN DEFERRED" if deferred else "BEGIN IMMEDIATE")


def _refuse_network_file_system(path: Path) -> None:
    """SQLite's locks and WAL need shared memory and a local disk; on a network file system they corrupt silently."""
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    found = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=False)
    kind = found.stdout.strip()
    if kind in _NETWORK_FILE_SYSTEMS:
        raise InvalidArgument(
            f"database_url: {path} lies on a network file system ({kind}), where SQLite's locks do not hold; "
            "put it on a local disk, or use PostgreSQL",
            field="database_url",
        )
