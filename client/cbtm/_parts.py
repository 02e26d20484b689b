"""What an ensemble is made of, wherever it comes from: a saved folder or a run's catalog."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cbtm._residency import ExpertSource
from cbtm_common.recipe import Recipe
from cbtm_common.routing import Router
from cbtm_common.run_routing import RunRouting


@dataclass(frozen=True, kw_only=True)
class ClusterInfo:
    """One of the K clusters, whether or not its expert exists yet."""

    id: str
    index: int
    top_terms: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExpertChanges:
    """What a refresh changed, by cluster id; false when nothing did."""

    added: tuple[str, ...] = ()
    # Withdrawn: their weight goes to the others.
    removed: tuple[str, ...] = ()
    # There is a newer version.
    replaced: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.replaced)


def _nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class EnsembleParts:
    """Experts are bound to clusters, and clusters to rows of the router, by id and never by order."""

    run_id: str
    run_name: str
    router: Router
    tokenizer_dir: Path
    # In the order of their indices.
    clusters: tuple[ClusterInfo, ...]
    # Cluster id -> expert, for those that exist.
    experts: Mapping[str, ExpertSource]
    # The model that the experts branched from.
    seed: ExpertSource | None = None
    recipe: Recipe = field(default_factory=Recipe)
    # How the run mixes its experts by default, where that was calibrated; else the recipe says.
    calibrated: RunRouting | None = None
    close: Callable[[], None] = _nothing
    # What it is made of by now, where that can change: experts that are as they were are the same objects.
    reload: Callable[[], EnsembleParts] | None = None

    @property
    def present(self) -> tuple[ClusterInfo, ...]:
        return tuple(c for c in self.clusters if c.id in self.experts)

    @property
    def missing(self) -> tuple[ClusterInfo, ...]:
        return tuple(c for c in self.clusters if c.id not in self.experts)
