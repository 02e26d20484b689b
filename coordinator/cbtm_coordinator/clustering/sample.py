"""A uniform sample of documents in one pass and bounded memory (reservoir sampling, algorithm R; Vitter 1985)."""

from __future__ import annotations

import random
from collections.abc import Iterable

from cbtm_coordinator.clustering.corpus import Document

# A document counts for the clustering with at most its first characters, so the sample's memory is bounded too.
MAX_CHARACTERS = 8_000


def reservoir(documents: Iterable[Document], *, size: int, seed: int) -> list[str]:
    """Up to `size` texts, each document equally likely; deterministic for a seed."""
    chance = random.Random(seed)
    kept: list[str] = []
    for position, document in enumerate(documents):
        if position < size:
            kept.append(document.text[:MAX_CHARACTERS])
            continue
        place = chance.randrange(position + 1)
        if place < size:
            kept[place] = document.text[:MAX_CHARACTERS]
    return kept
