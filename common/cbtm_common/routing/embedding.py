"""tf-idf and truncated SVD as one sum over a text's terms, and its value at every prefix of the text.

h(x) = normalise(sum over terms w of tf(count(w)) · idf(w) · V_w): the tf-idf norm cancels in the last normalisation, so
the embedding before normalising is a sum over terms. `projection` [V, d] holds idf(w) · V_w. tf(c) is c, as in c-BTM,
or sublinear, 1 + ln c: then the next occurrence of a word adds tf(c + 1) - tf(c) of its row. One pass over a text so
gives h at every prefix: a running sum over finished words, plus the one word that a prefix may cut.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from cbtm_common.routing.counting import count_words
from cbtm_common.routing.history import History
from cbtm_common.routing.terms import term_of, words

# Words whose row is remembered: frequent ones come early, and memory stays bounded.
_REMEMBERED = 1 << 18
# Texts whose words are counted together.
_COUNTED_AT_ONCE = 256

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]


class _Rows(dict[str, int]):
    """From a word as it is written to its term's row, -1 for none. The first words met are remembered."""

    def __init__(self, row_of_term: dict[str, int]) -> None:
        self._row_of_term = row_of_term

    def __missing__(self, word: str) -> int:
        term = term_of(word)
        row = -1 if term is None else self._row_of_term.get(term, -1)
        if len(self) < _REMEMBERED:
            self[word] = row
        return row


class _WrittenRows(dict[bytes, int]):
    """The same for words in UTF-8, lower-cased."""

    def __init__(self, rows: _Rows) -> None:
        self._rows_of = rows

    def __missing__(self, word: bytes) -> int:
        row = self._rows_of[word.decode("utf-8", "surrogatepass")]
        if len(self) < _REMEMBERED:
            self[word] = row
        return row


@dataclass(frozen=True)
class RunningText:
    """All that the embedding needs to know of a text that grows at its end. Immutable: texts may branch."""

    # Sum over the finished words, [d].
    total: Float64
    # The last word, which what comes next may still lengthen.
    tail: str
    # The finished words: so many of the rows of a history are this text's.
    history: History
    length: int


class TermEmbedding:
    """`terms[i]` has row i of `projection` [V, d], float32. Sums are taken in float64.

    `sublinear`: a term that occurs c times weighs 1 + ln c, not c.
    """

    def __init__(self, terms: Sequence[str], projection: Float32, *, sublinear: bool = False) -> None:
        if projection.shape[0] != len(terms):
            raise ValueError(f"{len(terms)} terms for a projection of {projection.shape[0]} rows")
        self.terms = tuple(terms)
        self.sublinear = sublinear
        # Row by row, as it is looked up.
        self.projection = np.ascontiguousarray(projection)
        self._rows = _Rows({term: row for row, term in enumerate(terms)})
        self._written_rows = _WrittenRows(self._rows)

    @property
    def dimensions(self) -> int:
        return int(self.projection.shape[1])

    @cached_property
    def _wide(self) -> Float64:
        """`projection` as sums are taken; only whole texts, many of them, are worth the memory."""
        return self.projection.astype(np.float64)

    def embed(self, texts: Sequence[str]) -> Float64:
        """[N, d], each row of length 1, or zero for a text without a known term."""
        sums = np.zeros((len(texts), self.dimensions))
        for first in range(0, len(texts), _COUNTED_AT_ONCE):
            counted = count_words(texts[first : first + _COUNTED_AT_ONCE], self._written_rows.__getitem__)
            weights = 1 + np.log(counted.counts) if self.sublinear else counted.counts.astype(np.float64)
            for i, (start, end) in enumerate(pairwise(counted.starts.tolist()), first):
                sums[i] = weights[start:end] @ self._wide.take(counted.numbers[start:end], axis=0)
        return normalise(sums)

    def embed_prefixes(self, text: str, ends: Sequence[int]) -> Float64:
        """[T, d]: row t embeds `text[:ends[t]]`, equal to `embed([text[:ends[t]]])` up to rounding.

        `ends` must not descend. Costs one pass over `text` and at most one word lookup for each end.
        """
        end_of = np.asarray(ends, dtype=np.int64)
        spans = np.array(list(words(text[: int(end_of[-1])] if len(end_of) else "")), dtype=np.int64).reshape(-1, 2)
        rows = [self._row_of_span(text, start, end) for start, end in spans.tolist()]
        vectors = np.zeros((len(spans) + 1, self.dimensions))
        known = {i + 1: row for i, row in enumerate(rows) if row is not None}
        if known:
            vectors[list(known)] = self.projection[list(known.values())]
        places: dict[int, list[int]] = {}
        if self.sublinear:
            for i, found in known.items():
                before = places.setdefault(found, [])
                before.append(i)
                vectors[i] *= self._step(len(before))
        sums = np.cumsum(vectors, axis=0)
        # Words that end at or before each prefix's end are whole; the next one is cut if it has begun.
        whole = np.searchsorted(spans[:, 1], end_of, side="right")
        result = sums[whole]
        for t, (done, end) in enumerate(zip(whole.tolist(), end_of.tolist(), strict=True)):
            if done < len(spans) and spans[done, 0] < end:
                row = self._row_of_span(text, int(spans[done, 0]), end)
                if row is not None:
                    # Of `places` those up to `done` are before this prefix's last word.
                    seen = bisect_right(places[row], done) if row in places else 0
                    result[t] += self._step(seen + 1) * self.projection[row]
        return normalise(result)

    def start(self) -> RunningText:
        """The empty text."""
        return RunningText(np.zeros(self.dimensions), "", History(), 0)

    def advance(self, running: RunningText, text: str) -> RunningText:
        """`running` with `text` after it; costs what `text` costs, however long the text is by now.

        The exception is a second text that goes on from the same `running`: it copies the history.
        """
        joined = running.tail + text
        total, tail, history = running.total, "", running.history
        if self.sublinear:
            history = history.until(running.length)
        for start, end in words(joined):
            if end == len(joined):
                tail = joined[start:]
                continue
            row = self._row_of_span(joined, start, end)
            if row is not None:
                total = total + (self._step(history.add(row)) if self.sublinear else 1.0) * self.projection[row]
        return RunningText(total, tail, history, len(history.rows))

    def embed_running(self, running: Sequence[RunningText]) -> Float64:
        """[N, d]: equal to `embed` of the texts so far, up to rounding."""
        sums = np.zeros((len(running), self.dimensions))
        for i, state in enumerate(running):
            row = self._row_of_span(state.tail, 0, len(state.tail))
            sums[i] = state.total
            if row is not None:
                seen = state.history.until(state.length).counts[row] if self.sublinear else 0
                sums[i] += self._step(seen + 1) * self.projection[row]
        return normalise(sums)

    def _step(self, count: int) -> float:
        """What a term's weight grows by with its occurrence number `count`."""
        return float(np.log(count / (count - 1))) if self.sublinear and count > 1 else 1.0

    def _row_of_span(self, text: str, start: int, end: int) -> int | None:
        row = self._rows[text[start:end]] if end - start >= 2 else -1
        return None if row < 0 else row


def normalise(rows: Float64) -> Float64:
    """Rows divided by their lengths; zero rows stay zero."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Float64 = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 1e-12)
    return unit
