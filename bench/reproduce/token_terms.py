"""A learned router on token ids instead of pieces of text, to measure which terms route better.

Each id is written as one character of a script whose characters are pieces by themselves, so that the very code of the
learned router reads ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.reproduce.scores import Documents
from cbtm._scored import Float64
from cbtm_common.routing import CentroidRouter, LearnedRouter
from cbtm_coordinator.clustering.learn import learn_router

# Han characters.
_FIRST, _COUNT = 0x4E00, 20_000


def written(ids: Sequence[int]) -> str:
    """One character an id. Raises ValueError for an id that there is no character for."""
    if max(ids, default=0) >= _COUNT:
        raise ValueError(f"ids: there are characters for {_COUNT} ids only")
    return "".join(chr(_FIRST + i) for i in ids)


class _OfTokens(CentroidRouter):
    """The clustering of texts that are given as written ids."""

    @classmethod
    def of(cls, clustering: CentroidRouter, tokenizer: Any) -> _OfTokens:
        made = cls(
            cluster_ids=clustering.cluster_ids,
            embedding=clustering.embedding,
            centroids=clustering.centroids,
            prior=clustering.prior,
        )
        made._tokenizer = tokenizer
        return made

    _tokenizer: Any

    def _read_texts(self, texts: Sequence[str]) -> Float64:
        return super()._read_texts([self._tokenizer.decode([ord(c) - _FIRST for c in text]) for text in texts])


def learn(clustering: CentroidRouter, texts: Sequence[str], tokenizer: Any, *, seed: int) -> LearnedRouter:
    """Trained as a run's learned router is, on the ids of `texts`."""
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return learn_router(_OfTokens.of(clustering, tokenizer), [written(ids) for ids in encoded], seed=seed).router


def weights(router: LearnedRouter, documents: Documents, temperature: float) -> Float64:
    """[tokens, K] of all experts, as `mixing.each_token_weights`."""
    rows = []
    for sequence in documents.sequences:
        text = written(sequence.ids[sequence.first :])
        rows.append(router.prefix_weights(text, range(len(text)), temperature=temperature))
    return np.concatenate(rows)
