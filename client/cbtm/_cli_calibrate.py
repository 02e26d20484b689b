"""`cbtm calibrate`: how a run mixes its experts by default, chosen on its validation documents."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from cbtm._cli_options import (
    AsJson,
    Budget,
    CacheDir,
    Coordinator,
    Device,
    Dtype,
    RunName,
    parse_floats,
    progress_bars,
)
from cbtm_common.cli import show_json
from cbtm_common.errors import InvalidArgument

if TYPE_CHECKING:
    from cbtm._calibrate import Calibration


def calibrate_command(
    coordinator: Coordinator = None,
    run: RunName = None,
    token: Annotated[
        str | None, typer.Option("--token", envvar="CBTM_TOKEN", help="An admin's token; a consumer's for --dry-run.")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", min=1, help="Experts to mix, what inference costs; default the run's."),
    ] = None,
    temperatures: Annotated[
        str | None,
        typer.Option(help="Router temperatures to try; default an eighth to eight times the router's own."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Store nothing.")] = False,
    reset: Annotated[bool, typer.Option("--reset", help="Only forget what was stored: as the recipe says.")] = False,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens-per-cluster", min=1, help="Bound on validation tokens.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    max_experts: Budget = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Choose temperature and re-routing interval on a run's validation documents, and store them with the run.

    Each expert reads every token once; the grid is arithmetic. Whoever opens the run from then on mixes by what is
    stored, unless told otherwise; numbers to report are of `cbtm eval`, on test documents.
    """
    from cbtm._calibrate import calibrate_run
    from cbtm._catalog import Catalog

    if coordinator is None or run is None:
        raise InvalidArgument("run: say which, with --coordinator HOST:PORT and --run NAME", field="run")
    if reset:
        with Catalog(coordinator, run=run, token=token or os.environ.get("CBTM_TOKEN"), cache_dir=cache_dir) as catalog:
            catalog.set_routing(None)
        if as_json:
            show_json({"run": run, "calibrated": None})
        else:
            sys.stdout.write(f"{run}: mixed as its recipe says\n")
        return
    with progress_bars(quiet=as_json) as progress:
        found = calibrate_run(
            coordinator,
            run=run,
            token=token,
            top_k=top_k,
            temperatures=None if temperatures is None else parse_floats(temperatures, field="temperatures"),
            store=not dry_run,
            device=device,
            dtype=dtype,
            cache_dir=cache_dir,
            max_experts=max_experts,
            max_tokens_per_cluster=max_tokens,
            progress=progress,
        )
    if as_json:
        show_json({**found.to_dict(), "stored": not dry_run})
    else:
        _show(found, stored=not dry_run)


def _show(found: Calibration, *, stored: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    policies = list(dict.fromkeys(point.policy.name for point in found.grid))
    chosen, done = found.chosen, "stored" if stored else "would store"
    plain = [point for point in found.grid if point.seed_below is None]
    value = {(p.top_k, p.temperature, p.policy.name): p for p in plain}
    # Tables are of what the seed has no part in.
    shown = value.get((chosen.top_k, chosen.temperature, chosen.policy.name))
    for k in sorted({point.top_k for point in plain}):
        title = "all experts" if k == found.experts else f"top-{k}"
        table = Table("Temperature", title=f"{title}: validation perplexity, by when experts are chosen")
        for name in policies:
            table.add_column(name, justify="right")
        # One expert alone is weighed the same by every temperature.
        for temperature in sorted({p.temperature for p in found.grid})[: 1 if k == 1 else None]:
            cells = [value[k, temperature, name] for name in policies]
            table.add_row(
                "any" if k == 1 else f"{temperature:.4g}",
                *(f"[bold]{p.perplexity:.3f}[/bold]" if p == shown else f"{p.perplexity:.3f}" for p in cells),
            )
        console.print(table)
    seed = ""
    if chosen.seed_below is not None:
        seed = f", the seed where no cluster weighs {chosen.seed_below:g} ({chosen.seed_share:.0%} of the tokens)"
    console.print(
        f"{found.run}: {done} top-{chosen.top_k}, temperature {chosen.temperature:.4g}, "
        f"routed {chosen.policy.name}{seed}: perplexity {chosen.perplexity:.3f}, "
        f"{chosen.arrivals:.0f} arrivals of experts in 1,000 tokens\n"
        f"Why: {found.reason}. {found.documents:,} validation documents, {found.tokens:,} tokens."
    )
