"""`leaderboard`, and `receipt issue | key | verify`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cbtm_common.cli import show_json, show_table
from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.cli.options import AdminToken, Coordinator, DataDir, Json, open_connection

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


class By(StrEnum):
    ACCOUNT = "account"
    WORKER = "worker"


def leaderboard(
    by: Annotated[By, typer.Option(help="Whose work is added up.")] = By.ACCOUNT,
    limit: Annotated[int, typer.Option(help="How many to show; 0 for all.", min=0)] = 50,
    coordinator: Coordinator = None,
    token: AdminToken = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Who trained how many tokens of models that were accepted."""
    from cbtm_api.v1 import admin_service_pb2 as ad

    unit = {By.ACCOUNT: ad.LEADERBOARD_BY_ACCOUNT, By.WORKER: ad.LEADERBOARD_BY_WORKER}[by]
    found: list[ad.LeaderboardRow] = []
    with open_connection(coordinator, token, data_dir) as connection:
        page = ""
        while True:
            size = min(1000, limit - len(found)) if limit else 1000
            request = ad.GetLeaderboardRequest(by=unit, page_size=size, page_token=page)
            answer = connection.admin.GetLeaderboard(request)
            found += answer.rows
            page = answer.next_page_token
            if not page or (limit and len(found) >= limit):
                break
    if by is By.ACCOUNT:
        columns = ["Place", "ID", "Account", "Verified tokens", "Workers"]
        rows = [[n, r.id, r.name, r.verified_tokens, r.workers] for n, r in enumerate(found, start=1)]
    else:
        columns = ["Place", "ID", "Name", "Account", "Verified tokens"]
        rows = [[n, r.id, r.name, r.account, r.verified_tokens] for n, r in enumerate(found, start=1)]
    show_table("Leaderboard", columns, rows, as_json=as_json)


@app.command()
def issue(
    account: Annotated[str, typer.Argument(help="Id or name.")],
    out: Annotated[Path | None, typer.Option(help="File for it (default: standard output).")] = None,
    coordinator: Coordinator = None,
    token: AdminToken = None,
    data_dir: DataDir = None,
) -> None:
    """Write what an account has earned until now, signed. Volunteers get their own: `cbtm-worker receipt`."""
    from cbtm_api.v1 import admin_service_pb2 as ad
    from cbtm_common.cli import write_output

    with open_connection(coordinator, token, data_dir) as connection:
        answer = connection.admin.IssueReceipt(ad.IssueReceiptRequest(account=account))
    write_output(answer.receipt, out)


@app.command()
def key(coordinator: Coordinator = None, token: AdminToken = None, data_dir: DataDir = None) -> None:
    """Show the public key by which receipts of this coordinator are verified. Publish it."""
    from cbtm_api.v1 import catalog_service_pb2 as cs

    with open_connection(coordinator, token, data_dir) as connection:
        typer.echo(connection.catalog.GetReceiptKey(cs.GetReceiptKeyRequest()).public_key)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="A receipt.")],
    public_key: Annotated[str, typer.Option("--key", help="As `receipt key` shows it, from its owner.")],
    as_json: Json = False,
) -> None:
    """Check a receipt, without asking anybody, and show what it says. Exit code 1 when it is not genuine."""
    from cbtm_common import receipts

    try:
        document = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"file: {file} cannot be read: {error}", field="file") from error
    said = receipts.verify(document, public_key)
    if as_json:
        show_json(said)
        return
    typer.echo(
        f"genuine: {said['account']} ({said['account_id']}) trained {said['verified_tokens']:,} tokens of accepted "
        f"models until {said['issue_time']}"
    )
    columns = ["Run", "Cluster", "Worker", "Tokens", "Checked by", "Time", "Kind"]
    names = ("run", "cluster", "worker_id", "tokens", "verification", "time", "kind")
    show_table("Lines", columns, [[line[name] for name in names] for line in said["lines"]], as_json=False)
