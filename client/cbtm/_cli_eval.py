"""`cbtm eval` and `cbtm classify`: how good an ensemble is, beside what it is compared with."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    open_ensemble,
    parse_floats,
    parse_numbers,
    progress_bars,
    read_texts,
)
from cbtm_common.cli import show_json
from cbtm_common.errors import InvalidArgument

if TYPE_CHECKING:
    from rich.console import Console

    from cbtm._classify import Classification
    from cbtm._evaluate import Evaluation

# Of the sweep, unless said otherwise; the paper's default is 0.1.
_TEMPERATURES = "0.02,0.05,0.1,0.2,0.5,1"
_Mixtures = Annotated[str | None, typer.Option("--top-k", help="Mixtures to show, such as 1,2,4; default 1, 2, 4, …")]
_Baseline = Annotated[
    str | None, typer.Option(help="Dense run to compare with; default the run's own; 'none' for none.")
]
_Output = Annotated[Path | None, typer.Option("--output", help="Write the JSON to this file, too.")]


def eval_command(
    folder: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="Folder that `cbtm save` wrote.")] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Texts to score instead of the run's held-out shards: .jsonl or .txt.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field of the JSON lines.")] = "text",
    split: Annotated[
        str | None, typer.Option(help="Of the held-out shards: test (default), or validation, to choose by.")
    ] = None,
    baseline: _Baseline = None,
    coordinator: Coordinator = None,
    run: RunName = None,
    token: Token = None,
    top_k: _Mixtures = None,
    temperature: Temperature = None,
    sweep: Annotated[
        str, typer.Option("--temperatures", help="Router temperatures to compare; no model runs again for them.")
    ] = _TEMPERATURES,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens-per-cluster", min=1, help="Bound on held-out tokens.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    max_experts: Budget = None,
    cache_dir: CacheDir = None,
    output: _Output = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for evaluation.json and the figures as PNG; needs cbtm[eval].")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Held-out perplexity of the seed, the dense baseline, each expert on its own cluster, and the mixtures.

    Each model reads every token once; mixtures of any k and temperature are arithmetic on what they said.
    """
    from cbtm._evaluate import evaluate, evaluate_run

    if out is not None:
        from cbtm._plots import check_matplotlib

        check_matplotlib()
    ks = parse_numbers(top_k) if top_k is not None else None
    options: dict[str, Any] = {"device": device, "dtype": dtype, "max_experts": max_experts, "temperature": temperature}
    asked: dict[str, Any] = {"top_k": ks, "temperatures": parse_floats(sweep, field="temperatures")}
    with progress_bars(quiet=as_json) as progress:
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
                split=split or "test",  # type: ignore[arg-type]  # checked there
                token=token,
                baseline=None if baseline == "none" else baseline or "auto",
                cache_dir=cache_dir,
                max_tokens_per_cluster=max_tokens,
                progress=progress,
                **asked,
                **options,
            )
        else:
            if split is not None:
                raise InvalidArgument("split: it is of a run's held-out shards, not of --texts", field="split")
            documents = list(read_texts(texts, text_field))
            with open_ensemble(folder, coordinator, run, token, cache_dir, top_k=None, **options) as model:
                if not as_json:
                    tokens = sum(len(model.encode(text)) for text in documents)
                    sys.stderr.write(f"{len(model.clusters)} experts and the seed read {tokens:,} tokens each\n")
                if baseline in (None, "none"):
                    found = evaluate(model, documents, progress=progress, **asked)
                else:
                    with open_ensemble(
                        None, coordinator, baseline, token, cache_dir, device=device, dtype=dtype
                    ) as dense:
                        found = evaluate(model, documents, baseline=dense, progress=progress, **asked)
    _write_json(found.to_dict(), output)
    if out is not None:
        from cbtm._plots import plot

        out.mkdir(parents=True, exist_ok=True)
        _write_json(found.to_dict(), out / "evaluation.json")
        plot(found, out)
    if as_json:
        show_json(found.to_dict())
    else:
        _show(found)
        if out is not None:
            sys.stdout.write(f"{out}: evaluation.json and figures\n")


def classify_command(
    task: Annotated[Path, typer.Argument(metavar="TASK", help="Task file: JSON lines, the first with the labels.")],
    folder: Folder = None,
    coordinator: Coordinator = None,
    run: RunName = None,
    token: Token = None,
    baseline: Annotated[str | None, typer.Option(help="Dense run of the coordinator to compare with.")] = None,
    shots: Annotated[int, typer.Option(min=0, help="Demonstrations before each text.")] = 8,
    seeds: Annotated[str, typer.Option(help="Seeds that draw the demonstrations.")] = "0,1,2,3,4",
    method: Annotated[str, typer.Option(help="direct, or pmi: less what the words are worth without a text.")] = (
        "direct"
    ),
    top_k: _Mixtures = None,
    temperature: Annotated[
        float, typer.Option("--routing-temperature", help="T of the routing weights; the paper's is 1 here.")
    ] = 1.0,
    device: Device = None,
    dtype: Dtype = None,
    max_experts: Budget = None,
    cache_dir: CacheDir = None,
    output: _Output = None,
    as_json: AsJson = False,
) -> None:
    """Few-shot classification: the label whose words are most probable after the prompt, which is routed once."""
    from contextlib import ExitStack

    from cbtm._classify import classify, load_task

    loaded = load_task(task)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "max_experts": max_experts}
    with ExitStack() as stack:
        model = stack.enter_context(open_ensemble(folder, coordinator, run, token, cache_dir, **options))
        dense = None
        if baseline is not None:
            dense = stack.enter_context(open_ensemble(None, coordinator, baseline, token, cache_dir, **options))
        progress = stack.enter_context(progress_bars(quiet=as_json))
        found = classify(
            model,
            loaded,
            shots=shots,
            seeds=parse_numbers(seeds, field="seeds"),
            top_k=parse_numbers(top_k) if top_k is not None else None,
            method=method,  # type: ignore[arg-type]  # checked there
            temperature=temperature,
            baseline=dense,
            progress=progress,
        )
    _write_json(found.to_dict(), output)
    if as_json:
        show_json(found.to_dict())
    else:
        _show_classification(found)


def _write_json(values: Mapping[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")


def _show(found: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    overall = Table(
        "Model",
        "Perplexity",
        "Bits per byte",
        "Against the seed",
        title=f"{found.run}: perplexity",
        header_style="bold",
    )
    seed = found.perplexity.get("seed")
    for name, value in found.perplexity.items():
        against = "" if seed is None or name == "seed" else f"{100 * (value / seed - 1):+.1f} %"
        overall.add_row(_title(name), f"{value:.3f}", f"{found.bits_per_byte[name]:.3f}", against)
    console.print(overall)
    names = [name for name in found.perplexity if name in ("seed", "dense", "expert", "top1", "top2", "all")]
    by_cluster = Table(title="By cluster", header_style="bold")
    by_cluster.add_column("", no_wrap=True)
    by_cluster.add_column("Its words", min_width=12)
    for title in ("Tokens", *(_SHORT.get(name, _short(name)) for name in names)):
        by_cluster.add_column(title, justify="right", no_wrap=True, overflow="fold")
    for cluster in found.clusters:
        by_cluster.add_row(
            str(cluster.index),
            ", ".join(cluster.top_terms[:5]),
            f"{cluster.tokens:,}",
            *(f"{cluster.perplexity[name]:.2f}" for name in names),
        )
    console.print(by_cluster)
    experts = Table("Expert of cluster", "Weight", "Heaviest", title="Share of tokens", header_style="bold")
    index = {cluster.cluster_id: str(cluster.index) for cluster in found.clusters}
    for expert, share in found.expert_share.items():
        experts.add_row(index.get(expert, expert), f"{share:.3f}", f"{found.top1_share[expert]:.3f}")
    console.print(experts)
    if found.sweep:
        _show_sweep(found, console)
    split = f" of split {found.split}" if found.split else ""
    often = "" if found.interval == 1 else f", anew every {found.interval} tokens"
    settled = "" if found.settle_after is None else f", settled after {found.settle_after}"
    stands_in = "" if found.seed_below is None else f", the seed for {found.seed_share:.0%} of the tokens"
    console.print(
        f"{found.documents:,} documents{split}, {found.tokens:,} tokens; windows of {found.window} by {found.stride}; "
        f"routing temperature {found.temperature:g}{often}{settled}{stands_in}"
    )
    if found.missing_clusters:
        console.print(f"{len(found.missing_clusters)} clusters have no expert yet; the others take their weight")


def _show_sweep(found: Evaluation, console: Console) -> None:
    from rich.table import Table

    names = list(found.sweep[0].perplexity)
    table = Table("Temperature", *(_short(name) for name in names), title="Perplexity by temperature")
    for point in found.sweep:
        table.add_row(f"{point.temperature:g}", *(f"{point.perplexity[name]:.3f}" for name in names))
    console.print(table)


def _show_classification(found: Classification) -> None:
    from rich.console import Console
    from rich.table import Table

    labels = list(next(iter(found.accuracy.values())).by_label)
    table = Table("Model", "Accuracy", "Seeds", *labels, title=f"{found.task}: {found.shots}-shot accuracy")
    for name, accuracy in found.accuracy.items():
        spread = f"{min(accuracy.by_seed):.3f} to {max(accuracy.by_seed):.3f}"
        table.add_row(
            _title(name), f"{accuracy.mean:.3f}", spread, *(f"{accuracy.by_label[label]:.2f}" for label in labels)
        )
    console = Console()
    console.print(table)
    console.print(
        f"{found.examples:,} examples, {len(found.seeds)} draw(s) of demonstrations, method {found.method}; always the "
        f"commonest label: {found.majority:.3f}"
    )


def _title(name: str) -> str:
    return _NAMES.get(name, _short(name))


def _short(name: str) -> str:
    return name.replace("top", "top-")


_NAMES = {
    "seed": "seed",
    "dense": "dense baseline",
    "expert": "each expert on its own cluster",
    "all": "all experts mixed",
}
_SHORT = {"expert": "own"}
