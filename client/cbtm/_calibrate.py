"""Temperature, k and re-routing interval of a run, chosen on its validation documents and stored with it.

The experts read the documents once; each point of the grid is then arithmetic. k is the owner's to choose, since it is
what inference costs; the temperature, how often weights follow the context, and where the seed model stands in for
experts that may be the wrong ones, are chosen for it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cbtm._catalog import Catalog
from cbtm._ensemble import Ensemble
from cbtm._held_out import HeldOutDocument
from cbtm._members import usual_top_k
from cbtm._results import check_top_k
from cbtm._routing_grid import POLICIES, GridPoint, RoutingPolicy, routing_grid
from cbtm._scored import Progress, ScoredDocuments, score_documents
from cbtm_common.errors import InvalidState
from cbtm_common.run_routing import RunRouting

# A policy whose perplexity is greater than the lowest by no more than this share is as good.
TOLERANCE = 0.001
# Of the router's own temperature.
_FACTORS = (1 / 8, 1 / 4, 1 / 2, 1 / math.sqrt(2), 1, math.sqrt(2), 2, 4, 8)
# Weights of the heaviest cluster under which the seed could stand in.
_SEED_BELOW = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The grid over validation documents, the point of it that was chosen, and why. `experts` is K."""

    run: str
    documents: int
    tokens: int
    experts: int
    grid: tuple[GridPoint, ...]
    chosen: GridPoint
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def calibrate(
    model: Ensemble,
    documents: Sequence[HeldOutDocument] | Sequence[str] | ScoredDocuments,
    *,
    top_k: int | None = None,
    temperatures: Sequence[float] | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Chooses temperature, policy and where the seed stands in, for `top_k` experts (default: as many as the run mixes)
    by these documents, which must not be those that numbers are reported on.

    The grid has 1, 2, 4, … and all experts too. `temperatures` default to an eighth to eight times the router's own.
    Raises InvalidState where experts are missing or there is one alone; InvalidArgument.
    """
    experts = len(model.clusters)
    if model.missing_clusters:
        raise InvalidState(
            f"{len(model.missing_clusters)} of {len(model.parts.clusters)} experts of run {model.name} are missing: "
            "what is best for some is not for all; calibrate when it is complete"
        )
    if experts == 1:
        raise InvalidState(f"run {model.name} has one expert: there is nothing to calibrate")
    k = usual_top_k(model.parts) if top_k is None else top_k
    ks = check_top_k([*check_top_k(None, experts), k, experts], experts)
    own = model.parts.router.temperature
    if isinstance(documents, ScoredDocuments):
        scored = documents
    else:
        scored = score_documents(model, documents, progress=progress)
    grid = routing_grid(
        scored,
        model.context_router,
        top_k=ks,
        temperatures=[own * factor for factor in _FACTORS] if temperatures is None else temperatures,
        seed_below=_SEED_BELOW if "seed" in scored.others else (),
        progress=progress,
    )
    chosen, reason = choose(grid, top_k=k)
    return Calibration(
        run=model.name,
        documents=len(scored.documents),
        tokens=scored.tokens,
        experts=experts,
        grid=grid,
        chosen=chosen,
        reason=reason,
    )


def choose(grid: Sequence[GridPoint], *, top_k: int) -> tuple[GridPoint, str]:
    """The point to use with `top_k` experts, and why, for a person.

    Each policy has the temperature that is best with it, and then the best threshold for the seed to stand in, or none
    where that is no worse by more than `TOLERANCE`. Of these the cheapest policy (the first of `POLICIES`) is taken
    that comes within `TOLERANCE` of the lowest perplexity. One expert alone is weighed the same by every temperature:
    there it is the best for two.
    """
    candidates = [point for point in grid if point.top_k == top_k]
    of_policies = []
    for policy in POLICIES:
        weighed = _without_seed(grid, top_k=max(top_k, 2), policy=policy)
        if weighed:
            temperature = min(weighed, key=_perplexity).temperature
            here = [p for p in candidates if p.policy == policy and p.temperature == temperature]
            plain, best = next(p for p in here if p.seed_below is None), min(here, key=_perplexity)
            of_policies.append(plain if _as_good(plain, best) else best)
    best = min(of_policies, key=_perplexity)
    chosen = next(point for point in of_policies if _as_good(point, best))
    reason = f"of {len(candidates)} with k = {top_k} it has the lowest perplexity"
    if chosen.policy != best.policy:
        reason = (
            f"{chosen.policy.name} is the cheapest within {100 * TOLERANCE:g} % of the lowest perplexity with "
            f"k = {top_k}, {best.perplexity:.3f} ({best.policy.name})"
        )
    if chosen.seed_below is not None:
        at = _without_seed(candidates, top_k=top_k, policy=chosen.policy)
        plain = next(p for p in at if p.temperature == chosen.temperature)
        reason += f"; it is {plain.perplexity:.3f} where the seed never stands in"
    if top_k == 1:
        reason += "; the temperature, which one expert alone does not feel, is the best for two"
    tried = sorted({point.temperature for point in _without_seed(grid, top_k=max(top_k, 2), policy=chosen.policy)})
    if len(tried) > 1 and chosen.temperature in (tried[0], tried[-1]):
        reason += "; the temperature is the last that was tried: look beyond it"
    return chosen, reason


def _without_seed(grid: Sequence[GridPoint], *, top_k: int, policy: RoutingPolicy) -> list[GridPoint]:
    return [p for p in grid if (p.seed_below, p.top_k, p.policy) == (None, top_k, policy)]


def _perplexity(point: GridPoint) -> float:
    return point.perplexity


def _as_good(point: GridPoint, best: GridPoint) -> bool:
    return point.perplexity <= (1 + TOLERANCE) * best.perplexity


def calibrate_run(
    target: str,
    *,
    run: str,
    token: str | None = None,
    top_k: int | None = None,
    temperatures: Sequence[float] | None = None,
    store: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    max_experts: int | None = None,
    max_tokens_per_cluster: int | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """`calibrate` on the validation split of a run's held-out documents; what is chosen becomes the run's default.

    Needs a token of role admin; without `store`, which changes nothing, of consumer.
    """
    secret = token or os.environ.get("CBTM_TOKEN") or None
    directory = Path(cache_dir) if cache_dir is not None else None
    with Catalog(target, run=run, token=secret, cache_dir=directory) as catalog:
        if store:
            catalog.check_admin()
        documents = catalog.held_out(split="validation", max_tokens_per_cluster=max_tokens_per_cluster)
        with Ensemble.from_coordinator(
            target, run=run, token=secret, device=device, dtype=dtype, cache_dir=cache_dir, max_experts=max_experts
        ) as model:
            found = calibrate(model, documents, top_k=top_k, temperatures=temperatures, progress=progress)
        if store:
            chosen = found.chosen
            catalog.set_routing(
                RunRouting(
                    temperature=chosen.temperature,
                    top_k=chosen.top_k,
                    interval=chosen.policy.interval,
                    settle_after=chosen.policy.settle_after,
                    seed_below=chosen.seed_below,
                    clustering=catalog.clustering_digest(),
                    documents=found.documents,
                    tokens=found.tokens,
                    perplexity=chosen.perplexity,
                )
            )
    return found
