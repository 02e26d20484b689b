"""tf-idf and truncated SVD as one linear map, and its value at every prefix of a text.

h(x) = normalise(sum over terms w of count(w) · idf(w) · V_w): the tf-idf norm cancels in the last normalisation, so
the embedding before normalising is a sum over terms. `projection` [V, d] holds idf(w) · V_w. One pass over a text
then gives h at every prefix: a running sum over finished words, plus the one word that a prefix may cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cbtm_common.routing.terms import WORD, term_of, words

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RunningText:
    """All that the embedding needs to know of a text that grows at its end. Immutable: texts may branch."""

    # Sum over the finished words, [d].
    total: Float64
    # The last word, which what comes next may still lengthen.
    tail: str


class TermEmbedding:
    """`terms[i]` has row i of `projection` [V, d], float32. Sums are taken in float64."""

    def __init__(self, terms: Sequence[str], projection: Float32) -> None:
        if projection.shape[0] != len(terms):
            raise ValueError(f"{len(terms)} terms for a projection of {projection.shape[0]} rows")
        self.terms = tuple(terms)
        self.projection = projection
        self._row = {term: row for row, term in enumerate(terms)}

    @property
    def dimensions(self) -> int:
        return int(self.projection.shape[1])

    def embed(self, texts: Sequence[str]) -> Float64:
        """[N, d], each row of length 1, or zero for a text without a known term."""
        sums = np.zeros((len(texts), self.dimensions))
        for i, text in enumerate(texts):
            # Words are counted before they are looked at: most of them are repeats.
            counts = [(self._row_of(word), count) for word, count in Counter(WORD.findall(text)).items()]
            known = [(row, count) for row, count in counts if row is not None]
            if known:
                rows, times = zip(*known, strict=True)
                sums[i] = np.array(times, dtype=np.float64) @ self.projection[list(rows)]
        return normalise(sums)

    def embed_prefixes(self, text: str, ends: Sequence[int]) -> Float64:
        """[T, d]: row t embeds `text[:ends[t]]`, equal to `embed([text[:ends[t]]])` up to rounding.

        `ends` must not descend. Costs one pass over `text` and at most one word lookup for each end.
        """
        end_of = np.asarray(ends, dtype=np.int64)
        if len(end_of) and (np.diff(end_of) < 0).any():
            raise ValueError("ends must not descend")
        spans = np.array(list(words(text[: int(end_of[-1])] if len(end_of) else "")), dtype=np.int64).reshape(-1, 2)
        rows = [self._row_of_span(text, start, end) for start, end in spans.tolist()]
        vectors = np.zeros((len(spans) + 1, self.dimensions))
        known = {i + 1: row for i, row in enumerate(rows) if row is not None}
        if known:
            vectors[list(known)] = self.projection[list(known.values())]
        sums = np.cumsum(vectors, axis=0)
        # Words that end at or before each prefix's end are whole; the next one is cut if it has begun.
        whole = np.searchsorted(spans[:, 1], end_of, side="right")
        result = sums[whole]
        for t, (done, end) in enumerate(zip(whole.tolist(), end_of.tolist(), strict=True)):
            if done < len(spans) and spans[done, 0] < end:
                row = self._row_of_span(text, int(spans[done, 0]), end)
                if row is not None:
                    result[t] += self.projection[row]
        return normalise(result)

    def start(self) -> RunningText:
        """The empty text."""
        return RunningText(np.zeros(self.dimensions), "")

    def advance(self, running: RunningText, text: str) -> RunningText:
        """`running` with `text` after it; costs what `text` costs, however long the text is by now."""
        joined = running.tail + text
        total, tail = running.total, ""
        for start, end in words(joined):
            if end == len(joined):
                tail = joined[start:]
                continue
            row = self._row_of_span(joined, start, end)
            if row is not None:
                total = total + self.projection[row]
        return RunningText(total, tail)

    def embed_running(self, running: Sequence[RunningText]) -> Float64:
        """[N, d]: equal to `embed` of the texts so far, up to rounding."""
        sums = np.zeros((len(running), self.dimensions))
        for i, state in enumerate(running):
            row = self._row_of_span(state.tail, 0, len(state.tail))
            sums[i] = state.total if row is None else state.total + self.projection[row]
        return normalise(sums)

    def _row_of(self, word: str) -> int | None:
        term = term_of(word)
        return None if term is None else self._row.get(term)

    def _row_of_span(self, text: str, start: int, end: int) -> int | None:
        return self._row_of(text[start:end]) if end - start >= 2 else None


def normalise(rows: Float64) -> Float64:
    """Rows divided by their lengths; zero rows stay zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Float64 = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 1e-12)
    return unit
