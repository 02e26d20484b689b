"""The figures of an evaluation as PNG: perplexity against k, the router's heat map, perplexity against temperature.

The first two are the paper's (arXiv 2303.14177). matplotlib is an extra, `cbtm[eval]`; no display is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbtm._evaluate import Evaluation
from cbtm_common.errors import InvalidState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's, told apart by everybody.
_MIXTURE, _DENSE, _SEED = "#0072B2", "#D55E00", "#666666"
_TERMS = 3


def plot(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Writes the figures into `folder`, which is made; their paths. Raises InvalidState without matplotlib."""
    check_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    made = [("perplexity-by-k.png", _by_k(evaluation)), ("routing.png", _routing(evaluation))]
    if evaluation.sweep:
        made.append(("perplexity-by-temperature.png", _by_temperature(evaluation)))
    paths = []
    for name, figure in made:
        paths.append(folder / name)
        figure.savefig(paths[-1], dpi=150)
    return paths


def check_matplotlib() -> None:
    """Raises InvalidState, with the remedy, when it is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InvalidState("plots need matplotlib: pip install 'cbtm[eval]', or leave out --out") from error


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Not by pyplot, which would look for a display and keep every figure.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def mixtures(perplexity: Mapping[str, float], experts: int) -> list[tuple[int, float]]:
    """(k, perplexity) of the mixtures, k rising; "all" is k = `experts`."""
    found = {experts if name == "all" else int(name[3:]): value for name, value in perplexity.items() if _is_k(name)}
    return sorted(found.items())


def _is_k(name: str) -> bool:
    return name == "all" or (name.startswith("top") and name[3:].isdigit())


def _by_k(evaluation: Evaluation) -> Figure:
    figure, axes = _figure(6, 4)
    points = mixtures(evaluation.perplexity, len(evaluation.expert_share))
    axes.plot(*zip(*points, strict=True), marker="o", color=_MIXTURE, label="ensemble")
    for name, label, colour, style in (("dense", "dense baseline", _DENSE, "--"), ("seed", "seed model", _SEED, ":")):
        if name in evaluation.perplexity:
            axes.axhline(evaluation.perplexity[name], color=colour, linestyle=style, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks([k for k, _ in points], [str(k) for k, _ in points])
    axes.minorticks_off()
    axes.set_xlabel("experts mixed at each token, k (cost at inference)")
    axes.set_ylabel("held-out perplexity")
    axes.set_title(f"{evaluation.run}: {evaluation.tokens:,} tokens, T = {evaluation.temperature:g}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def _routing(evaluation: Evaluation) -> Figure:
    experts = list(evaluation.expert_share)
    size = max(4.0, 0.45 * len(experts))
    figure, axes = _figure(size + 3, max(3.0, 0.45 * len(evaluation.clusters)) + 1.5)
    rows = [[cluster.routed[expert] for expert in experts] for cluster in evaluation.clusters]
    image = axes.imshow(rows, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    index = {cluster.cluster_id: cluster.index for cluster in evaluation.clusters}
    axes.set_xticks(range(len(experts)), [str(index.get(expert, expert[-4:])) for expert in experts])
    labels = [
        f"{c.index}: {', '.join(c.top_terms[:_TERMS])}" if c.top_terms else str(c.index) for c in evaluation.clusters
    ]
    axes.set_yticks(range(len(rows)), labels)
    axes.set_xlabel("expert")
    axes.set_ylabel("documents of cluster")
    if len(experts) <= 16:
        for row, weights in enumerate(rows):
            for column, weight in enumerate(weights):
                colour = "black" if weight > 0.5 else "white"
                axes.text(column, row, f"{weight:.2f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axes, label="mean weight of the expert")
    axes.set_title(f"{evaluation.run}: where tokens are routed, T = {evaluation.temperature:g}", fontsize=10)
    return figure


def _by_temperature(evaluation: Evaluation) -> Figure:
    from matplotlib import colormaps

    figure, axes = _figure(6, 4)
    experts = len(evaluation.expert_share)
    sweep = sorted(evaluation.sweep, key=lambda point: point.temperature)
    lines: dict[int, list[float]] = {}
    for point in sweep:
        for k, value in mixtures(point.perplexity, experts):
            lines.setdefault(k, []).append(value)
    markers: Any = "osD^vP*X"
    colours = colormaps["viridis"]
    for number, (k, values) in enumerate(sorted(lines.items())):
        label = f"all {k}" if k == experts else f"top {k}"
        colour = colours(0.9 * number / max(1, len(lines) - 1))
        axes.plot(
            [p.temperature for p in sweep], values, marker=markers[number % len(markers)], color=colour, label=label
        )
    if "dense" in evaluation.perplexity:
        axes.axhline(evaluation.perplexity["dense"], color=_DENSE, linestyle="--", label="dense baseline")
    axes.set_xscale("log")
    axes.axvline(evaluation.temperature, color="#999999", linewidth=0.8)
    axes.set_xlabel("temperature of the router (line: the ensemble's own)")
    axes.set_ylabel("held-out perplexity")
    axes.set_title(f"{evaluation.run}: {evaluation.tokens:,} tokens", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    return figure
