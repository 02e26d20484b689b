"""`status`: the admin's window."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from cbtm_common.cli import human_seconds, show_json, show_table
from cbtm_common.errors import RETRYABLE
from cbtm_coordinator.cli.options import AdminToken, Coordinator, DataDir, Json, open_connection

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

    from cbtm_api.v1 import resources_pb2 as pb
    from cbtm_common.rpc import Connection

_WATCH_SECONDS = 2.0


def status(
    run: Annotated[str | None, typer.Argument(help="A run by name or id (default: all of them).")] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep it up to date; Ctrl-C ends.")] = False,
    coordinator: Coordinator = None,
    token: AdminToken = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Show runs, or one run task by task: who trains it, how far it is, how fast, and why it is where it is."""
    with open_connection(coordinator, token, data_dir) as connection:
        if watch and not as_json:
            _watch(connection, run)
        elif run is None:
            show_runs(connection, as_json)
        else:
            facts = run_facts(connection, run)
            if as_json:
                show_json(facts)
            else:
                from rich.console import Console

                Console().print(render_run(facts))


def _watch(connection: Connection, run: str | None) -> None:
    import threading

    from rich.console import Group, RenderableType
    from rich.live import Live
    from rich.text import Text

    wait = threading.Event()
    shown: RenderableType = ""
    # Ctrl-C is how watching ends, no failure.
    with contextlib.suppress(KeyboardInterrupt), Live(auto_refresh=False) as live:
        while True:
            try:
                names = [run] if run else [r.name for r in _list_runs(connection)]
                shown = Group(*(render_run(run_facts(connection, name)) for name in names))
                live.update(shown, refresh=True)
            except RETRYABLE as error:
                # A coordinator that restarts does not end the watching.
                live.update(Group(shown, Text(f"{error.message}; trying again", style="yellow")), refresh=True)
            wait.wait(_WATCH_SECONDS)


def _run_rows(connection: Connection) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for r in _list_runs(connection):
        facts = run_facts(connection, r.id)
        done, count = facts["done_tasks"], len(facts["tasks"])
        remaining = facts["estimated_remaining_seconds"]
        left = human_seconds(remaining) if remaining is not None else None
        progress = f"{100 * facts['trained_share']:.0f} %"
        state = facts["state"] + (" (paused)" if facts["paused"] else "")
        rows.append([r.name, state, r.cluster_count, f"{done}/{count}", progress, left, facts["workers"], r.reason])
    return rows


def _list_runs(connection: Connection) -> Iterator[pb.Run]:
    from cbtm_api.v1 import catalog_service_pb2 as cs

    page = ""
    while True:
        answer = connection.catalog.ListRuns(cs.ListRunsRequest(page_token=page))
        yield from answer.runs
        page = answer.next_page_token
        if not page:
            return


def show_runs(connection: Connection, as_json: bool) -> None:
    columns = ["Run", "State", "Clusters", "Tasks done", "Trained", "Left", "Workers", "Reason"]
    show_table("Runs", columns, _run_rows(connection), as_json=as_json)


def run_facts(connection: Connection, run: str) -> dict[str, Any]:
    """All that `status RUN` shows, as plain values."""
    from cbtm_api.v1 import admin_service_pb2 as ad
    from cbtm_api.v1 import resources_pb2 as pb
    from cbtm_common.protos import from_duration, from_timestamp
    from cbtm_common.recipe import Recipe

    answer = connection.admin.GetRunStatus(ad.GetRunStatusRequest(run=run))
    now = from_timestamp(answer.server_time)
    tasks: list[dict[str, Any]] = []
    for status in answer.tasks:
        task, lease = status.task, status.lease
        live = status.HasField("lease")
        step = max(task.committed_step, lease.progress.step) if live else task.committed_step
        tasks.append(
            {
                "task": task.id,
                "kind": pb.TaskKind.Name(task.kind).removeprefix("TASK_KIND_"),
                "cluster": task.cluster_index if task.cluster_index >= 0 else None,
                "terms": list(status.cluster.top_terms[:4]),
                "state": pb.TaskState.Name(task.state).removeprefix("TASK_STATE_"),
                "worker": status.worker_name or None,
                "step": step,
                "total_steps": task.total_steps,
                "committed_step": task.committed_step,
                "loss": _finite(lease.progress.loss) if live and lease.progress.loss else _metric(status, "loss"),
                "tokens_per_second": lease.progress.tokens_per_second if live else None,
                "phase": lease.progress.phase if live else None,
                "lease_seconds_left": (from_timestamp(lease.expire_time) - now).total_seconds() if live else None,
                "attempts": task.attempts,
                "epoch": task.epoch,
                "reason": task.reason or None,
            }
        )
    run_message = answer.run
    recipe = Recipe.from_json(run_message.recipe_json)
    step_tokens = {t["task"]: recipe.of_task(seed=t["kind"] == "SEED").step_tokens() for t in tasks}
    trained, total = (sum(t[field] * step_tokens[t["task"]] for t in tasks) for field in ("step", "total_steps"))
    remaining = answer.HasField("estimated_remaining")
    return {
        "run": run_message.name,
        "id": run_message.id,
        "state": pb.RunState.Name(run_message.state).removeprefix("RUN_STATE_"),
        "paused": run_message.paused,
        "reason": run_message.reason or None,
        "clusters": run_message.cluster_count,
        "documents": run_message.documents,
        "train_tokens": run_message.train_tokens,
        "budget_tokens": run_message.budget_tokens,
        "baseline_of": run_message.baseline_of or None,
        "trained_share": trained / total if total else 0.0,
        "done_tasks": sum(t["state"] == "DONE" for t in tasks),
        "workers": sum(t["worker"] is not None for t in tasks),
        "estimated_remaining_seconds": (
            from_duration(answer.estimated_remaining).total_seconds() if remaining else None
        ),
        "waiting_workers": [{"worker": w.name, "reason": w.reason} for w in answer.waiting_workers],
        "tasks": tasks,
    }


def _metric(status: Any, name: str) -> float | None:
    value = dict(status.checkpoint.metrics).get(name)
    return _finite(value) if isinstance(value, int | float) else None


def _finite(value: float) -> float | None:
    """JSON has no NaN, which is what the loss of a run that diverged is."""
    return float(value) if math.isfinite(value) else None


_STATE_STYLE = {
    "DONE": "green",
    "COMPLETE": "green",
    "LEASED": "cyan",
    "TRAINING": "cyan",
    "SEEDING": "cyan",
    "FAILED": "bold red",
    "BLOCKED": "dim",
}


class _Column(NamedTuple):
    name: str
    justify: Literal["left", "right"]
    always: bool


_TASK_COLUMNS = (
    _Column("Cluster", "right", always=True),
    _Column("State", "left", always=True),
    _Column("Worker", "left", always=False),
    _Column("Step", "right", always=True),
    _Column("Saved", "right", always=True),
    _Column("Loss", "right", always=False),
    _Column("Tokens/s", "right", always=False),
    _Column("Lease", "right", always=False),
    _Column("Terms", "left", always=False),
)


def render_run(facts: dict[str, Any]) -> Group:
    """The header and the table of one run."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    header = Text.assemble(
        (facts["run"], "bold"),
        "  ",
        (facts["state"], _STATE_STYLE.get(facts["state"], "")),
        ("  PAUSED", "bold yellow") if facts["paused"] else "",
        f"  {100 * facts['trained_share']:.0f} % of {facts['budget_tokens']:,} tokens",
    )
    remaining = facts["estimated_remaining_seconds"]
    if remaining:
        header.append(f"  about {human_seconds(remaining)} left")
    if facts["reason"]:
        header.append(f"\n{facts['reason']}", style="yellow")
    rows = [_task_cells(t) for t in facts["tasks"]]
    # Only what some task has something to say about, so that a narrow terminal has room for it.
    shown = [n for n, column in enumerate(_TASK_COLUMNS) if column.always or any(row[n] for row in rows)]
    table = Table(box=SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), show_edge=False)
    for column in (_TASK_COLUMNS[n] for n in shown):
        table.add_column(column.name, justify=column.justify, no_wrap=column.name != "Terms")
    for row in rows:
        table.add_row(*(row[n] for n in shown))
    notes = [Text(f"{_task_name(t)}: {note}", style="dim") for t in facts["tasks"] if (note := _note(t))]
    notes += [Text(f"{w['worker']}: {w['reason']}", style="dim") for w in facts["waiting_workers"]]
    return Group(header, table, *notes)


def _task_cells(t: dict[str, Any]) -> list[str | Text]:
    """One task, a cell for each of `_TASK_COLUMNS`."""
    from rich.text import Text

    lease = t["lease_seconds_left"]
    return [
        _task_name(t),
        Text(t["state"], style=_STATE_STYLE.get(t["state"], "")),
        Text(t["worker"] or ""),
        f"{t['step']:,}/{t['total_steps']:,}",
        f"{t['committed_step']:,}",
        "" if t["loss"] is None else f"{t['loss']:.3f}",
        "" if t["tokens_per_second"] is None else f"{t['tokens_per_second']:,.0f}",
        "" if lease is None else f"{max(0, lease):.0f} s",
        # Cut to what the other columns leave.
        Text(", ".join(t["terms"]), no_wrap=True, overflow="ellipsis"),
    ]


def _task_name(t: dict[str, Any]) -> str:
    return "seed" if t["cluster"] is None else str(t["cluster"])


def _note(t: dict[str, Any]) -> str:
    """What is out of the ordinary about a task."""
    notes = [t["phase"] if t["phase"] not in (None, "", "train") else "", t["reason"] or ""]
    if t["attempts"]:
        notes.append(f"{t['attempts']} failed")
    return "; ".join(note for note in notes if note)
