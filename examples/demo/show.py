"""Prints what the demo found."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text


def show(console: Console, report: dict[str, Any]) -> None:
    """The tables of a report (`report.json`)."""
    console.print(_overall(report["perplexity"]))
    console.print(_by_cluster(report["clusters"]))
    console.print(_routing(report["routing"]))
    sample = Text.assemble((report["sample"]["prompt"], "bold"), report["sample"]["text"])
    console.print(Panel(sample, title="a sample, top-2", title_align="left"))
    console.print(_verdict(report))


_NAMES = {
    "seed": "seed (what the experts started from)",
    "dense": "dense baseline, as many training tokens",
    "top1": "ensemble, top-1 (costs one model)",
    "top2": "ensemble, top-2 (costs two)",
    "all": "ensemble, all experts",
}


def _overall(perplexity: dict[str, float]) -> Table:
    table = Table(title="Held-out perplexity, all clusters", title_justify="left")
    table.add_column("Model")
    table.add_column("Perplexity", justify="right")
    table.add_column("Against dense", justify="right")
    for key, name in _NAMES.items():
        change = 100 * (perplexity[key] / perplexity["dense"] - 1)
        table.add_row(name, f"{perplexity[key]:.2f}", "" if key == "dense" else f"{change:+.1f} %")
    return table


def _by_cluster(clusters: list[dict[str, Any]]) -> Table:
    table = Table(title="Each expert on its own cluster", title_justify="left")
    table.add_column("Cluster", justify="right")
    table.add_column("Top terms")
    for name in ("Seed", "Dense", "Its expert", "Against seed"):
        table.add_column(name, justify="right")
    for c in clusters:
        p = c["perplexity"]
        change = 100 * (p["expert"] / p["seed"] - 1)
        table.add_row(
            str(c["index"]),
            ", ".join(c["top_terms"][:6]),
            f"{p['seed']:.2f}",
            f"{p['dense']:.2f}",
            f"{p['expert']:.2f}",
            f"{change:+.1f} %",
        )
    return table


def _routing(routings: list[dict[str, Any]]) -> Table:
    table = Table(title="Where four sentences go", title_justify="left")
    table.add_column("Text")
    table.add_column("Clusters and weights")
    for routing in routings:
        weights = ", ".join(f"{w['cluster']}: {100 * w['weight']:.0f} %" for w in routing["weights"][:3])
        table.add_row(Text(routing["text"]), weights)
    return table


def _verdict(report: dict[str, Any]) -> str:
    p = report["perplexity"]
    better = [name for name in ("top1", "top2", "all") if p[name] < p["dense"]]
    said = "beats" if "top1" in better else "does not beat"
    return (
        f"At the cost of one model, the ensemble {said} a dense model that saw as many tokens "
        f"({p['top1']:.2f} against {p['dense']:.2f})."
    )
