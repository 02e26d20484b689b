"""`cluster list | show | requeue`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cbtm_common.cli import show_json, show_table
from cbtm_common.errors import InvalidArgument, NotFound
from cbtm_coordinator.cli.options import AdminToken, Coordinator, DataDir, Json, open_connection

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
Run = Annotated[str | None, typer.Option("--run", help="The run (default: the only one).")]


def find_run(connection: Any, run: str | None) -> str:
    """The run named, or the only one that is no baseline."""
    from cbtm_api.v1 import catalog_service_pb2 as cs

    if run is not None:
        return run
    found = [r for r in connection.catalog.ListRuns(cs.ListRunsRequest()).runs if not r.baseline_of]
    if len(found) != 1:
        names = ", ".join(r.name for r in found) or "none"
        raise InvalidArgument(f"run: name one with --run; there are: {names}", field="run")
    return str(found[0].name)


def list_all(connection: Any, run: str) -> list[Any]:
    from cbtm_api.v1 import catalog_service_pb2 as cs

    clusters: list[Any] = []
    page = ""
    while True:
        answer = connection.catalog.ListClusters(cs.ListClustersRequest(run=run, page_token=page))
        clusters += answer.clusters
        page = answer.next_page_token
        if not page:
            return clusters


@app.command("list")
def list_clusters(
    run: Run = None,
    coordinator: Coordinator = None,
    token: AdminToken = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """List clusters: size, balance and top terms."""
    with open_connection(coordinator, token, data_dir) as connection:
        clusters = list_all(connection, find_run(connection, run))
    mean = sum(c.train_tokens for c in clusters) / max(1, len(clusters))
    rows = [
        [
            c.index,
            c.documents,
            c.train_tokens,
            c.held_out_tokens,
            round(c.train_tokens / mean, 2) if mean else None,
            ", ".join(c.top_terms[:8]),
        ]
        for c in clusters
    ]
    columns = ["Cluster", "Documents", "Train tokens", "Held-out tokens", "Of mean", "Top terms"]
    show_table("Clusters", columns, rows, as_json=as_json)


@app.command()
def show(
    index: Annotated[int, typer.Argument(help="Number of the cluster.")],
    run: Run = None,
    coordinator: Coordinator = None,
    token: AdminToken = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Show a cluster's terms and some of its documents."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    with open_connection(coordinator, token, data_dir) as connection:
        found = [c for c in list_all(connection, find_run(connection, run)) if c.index == index]
    if not found:
        raise NotFound(f"cluster: there is no cluster {index}; `cbtm-coord cluster list` shows them")
    cluster = found[0]
    if as_json:
        show_json(
            {
                "id": cluster.id,
                "index": cluster.index,
                "documents": cluster.documents,
                "train_tokens": cluster.train_tokens,
                "held_out_tokens": cluster.held_out_tokens,
                "top_terms": list(cluster.top_terms),
                "examples": list(cluster.example_documents),
            }
        )
        return
    console = Console()
    console.print(
        f"[bold]Cluster {index}[/]: {cluster.documents:,} documents, {cluster.train_tokens:,} training tokens"
    )
    console.print("terms: " + ", ".join(cluster.top_terms), markup=False)
    for number, text in enumerate(cluster.example_documents, start=1):
        console.print(Panel(Text(text), title=f"document {number}", title_align="left"))


@app.command()
def requeue(
    index: Annotated[int | None, typer.Argument(help="Number of the cluster.")] = None,
    seed: Annotated[bool, typer.Option("--seed", help="The seed's task instead of a cluster's.")] = False,
    run: Run = None,
    from_start: Annotated[bool, typer.Option("--from-start", help="Drop its checkpoints.")] = False,
    coordinator: Coordinator = None,
    token: AdminToken = None,
    data_dir: DataDir = None,
) -> None:
    """Put a cluster's task back, with fresh attempts, from its last good checkpoint."""
    from cbtm_api.v1 import admin_service_pb2 as ad
    from cbtm_common.ids import new_request_id

    if (index is None) == (not seed):
        raise InvalidArgument("index: pass the number of a cluster, or --seed", field="index")
    with open_connection(coordinator, token, data_dir) as connection:
        request = ad.RequeueTaskRequest(
            request_id=new_request_id(),
            run=find_run(connection, run),
            cluster_index=-1 if index is None else index,
            from_start=from_start,
        )
        task = connection.admin.RequeueTask(request).task
    typer.echo(f"{task.id} is open again, from step {task.committed_step:,} of {task.total_steps:,}")
