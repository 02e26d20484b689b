"""`run create | list | baseline | verify | pause | resume | delete`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from cbtm_common.errors import InvalidArgument
from cbtm_common.signals import ending_signals
from cbtm_coordinator.cli.options import AdminToken, Coordinator, DataDir, Json, Yes, open_connection
from cbtm_coordinator.cli.status import show_runs
from cbtm_coordinator.clustering.engine import EngineName


class Verify(StrEnum):
    OFF = "off"
    PEERS = "peers"
    TRUSTED = "trusted"


_CHECKERS = {
    Verify.OFF: "nobody; what is whole is accepted",
    Verify.PEERS: "workers of other accounts",
    Verify.TRUSTED: "workers that joined with a token made with --trusted",
}
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def create(
    name: Annotated[str, typer.Option(help="Name of the run.")],
    corpus: Annotated[list[str], typer.Option(help="File, folder or glob; may be given again.")],
    clusters: Annotated[int, typer.Option(help="K, the number of clusters and experts.")],
    recipe: Annotated[Path, typer.Option(help="TOML file that fixes the mathematics of training.")],
    seed_model: Annotated[
        str | None, typer.Option(help="Model to branch from: Hub id, folder or s3://BUCKET/PREFIX.")
    ] = None,
    from_scratch: Annotated[Path | None, typer.Option(help="Model config (JSON) to train a seed from first.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Hub id or folder (default: the seed model's, or one trained on the corpus).")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of the text in JSONL and Parquet.")] = "text",
    id_field: Annotated[str | None, typer.Option(help="Field of a document's id.")] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Also make a dense run beside it.")] = False,
    sample: Annotated[int, typer.Option(help="Documents that the clustering is fitted on, at most.")] = 50_000,
    work_dir: Annotated[
        Path | None, typer.Option(help="Folder for intermediate files (default: a temporary one).")
    ] = None,
    resume_dir: Annotated[
        Path | None, typer.Option(help="Folder to keep shards in until the run is made: once killed, it goes on there.")
    ] = None,
    verify: Annotated[
        Verify, typer.Option(help="Who checks what workers hand in: nobody, other accounts, trusted workers.")
    ] = Verify.OFF,
    engine: Annotated[
        EngineName, typer.Option(help="Where text is worked on: this machine's cores, or a Ray cluster.")
    ] = EngineName.LOCAL,
    coordinator: Coordinator = None,
    token: AdminToken = None,
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Cluster a corpus, shard it, register it, open it to workers.

    Runs where the corpus is: only shards, clustering model and seed go to the coordinator's object store.
    """
    from rich.console import Console

    from cbtm_common.cli import show_json
    from cbtm_common.recipe import Recipe
    from cbtm_coordinator.create_run import CreateRunOptions, create_run
    from cbtm_coordinator.lifecycle import Verification

    if (seed_model is None) == (from_scratch is None):
        raise InvalidArgument("seed-model: pass exactly one of --seed-model and --from-scratch", field="seed-model")
    options = CreateRunOptions(
        name=name,
        corpus=tuple(corpus),
        clusters=clusters,
        recipe=Recipe.from_toml(recipe),
        seed_model=seed_model,
        from_scratch=from_scratch,
        tokenizer=tokenizer,
        text_field=text_field,
        id_field=id_field,
        baseline=baseline,
        sample_documents=sample,
        work_dir=work_dir,
        resume_dir=resume_dir,
        engine=engine,
        verification=Verification[verify.name],
    )
    _interrupt_when_told_to_end()
    with open_connection(coordinator, token, data_dir) as connection:
        made = create_run(connection, options, Console(stderr=as_json))
    if as_json:
        show_json(made)


def _interrupt_when_told_to_end() -> None:
    """What ends a session or a service leaves no half-made run either, just as Ctrl-C."""
    import signal

    for number in ending_signals():
        signal.signal(number, signal.default_int_handler)


@app.command("list")
def list_runs(
    coordinator: Coordinator = None, token: AdminToken = None, data_dir: DataDir = None, as_json: Json = False
) -> None:
    """List runs."""
    with open_connection(coordinator, token, data_dir) as connection:
        show_runs(connection, as_json)


@app.command()
def baseline(
    run: str,
    name: Annotated[str, typer.Option(help="Its name (default: RUN-dense).")] = "",
    global_batch: Annotated[int, typer.Option(help="Sequences a step (default: the run's own).")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Peak rate (default: the run's own).")] = 0.0,
    coordinator: Coordinator = None,
    token: AdminToken = None,
    data_dir: DataDir = None,
) -> None:
    """Make a dense run beside a run: the same data and training tokens, one model.

    What the experts are to beat is the best of several batch sizes and learning rates: make one for each.
    """
    from cbtm_api.v1 import admin_service_pb2 as ad
    from cbtm_common.ids import new_request_id

    with open_connection(coordinator, token, data_dir) as connection:
        request = ad.CreateBaselineRequest(
            request_id=new_request_id(), run=run, name=name, global_batch=global_batch, learning_rate=learning_rate
        )
        made = connection.admin.CreateBaseline(request).run
    typer.echo(f"{made.name}: one model, {made.budget_tokens:,} training tokens")


@app.command()
def pause(run: str, coordinator: Coordinator = None, token: AdminToken = None, data_dir: DataDir = None) -> None:
    """Stop a run: its workers save a checkpoint and leave it."""
    from cbtm_api.v1 import admin_service_pb2 as ad
    from cbtm_common.ids import new_request_id

    with open_connection(coordinator, token, data_dir) as connection:
        connection.admin.PauseRun(ad.PauseRunRequest(request_id=new_request_id(), run=run))
    typer.echo(f"{run} is paused; workers save and leave it within one renewal")


@app.command()
def resume(run: str, coordinator: Coordinator = None, token: AdminToken = None, data_dir: DataDir = None) -> None:
    """Go on with a paused run."""
    from cbtm_api.v1 import admin_service_pb2 as ad
    from cbtm_common.ids import new_request_id

    with open_connection(coordinator, token, data_dir) as connection:
        connection.admin.ResumeRun(ad.ResumeRunRequest(request_id=new_request_id(), run=run))
    typer.echo(f"{run} goes on")


@app.command()
def verify(
    run: str,
    by: Annotated[Verify, typer.Argument(help="Nobody, workers of other accounts, or trusted workers alone.")],
    coordinator: Coordinator = None,
    token: AdminToken = None,
    data_dir: DataDir = None,
) -> None:
    """Say who checks what workers hand in from now on. With `off`, what waits to be checked is accepted."""
    from cbtm_api.v1 import admin_service_pb2 as ad
    from cbtm_api.v1 import resources_pb2 as pb
    from cbtm_common.ids import new_request_id

    with open_connection(coordinator, token, data_dir) as connection:
        verification = pb.Verification.Value(f"VERIFICATION_{by.name}")
        request = ad.SetVerificationRequest(request_id=new_request_id(), run=run, verification=verification)
        connection.admin.SetVerification(request)
    typer.echo(f"{run}: work is checked by {_CHECKERS[by]}")


@app.command()
def delete(
    run: str, yes: Yes = False, coordinator: Coordinator = None, token: AdminToken = None, data_dir: DataDir = None
) -> None:
    """Forget a run and delete its shards, checkpoints and experts."""
    from cbtm_api.v1 import admin_service_pb2 as ad
    from cbtm_common.cli import human_bytes
    from cbtm_common.ids import new_request_id

    if not yes:
        typer.confirm(f"Delete run {run} with all its shards, checkpoints and experts?", abort=True)
    with open_connection(coordinator, token, data_dir) as connection:
        done = connection.admin.DeleteRun(ad.DeleteRunRequest(request_id=new_request_id(), run=run))
    typer.echo(f"{run} is deleted: {done.deleted_objects:,} objects, {human_bytes(done.deleted_bytes)}")
