"""`cbtm`: use a run's experts from the command line.

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cbtm_common.cli import run_app, show_json
from cbtm_common.errors import InvalidArgument

if TYPE_CHECKING:
    from cbtm._ensemble import Ensemble, TopK
    from cbtm._evaluate import Evaluation, Progress

app = typer.Typer(
    help="Use the experts of a Cluster-Branch-Train-Merge run as one language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Folder = Annotated[Path | None, typer.Option("--ensemble", "-e", help="Folder that `cbtm save` wrote.")]
_Coordinator = Annotated[
    str | None, typer.Option("--coordinator", envvar="CBTM_COORDINATOR", help="HOST:PORT of the coordinator.")
]
_Run = Annotated[str | None, typer.Option("--run", help="Name or id of the run.")]
_Token = Annotated[str | None, typer.Option("--token", envvar="CBTM_TOKEN", help="A consumer's token.")]
_TopK = Annotated[str | None, typer.Option("--top-k", help="Experts mixed at each token: a number, or all.")]
_Temperature = Annotated[float | None, typer.Option("--routing-temperature", help="T of the routing weights.")]
_Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda:0, …")]
_Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, …; default as stored.")]
_Budget = Annotated[int | None, typer.Option("--max-experts", help="Most experts in memory at a time.")]
_Cache = Annotated[Path | None, typer.Option("--cache-dir", help="Where downloads are kept.")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("eval")
def eval_command(
    folder: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="Folder that `cbtm save` wrote.")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Texts to score instead of the run's held-out shards: .jsonl or .txt.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of the JSON lines.")] = "text",
    baseline: Annotated[
        str | None, typer.Option(help="Dense run to compare with; default the run's own; 'none' for none.")
    ] = None,
    coordinator: _Coordinator = None,
    run: _Run = None,
    token: _Token = None,
    top_k: Annotated[
        str | None, typer.Option("--top-k", help="Mixtures to show, such as 1,2,4; default 1, 2, 4, …")
    ] = None,
    temperature: _Temperature = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens-per-cluster", min=1, help="Bound on held-out tokens.")
    ] = None,
    device: _Device = None,
    dtype: _Dtype = None,
    max_experts: _Budget = None,
    cache_dir: _Cache = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write the JSON to this file, too.")] = None,
    as_json: _Json = False,
) -> None:
    """Held-out perplexity of the seed, the dense baseline, each expert on its own cluster, and the mixtures."""
    from cbtm._evaluate import evaluate, evaluate_run

    ks = _numbers(top_k) if top_k is not None else None
    options: dict[str, Any] = {"device": device, "dtype": dtype, "max_experts": max_experts, "temperature": temperature}
    with _progress(quiet=as_json) as progress:
        if texts is None:
            if folder is not None or coordinator is None or run is None:
                raise InvalidArgument(
                    "texts: give --texts FILE with a folder, or --coordinator and --run to use the run's held-out "
                    "shards",
                    field="texts",
                )
            found = evaluate_run(
                coordinator,
                run=run,
                token=token,
                baseline=None if baseline == "none" else baseline or "auto",
                top_k=ks,
                cache_dir=cache_dir,
                max_tokens_per_cluster=max_tokens,
                progress=progress,
                **options,
            )
        else:
            documents = list(read_texts(texts, text_field))
            with _open(folder, coordinator, run, token, cache_dir, top_k=None, **options) as model:
                if baseline in (None, "none"):
                    found = evaluate(model, documents, top_k=ks, progress=progress)
                else:
                    with _open(None, coordinator, baseline, token, cache_dir, device=device, dtype=dtype) as dense:
                        found = evaluate(model, documents, top_k=ks, baseline=dense, progress=progress)
    if output is not None:
        output.write_text(json.dumps(found.to_dict(), indent=1) + "\n", "utf-8")
    if as_json:
        show_json(found.to_dict())
    else:
        _show(found)


@app.command("generate")
def generate_command(
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Mass of the nucleus that is sampled from.")] = None,
    top_k_tokens: Annotated[int | None, typer.Option(help="Sample from so many tokens at most.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    folder: _Folder = None,
    coordinator: _Coordinator = None,
    run: _Run = None,
    token: _Token = None,
    top_k: _TopK = None,
    routing_temperature: _Temperature = None,
    device: _Device = None,
    dtype: _Dtype = None,
    max_experts: _Budget = None,
    cache_dir: _Cache = None,
    as_json: _Json = False,
) -> None:
    """Continue a prompt, routing anew at every token."""
    text = sys.stdin.read() if prompt == "-" else prompt
    with _open(
        folder,
        coordinator,
        run,
        token,
        cache_dir,
        top_k=_top_k(top_k),
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
            on_text=(lambda _row, piece: _write(piece)) if live else None,
        )
        if as_json:
            show_json(asdict(result))
        else:
            _write("\n" if live else f"{result.completion}\n")


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
    folder: _Folder = None,
    coordinator: _Coordinator = None,
    run: _Run = None,
    token: _Token = None,
    cache_dir: _Cache = None,
    as_json: _Json = False,
) -> None:
    """Collapse the experts into one ordinary model, that transformers loads without cbtm.

    average and weighted work for every architecture; moe for llama and mistral (written as mixtral) and qwen3
    (qwen3_moe). An average is not the ensemble, and a mixture of experts is a start for more training.
    """
    from rich.console import Console

    from cbtm._merge import merge

    given = [*(text or ()), *(read_lines(texts, text_field) if texts is not None else ())]
    with _open(folder, coordinator, run, token, cache_dir) as model:
        with Console(stderr=True).status("opening") as status:
            merge(model, output, method=method, texts=given, top_k=top_k, report=status.update)  # type: ignore[arg-type]
        experts = len(model.clusters)
    architecture = json.loads((output / "config.json").read_text("utf-8"))["architectures"][0]
    if as_json:
        show_json({"path": str(output), "method": method, "experts": experts, "architecture": architecture})
    else:
        _write(f"{output}: {experts} experts as one {architecture}\n")


@app.command("route")
def route_command(
    texts: Annotated[list[str], typer.Argument(help="Texts, each on its own; - reads one a line from standard input.")],
    folder: _Folder = None,
    coordinator: _Coordinator = None,
    run: _Run = None,
    token: _Token = None,
    top_k: _TopK = None,
    temperature: _Temperature = None,
    cache_dir: _Cache = None,
    as_json: _Json = False,
) -> None:
    """Show which clusters texts go to, and with what weight."""
    lines = [line.rstrip("\n") for line in sys.stdin] if texts == ["-"] else texts
    with _open(folder, coordinator, run, token, cache_dir, top_k=_top_k(top_k), temperature=temperature) as model:
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
        table.add_section()
    Console().print(table)


@app.command("save")
def save_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write.")],
    coordinator: _Coordinator = None,
    run: _Run = None,
    token: _Token = None,
    cache_dir: _Cache = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a saved ensemble.")] = False,
) -> None:
    """Save a run's router, tokenizer, seed and experts into one folder that needs no coordinator."""
    with _open(None, coordinator, run, token, cache_dir) as model:
        from rich.console import Console

        console = Console(stderr=True)
        with console.status("saving") as status:
            model.save(folder, overwrite=overwrite, report=lambda name: status.update(f"saving {name}"))
        missing = len(model.missing_clusters)
        _write(
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

        _write(f"cbtm {version_of('cbtm')}\n")
        raise typer.Exit


def main() -> None:
    run_app(app, name="cbtm")


def read_texts(path: Path, field: str) -> Iterator[str]:
    """Texts of a JSON-lines file (`field` of each line), or a text file as one. Raises InvalidArgument."""
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix != ".jsonl":
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _field_of(line, field, where=f"{path}:{number}")
    except FileNotFoundError:
        raise InvalidArgument(f"texts: there is no file {path}", field="texts") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"texts: {path} cannot be read: {error}", field="texts") from error


def read_lines(path: Path, field: str) -> Iterator[str]:
    """Texts of a JSON-lines file, or the lines of a text file, blank ones left out. Raises InvalidArgument."""
    for text in read_texts(path, field):
        yield from [text] if path.suffix == ".jsonl" else (line for line in text.splitlines() if line.strip())


def _field_of(line: str, field: str, *, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InvalidArgument(f"texts: {where}: not JSON: {error}", field="texts") from error
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = ", ".join(sorted(record)) if isinstance(record, dict) else "no object"
        raise InvalidArgument(f"texts: {where}: no text in field {field!r}; it has {has}", field="texts")
    return text


def _open(
    folder: Path | None,
    coordinator: str | None,
    run: str | None,
    token: str | None,
    cache_dir: Path | None,
    **options: Any,
) -> Ensemble:
    from cbtm._ensemble import Ensemble

    if folder is not None:
        return Ensemble.load(folder, **options)
    if coordinator is None or run is None:
        raise InvalidArgument(
            "ensemble: say where the experts are: a saved folder, or --coordinator HOST:PORT and --run NAME",
            field="ensemble",
        )
    return Ensemble.from_coordinator(coordinator, run=run, token=token, cache_dir=cache_dir, **options)


def _top_k(text: str | None) -> TopK:
    if text is None:
        return None
    if text == "all":
        return "all"
    return _numbers(text)[0]


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidArgument(f"top_k: {text!r} is not a number, or numbers with commas", field="top_k") from None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Progress | None]:
    """A bar for each model that is run, on standard error; none when `quiet` or not at a terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    with Bars(console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def told(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name)
            bars.update(tasks[name], completed=done, total=total)

        yield told


def _show(found: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    overall = Table("Model", "Perplexity", "Against the seed", title=f"{found.run}: perplexity", header_style="bold")
    seed = found.perplexity.get("seed")
    for name, value in found.perplexity.items():
        against = "" if seed is None or name == "seed" else f"{100 * (value / seed - 1):+.1f} %"
        overall.add_row(_NAMES.get(name, name.replace("top", "top-")), f"{value:.3f}", against)
    console.print(overall)
    names = [name for name in found.perplexity if name in ("seed", "dense", "expert", "top1", "top2", "all")]
    by_cluster = Table("", "Its words", title="By cluster", header_style="bold")
    for title in ("Tokens", "Share", *(_SHORT.get(name, name.replace("top", "top-")) for name in names)):
        by_cluster.add_column(title, justify="right", no_wrap=True, overflow="fold")
    for cluster in found.clusters:
        share = found.expert_share.get(cluster.cluster_id)
        by_cluster.add_row(
            str(cluster.index),
            ", ".join(cluster.top_terms[:5]),
            f"{cluster.tokens:,}",
            "-" if share is None else f"{share:.2f}",
            *(f"{cluster.perplexity[name]:.2f}" for name in names),
        )
    console.print(by_cluster)
    console.print(
        f"{found.documents:,} documents, {found.tokens:,} tokens; windows of {found.window} by {found.stride}; "
        f"routing temperature {found.temperature:g}"
    )
    if found.missing_clusters:
        console.print(f"{len(found.missing_clusters)} clusters have no expert yet; the others take their weight")


_NAMES = {
    "seed": "seed",
    "dense": "dense baseline",
    "expert": "each expert on its own cluster",
    "all": "all experts mixed",
}
_SHORT = {"expert": "own"}
