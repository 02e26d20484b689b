"""`init` and `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.cli.options import DataDir

_LOG_LEVELS = ("debug", "info", "warning", "error")

DatabaseUrl = Annotated[
    str | None, typer.Option(help="postgresql://USER:PASSWORD@HOST/DB (default: SQLite in the data folder).")
]


def init(data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """Make a data folder: registry, object store, keys, certificates, an admin and a join token.

    Does nothing to a folder that is ready, so it can be run again.
    """
    from rich.console import Console
    from rich.markup import escape

    from cbtm_coordinator.config import load_config
    from cbtm_coordinator.setup import initialise

    config = load_config(data_dir=data_dir, database_url=database_url)
    made = initialise(config)
    console = Console()
    console.print(f"[bold]{escape(str(config.data_dir))}[/] is {'ready' if made else 'ready already'}.")
    console.print("Next: [bold]cbtm-coord serve[/], then [bold]cbtm-coord run create --help[/].")


def serve(
    data_dir: DataDir = None,
    host: Annotated[str | None, typer.Option(help="Interface to listen on (default: all).")] = None,
    port: Annotated[int | None, typer.Option(help="gRPC port; 0 takes a free one (default: 50051).")] = None,
    http_port: Annotated[int | None, typer.Option(help="HTTP port of the object endpoint (default: 8080).")] = None,
    advertise_host: Annotated[str | None, typer.Option(help="Host that volunteers connect to.")] = None,
    public_http_url: Annotated[str | None, typer.Option(help="URL of the HTTP endpoint behind a proxy.")] = None,
    database_url: DatabaseUrl = None,
    object_store: Annotated[str | None, typer.Option(help="local, or s3://BUCKET/PREFIX (default: local).")] = None,
    s3_endpoint_url: Annotated[str | None, typer.Option(help="Endpoint of the S3-compatible store.")] = None,
    s3_public_endpoint_url: Annotated[str | None, typer.Option(help="The same, as workers reach it.")] = None,
    insecure: Annotated[
        int, typer.Option("--insecure", count=True, help="Plain text: for loopback, or said twice.")
    ] = 0,
    tls_cert_file: Annotated[
        Path | None, typer.Option(help="Certificate chain, PEM (default: one of its own).")
    ] = None,
    tls_key_file: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    tls_client_ca_file: Annotated[
        Path | None, typer.Option(help="Let only clients with these certificates in.")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
) -> None:
    """Serve runs until SIGTERM or Ctrl-C. Prints the line with which volunteers join."""
    import logging

    from cbtm_coordinator.config import load_config
    from cbtm_coordinator.process import run_until_signalled

    if log_level.lower() not in _LOG_LEVELS:
        raise InvalidArgument(f"log-level: {log_level!r} is not one of {', '.join(_LOG_LEVELS)}", field="log-level")
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # It tells of answers cut short with a traceback; what became of them is told by the call concerned.
    logging.getLogger("urllib3.connection").setLevel(logging.ERROR)
    flags: dict[str, Any] = {
        "data_dir": data_dir,
        "host": host,
        "port": port,
        "http_port": http_port,
        "advertise_host": advertise_host,
        "public_http_url": public_http_url,
        "database_url": database_url,
        "object_store": object_store,
        "s3_endpoint_url": s3_endpoint_url,
        "s3_public_endpoint_url": s3_public_endpoint_url,
        "insecure": insecure or None,
        "tls_cert_file": tls_cert_file,
        "tls_key_file": tls_key_file,
        "tls_client_ca_file": tls_client_ca_file,
    }
    config = load_config(**flags)
    run_until_signalled(config)
