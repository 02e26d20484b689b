"""Fits the clustering model on a sample: tf-idf, truncated SVD to 100 dimensions, normalised, balanced k-means.

The terms are those of `cbtm_common.routing`, so what is fitted here is exactly what routes later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cbtm_common.errors import InvalidArgument
from cbtm_common.routing import CentroidRouter, TermEmbedding, terms
from cbtm_coordinator.clustering.kmeans import balanced_kmeans

DIMENSIONS = 100
MAX_TERMS = 65_536
_TOP_TERMS = 20


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
    temperature: float,
    report: Callable[[str], None] = lambda _: None,
) -> FitResult:
    """A router for `cluster_ids` fitted on `texts`. Raises InvalidArgument for fewer texts than clusters."""
    clusters = len(cluster_ids)
    if len(texts) < clusters:
        raise InvalidArgument(f"clusters: {clusters} cannot be made of {len(texts)} documents", field="clusters")
    if clusters == 1:
        return _trivial(cluster_ids[0], temperature)
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    report("counting terms")
    vectorizer = TfidfVectorizer(
        analyzer=terms, min_df=2 if len(texts) >= 1000 else 1, max_features=MAX_TERMS, dtype=np.float32
    )
    try:
        tfidf = vectorizer.fit_transform(texts)
    except ValueError as error:
        raise InvalidArgument(f"corpus: no usable words to cluster by ({error})", field="corpus") from error
    dimensions = min(DIMENSIONS, tfidf.shape[1] - 1, tfidf.shape[0] - 1)
    if dimensions < 1:
        raise InvalidArgument("corpus: too few different words to cluster by", field="corpus")
    report("reducing to 100 dimensions")
    svd = TruncatedSVD(dimensions, random_state=seed, n_iter=4)
    svd.fit(tfidf)
    projection = (vectorizer.idf_[:, None] * svd.components_.T).astype(np.float32)
    embedding = TermEmbedding(vectorizer.get_feature_names_out().tolist(), projection)
    # The rows that `embedding.embed` would give, by one sparse product.
    embedded = tfidf @ svd.components_.T.astype(np.float32)
    lengths = np.linalg.norm(embedded, axis=1, keepdims=True)
    embedded = np.divide(embedded, lengths, out=np.zeros_like(embedded), where=lengths > 1e-12)
    report("balanced k-means")
    result = balanced_kmeans(embedded, clusters, seed=seed)
    router = CentroidRouter(
        cluster_ids=cluster_ids,
        embedding=embedding,
        centroids=result.centroids,
        prior=np.full(clusters, 1.0 / clusters, dtype=np.float32),
        temperature=temperature,
    )
    return FitResult(
        router=router,
        top_terms=_top_terms(tfidf, result.labels, clusters, embedding.terms),
        inertia=result.inertia,
        explained_variance=float(svd.explained_variance_ratio_.sum()),
    )


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
