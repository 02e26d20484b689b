"""Temperature, k and re-routing interval of a run, chosen on its validation documents and stored with it.

The experts read the documents once; each point of the grid is then arithmetic. k is the owner's to choose, since it is
what inference costs; the temperature and how often weights follow the context are chosen for it.
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
from cbtm._routing_grid import POLICIES, GridPoint, routing_grid
from cbtm._scored import Progress, ScoredDocuments, score_documents
from cbtm_common.errors import InvalidState
from cbtm_common.run_routing import RunRouting

# A policy whose perplexity is greater than the lowest by no more than this share is as good.
TOLERANCE = 0.001
# Of the router's own temperature.
_FACTORS = (1 / 8, 1 / 4, 1 / 2, 1 / math.sqrt(2), 1, math.sqrt(2), 2, 4, 8)


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
    """Chooses temperature and policy for `top_k` experts (default: as many as the run mixes) by these documents, which
    must not be those that numbers are reported on.

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
        scored = score_documents(model, documents, seed=False, progress=progress)
    grid = routing_grid(
        scored,
        model.context_router,
        top_k=ks,
        temperatures=[own * factor for factor in _FACTORS] if temperatures is None else temperatures,
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

    The policy is the cheapest (the first of `POLICIES`) that comes within `TOLERANCE` of the lowest perplexity at this
    k at some temperature; the temperature is the best with that policy. One expert alone is weighed the same by every
    temperature: there it is the best for two.
    """
    points = [point for point in grid if point.seed_below is None]
    candidates = [point for point in points if point.top_k == top_k]
    best = min(candidates, key=lambda point: point.perplexity)
    near = [point for point in candidates if point.perplexity <= (1 + TOLERANCE) * best.perplexity]
    policy = min(near, key=lambda point: POLICIES.index(point.policy)).policy
    weighed = [point for point in points if point.top_k == max(top_k, 2) and point.policy == policy]
    temperature = min(weighed, key=lambda point: point.perplexity).temperature
    chosen = next(p for p in candidates if p.policy == policy and p.temperature == temperature)
    reason = f"of {len(candidates)} with k = {top_k} it has the lowest perplexity"
    if policy != best.policy:
        reason = (
            f"{policy.name} is the cheapest within {100 * TOLERANCE:g} % of the lowest perplexity with k = {top_k}, "
            f"{best.perplexity:.3f} ({best.policy.name})"
        )
    if top_k == 1:
        reason += "; the temperature, which one expert alone does not feel, is the best for two"
    tried = sorted({point.temperature for point in weighed})
    if len(tried) > 1 and temperature in (tried[0], tried[-1]):
        reason += "; the temperature is the last that was tried: look beyond it"
    return chosen, reason


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
                    clustering=catalog.clustering_digest(),
                    documents=found.documents,
                    tokens=found.tokens,
                    perplexity=chosen.perplexity,
                )
            )
    return found
