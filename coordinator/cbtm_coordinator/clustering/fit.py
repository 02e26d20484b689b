"""Fits the clustering model on a sample: tf-idf, truncated SVD to 100 dimensions, normalised, balanced k-means.

Term counts are taken by their logarithm and idf squared, in the place of a list of stop words, where c-BTM takes both
as they are: clusters then agree far better with the domains that documents come from (docs/results/clustering.md).
The terms are those of `cbtm_common.routing`, so what is fitted here is exactly what routes later; and nothing of it is
changed after the corpus has been sharded by it, the prior included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from cbtm_common.errors import InvalidArgument
from cbtm_common.routing import CentroidRouter, TermEmbedding
from cbtm_coordinator.clustering.engine import ONE_PROCESS, Engine
from cbtm_coordinator.clustering.kmeans import balanced_kmeans
from cbtm_coordinator.clustering.svd import truncated_svd
from cbtm_coordinator.clustering.tfidf import tfidf

DIMENSIONS = 100
_IDF_POWER = 2.0
_TOP_TERMS = 20
# From so many texts on, a term must occur in two of them.
_MANY_TEXTS = 1000
# k-means depends on where it starts by a few percent of its inertia; it is tried again where that takes seconds.
_RESTARTS = 4
_CHEAP = 4_000_000


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """`top_terms[j]` are the terms that set cluster j apart, best first."""

    router: CentroidRouter
    top_terms: tuple[tuple[str, ...], ...]
    inertia: float
    explained_variance: float


def fit(
    texts: Sequence[str],
    cluster_ids: Sequence[str],
    *,
    seed: int,
    temperature: float = 0.1,
    engine: Engine = ONE_PROCESS,
    report: Callable[[str, float], None] = lambda *_: None,
) -> FitResult:
    """A router for `cluster_ids` fitted on `texts`. Raises InvalidArgument for fewer texts than clusters.

    `report` hears of what is being done and the share of it that is. The result depends neither on the engine nor on
    how many cores there are: BLAS, whose sums would, computes on one, which costs little beside the rest.
    """
    with threadpool_limits(1, user_api="blas"):
        return _fit(texts, cluster_ids, seed=seed, temperature=temperature, engine=engine, report=report)


def _fit(
    texts: Sequence[str],
    cluster_ids: Sequence[str],
    *,
    seed: int,
    temperature: float,
    engine: Engine,
    report: Callable[[str, float], None],
) -> FitResult:
    clusters = len(cluster_ids)
    if len(texts) < clusters:
        raise InvalidArgument(f"clusters: {clusters} cannot be made of {len(texts)} documents", field="clusters")
    if clusters == 1:
        return _trivial(cluster_ids[0], temperature)
    least = 2 if len(texts) >= _MANY_TEXTS else 1
    on_texts = _share_of(len(texts), report)
    counted = tfidf(texts, min_documents=least, sublinear=True, idf_power=_IDF_POWER, engine=engine, on_texts=on_texts)
    dimensions = min(DIMENSIONS, len(counted.terms) - 1, len(texts) - 1)
    if dimensions < 1:
        raise InvalidArgument("corpus: too few different words to cluster by", field="corpus")
    components, _ = truncated_svd(
        counted.matrix,
        dimensions,
        seed=seed,
        on_share=lambda share: report(f"reducing to {dimensions} dimensions", share),
    )
    projection = (counted.idf[:, None] * components.T).astype(np.float32)
    embedding = TermEmbedding(counted.terms, projection, sublinear=True)
    # The rows that `embedding.embed` would give, by one sparse product.
    embedded = counted.matrix @ np.ascontiguousarray(components.T)
    lengths = np.linalg.norm(embedded, axis=1)
    # A text without a known term says nothing of where a centroid should be.
    known = np.flatnonzero(lengths > 1e-12)
    if len(known) < clusters:
        raise InvalidArgument(
            f"clusters: only {len(known)} document(s) have words to cluster by, for {clusters} clusters",
            field="clusters",
        )
    points = embedded[known] / lengths[known, None]
    restarts = _RESTARTS if len(points) * clusters <= _CHEAP else 1
    result = balanced_kmeans(
        points, clusters, seed=seed, restarts=restarts, on_share=lambda share: report("balanced k-means", share)
    )
    router = CentroidRouter(
        cluster_ids=cluster_ids,
        embedding=embedding,
        centroids=result.centroids,
        prior=_prior(points, result.centroids, np.array([len(text) for text in texts], dtype=np.float64)[known]),
        temperature=temperature,
    )
    return FitResult(
        router=router,
        top_terms=_top_terms(counted.matrix[known], result.labels, clusters, counted.terms),
        inertia=result.inertia,
        explained_variance=_explained(counted.matrix, embedded),
    )


def _share_of(total: int, report: Callable[[str, float], None]) -> Callable[[int], None]:
    done = 0

    def on_texts(count: int) -> None:
        nonlocal done
        done += count
        report("counting terms", done / total)

    return on_texts


def _explained(matrix: Any, embedded: Any) -> float:
    """The share of the rows' variance that their embedding keeps."""
    mean = np.asarray(matrix.mean(axis=0), dtype=np.float64)
    whole = float(matrix.multiply(matrix).sum()) / matrix.shape[0] - float((mean**2).sum())
    kept = float(embedded.var(axis=0, dtype=np.float64).sum())
    return min(1.0, kept / whole) if whole > 0 else 0.0


def _prior(points: Any, centroids: Any, characters: Any) -> Any:
    """Each cluster's share of the sample's characters under nearest-centroid assignment, [K] float32."""
    nearest = ((centroids**2).sum(axis=1) - 2 * points @ centroids.T).argmin(axis=1)
    shares = np.bincount(nearest, weights=characters, minlength=len(centroids))
    return (shares / shares.sum()).astype(np.float32)


def _trivial(cluster_id: str, temperature: float) -> FitResult:
    """K = 1: everything goes to the only cluster, by the prior."""
    router = CentroidRouter(
        cluster_ids=[cluster_id],
        embedding=TermEmbedding([], np.zeros((0, 1), dtype=np.float32)),
        centroids=np.zeros((1, 1), dtype=np.float32),
        prior=np.ones(1, dtype=np.float32),
        temperature=temperature,
    )
    return FitResult(router=router, top_terms=((),), inertia=0.0, explained_variance=1.0)


def _top_terms(tfidf: Any, labels: Any, clusters: int, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Terms by how far their mean tf-idf in a cluster is above that in the corpus."""
    overall = np.asarray(tfidf.mean(axis=0)).ravel()
    found = []
    for cluster in range(clusters):
        lift = np.asarray(tfidf[labels == cluster].mean(axis=0)).ravel() - overall
        best = np.argsort(-lift)[:_TOP_TERMS]
        found.append(tuple(names[i] for i in best if lift[i] > 0))
    return tuple(found)
