"""The experts that an ensemble has at one time, with the router over just them; replaced as a whole, never changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from cbtm._parts import ClusterInfo, EnsembleParts, ExpertChanges
from cbtm._residency import ExpertPool, Residency
from cbtm._routing import ContextRouter, Policy, RoutingChange, RoutingOptions
from cbtm._tokens import TextCodec
from cbtm_common.errors import InvalidState

TopK = int | Literal["all"] | None


@dataclass(frozen=True, kw_only=True)
class Members:
    parts: EnsembleParts
    pool: ExpertPool
    router: ContextRouter
    codec: TextCodec

    @property
    def clusters(self) -> tuple[ClusterInfo, ...]:
        """Those whose expert is here: the K of every weight vector."""
        return self.parts.present

    def routed(self, change: RoutingChange) -> ContextRouter:
        """The router with other options. Raises InvalidArgument, also for a seed that cannot stand in."""
        router = self.router.with_options(change)
        if router.options.seed_below is not None and self.router.options.seed_below is None:
            self.pool.check_seed()
        return router


def assemble(parts: EnsembleParts, residency: Residency, codec: TextCodec, routing: RoutingOptions) -> Members:
    """Raises InvalidState without an expert, InvalidArgument when what is given does not fit together."""
    if not parts.present:
        raise InvalidState(f"the ensemble of run {parts.run_name} holds no expert")
    ids = [cluster.id for cluster in parts.present]
    experts = [parts.experts[cluster_id] for cluster_id in ids]
    pool = ExpertPool(experts, residency, tokenizer=codec.digest, seed=parts.seed)
    codec.check(pool.vocabulary)
    router = ContextRouter(parts.router.restrict(ids), codec.detokenizer, routing, seed=parts.seed is not None)
    if routing.seed_below is not None:
        pool.check_seed()
    return Members(parts=parts, pool=pool, router=router, codec=codec)


def first_routing(
    parts: EnsembleParts, *, top_k: TopK, temperature: float | None, saved: RoutingOptions | None = None
) -> RoutingOptions:
    """What is asked for; else as it was saved; else as the run was calibrated; else its recipe's."""
    default = saved or _default_routing(parts)
    return replace(
        default,
        top_k=default.top_k if top_k is None else top_k_of(top_k, parts),
        temperature=default.temperature if temperature is None else temperature,
    )


def _default_routing(parts: EnsembleParts) -> RoutingOptions:
    top_k, calibrated = top_k_of(None, parts), parts.calibrated
    if calibrated is None:
        return RoutingOptions(top_k=top_k, temperature=parts.recipe.routing.temperature or parts.router.temperature)
    return RoutingOptions(
        top_k=top_k,
        temperature=calibrated.temperature,
        interval=calibrated.interval,
        settle_after=calibrated.settle_after,
        seed_below=calibrated.seed_below if parts.seed is not None else None,
    )


def top_k_of(asked: TopK, parts: EnsembleParts) -> int | None:
    """As `RoutingOptions` has it; where nothing is asked for, the run's, or as many as there are."""
    if asked is None:
        return usual_top_k(parts)
    return None if asked == "all" else asked


def usual_top_k(parts: EnsembleParts) -> int:
    """The run's, or as many as there are."""
    return min((parts.calibrated or parts.recipe.routing).top_k, max(1, len(parts.present)))


def renewed(old: Members, parts: EnsembleParts, *, asked: TopK) -> tuple[Members, ExpertChanges]:
    """`old` with the experts of `parts`; models in memory stay. `asked` is the top k that the user wants.

    Raises InvalidState when no expert is left, or none that fixed weights name.
    """
    changes = changes_between(old.parts, parts)
    if not changes:
        return old, changes
    options = old.router.options
    weights = options.weights
    if options.policy is Policy.FIXED and weights is not None:
        by_id = {cluster.id: weight for cluster, weight in zip(old.clusters, weights, strict=True)}
        weights = tuple(by_id.get(cluster.id, 0.0) for cluster in parts.present)
        if parts.present and not any(weights):
            raise InvalidState("refresh: no expert is left of those that the fixed weights name; set others first")
    top_k = top_k_of(asked, parts)
    routing = replace(
        options, top_k=top_k if top_k is None else min(top_k, max(1, len(parts.present))), weights=weights
    )
    return assemble(parts, old.pool.residency, old.codec, routing), changes


def changes_between(old: EnsembleParts, new: EnsembleParts) -> ExpertChanges:
    """By cluster; an expert whose files are the same is the same object."""
    both = [cluster.id for cluster in new.present if cluster.id in old.experts]
    return ExpertChanges(
        added=tuple(cluster.id for cluster in new.present if cluster.id not in old.experts),
        removed=tuple(cluster.id for cluster in old.present if cluster.id not in new.experts),
        replaced=tuple(i for i in both if old.experts[i] is not new.experts[i]),
    )
