"""`cbtm-worker`: the volunteer's command line."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cbtm_common.cli import run_app
from cbtm_common.cli_connection import add_connection_options
from cbtm_worker.train.job import Shard

if TYPE_CHECKING:
    from cbtm_worker.config import WorkerConfig

app = typer.Typer(
    name="cbtm-worker",
    help="Gives a machine's computing time to a training run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Coordinator = Annotated[str, typer.Option(envvar="CBTM_COORDINATOR", help="HOST:PORT of the coordinator.")]
Token = Annotated[
    str | None, typer.Option(envvar="CBTM_TOKEN", help="Join token; needed the first time from this machine.")
]
CacheDir = Annotated[
    Path | None,
    typer.Option(envvar="CBTM_CACHE_DIR", help="Folder for data and checkpoints.", show_default="the user's cache"),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda:0, …; several, as in cuda:0,cuda:1, train a task together.", show_default="every GPU there is"
    ),
]


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"


@app.command()
def join(
    coordinator: Coordinator,
    token: Token = None,
    device: Device = None,
    cache_dir: CacheDir = None,
    name: Annotated[str, typer.Option(help="Name shown to the owner.", show_default="this host's")] = "",
    run: Annotated[str, typer.Option(help="Only work on this run.")] = "",
    evaluate_only: Annotated[
        bool, typer.Option("--evaluate-only", help="Train nothing: check what others trained.")
    ] = False,
    max_tasks: Annotated[int | None, typer.Option(help="Leave after so many finished tasks.", min=1)] = None,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="Leave when no work is left.")] = False,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences in one pass at most.", min=1)] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of torch.", min=1)] = None,
    per_gpu: Annotated[
        bool, typer.Option("--per-gpu", help="A worker for each device, each with a task of its own.")
    ] = False,
    compile_model: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile the model.", show_default="on CUDA")
    ] = None,
    shard: Annotated[
        Shard, typer.Option(help="Whether GPUs share a model: auto, where one does not hold it; always; never.")
    ] = Shard.AUTO,
    max_cache_gib: Annotated[
        float | None,
        typer.Option("--max-cache-gib", help="Room for downloaded files.", min=0, show_default="the disk's"),
    ] = None,
    log_level: Annotated[LogLevel, typer.Option(help="What is told beside the above.")] = LogLevel.WARNING,
) -> None:
    """Join a run: take tasks, train them, hand them in.

    The first Ctrl-C saves a checkpoint, hands it in and leaves, so that nothing is lost; the second leaves at once.
    """
    from dataclasses import replace

    from cbtm_worker.display import Display
    from cbtm_worker.logs import configure_logging
    from cbtm_worker.loop import join as work
    from cbtm_worker.signals import StopSignal

    config = _config(coordinator, token, device, cache_dir, name)
    config = replace(
        config,
        run=run,
        evaluate_only=evaluate_only,
        max_tasks=max_tasks,
        until_idle=until_idle,
        micro_batch=micro_batch,
        threads=threads,
        compile=compile_model,
        shard=shard,
        max_cache_bytes=None if max_cache_gib is None else int(max_cache_gib * 2**30),
    )
    if per_gpu:
        from cbtm_worker.fleet import join_each
        from cbtm_worker.hardware import choose_devices

        raise typer.Exit(join_each(config, choose_devices(config.device), log_level=log_level))
    with Display() as display:
        # Within, so that log lines go above the live one.
        configure_logging(log_level)
        stop = StopSignal(lambda: display.say("stopping after this step; press Ctrl-C again to leave at once"))
        stop.install()
        work(config, stop.requested, display)


@app.command()
def check(
    coordinator: Coordinator,
    token: Token = None,
    device: Device = None,
    cache_dir: CacheDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of lines.")] = False,
) -> None:
    """Tell whether this machine can take part, and what to mend. Exit code 1 when it cannot."""
    from cbtm_common.cli import show_json
    from cbtm_worker.check import Finding
    from cbtm_worker.check import check as examine

    config = _config(coordinator, token, device, cache_dir, "")
    config.cache_dir.mkdir(parents=True, exist_ok=True)
    findings: list[Finding] = []

    def tell(finding: Finding) -> None:
        findings.append(finding)
        if not as_json:
            mark = {True: "✓", None: "·", False: "✗"}[finding.ok]
            typer.echo(f"{mark} {finding.name}: {finding.detail}")
            if finding.remedy:
                typer.echo(f"    {finding.remedy}")

    fit = examine(config, tell)
    if as_json:
        show_json({"fit": fit, "findings": [vars(f) for f in findings]})
    raise typer.Exit(0 if fit else 1)


@app.command()
def receipt(
    coordinator: Coordinator,
    out: Annotated[Path | None, typer.Option(help="File for it.", show_default="standard output")] = None,
    cache_dir: CacheDir = None,
) -> None:
    """Write what your account has trained until now, signed by the coordinator."""
    from cbtm_common.cli import write_output
    from cbtm_worker.receipt import fetch_receipt

    write_output(fetch_receipt(_config(coordinator, None, None, cache_dir, "")), out)


def _config(coordinator: str, token: str | None, device: str | None, cache_dir: Path | None, name: str) -> WorkerConfig:
    import socket

    from cbtm_common.rpc import host_and_port
    from cbtm_worker import config as settings

    host_and_port(coordinator)
    return settings.WorkerConfig(
        coordinator=coordinator,
        token=token,
        cache_dir=cache_dir or settings.default_cache_dir(),
        device=device,
        name=name or socket.gethostname(),
    )


add_connection_options(app)


def main() -> None:
    run_app(app, name="cbtm-worker")
