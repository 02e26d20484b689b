"""`db upgrade` and `db check`."""

from __future__ import annotations

import typer

from cbtm_coordinator.cli.options import DataDir
from cbtm_coordinator.cli.serve import DatabaseUrl

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.command()
def upgrade(data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """Bring the registry's schema to this version. Stop coordinators first."""
    from cbtm_coordinator import migrations
    from cbtm_coordinator.config import load_config
    from cbtm_coordinator.store import Store

    store = Store(load_config(data_dir=data_dir, database_url=database_url).registry_url)
    store.ping()
    before, head = migrations.current_and_head(store.engine)
    migrations.upgrade(store.engine)
    store.close()
    typer.echo(f"revision {before or 'none'} -> {head}")


@app.command()
def check(data_dir: DataDir = None, database_url: DatabaseUrl = None) -> None:
    """Say whether the registry's schema is this version's; exit code 1 when it is not."""
    from cbtm_coordinator import migrations
    from cbtm_coordinator.config import load_config
    from cbtm_coordinator.store import Store

    store = Store(load_config(data_dir=data_dir, database_url=database_url).registry_url)
    store.ping()
    current, head = migrations.current_and_head(store.engine)
    differences = migrations.differences(store.engine) if current == head else []
    store.close()
    if current != head:
        typer.echo(f"revision {current or 'none'}, this version needs {head}: run `cbtm-coord db upgrade`")
        raise typer.Exit(1)
    for difference in differences:
        typer.echo(f"differs: {difference}")
    if differences:
        raise typer.Exit(1)
    typer.echo(f"revision {current}, in step")
