"""Options that many commands share, and the connection they give."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cbtm_common.errors import InvalidArgument

if TYPE_CHECKING:
    from cbtm_common.rpc import Connection

DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", envvar="CBTM_DATA_DIR", help="The coordinator's data folder (default: cbtm-data)."),
]
Coordinator = Annotated[
    str | None,
    typer.Option(envvar="CBTM_COORDINATOR", help="HOST:PORT (default: what serves the data folder)."),
]
AdminToken = Annotated[
    str | None,
    typer.Option("--token", envvar="CBTM_TOKEN", help="Admin token (default: the data folder's)."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def open_connection(coordinator: str | None, token: str | None, data_dir: Path | None) -> Connection:
    """A connection as admin: to the coordinator named, or to the one that serves the data folder.

    Raises InvalidArgument, saying what to pass, when neither is known.
    """
    from cbtm_common.rpc import connect
    from cbtm_coordinator.config import ADDRESS_NAME, ADMIN_TOKEN_NAME, DEFAULT_DATA_DIR

    folder = data_dir or DEFAULT_DATA_DIR
    target = coordinator or _read(folder / ADDRESS_NAME)
    secret = token or _read(folder / ADMIN_TOKEN_NAME)
    if not target:
        raise InvalidArgument(
            f"coordinator: none is known from {folder}; start one with `cbtm-coord serve`, or pass "
            "--coordinator HOST:PORT",
            field="coordinator",
        )
    if not secret:
        raise InvalidArgument(
            f"token: no admin token in {folder}; pass --token, or --data-dir of the coordinator", field="token"
        )
    return connect(target, token=secret, attempts=3)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except FileNotFoundError:
        return ""
