"""How much text a corpus holds, in one pass and bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cbtm_coordinator.clustering.corpus import Corpus, ReadReport
from cbtm_coordinator.clustering.sample import reservoir

# Of English text with a vocabulary of tens of thousands, about.
_CHARACTERS_PER_TOKEN = 4
_SAMPLE = 2_000


@dataclass(frozen=True, kw_only=True)
class Survey:
    """`size` in bytes on disk. `tokens` come of a sample of documents if `sampled`, else of their characters alone."""

    documents: int
    characters: int
    size: int
    bad_lines: int
    tokens: int
    sampled: bool


def survey(corpus: Corpus, tokenizer: Any | None, *, on_bytes: Callable[[int], None] = lambda _: None) -> Survey:
    """Reads all of `corpus`. Raises InvalidArgument when a file of it cannot be read to the end.

    `tokenizer` is a transformers one, or None: then tokens are a guess.
    """
    report = ReadReport()
    sample = reservoir(corpus.documents(report, on_bytes=on_bytes), size=_SAMPLE, seed=0)
    report.check_whole()
    rate = 1 / _CHARACTERS_PER_TOKEN
    characters = sum(map(len, sample))
    if tokenizer is not None and characters:
        ids = tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]
        rate = sum(map(len, ids)) / characters
    return Survey(
        documents=report.documents,
        characters=report.characters,
        size=corpus.total_bytes,
        bad_lines=report.bad_lines,
        # Each document ends with a token of its own.
        tokens=round(rate * report.characters) + report.documents,
        sampled=tokenizer is not None,
    )
