"""Balanced k-means: exact sizes, good clusters, the same result again."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_coordinator.clustering.kmeans import KMeansResult, balanced_kmeans, capacities

Points = npt.NDArray[np.float32]


def on_the_sphere(count: int, dimensions: int, seed: int, groups: int = 5) -> Points:
    """Points as documents give them: of length 1, around centres of unequal popularity."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(groups, dimensions))
    popular = random.dirichlet(np.ones(groups))
    points: Any = centres[random.choice(groups, count, p=popular)] + 0.7 * random.normal(size=(count, dimensions))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return np.asarray(points, dtype=np.float32)


def sizes(result: KMeansResult, clusters: int) -> list[int]:
    return sorted(np.bincount(result.labels, minlength=clusters).tolist(), reverse=True)


def greedy_inertia(points: Points, clusters: int, seed: int) -> float:
    """A plain balanced k-means to compare with: each round gives the closest pair of point and open cluster first."""
    random = np.random.default_rng(seed)
    centroids = points[random.choice(len(points), clusters, replace=False)].astype(np.float64)
    labels = np.zeros(len(points), dtype=np.int64)
    for _ in range(15):
        d2 = ((points[:, None] - centroids[None]) ** 2).sum(axis=2)
        room = capacities(len(points), clusters).copy()
        labels[:] = -1
        for flat in np.argsort(d2, axis=None, kind="stable").tolist():
            point, cluster = divmod(flat, clusters)
            if labels[point] < 0 and room[cluster]:
                labels[point] = cluster
                room[cluster] -= 1
        centroids = np.stack([points[labels == c].mean(axis=0) for c in range(clusters)])
    return float(((points - centroids[labels]) ** 2).sum())


@given(count=st.integers(1, 120), share=st.floats(0, 1), dimensions=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_every_cluster_has_its_share_to_within_one(count: int, share: float, dimensions: int, seed: int) -> None:
    clusters = 1 + int(share * (count - 1))
    result = balanced_kmeans(on_the_sphere(count, dimensions, seed), clusters, seed=seed, max_iterations=5)
    assert sizes(result, clusters) == capacities(count, clusters).tolist()
    assert result.centroids.shape == (clusters, dimensions)
    assert np.isfinite(result.centroids).all()


@pytest.mark.parametrize(("count", "clusters"), [(7, 7), (1000, 7), (1001, 8), (640, 64), (9, 2), (5, 1)])
def test_sizes_hold_at_the_edges(count: int, clusters: int) -> None:
    result = balanced_kmeans(on_the_sphere(count, 8, 0), clusters, seed=1)
    assert sizes(result, clusters) == capacities(count, clusters).tolist()


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_sizes_hold_where_most_points_are_the_same(distinct: int) -> None:
    points = np.repeat(on_the_sphere(distinct, 4, 0), 50, axis=0)[:50]
    points[-distinct:] = on_the_sphere(distinct, 4, 0)
    result = balanced_kmeans(points, 6, seed=0)
    assert sizes(result, 6) == [9, 9, 8, 8, 8, 8]


def test_documents_without_a_known_term_are_clustered_too() -> None:
    points = on_the_sphere(40, 4, 0)
    points[:15] = 0
    result = balanced_kmeans(points, 4, seed=0)
    assert sizes(result, 4) == [10] * 4
    assert np.isfinite(result.inertia)


@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_no_worse_than_greedy_ones(seed: int) -> None:
    points = on_the_sphere(300, 10, seed)
    best_greedy = min(greedy_inertia(points, 6, s) for s in range(2))
    assert balanced_kmeans(points, 6, seed=seed).inertia <= 1.03 * best_greedy


def test_separate_groups_of_equal_size_are_found() -> None:
    truth = np.repeat(np.arange(4), 25)
    points = (np.eye(4)[truth] + 0.05 * np.random.default_rng(0).normal(size=(100, 4))).astype(np.float32)
    labels = balanced_kmeans(points, 4, seed=0).labels
    assert len({(a, b) for a, b in zip(truth.tolist(), labels.tolist(), strict=True)}) == 4


def test_the_inertia_is_that_of_the_labels_and_centroids() -> None:
    points = on_the_sphere(200, 6, 3)
    result = balanced_kmeans(points, 5, seed=0)
    expected = ((points - result.centroids[result.labels]) ** 2).sum()
    assert result.inertia == pytest.approx(float(expected), rel=1e-4)
    for cluster in range(5):
        np.testing.assert_allclose(
            result.centroids[cluster], points[result.labels == cluster].mean(axis=0), rtol=1e-4, atol=1e-5
        )


def test_a_seed_gives_the_same_clusters_again_and_leaves_the_points_alone() -> None:
    points = on_the_sphere(300, 8, 2)
    before = points.copy()
    first, second = (balanced_kmeans(points, 7, seed=11) for _ in range(2))
    np.testing.assert_array_equal(first.labels, second.labels)
    np.testing.assert_array_equal(first.centroids, second.centroids)
    np.testing.assert_array_equal(points, before)


def test_of_several_restarts_the_best_is_taken() -> None:
    points = on_the_sphere(200, 5, 9)
    assert balanced_kmeans(points, 6, seed=0, restarts=4).inertia <= balanced_kmeans(points, 6, seed=0).inertia


def test_fewer_points_than_clusters_are_refused() -> None:
    with pytest.raises(ValueError, match="3 points cannot fill 4 clusters"):
        balanced_kmeans(on_the_sphere(3, 2, 0), 4, seed=0)
