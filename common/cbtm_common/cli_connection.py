"""The options of every command that talks to a coordinator: how to know it, and a token that `ps` does not show."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from cbtm_common.errors import InvalidArgument

_TOKEN_FILE = Annotated[
    str | None, typer.Option("--token-file", help="File that holds the token, or - for standard input.")
]
# Each with the environment variable that it stands for.
_SECURITY: dict[str, tuple[Any, Any, str]] = {
    "ca_file": (
        Annotated[Path | None, typer.Option("--ca-file", help="Authorities to trust, PEM (CBTM_CA_FILE).")],
        None,
        "CBTM_CA_FILE",
    ),
    "cert_file": (
        Annotated[Path | None, typer.Option("--cert-file", help="Certificate to show, PEM (CBTM_CERT_FILE).")],
        None,
        "CBTM_CERT_FILE",
    ),
    "key_file": (
        Annotated[Path | None, typer.Option("--key-file", help="Its key, PEM (CBTM_KEY_FILE).")],
        None,
        "CBTM_KEY_FILE",
    ),
    "insecure": (
        Annotated[
            int,
            typer.Option("--insecure", count=True, show_default=False, help="Plain text: on loopback, or said twice."),
        ],
        0,
        "CBTM_INSECURE",
    ),
}


def add_connection_options(app: typer.Typer) -> None:
    """Gives them to each command of `app` that has a `coordinator` and a `token`."""
    for group in app.registered_groups:
        if group.typer_instance is not None:
            add_connection_options(group.typer_instance)
    for command in app.registered_commands:
        assert command.callback is not None
        names = inspect.signature(command.callback).parameters
        if "coordinator" in names and "token" in names:
            command.callback = _connecting(command.callback)


def _connecting(command: Callable[..., Any]) -> Callable[..., Any]:
    hints = get_type_hints(command, include_extras=True)

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        for name, (_, _, variable) in _SECURITY.items():
            value = given.pop(name)
            if value:
                # `Security.from_environment` is what the whole process goes by.
                os.environ[variable] = str(min(value, 2) if name == "insecure" else value)
        token_file = given.pop("token_file")
        if token_file is not None:
            given["token"] = read_token(token_file)
        return command(**given)

    signature = inspect.signature(command)
    kept = [parameter.replace(annotation=hints[parameter.name]) for parameter in signature.parameters.values()]
    more = {"token_file": (_TOKEN_FILE, None)} | {name: (kind, no) for name, (kind, no, _) in _SECURITY.items()}
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in more.items()
    ]
    run.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
    run.__annotations__ = hints | {name: kind for name, (kind, _) in more.items()}
    return run


def read_token(where: str) -> str:
    """The token in a file, or on standard input for "-". Raises InvalidArgument, without telling it."""
    try:
        token = (sys.stdin.readline() if where == "-" else Path(where).read_text("utf-8")).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"token_file: {where} cannot be read ({error})", field="token_file") from error
    if not token or len(token.split()) != 1:
        raise InvalidArgument(f"token_file: {where} does not hold one token and nothing else", field="token_file")
    return token


def hide_tokens(arguments: list[str]) -> None:
    """Takes the values of `--token` out of what `ps` shows of this process."""
    shown = list(arguments)
    for place, argument in enumerate(shown):
        if argument.startswith("--token="):
            shown[place] = "--token=…"
        elif argument == "--token" and place + 1 < len(shown):
            shown[place + 1] = "…"
    if shown != arguments:
        import setproctitle

        setproctitle.setproctitle(" ".join([sys.argv[0], *shown]))
