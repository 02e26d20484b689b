"""`cbtm`: use a run's experts from the command line.

    cbtm calibrate choose how a run mixes its experts, on validation documents
    cbtm classify  few-shot classification of a task file
    cbtm eval      held-out perplexity: seed, dense, each expert, mixtures
    cbtm generate  continue a prompt
    cbtm merge     the experts as one ordinary model
    cbtm route     where texts go
    cbtm save      a run's experts into one folder, to use with no coordinator

The experts come from a saved folder (`--ensemble DIR`) or a coordinator (`--coordinator HOST:PORT --run NAME`, with
`--token` or CBTM_TOKEN where the catalog is not public).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cbtm import _cli_calibrate, _cli_eval
from cbtm._cli_options import (
    AsJson,
    Budget,
    CacheDir,
    Coordinator,
    Device,
    Dtype,
    Folder,
    RunName,
    Temperature,
    Token,
    TopKOption,
    open_ensemble,
    parse_top_k,
    read_lines,
    write,
)
from cbtm_common.cli import run_app, show_json
from cbtm_common.cli_connection import add_connection_options

app = typer.Typer(
    help="Use the experts of a Cluster-Branch-Train-Merge run as one language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command("calibrate")(_cli_calibrate.calibrate_command)
app.command("eval")(_cli_eval.eval_command)
app.command("classify")(_cli_eval.classify_command)


@app.command("generate")
def generate_command(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Mass of the nucleus that is sampled from.")] = None,
    top_k_tokens: Annotated[int | None, typer.Option(help="Sample from so many tokens at most.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    folder: Folder = None,
    coordinator: Coordinator = None,
    run: RunName = None,
    token: Token = None,
    top_k: TopKOption = None,
    routing_temperature: Temperature = None,
    device: Device = None,
    dtype: Dtype = None,
    max_experts: Budget = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt, routing anew at every token."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with open_ensemble(
        folder,
        coordinator,
        run,
        token,
        cache_dir,
        top_k=parse_top_k(top_k),
        temperature=routing_temperature,
        device=device,
        dtype=dtype,
        max_experts=max_experts,
    ) as model:
        # A stop text may turn out to be one only once part of it is shown: with one, the text is shown at the end.
        live = not as_json and not stop
        result = model.generate(
            text,
            max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k_tokens=top_k_tokens,
            seed=seed,
            stop=tuple(stop or ()),
            on_text=(lambda _row, piece: write(piece)) if live else None,
        )
        if as_json:
            show_json(asdict(result))
        else:
            write("\n" if live else f"{result.completion}\n")


@app.command("merge")
def merge_command(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write, a plain Hugging Face model.")],
    method: Annotated[
        str,
        typer.Option(help="average: of all parameters; weighted: for a text; moe: feed-forward layers become experts."),
    ],
    text: Annotated[list[str] | None, typer.Option(help="A text, for weighted; may be given again.")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="File of texts, for weighted and moe: .jsonl, or one on each line.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of the JSON lines.")] = "text",
    top_k: Annotated[int | None, typer.Option("--top-k", help="Experts for each token, of moe.")] = None,
    folder: Folder = None,
    coordinator: Coordinator = None,
    run: RunName = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Collapse the experts into one ordinary model, that transformers loads without cbtm.

    average and weighted work for every architecture; moe for llama and mistral (written as mixtral) and qwen3
    (qwen3_moe). An average is not the ensemble, and a mixture of experts is a start for more training.
    """
    from rich.console import Console

    from cbtm._merge import merge

    given = [*(text or ()), *(read_lines(texts, text_field) if texts is not None else ())]
    with open_ensemble(folder, coordinator, run, token, cache_dir) as model:
        with Console(stderr=True).status("opening") as status:
            merge(model, output, method=method, texts=given, top_k=top_k, report=status.update)  # type: ignore[arg-type]
        experts = len(model.clusters)
    architecture = json.loads((output / "config.json").read_text("utf-8"))["architectures"][0]
    if as_json:
        show_json({"path": str(output), "method": method, "experts": experts, "architecture": architecture})
    else:
        write(f"{output}: {experts} experts as one {architecture}\n")


@app.command("route")
def route_command(
    texts: Annotated[list[str], typer.Argument(help="Texts, each on its own; - reads one a line from standard input.")],
    folder: Folder = None,
    coordinator: Coordinator = None,
    run: RunName = None,
    token: Token = None,
    top_k: TopKOption = None,
    temperature: Temperature = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Show which clusters texts go to, and with what weight."""
    lines = [line.rstrip("\n") for line in sys.stdin] if texts == ["-"] else texts
    with open_ensemble(
        folder, coordinator, run, token, cache_dir, top_k=parse_top_k(top_k), temperature=temperature
    ) as model:
        routings = model.route(lines)
    if as_json:
        show_json([asdict(routing) for routing in routings])
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("Text", "Cluster", "Weight", "Its words", header_style="bold")
    for routing in routings:
        for place, weight in enumerate(routing.weights):
            shown = routing.text if len(routing.text) <= 60 else routing.text[:57] + "…"
            table.add_row(
                "" if place else Text(shown), str(weight.index), f"{weight.weight:.3f}", ", ".join(weight.top_terms[:6])
            )
        if routing.seed_stands_in:
            table.add_row("", "seed", "", "stands in: no cluster weighs enough")
        table.add_section()
    Console().print(table)


@app.command("save")
def save_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    coordinator: Coordinator = None,
    run: RunName = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a saved ensemble.")] = False,
) -> None:
    """Save a run's router, tokenizer, seed and experts into one folder that needs no coordinator."""
    with open_ensemble(None, coordinator, run, token, cache_dir) as model:
        from rich.console import Console

        console = Console(stderr=True)
        with console.status("saving") as status:
            model.save(folder, overwrite=overwrite, report=lambda name: status.update(f"saving {name}"))
        missing = len(model.missing_clusters)
        write(
            f"{folder}: {len(model.clusters)} experts" + (f"; {missing} are not finished yet" if missing else "") + "\n"
        )


@app.callback(invoke_without_command=True)
def _main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """`--debug` is taken by `run_app`; it stands here for the help."""
    if version:
        from importlib.metadata import version as version_of

        write(f"cbtm {version_of('cbtm')}\n")
        raise typer.Exit


add_connection_options(app)


def main() -> None:
    run_app(app, name="cbtm")
