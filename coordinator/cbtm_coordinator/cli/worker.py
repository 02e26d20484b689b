"""`worker list | recover | revoke`."""

from __future__ import annotations

from typing import Annotated

import typer

from cbtm_common.cli import human_bytes, show_table
from cbtm_coordinator.cli.options import AdminToken, Coordinator, DataDir, Json, open_connection
from cbtm_coordinator.cli.token import parse_duration

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.command("list")
def list_workers(
    coordinator: Coordinator = None, token: AdminToken = None, data_dir: DataDir = None, as_json: Json = False
) -> None:
    """List workers: what they are, what they do, since when they were not heard of."""
    from datetime import UTC, datetime

    from cbtm_api.v1 import admin_service_pb2 as ad
    from cbtm_api.v1 import resources_pb2 as pb
    from cbtm_common.protos import from_timestamp

    rows = []
    with open_connection(coordinator, token, data_dir) as connection:
        page = ""
        while True:
            answer = connection.admin.ListWorkers(ad.ListWorkersRequest(page_token=page))
            for w in answer.workers:
                state = pb.WorkerState.Name(w.state).removeprefix("WORKER_STATE_")
                seen = int((datetime.now(UTC) - from_timestamp(w.last_seen_time)).total_seconds())
                memory = human_bytes(w.hardware.device_memory_bytes or w.hardware.memory_bytes)
                device = w.hardware.device_name or w.hardware.device_type
                task = w.lease.task_id if w.HasField("lease") else None
                rows.append(
                    [
                        w.id,
                        w.name,
                        w.account,
                        state,
                        f"{device} ({memory})",
                        task,
                        w.finished_tasks,
                        w.failed_tasks,
                        "all" if w.trusted else round(w.trust, 2),
                        seen,
                        w.reason,
                    ]
                )
            page = answer.next_page_token
            if not page:
                break
    columns = ["ID", "Name", "Account", "State", "Device", "Task", "Done", "Failed", "Trust", "Seen s ago", "Reason"]
    show_table("Workers", columns, rows, as_json=as_json)


@app.command()
def recover(
    worker_id: str,
    expires: Annotated[str, typer.Option(help="How long the token is good: 12h, 7d.")] = "1d",
    coordinator: Coordinator = None,
    token: AdminToken = None,
    data_dir: DataDir = None,
) -> None:
    """Make a token, good once, with which a machine that lost its key joins as the same worker.

    A key that somebody else has is good for nothing once the token was used.
    """
    from cbtm_api.v1 import admin_service_pb2 as ad
    from cbtm_common.ids import new_request_id
    from cbtm_common.protos import duration

    ttl = duration(parse_duration(expires))
    with open_connection(coordinator, token, data_dir) as connection:
        request = ad.RecoverWorkerRequest(request_id=new_request_id(), worker_id=worker_id, ttl=ttl)
        answer = connection.admin.RecoverWorker(request)
    typer.echo(answer.secret)


@app.command()
def revoke(
    worker_id: str,
    reason: Annotated[str, typer.Option(help="Shown to the volunteer.")] = "",
    quarantine: Annotated[
        bool,
        typer.Option("--quarantine", help="Its whole account: all its workers and tokens, and all it contributed."),
    ] = False,
    coordinator: Coordinator = None,
    token: AdminToken = None,
    data_dir: DataDir = None,
) -> None:
    """Shut a worker out. Its tasks go on elsewhere from their last checkpoints.

    With --quarantine they go on from the last checkpoint of somebody else, and experts with its work in them fall back
    to the version before, or are trained anew.
    """
    from cbtm_api.v1 import admin_service_pb2 as ad
    from cbtm_common.ids import new_request_id

    with open_connection(coordinator, token, data_dir) as connection:
        request = ad.RevokeWorkerRequest(
            request_id=new_request_id(), worker_id=worker_id, reason=reason, quarantine=quarantine
        )
        answer = connection.admin.RevokeWorker(request)
    typer.echo(f"{answer.worker.name} ({worker_id}) is revoked: {answer.worker.reason}")
    if quarantine:
        typer.echo(f"all it contributed is quarantined; {answer.reopened_tasks} task(s) are open again")
