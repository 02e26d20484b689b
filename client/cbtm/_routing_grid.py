"""Perplexity of every way to mix experts whose log-probabilities are known: arithmetic, no model runs.

A point has a temperature, a k, a policy (when weights follow the context) and, if asked for, a weight below which the
seed model stands in for the experts. What is chosen by a grid over validation documents is measured on test ones by a
grid of one point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cbtm._results import check_top_k, perplexity_of
from cbtm._routing import ContextRouter, Policy, RoutingOptions, no_cluster_near
from cbtm._scored import Float64, Progress, ScoredDocuments, log_mixtures
from cbtm_common.errors import InvalidArgument


@dataclass(frozen=True, kw_only=True)
class RoutingPolicy:
    """When weights follow the context: as `RoutingOptions` has it."""

    name: str
    interval: int = 1
    settle_after: int | None = None


# The cheapest first: an expert that comes in late reads the whole context before it can go on.
POLICIES = (
    RoutingPolicy(name="once after 16", interval=16, settle_after=16),
    RoutingPolicy(name="once after 32", interval=32, settle_after=32),
    RoutingPolicy(name="each 16", interval=16),
    RoutingPolicy(name="each token"),
)


@dataclass(frozen=True, kw_only=True)
class GridPoint:
    """What one way to mix the experts gives.

    `arrivals`: experts that come into the mixture, for each 1,000 tokens. `seed_below`: where the heaviest of all
    clusters weighs less, the seed model stands in for the experts, as for `seed_share` of the tokens; None: never.
    """

    temperature: float
    top_k: int
    policy: RoutingPolicy
    perplexity: float
    arrivals: float
    seed_below: float | None = None
    seed_share: float = 0.0


def routing_grid(
    scored: ScoredDocuments,
    router: ContextRouter,
    *,
    top_k: Sequence[int],
    temperatures: Sequence[float],
    policies: Sequence[RoutingPolicy] = POLICIES,
    seed_below: Sequence[float] = (),
    progress: Progress | None = None,
) -> tuple[GridPoint, ...]:
    """Perplexity of every combination, by temperature, policy and k, with and without the seed standing in.

    `router` is over the experts that scored the documents, in their order; its own options do not count, but for the
    distance. `seed_below` needs the seed among what was scored. Raises InvalidArgument.
    """
    experts = len(scored.experts)
    check_top_k(top_k, experts)
    if not temperatures or not all(0 < temperature < math.inf for temperature in temperatures):
        raise InvalidArgument(f"temperatures: {list(temperatures)} are not numbers above 0", field="temperatures")
    seed = scored.others.get("seed")
    if seed_below and seed is None:
        raise InvalidArgument("seed_below: this ensemble has no seed model", field="seed_below")
    rows = [
        [routed_rows(policy, sequence.first, len(sequence.ids)) for sequence in scored.sequences] for policy in policies
    ]
    points = []
    for number, temperature in enumerate(temperatures):
        view = router.with_options(
            {
                "top_k": "all",
                "temperature": temperature,
                "policy": Policy.PREFIX,
                "interval": 1,
                "settle_after": "never",
                "seed_below": "never",
            }
        )
        sums = [_Sums(top_k, seed_below) for _ in policies]
        for n, sequence in enumerate(scored.sequences):
            each_TK = view.positions(sequence.ids, sequence.first)
            for of_policy, into in zip(rows, sums, strict=True):
                into.add(each_TK[of_policy[n]], scored.of_experts(n), None if seed is None else seed[n])
        for policy, summed in zip(policies, sums, strict=True):
            points += summed.points(temperature, policy, scored.tokens)
        if progress is not None:
            progress("temperatures", number + 1, len(temperatures))
    return tuple(points)


def routed_rows(policy: RoutingPolicy, first: int, length: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For each scored token, whose weights it has of those routed at every token."""
    options = RoutingOptions(interval=policy.interval, settle_after=policy.settle_after)
    return np.array([options.routed(n) - first for n in range(first, length)], dtype=np.int64)


class _Sums:
    """Sums over documents for one temperature and policy: log-likelihoods, arrivals, tokens of the seed's."""

    def __init__(self, top_k: Sequence[int], seed_below: Sequence[float]) -> None:
        self._top_k = top_k
        self._seed_below = seed_below
        self._log_probs = np.zeros((1 + len(seed_below), len(top_k)))
        self._arrivals = np.zeros(len(top_k))
        self._seeded = np.zeros(len(seed_below))

    def add(self, weights_TK: Float64, log_probs_TK: Float64, seed_T: Float64 | None) -> None:
        columns = [k - 1 for k in self._top_k]
        mixed = log_mixtures(weights_TK, log_probs_TK)[:, columns]
        self._log_probs[0] += mixed.sum(axis=0)
        # Place of each expert when the heaviest come first.
        place_TK = np.argsort(np.argsort(-weights_TK, axis=1, kind="stable"), axis=1)
        for i, k in enumerate(self._top_k):
            kept_TK = place_TK < k
            self._arrivals[i] += k + np.count_nonzero(kept_TK[1:] & ~kept_TK[:-1])
        if seed_T is not None:
            for i, threshold in enumerate(self._seed_below):
                far_T = no_cluster_near(weights_TK, threshold)
                self._log_probs[1 + i] += np.where(far_T[:, None], seed_T[:, None], mixed).sum(axis=0)
                self._seeded[i] += np.count_nonzero(far_T)

    def points(self, temperature: float, policy: RoutingPolicy, tokens: int) -> list[GridPoint]:
        return [
            GridPoint(
                temperature=temperature,
                top_k=k,
                policy=policy,
                perplexity=perplexity_of(float(self._log_probs[row, i]), tokens),
                arrivals=1000 * float(self._arrivals[i]) / tokens,
                seed_below=None if row == 0 else self._seed_below[row - 1],
                seed_share=0.0 if row == 0 else float(self._seeded[row - 1]) / tokens,
            )
            for i, k in enumerate(self._top_k)
            for row in range(len(self._log_probs))
        ]
