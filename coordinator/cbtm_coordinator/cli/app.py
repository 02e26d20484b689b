"""The tree of commands."""

from __future__ import annotations

import typer

from cbtm_common.cli_connection import add_connection_options
from cbtm_coordinator.cli import cluster, credit, database, events, plan, run, serve, status, token, worker

app = typer.Typer(
    name="cbtm-coord",
    help="Hosts training runs: makes them from a corpus, hands out work, watches it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("init")(serve.init)
app.command("serve")(serve.serve)
app.command("status")(status.status)
app.command("plan")(plan.plan)
app.command("events")(events.events)
app.command("leaderboard")(credit.leaderboard)
app.add_typer(run.app, name="run", help="Create, list, pause, resume, delete runs.")
app.add_typer(cluster.app, name="cluster", help="Look into clusters, put their tasks back.")
app.add_typer(worker.app, name="worker", help="List and revoke workers.")
app.add_typer(token.app, name="token", help="Make, list, revoke tokens.")
app.add_typer(credit.app, name="receipt", help="Sign and verify what volunteers have trained.")
app.add_typer(database.app, name="db", help="Upgrade and check the registry's schema.")
add_connection_options(app)
