"""tf-idf of a sample over the terms of `cbtm_common.routing`: what scikit-learn's TfidfVectorizer computes, faster (a
text's words are counted before they are looked at one by one; pieces of the sample are counted by an engine) and with
a bounded vocabulary. The result does not depend on the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cbtm_common.routing.counting import count_words
from cbtm_common.routing.terms import term_of
from cbtm_coordinator.clustering.engine import ONE_PROCESS, Engine

MAX_TERMS = 65_536
# Beyond this many different terms the rarest so far are forgotten (lossy counting; Manku & Motwani 2002).
_MAX_COUNTED = 2_000_000
# A piece of the sample, counted at once.
_PIECE_TEXTS = 500
_PIECE_CHARACTERS = 2_000_000

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TfIdf:
    """`matrix` [N, V] is sparse (CSR, float32), its rows of length 1; `idf` [V] float64; V terms, sorted."""

    matrix: Any
    idf: npt.NDArray[np.float64]
    terms: tuple[str, ...]


def tfidf(
    texts: Iterable[str],
    *,
    min_documents: int,
    max_terms: int = MAX_TERMS,
    sublinear: bool = False,
    idf_power: float = 1.0,
    engine: Engine = ONE_PROCESS,
    on_texts: Callable[[int], None] = lambda _: None,
) -> TfIdf:
    """Terms that occur in `min_documents` texts or more, at most `max_terms` of them, the most frequent.

    idf(w) = (ln((1 + N) / (1 + df(w))) + 1)^idf_power; tf is the count c, or `sublinear`, 1 + ln c. V may be 0, when no
    text has a usable word. `on_texts` hears of texts done.
    """
    from scipy import sparse

    counted = _count(texts, engine, on_texts)
    numbers = np.fromiter(counted.ids.values(), dtype=np.int64, count=len(counted.ids))
    names = list(counted.ids)
    occurrences = counted.occurrences[numbers]
    able = np.flatnonzero(counted.documents[numbers] >= min_documents)
    if len(able) > max_terms:
        # Of equally frequent ones, those first in the alphabet.
        least = np.partition(occurrences[able], len(able) - max_terms)[len(able) - max_terms]
        more = able[occurrences[able] > least]
        equal = sorted(able[occurrences[able] == least].tolist(), key=lambda i: names[i])
        able = np.concatenate([more, np.array(equal[: max_terms - len(more)], dtype=np.int64)])
    chosen = sorted(able.tolist(), key=lambda i: names[i])
    old = numbers[chosen]
    column = np.full(len(counted.documents), -1, dtype=np.int32)
    column[old] = np.arange(len(chosen), dtype=np.int32)

    parts = []
    for piece in counted.pieces:
        columns = column[piece.numbers]
        kept = columns >= 0
        starts = np.concatenate([[0], np.cumsum(kept)])[piece.starts]
        shape = (len(piece.starts) - 1, len(chosen))
        parts.append(sparse.csr_matrix((piece.counts[kept], columns[kept], starts.astype(np.int32)), shape=shape))
    matrix = sparse.vstack(parts, format="csr") if parts else sparse.csr_matrix((0, len(chosen)), dtype=np.float32)
    rows = matrix.shape[0]
    idf = (np.log((1 + rows) / (1 + counted.documents[old].astype(np.float64))) + 1) ** idf_power
    if sublinear:
        matrix.data = 1 + np.log(matrix.data)
    matrix.data *= idf.astype(np.float32)[matrix.indices]
    lengths = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    matrix.data /= np.repeat(np.maximum(lengths, 1e-12), np.diff(matrix.indptr)).astype(np.float32)
    return TfIdf(matrix=matrix, idf=idf, terms=tuple(names[i] for i in chosen))


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Term counts of some texts: row i is `numbers[starts[i]:starts[i + 1]]`, so often each as `counts` says."""

    numbers: Int32
    counts: npt.NDArray[np.float32]
    starts: Int64


class _Counts:
    """Term counts of all texts. Numbers of forgotten terms stay in the rows and mean nothing."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}
        self.pieces: list[_Piece] = []
        # By number of the term: in how many texts it is, and how often in all.
        self.documents: Int64 = np.zeros(0, dtype=np.int64)
        self.occurrences: Int64 = np.zeros(0, dtype=np.int64)
        self._floor = 1

    def add(self, terms: Sequence[str], piece: _Piece) -> None:
        """A piece whose numbers are places in `terms`."""
        known = self.ids
        numbers = np.empty(len(terms), dtype=np.int32)
        total = len(self.documents)
        for place, term in enumerate(terms):
            number = known.get(term)
            if number is None:
                number = known[term] = total
                total += 1
            numbers[place] = number
        grown = total - len(self.documents)
        self.documents = np.concatenate([self.documents, np.zeros(grown, dtype=np.int64)])
        self.occurrences = np.concatenate([self.occurrences, np.zeros(grown, dtype=np.int64)])
        self.documents[numbers] += np.bincount(piece.numbers, minlength=len(terms))
        self.occurrences[numbers] += np.bincount(piece.numbers, piece.counts, len(terms)).astype(np.int64)
        self.pieces.append(_Piece(numbers=numbers[piece.numbers], counts=piece.counts, starts=piece.starts))
        while len(known) > _MAX_COUNTED:
            self.ids = known = {term: i for term, i in known.items() if self.documents[i] > self._floor}
            self._floor += 1


def _count(texts: Iterable[str], engine: Engine, on_texts: Callable[[int], None]) -> _Counts:
    counts = _Counts()
    for terms, piece in engine.map(_count_piece, _pieces(texts), _itself):
        counts.add(terms, piece)
        on_texts(len(piece.starts) - 1)
    return counts


def _itself(piece: list[str]) -> tuple[list[str]]:
    return (piece,)


def _pieces(texts: Iterable[str]) -> Iterator[list[str]]:
    piece: list[str] = []
    characters = 0
    for text in texts:
        piece.append(text)
        characters += len(text)
        if len(piece) >= _PIECE_TEXTS or characters >= _PIECE_CHARACTERS:
            yield piece
            piece, characters = [], 0
    if piece:
        yield piece


class _Numbers(dict[bytes, int]):
    """From a word in UTF-8 to the number of its term, -1 for none; a word is looked at when first met."""

    def __init__(self) -> None:
        self.terms: dict[str, int] = {}

    def __missing__(self, word: bytes) -> int:
        term = term_of(word.decode("utf-8", "surrogatepass"))
        number = -1 if term is None else self.terms.setdefault(term, len(self.terms))
        self[word] = number
        return number


def _count_piece(texts: Sequence[str]) -> tuple[list[str], _Piece]:
    number_of = _Numbers()
    counted = count_words(texts, number_of.__getitem__)
    return list(number_of.terms), _Piece(
        numbers=counted.numbers.astype(np.int32), counts=counted.counts.astype(np.float32), starts=counted.starts
    )
