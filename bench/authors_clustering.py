"""c-BTM's published clustering pipeline, written anew as what ours is measured against.

Word tf-idf by scikit-learn (English stop words and numbers left out), `TruncatedSVD` to 100 dimensions, L2; k-means on
squared Euclidean distance whose every round hands out equal shares by an auction (the one of BASE layers, arXiv
2103.16716). It is given the best of its conditions: all documents as one batch, where several would each overwrite the
centres, and a number that K divides, as leftovers stop its auction from ending.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer

DIMENSIONS = 100
ROUNDS = 20
# Of the centres, all together and squared.
_SETTLED = 1e-3
# From so many bidding rounds on, points that nobody bids for are bid for at the least price.
_FORCED_AFTER = 1000
_KEPT_UNTIL = 100


class WordVectorizer(TfidfVectorizer):  # type: ignore[misc]
    """tf-idf over words but those that begin with a digit."""

    def build_tokenizer(self) -> Any:
        tokenize = super().build_tokenizer()
        return lambda text: [token for token in tokenize(text) if not token[0].isdigit()]


@dataclass(frozen=True, kw_only=True)
class AuthorsModel:
    """`centres` [K, 100]; `inertia` of the fit's own documents under equal shares."""

    pipeline: Pipeline
    centres: torch.Tensor
    inertia: float

    def assign(self, texts: Iterable[str]) -> npt.NDArray[np.int64]:
        """The nearest centre of each text, [N]."""
        points = torch.from_numpy(np.asarray(self.pipeline.transform(texts), dtype=np.float32))
        return np.asarray(squared_distances(points, self.centres).argmin(dim=1))


def vectorizer(seed: int) -> Pipeline:
    """Text to unit rows of 100 dimensions."""
    words = WordVectorizer(stop_words="english")
    return make_pipeline(words, TruncatedSVD(DIMENSIONS, random_state=seed), Normalizer(copy=False))


def fit(texts: Sequence[str], clusters: int, *, seed: int) -> AuthorsModel:
    """The whole pipeline fitted on `texts`."""
    pipeline = vectorizer(seed)
    points = torch.from_numpy(np.asarray(pipeline.fit_transform(texts), dtype=np.float32))
    even = len(points) - len(points) % clusters
    centres, _, inertia = auction_kmeans(points[:even], clusters, seed=seed)
    return AuthorsModel(pipeline=pipeline, centres=centres, inertia=inertia)


def auction_kmeans(
    points: torch.Tensor, clusters: int, *, seed: int, rounds: int = ROUNDS
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(centres [K, d], labels [N], inertia) of `points` [N, d], N a multiple of K; from K points drawn at random."""
    chosen = np.random.default_rng(seed).choice(len(points), clusters, replace=False)
    centres = points[torch.from_numpy(chosen)]
    labels = torch.zeros(len(points), dtype=torch.int64)
    for _ in range(rounds):
        labels = auction(-squared_distances(points, centres))
        before = centres
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        centres = sums / (len(points) // clusters)
        if float((centres - before).norm(dim=1).sum()) ** 2 < _SETTLED:
            break
    return centres, labels, float((points - centres[labels]).double().pow(2).sum())


def squared_distances(points: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """[N, K]."""
    lengths = points.pow(2).sum(dim=1, keepdim=True) + centres.pow(2).sum(dim=1)
    return torch.addmm(lengths, points, centres.T, alpha=-2.0)


def auction(scores: torch.Tensor) -> torch.Tensor:
    """The cluster of each point [N], equal shares, by bidding on `scores` [N, K] until every point is bid for."""
    smallest = ((scores.max() - scores.min()) / 50).clamp_min(1e-4)
    worth = scores.T.contiguous()
    clusters, points = worth.shape
    share = points // clusters
    value = worth.clone()
    cost = torch.zeros(1, points)
    held: torch.Tensor | None = None
    unwanted = torch.zeros(0, dtype=torch.int64)
    turn = 0
    while True:
        # A cluster bids for its best points what the last of them is dearer than the next one after.
        top, which = value.topk(min(share + 1, points), dim=1)
        raise_by = top[:, :share] - top[:, -1:] + smallest
        bids = torch.zeros(clusters, points).scatter_(1, which[:, :share], raise_by)
        if held is not None and turn < _KEPT_UNTIL:
            bids.view(-1)[held] = smallest
        if turn > _FORCED_AFTER:
            bids[:, unwanted] = smallest
        wanted = (bids > 0).any(dim=0)
        at, unwanted = wanted.nonzero().squeeze(1), (~wanted).nonzero().squeeze(1)
        highest, bidder = bids[:, at].max(dim=0)
        if len(at) == points:
            return bidder
        cost[:, at] += highest
        value = worth - cost
        held = bidder * points + at
        value.view(-1)[held] = worth.view(-1)[held]
        turn += 1
