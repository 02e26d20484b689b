"""Findings as Markdown and as figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import Report
from bench.reproduce.findings import WITH_SEED, Findings, Row, one
from bench.reproduce.grid import FRACTIONS
from bench.reproduce.mixing import POLICIES

# Okabe and Ito's colours.
_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00")
_DENSE = "#D55E00"
POLICY = "each token"


def figures(findings: Findings, report: Report) -> None:
    """The bars, on test, mean over seeds."""
    head = one(headline(findings.rows), router="learned", k=1)
    most = head[0].clusters
    report.add(f"protocol B, K = {most}, top-1 under the best dense", _gain(head, "each token"), "%", bar=8)
    for router, name in (("learned", ""), (WITH_SEED, ", the seed for the unsure")):
        once = one(headline(findings.rows, router, "once after 16"), router=router, k=1)
        report.add(f"the same{name}, routed once after 16 tokens", _gain(once, "once after 16"), "%", bar=5)
    # The paper's order, at the K at which all of it was trained.
    random = one(findings.rows, protocol="A", router="random", k=1)
    clusters = random[0].clusters
    paper = one(findings.rows, protocol="A", clusters=clusters, router="centroid", policy=POLICY)
    top, two = (one(paper, k=k) for k in (1, 2))
    name = f"protocol A, K = {clusters}, centroid router"
    report.add(f"{name}: top-1 under dense", _gain(top, POLICY), "%", bar=0)
    report.add(f"{name}: top-2 under top-1", 100 * (1 - _mean(two, "test") / _mean(top, "test")), "%", bar=0)
    share = 1 - _mean(top, "test") / _mean(random, "test")
    report.add(f"{name}: top-1 under random clusters", 100 * share, "%", bar=0)


def headline(rows: Sequence[Row], router: str = "learned", policy: str = POLICY) -> list[Row]:
    """Protocol B's of the greatest K, after the seed that is best on validation for this router's top-1."""
    most = one(rows, protocol="B", clusters=max(row.clusters for row in rows))
    chosen = one(most, router=router, policy=policy, k=1)
    fractions = {row.seed_fraction for row in chosen}
    best = min(fractions, key=lambda fraction: _mean(one(chosen, seed_fraction=fraction), "validation"))
    return one(most, seed_fraction=best)


def markdown(findings: Findings, about: dict[str, Any], commands: Sequence[str]) -> str:
    """The tables, with what they were made of."""
    rows = findings.rows
    lines = [
        "# Experts against a dense model",
        "",
        f"Size `{about['size']}`: {about['parameters']:,} parameters a model, {about['tokens']:,} training tokens for",
        f"every contender, its seed phase included, in sequences of {about['sequence_length']}; {len(about['seeds'])} "
        "seed(s) of randomness.",
        f"Of {findings.documents:,} held-out documents {findings.validation_documents:,} serve to choose by: the",
        "dense batch and rate, the experts' rate, temperatures, thresholds. All below is of the others, "
        f"{findings.test_tokens:,} tokens.",
        f"Measured on {about['date']}; {about['machine']}; {about['duration']}.",
        "",
        "```",
        *commands,
        "```",
        "",
        "Gains are in perplexity over the dense model of the same protocol; in brackets a 95 % interval over documents"
        + ("." if len(about["seeds"]) == 1 else ", of the first seed; ± is the deviation over seeds."),
        "Top-1 costs at inference what the dense model does.",
        "",
        "## The dense baseline",
        "",
        "| batch | learning rate | validation | test | |",
        "| ---: | ---: | ---: | ---: | --- |",
    ]
    for batch, rate in sorted({(d.batch, d.learning_rate) for d in findings.dense}):
        same = [d for d in findings.dense if (d.batch, d.learning_rate) == (batch, rate)]
        notes = ["best" if any(d.best for d in same) else "", "protocol A's" if batch == about["paper_batch"] else ""]
        validation, test = (np.mean([getattr(d, split) for d in same]) for split in ("validation", "test"))
        note = ", ".join(n for n in notes if n)
        lines.append(f"| {batch} | {rate:g} | {validation:.2f} | {test:.2f} | {note} |")
    lines += ["", "## The experts' learning rate (protocol B, greatest K)", ""]
    lines += ["| seed phase | learning rate | validation, top-1 | |", "| ---: | ---: | ---: | --- |"]
    for fraction, rate in sorted({(e.seed_fraction, e.learning_rate) for e in findings.expert_rates}):
        tried = [e for e in findings.expert_rates if (e.seed_fraction, e.learning_rate) == (fraction, rate)]
        mean, best = np.mean([e.validation for e in tried]), any(e.best for e in tried)
        lines.append(f"| {100 * fraction:.0f} % | {rate:.2g} | {mean:.2f} | {'best' if best else ''} |")
    for protocol, title in (
        ("B", "Protocol B: against the best dense model"),
        ("A", "Protocol A, the paper's: equal steps, experts at batch B/K, dense at batch B"),
    ):
        lines += ["", f"## {title}", ""]
        lines += _by_clusters([row for row in rows if row.protocol == protocol])
    most = one(rows, protocol="B", clusters=max(row.clusters for row in rows))
    for fraction in sorted({row.seed_fraction for row in most}, reverse=True):
        setting = f"protocol B, K = {most[0].clusters}, {100 * fraction:.0f} % seed, top-1"
        lines += ["", f"## Routers and how often they route ({setting})", ""]
        lines += _by_router(one(most, seed_fraction=fraction))
    lines += ["", "![perplexity by K](reproduce-by-k.png)", "", "![by policy](reproduce-by-policy.png)", ""]
    return "\n".join(lines)


def _by_clusters(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| K | seed phase | router | seed alone | top-1 | top-2 | top-4 | all | top-1, once after 16 | oracle | "
        "parameter mean | dense |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for clusters, fraction in sorted({(row.clusters, row.seed_fraction) for row in rows}):
        same = one(rows, clusters=clusters, seed_fraction=fraction)
        plain = {name: _cell(one(same, router=name, k=1, random=False)) for name in ("seed", "oracle", "mean")}
        dense = f"{_mean(same, 'dense'):.2f}"
        start = f"| {clusters} | {100 * fraction:.0f} %"
        for router in ("learned", "centroid"):
            found = one(same, router=router)
            if not found:
                continue
            mixed = [_cell(one(found, policy=POLICY, k=k)) for k in (1, 2, 4, 0)]
            once = _cell(one(found, policy="once after 16", k=1))
            cells = [router, plain["seed"], *mixed, once, plain["oracle"], plain["mean"], dense]
            lines.append(f"{start} | {' | '.join(cells)} |")
        random = one(same, router="random")
        if random:
            cells = ["random clusters", plain["seed"], _cell(one(random, k=1)), "", "", _cell(one(random, k=0))]
            lines.append(f"{start} | {' | '.join([*cells, '', '', '', dense])} |")
    return lines


def _by_router(rows: Sequence[Row]) -> list[str]:
    routers = [r for r in dict.fromkeys(row.router for row in rows) if one(rows, router=r, policy=POLICY)]
    lines = [f"| router | {' | '.join(POLICIES)} |", f"| --- |{' ---: |' * len(POLICIES)}"]
    for router in routers:
        cells = [_cell(one(rows, router=router, policy=policy, k=1)) for policy in POLICIES]
        lines.append(f"| {router} | {' | '.join(cells)} |")
    return lines


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    value = f"{_mean(rows, 'test'):.2f}"
    if len(rows) > 1:
        value += f" ± {np.std([row.test for row in rows], ddof=1):.2f}"
    gain = f"{-100 * _mean(rows, 'gain'):+.1f} %"
    low, high = rows[0].gain_low, rows[0].gain_high
    if low is not None and high is not None:
        return f"{value} ({gain} [{-100 * high:+.1f}, {-100 * low:+.1f}])"
    return f"{value} ({gain})"


def _mean(rows: Sequence[Row], name: str) -> float:
    return float(np.mean([getattr(row, name) for row in rows]))


def _gain(rows: Sequence[Row], policy: str) -> float:
    return 100 * _mean(one(rows, policy=policy), "gain")


def plots(findings: Findings, folder: Path) -> None:
    """Writes reproduce-by-k.png and reproduce-by-policy.png."""
    from matplotlib.figure import Figure

    rows = findings.rows
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, protocol in zip(figure.subplots(1, 2), ("A", "B"), strict=True):
        same = one(rows, protocol=protocol, seed_fraction={"A": 0.5, "B": FRACTIONS[0]}[protocol])
        clusters = sorted({row.clusters for row in same})
        lines = [
            ("learned", 1, "top-1"),
            ("learned", 2, "top-2"),
            ("learned", 0, "all"),
            ("centroid", 1, "top-1, centroids"),
        ]
        for (router, k, label), colour in zip(lines, _COLOURS, strict=True):
            points = [
                (n, _mean(found, "test"))
                for n in clusters
                if (found := one(same, clusters=n, router=router, k=k, policy=POLICY))
            ]
            axes.plot(*zip(*points, strict=True), marker="o", color=colour, label=label)
        axes.axhline(_mean(same, "dense"), color=_DENSE, linestyle="--", label="dense")
        axes.set_xscale("log", base=2)
        axes.set_xticks(clusters, [str(n) for n in clusters])
        axes.set_xlabel("experts, K")
        axes.set_ylabel("test perplexity")
        axes.set_title(f"protocol {protocol}", fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(folder / "reproduce-by-k.png", dpi=120)

    head = one(headline(rows), k=1)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for router, colour in zip(("learned", "token ids", "centroid"), _COLOURS, strict=False):
        values = [_mean(one(head, router=router, policy=policy), "test") for policy in POLICIES]
        axes.plot(list(POLICIES), values, marker="o", color=colour, label=router)
    axes.axhline(_mean(head, "dense"), color=_DENSE, linestyle="--", label="best dense")
    axes.set_ylabel("test perplexity, top-1")
    axes.set_title(f"protocol B, K = {head[0].clusters}: how often the context is routed", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(folder / "reproduce-by-policy.png", dpi=120)


def write(findings: Findings, about: dict[str, Any], commands: Sequence[str], folder: Path) -> None:
    """reproduce.md, reproduce.json and the figures in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reproduce.md").write_text(markdown(findings, about, commands), "utf-8")
    (folder / "reproduce.json").write_text(json.dumps({**about, **findings.to_dict()}, indent=1) + "\n", "utf-8")
    plots(findings, folder)
