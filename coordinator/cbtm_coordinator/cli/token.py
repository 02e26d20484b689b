"""`token create | list | revoke`."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from cbtm_common.cli import show_json, show_table
from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.cli.options import AdminToken, Coordinator, DataDir, Json, open_connection

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@app.command()
def create(
    role: Annotated[str, typer.Option(help="worker (to join), consumer (to read) or admin.")] = "worker",
    label: Annotated[str, typer.Option(help="Whom it is for.")] = "",
    account: Annotated[
        str, typer.Option(help="Whose the machines are that join with it (default: the label, or one of its own).")
    ] = "",
    trusted: Annotated[
        bool, typer.Option("--trusted", help="Who joins with it is believed, and may check others alone.")
    ] = False,
    expires: Annotated[str | None, typer.Option(help="Such as 12h, 7d, 4w (default: never).")] = None,
    uses: Annotated[int, typer.Option(help="How many machines may join with it; 0 for any number.")] = 0,
    coordinator: Coordinator = None,
    token: AdminToken = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Make a token. Its secret is shown once."""
    from cbtm_api.v1 import admin_service_pb2 as ad
    from cbtm_api.v1 import resources_pb2 as pb
    from cbtm_common.ids import new_request_id
    from cbtm_common.protos import duration

    roles = {"worker": pb.TOKEN_ROLE_WORKER, "consumer": pb.TOKEN_ROLE_CONSUMER, "admin": pb.TOKEN_ROLE_ADMIN}
    if role not in roles:
        raise InvalidArgument(f"role: {role!r} is not one of {', '.join(roles)}", field="role")
    ttl = None if expires is None else duration(parse_duration(expires))
    with open_connection(coordinator, token, data_dir) as connection:
        made = connection.admin.CreateToken(
            ad.CreateTokenRequest(
                request_id=new_request_id(),
                role=roles[role],
                label=label,
                account=account,
                trusted=trusted,
                ttl=ttl,
                max_uses=uses,
            )
        )
    if as_json:
        show_json({"id": made.token.id, "role": role, "secret": made.secret})
    else:
        typer.echo(made.secret)


@app.command("list")
def list_tokens(
    coordinator: Coordinator = None, token: AdminToken = None, data_dir: DataDir = None, as_json: Json = False
) -> None:
    """List tokens, without their secrets."""
    from cbtm_api.v1 import admin_service_pb2 as ad
    from cbtm_api.v1 import resources_pb2 as pb
    from cbtm_common.protos import from_timestamp

    rows = []
    with open_connection(coordinator, token, data_dir) as connection:
        page = ""
        while True:
            answer = connection.admin.ListTokens(ad.ListTokensRequest(page_token=page))
            for t in answer.tokens:
                role = pb.TokenRole.Name(t.role).removeprefix("TOKEN_ROLE_").lower()
                ends = (
                    from_timestamp(t.expire_time).isoformat(timespec="minutes") if t.HasField("expire_time") else None
                )
                rows.append([t.id, role, t.label, t.account, t.uses, t.max_uses or None, ends, t.trusted, t.revoked])
            page = answer.next_page_token
            if not page:
                break
    show_table(
        "Tokens",
        ["ID", "Role", "Label", "Account", "Uses", "Of", "Expires", "Trusted", "Revoked"],
        rows,
        as_json=as_json,
    )


@app.command()
def revoke(token_id: str, coordinator: Coordinator = None, token: AdminToken = None, data_dir: DataDir = None) -> None:
    """Make a token good for nothing. Workers that joined with it stay; see `worker revoke`."""
    from cbtm_api.v1 import admin_service_pb2 as ad
    from cbtm_common.ids import new_request_id

    with open_connection(coordinator, token, data_dir) as connection:
        connection.admin.RevokeToken(ad.RevokeTokenRequest(request_id=new_request_id(), token_id=token_id))
    typer.echo(f"{token_id} is revoked")


def parse_duration(text: str) -> float:
    """'90m' as 5400.0 seconds. Raises InvalidArgument."""
    match = re.fullmatch(r"(\d+)([smhdw])", text)
    if match is None:
        raise InvalidArgument(f"expires: {text!r} is not a number and one of s, m, h, d, w", field="expires")
    return float(int(match[1]) * _UNITS[match[2]])
