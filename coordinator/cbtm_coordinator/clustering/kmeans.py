"""Balanced k-means: clusters of equal size, floor(N/K) or ceil(N/K), for any N ≥ K.

Each round solves the assignment's dual: prices p_j such that sending every point to argmin_j(‖x − c_j‖² + p_j) fills
each cluster just to its capacity. Prices move by sign-based steps that halve when they overshoot (Rprop, Riedmiller &
Braun 1993), each step one N × K argmin; they start where the round before ended, so a few suffice. What is left over
the capacity, a percent or so, moves to where it costs least. An auction pays for the same result with thousands of
bidding rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.float32]
Int = npt.NDArray[np.int64]

_PRICE_STEPS = 60
# Imbalance, as a share of N/K, that the exact repair may be left with.
_TOLERANCE = 0.01
# Rounds that lower the inertia by a smaller share than this are not worth their time.
_WORTHWHILE = 5e-4


@dataclass(frozen=True, kw_only=True)
class KMeansResult:
    """`centroids` [K, d] are the means of the balanced clusters; `inertia` = Σ ‖x − c‖² over all points."""

    centroids: Float
    labels: Int
    inertia: float
    iterations: int


def balanced_kmeans(
    points: Float,
    clusters: int,
    *,
    seed: int,
    max_iterations: int = 30,
    restarts: int = 1,
    on_share: Callable[[float], None] = lambda _: None,
) -> KMeansResult:
    """Clusters `points` [N, d]. Deterministic for a seed. Of several restarts the lowest inertia wins.

    `on_share` hears of the share done, of as many rounds as it may take. Raises ValueError when there are fewer points
    than clusters.
    """
    if len(points) < clusters:
        raise ValueError(f"{len(points)} points cannot fill {clusters} clusters")
    points = np.ascontiguousarray(points, dtype=np.float32)
    best: KMeansResult | None = None
    for attempt in range(restarts):
        chance = np.random.default_rng([seed, attempt])
        start = _plus_plus(points, clusters, chance)
        found = _rounds(points, start, max_iterations, partial(_share, on_share, attempt, restarts))
        if best is None or found.inertia < best.inertia:
            best = found
    assert best is not None
    return best


def _share(on_share: Callable[[float], None], done: int, restarts: int, share: float) -> None:
    on_share((done + share) / restarts)


def _rounds(
    points: Float, centroids: Float, max_iterations: int, on_share: Callable[[float], None] = lambda _: None
) -> KMeansResult:
    """From these centroids [K, d] on, until the inertia falls no more."""
    clusters = len(centroids)
    capacity = capacities(len(points), clusters)
    prices = np.zeros(clusters, dtype=np.float32)
    lengths = float((points**2).sum(dtype=np.float64))
    labels: Int = np.full(len(points), -1)
    inertia, iteration = np.inf, 0
    for iteration in range(1, max_iterations + 1):
        before, inertia_before = labels, inertia
        costs = _costs(points, centroids)
        prices = _balance_prices(costs, capacity, prices)
        labels = _repair(costs, (costs + prices).argmin(axis=1), capacity)
        centroids = _means(points, labels, clusters)
        inertia = lengths + _total(costs, labels)
        on_share(iteration / max_iterations)
        if (labels == before).all() or inertia_before - inertia <= _WORTHWHILE * inertia:
            break
    squared = max(0.0, lengths + _total(_costs(points, centroids), labels))
    return KMeansResult(centroids=centroids, labels=labels, inertia=squared, iterations=iteration)


def capacities(points: int, clusters: int) -> Int:
    """Sizes that differ by one at most and sum to `points`, [K]."""
    sizes: Int = np.full(clusters, points // clusters)
    sizes[: points % clusters] += 1
    return sizes


def _costs(points: Float, centroids: Float) -> Float:
    """‖x − c‖² − ‖x‖² [N, K]: what differs between clusters."""
    costs: Float = points @ (-2.0 * centroids.T)
    costs += (centroids**2).sum(axis=1)
    return costs


def _total(costs: Float, labels: Int) -> float:
    return float(costs[np.arange(len(labels)), labels].sum(dtype=np.float64))


def _plus_plus(points: Float, clusters: int, chance: np.random.Generator) -> Float:
    """k-means++ seeding (Arthur & Vassilvitskii 2007): far points are likelier to become centres."""
    chosen = [int(chance.integers(len(points)))]
    lengths = (points**2).sum(axis=1)
    nearest = np.full(len(points), np.inf, dtype=np.float32)
    for _ in range(clusters - 1):
        centre = points[chosen[-1]]
        distance = lengths - 2.0 * (points @ centre) + centre @ centre
        nearest = np.minimum(nearest, np.maximum(distance, 0.0))
        total = nearest.sum(dtype=np.float64)
        if total <= 0:
            # Fewer distinct points than clusters: any other will do.
            left = np.setdiff1d(np.arange(len(points)), chosen)
            chosen.append(int(chance.choice(left)))
            continue
        place = np.searchsorted(np.cumsum(nearest, dtype=np.float64), chance.random() * total)
        chosen.append(int(min(place, len(points) - 1)))
    return points[chosen].copy()


def _balance_prices(costs: Float, capacity: Int, prices: Float) -> Float:
    """Prices [K] under which each cluster attracts about its capacity; the best seen of a bounded search."""
    clusters = len(capacity)
    step = np.full(clusters, 0.05 * float(costs.std()) + 1e-6, dtype=np.float32)
    best, best_excess = prices, np.inf
    sign = np.zeros(clusters, dtype=np.float32)
    priced = np.empty_like(costs)
    for _ in range(_PRICE_STEPS):
        np.add(costs, prices, out=priced)
        counts = np.bincount(priced.argmin(axis=1), minlength=clusters)
        excess = counts - capacity
        worst = int(np.abs(excess).max())
        total = int(np.abs(excess).sum())
        if total < best_excess:
            best, best_excess = prices, total
        if worst <= max(1.0, _TOLERANCE * float(capacity.mean())):
            break
        turned = np.sign(excess).astype(np.float32)
        step = np.where(turned * sign < 0, step * 0.5, step * 1.2).astype(np.float32)
        sign = turned
        # Far from balance a full step; near it a small one, so that prices settle.
        prices = prices + step * turned * np.minimum(1.0, np.abs(excess) / (0.1 * capacity)).astype(np.float32)
    return best


def _repair(costs: Float, labels: Int, capacity: Int) -> Int:
    """Moves what is over capacity to clusters with room, cheapest moves first, until sizes are exact."""
    labels = labels.copy()
    while True:
        counts = np.bincount(labels, minlength=len(capacity))
        surplus = np.maximum(counts - capacity, 0)
        room = np.maximum(capacity - counts, 0)
        if not surplus.any():
            return labels
        movable = np.flatnonzero(surplus[labels] > 0)
        open_clusters = np.flatnonzero(room)
        options = costs[movable][:, open_clusters]
        target = options.argmin(axis=1)
        price = options[np.arange(len(movable)), target] - costs[movable, labels[movable]]
        for place in np.argsort(price, kind="stable").tolist():
            point, to = int(movable[place]), int(open_clusters[target[place]])
            origin = int(labels[point])
            if surplus[origin] > 0 and room[to] > 0:
                labels[point] = to
                surplus[origin] -= 1
                room[to] -= 1


def _means(points: Float, labels: Int, clusters: int) -> Float:
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(clusters))
    sums = np.add.reduceat(points[order], starts, axis=0, dtype=np.float64)
    counts = np.bincount(labels, minlength=clusters)
    return (sums / counts[:, None]).astype(np.float32)
