"""`events`: the log of what happened, when and why."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from typing import Annotated, Any

import typer

from cbtm_common.cli import show_json
from cbtm_coordinator.cli.options import AdminToken, Coordinator, DataDir, Json, open_connection

_FOLLOW_SECONDS = 1.0
_OVERLAP = 100


def events(
    run: Annotated[str, typer.Option(help="Only of this run.")] = "",
    task: Annotated[str, typer.Option(help="Only of this task.")] = "",
    worker: Annotated[str, typer.Option(help="Only of this worker.")] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as events come; Ctrl-C ends.")] = False,
    limit: Annotated[int, typer.Option(help="How many of the newest to begin with.")] = 100,
    coordinator: Coordinator = None,
    token: AdminToken = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Show what happened to runs, tasks, leases, checkpoints and workers.

    With --json an array; with --follow too, one object a line.
    """
    import threading

    from cbtm_api.v1 import admin_service_pb2 as ad

    # The ids of events are drawn before their transactions end, so that a smaller one may come to be seen later.
    newest, seen = 0, deque[int](maxlen=4 * _OVERLAP)
    wait = threading.Event()
    # Ctrl-C is how following ends, no failure.
    with (
        contextlib.suppress(KeyboardInterrupt) if follow else contextlib.nullcontext(),
        open_connection(coordinator, token, data_dir) as connection,
    ):
        while True:
            answer = connection.admin.ListEvents(
                ad.ListEventsRequest(
                    run=run,
                    task_id=task,
                    worker_id=worker,
                    after_id=max(1, newest - _OVERLAP) if newest else 0,
                    page_size=max(limit, 2 * _OVERLAP) if newest else limit,
                )
            )
            if as_json and not follow:
                show_json([_fields(event) for event in answer.events])
                return
            fresh = [event for event in answer.events if event.id not in seen]
            for event in fresh:
                seen.append(event.id)
                newest = max(newest, event.id)
                typer.echo(json.dumps(_fields(event)) if as_json else _line(_fields(event)))
            if not follow:
                return
            if not fresh:
                wait.wait(_FOLLOW_SECONDS)


def _fields(event: Any) -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(event, preserving_proto_field_name=True)


def _line(fields: dict[str, Any]) -> str:
    detail = " ".join(f"{k}={v}" for k, v in fields.get("detail", {}).items())
    about = " ".join(fields[k] for k in ("task_id", "worker_id") if k in fields)
    parts = (fields["event_time"][:19], f"{fields['kind']:<22}", about, fields.get("reason", ""), detail)
    return "  ".join(part for part in parts if part)
