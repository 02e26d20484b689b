"""Trains the learned router: multinomial logistic regression from prefixes to the clusters of their documents.

Every text of the sample is cut at a few random lengths, short ones as often as long ones, and each prefix is labelled
with the cluster that the whole text is in. Texts that are kept apart say when to stop, and which temperature makes the
weights true: of all prefixes that give a cluster 0.7, 0.7 are of that cluster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cbtm_common.errors import InvalidArgument
from cbtm_common.routing import CentroidRouter, LearnedRouter
from cbtm_common.routing.embedding import Float32
from cbtm_common.routing.learned import pieces

# At most so many texts are learned from, and so many pieces of each read.
_TEXTS = 30_000
_PIECES = 1024
_CUTS = 4
_LEAST = 20
_SHORTEST = 2
_VOCABULARY = 32_768
_MIN_TEXTS = 3
_KEPT_APART = 0.1
_LEARNING_RATE = 0.01
_BATCH = 256
_EPOCHS = 20
# Epochs without a better loss on the texts kept apart before it ends.
_PATIENCE = 2
_TEMPERATURES = np.geomspace(0.25, 4.0, 33)


@dataclass(frozen=True, kw_only=True)
class LearnResult:
    """`accuracy` and `loss` (nats) are of prefixes of texts that were not learned from; `centroid_accuracy` is that of
    the clustering's own router on the same ones.
    """

    router: LearnedRouter
    accuracy: float
    loss: float
    centroid_accuracy: float

    def report(self) -> dict[str, float]:
        """For the run's report."""
        return {
            "pieces": len(self.router.vocabulary),
            "temperature": self.router.temperature,
            "prefix_accuracy": self.accuracy,
            "prefix_loss": self.loss,
            "centroid_prefix_accuracy": self.centroid_accuracy,
        }


def learn_router(
    clustering: CentroidRouter,
    texts: Sequence[str],
    *,
    seed: int,
    report: Callable[[str, float], None] = lambda *_: None,
) -> LearnResult:
    """A router that has learned `clustering` on `texts`. Deterministic in `seed`.

    Raises InvalidArgument when there are too few texts to keep some apart.
    """
    random = np.random.default_rng((seed, 0x6C6561726E))
    if len(texts) > _TEXTS:
        texts = [texts[i] for i in np.sort(random.choice(len(texts), _TEXTS, replace=False))]
    labels = clustering.assign(texts)
    ends: list[int] = []
    counts: list[Counter[str]] = []
    owner: list[int] = []
    for number, text in enumerate(texts):
        for end, counted in _cuts(text, random):
            ends.append(end)
            counts.append(counted)
            owner.append(number)
        if number % 1000 == 0:
            report("reading prefixes", number / len(texts))
    of_text = np.array(owner, dtype=np.int64)
    apart = random.random(len(texts)) < _KEPT_APART
    kept = apart[of_text]
    vocabulary = _vocabulary(counts, of_text, ~kept, len(texts))
    if len(texts) < _LEAST or not vocabulary or not kept.any():
        raise InvalidArgument(
            f"routing.router: {len(texts)} documents are too few to learn a router from; "
            'set it to "centroid", or give more text',
            field="routing.router",
        )
    features = _features(counts, vocabulary)
    target = labels[of_text]
    coefficients, bias = _train(features, target, ~kept, clusters=len(clustering.cluster_ids), seed=seed, report=report)
    logits = features[kept] @ coefficients + bias
    losses = [_loss(logits, target[kept], float(t)) for t in _TEMPERATURES]
    router = LearnedRouter(
        clustering=clustering,
        vocabulary=vocabulary,
        coefficients=coefficients,
        bias=bias,
        temperature=float(_TEMPERATURES[int(np.argmin(losses))]),
    )
    held = [texts[owner[i]][: ends[i]] for i in np.flatnonzero(kept)]
    return LearnResult(
        router=router,
        accuracy=float((router.weights(held).argmax(axis=1) == target[kept]).mean()),
        loss=float(min(losses)),
        centroid_accuracy=float((clustering.weights(held).argmax(axis=1) == target[kept]).mean()),
    )


def _cuts(text: str, random: np.random.Generator) -> list[tuple[int, Counter[str]]]:
    """(end, pieces before it with their counts) at random numbers of pieces, spread evenly in their logarithm."""
    found = []
    for start, end, piece in pieces(text):
        found.append((start, end, piece))
        if len(found) == _PIECES:
            break
    if len(found) < _SHORTEST:
        return []
    lengths = np.exp(random.uniform(np.log(_SHORTEST), np.log(len(found) + 1), _CUTS)).astype(int)
    cuts, counted, done = [], Counter[str](), 0
    for length in np.unique(np.minimum(lengths, len(found))).tolist():
        counted.update(piece for _, _, piece in found[done:length])
        done = length
        cuts.append((found[length - 1][1], counted.copy()))
    return cuts


def _vocabulary(
    counts: Sequence[Counter[str]], of_text: npt.NDArray[np.int64], used: npt.NDArray[np.bool_], texts: int
) -> list[str]:
    """The pieces that most texts have, the first `_VOCABULARY` by that, then by themselves."""
    # The last prefix of a text holds all others.
    longest = {int(text): i for i, text in enumerate(of_text) if used[i]}
    seen: Counter[str] = Counter()
    for i in longest.values():
        seen.update(counts[i].keys())
    least = _MIN_TEXTS if texts >= 1000 else 1
    ranked = sorted((piece for piece, times in seen.items() if times >= least), key=lambda piece: (-seen[piece], piece))
    return ranked[:_VOCABULARY]


def _features(counts: Sequence[Counter[str]], vocabulary: Sequence[str]) -> Any:
    """log(1 + count) [prefixes, V], sparse."""
    from scipy.sparse import csr_matrix

    row_of = {piece: row for row, piece in enumerate(vocabulary)}
    columns: list[int] = []
    values: list[int] = []
    ends = [0]
    for counted in counts:
        for piece, times in counted.items():
            column = row_of.get(piece)
            if column is not None:
                columns.append(column)
                values.append(times)
        ends.append(len(columns))
    data = np.log1p(np.array(values, dtype=np.float32))
    return csr_matrix((data, columns, ends), shape=(len(counts), len(vocabulary)))


def _train(
    features: Any,
    target: npt.NDArray[np.int64],
    used: npt.NDArray[np.bool_],
    *,
    clusters: int,
    seed: int,
    report: Callable[[str, float], None],
) -> tuple[Float32, Float32]:
    """Coefficients [V, K] and bias [K] with the least loss on what is not `used` among those after each epoch."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(features.shape[1], clusters, requires_grad=True)
    bias = torch.zeros(clusters, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=_LEARNING_RATE, weight_decay=0.0)
    rows = torch.from_numpy(np.flatnonzero(used))
    labels = torch.from_numpy(target)
    apart, of_apart = features[~used], target[~used]
    best, patience = (np.inf, np.zeros(0, np.float32), np.zeros(0, np.float32)), _PATIENCE
    for epoch in range(_EPOCHS):
        report("learning to route", epoch / _EPOCHS)
        for batch in rows[torch.randperm(len(rows), generator=generator)].split(_BATCH):  # type: ignore[no-untyped-call]
            some = features[batch.numpy()]
            logits = bias + torch.nn.functional.embedding_bag(
                torch.from_numpy(some.indices),
                weight,
                torch.from_numpy(some.indptr[:-1]),
                mode="sum",
                per_sample_weights=torch.from_numpy(some.data),
            )
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        found = weight.detach().numpy().copy(), bias.detach().numpy().copy()
        loss = _loss(apart @ found[0] + found[1], of_apart, 1.0)
        if loss < best[0]:
            best, patience = (loss, *found), _PATIENCE
        else:
            patience -= 1
            if not patience:
                break
    return best[1], best[2]


def _loss(logits: Any, target: npt.NDArray[np.int64], temperature: float) -> float:
    """Mean negative log-probability of the target, in nats; logits [N, K]."""
    from scipy.special import log_softmax

    return -float(log_softmax(logits / temperature, axis=1)[np.arange(len(target)), target].mean())
