"""A real PostgreSQL on loopback, for tests of logic without durability, for benchmarks with it.

The fixture `postgres` starts one server for the session and stops it at the end; ready in about a second. As root it
runs under another user, as PostgreSQL demands.
"""

from __future__ import annotations

import glob
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_NOBODY = 65534
_PASSWORD = "of-a-test"


@dataclass(frozen=True, kw_only=True)
class PostgresServer:
    port: int
    # Stops it as a crash would, every connection cut and nothing flushed, and starts it again.
    crash: Callable[[], None]

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://coordinator:{_PASSWORD}@127.0.0.1:{self.port}/{database}"


def _program(name: str) -> str:
    """In PATH, or where Debian puts it."""
    found = shutil.which(name) or next(iter(sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), reverse=True)), None)
    if found is None:
        raise FileNotFoundError(f"{name} is needed by this test: install PostgreSQL (Debian: apt install postgresql)")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    with running_postgres() as server:
        yield server


@contextmanager
def running_postgres(*, durable: bool = False) -> Iterator[PostgresServer]:
    """A server of its own, stopped and removed at the end. `durable`: commits reach the disk, as in production."""
    as_nobody = [] if os.geteuid() else ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]
    # Not under pytest's own folder: that one is closed to other users.
    folder = Path(tempfile.mkdtemp(prefix="cbtm-postgres-"))
    if as_nobody:
        os.chown(folder, _NOBODY, _NOBODY)
    password_file = folder / "password"
    password_file.write_text(_PASSWORD)
    data, port = folder / "data", _free_port()
    options = (
        f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} "
        "-c max_connections=200 -c deadlock_timeout=50ms"
    )
    if not durable:
        options += " -c fsync=off -c synchronous_commit=off -c full_page_writes=off"
    run = {"check": True, "cwd": "/", "stdout": subprocess.DEVNULL}
    try:
        init = ["-D", str(data), "-U", "coordinator", f"--pwfile={password_file}", "-A", "scram-sha-256"]
        locale = ["-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]
        subprocess.run([*as_nobody, _program("initdb"), *init, *locale], **run)  # type: ignore[call-overload]
        control = [*as_nobody, _program("pg_ctl"), "-D", str(data)]

        def start() -> None:
            log = str(folder / "log")
            subprocess.run([*control, "-w", "-l", log, "-o", options, "start"], **run)  # type: ignore[call-overload]

        def stop() -> None:
            subprocess.run([*control, "-m", "immediate", "stop"], **run)  # type: ignore[call-overload]

        def crash() -> None:
            stop()
            start()

        start()
        try:
            yield PostgresServer(port=port, crash=crash)
        finally:
            stop()
    finally:
        shutil.rmtree(folder)
