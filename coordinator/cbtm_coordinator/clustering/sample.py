"""A uniform sample of documents in one pass and bounded memory (reservoir sampling, algorithm R; Vitter 1985)."""

from __future__ import annotations

import random
from collections.abc import Iterable

from cbtm_coordinator.clustering.corpus import Document

# A document counts for the clustering with at most its first characters.
MAX_CHARACTERS = 8_000
# Over this many characters together, all documents of the sample are cut to half as many.
MAX_TOTAL_CHARACTERS = 150_000_000


def reservoir(
    documents: Iterable[Document], *, size: int, seed: int, max_total: int = MAX_TOTAL_CHARACTERS
) -> list[str]:
    """Up to `size` texts, each document equally likely; deterministic for a seed.

    Holds at most `max_total` characters, whatever `size` is.
    """
    chance = random.Random(seed)
    kept: list[str] = []
    limit, total = MAX_CHARACTERS, 0
    for position, document in enumerate(documents):
        if position < size:
            kept.append("")
            place = position
        else:
            place = chance.randrange(position + 1)
            if place >= size:
                continue
        text = document.text[:limit]
        total += len(text) - len(kept[place])
        kept[place] = text
        while total > max_total and limit > 1:
            limit //= 2
            kept = [text[:limit] for text in kept]
            total = sum(map(len, kept))
    return kept
