"""A learned router: a linear classifier of the clusters on the log counts of a context's pieces.

logits(x) = b + Σ_w log(1 + count_w(x)) · W_w, weights = softmax(logits / T). It is trained on prefixes of random
length, labelled with the cluster of their whole document, so it knows how little a short context says; a distance to
centroids does not. Each new piece changes one count, so a context that grows costs O(K) a piece.

Pieces are words in any case, single signs, and single characters of scripts without spaces: like a model's tokens, but
the same whatever model the experts are. A piece depends on the text of its own span alone, as terms do.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cbtm_common.errors import IntegrityError, InvalidArgument
from cbtm_common.routing.centroid import CentroidRouter
from cbtm_common.routing.embedding import Float32, Float64
from cbtm_common.routing.history import History
from cbtm_common.routing.mixture import Distance, keep_top, mixture_weights
from cbtm_common.routing.router import JSON_NAME, TENSORS_NAME, Router, RunningState, load_router, register_router

# Scripts that are written without spaces: Thai, Lao, Khmer, kana, Han, and Hangul for its long words.
_ALONE = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_PIECE = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+|[^\w\s]")
_CENTROID_FOLDER = "centroid"
_NUMBER = "0"


def pieces(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, piece) of each piece of `text`: lower-cased, numbers folded into one."""
    for match in _PIECE.finditer(text):
        start, end = match.span()
        yield start, end, piece_of(match.group())


def piece_of(found: str) -> str:
    return _NUMBER if found[0].isdigit() else found.lower()


def _open(text: str) -> bool:
    """Whether what follows `text` may lengthen its last piece: it is a word of a script with spaces."""
    return bool(text) and re.fullmatch(rf"[^\W{_ALONE}]", text[-1]) is not None


@dataclass(frozen=True)
class LearnedState:
    """A context as the sum over its finished pieces. Extending it costs what the new text costs; to branch from a
    state that has been extended already costs a copy of its history.
    """

    router: LearnedRouter
    history: History
    length: int
    # Of the finished pieces, [K], the bias included.
    total: Float64
    # With the last word, which what comes next may lengthen, [K]; None: no known piece so far.
    logits: Float64 | None
    tail: str

    def extend(self, text: str) -> LearnedState:
        if not text:
            return self
        router, history = self.router, self.history.until(self.length)
        total, joined, tail, last = self.total, self.tail + text, "", None
        found = list(pieces(joined))
        if found and found[-1][1] == len(joined) and _open(joined):
            start, _, last = found.pop()
            tail = joined[start:]
        for _, _, piece in found:
            row = router.row_of(piece)
            if row is not None:
                total = total + _step(history.counts[row]) * router.coefficients[row]
                history.add(row)
        logits = total if history.rows else None
        row = None if last is None else router.row_of(last)
        if row is not None:
            logits = total + _step(history.counts[row]) * router.coefficients[row]
        return LearnedState(router, history, len(history.rows), total, logits, tail)


def _step(count: int) -> float:
    """How much log(1 + count) grows with one more."""
    return float(np.log1p(1 / (1 + count)))


@register_router
class LearnedRouter(Router):
    """A linear classifier beside the `clustering` that it has learned from, and that goes on to shard documents.

    `vocabulary[i]` has row i of `coefficients` [V, K]; `bias` [K]; all float32, summed in float64. `temperature` is
    what calibrates it on texts that it has not learned. A context without a known piece has the clustering's prior.
    """

    kind = "learned"

    def __init__(
        self,
        *,
        clustering: CentroidRouter,
        vocabulary: Sequence[str],
        coefficients: Float32,
        bias: Float32,
        temperature: float = 1.0,
    ) -> None:
        clusters = len(clustering.cluster_ids)
        if coefficients.shape != (len(vocabulary), clusters) or bias.shape != (clusters,):
            raise IntegrityError(
                f"router: {clusters} clusters, {len(vocabulary)} pieces, coefficients {coefficients.shape} and bias "
                f"{bias.shape} do not fit together"
            )
        self.clustering = clustering
        self.vocabulary = tuple(vocabulary)
        self.coefficients = coefficients
        self.bias = bias
        self._temperature = temperature
        self._row = {piece: row for row, piece in enumerate(self.vocabulary)}

    @property
    def cluster_ids(self) -> tuple[str, ...]:
        return self.clustering.cluster_ids

    @property
    def temperature(self) -> float:
        return self._temperature

    def row_of(self, piece: str) -> int | None:
        return self._row.get(piece)

    def assign(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """By the clustering: a whole document needs no guess of what it will be."""
        return self.clustering.assign(texts)

    def begin(self) -> LearnedState:
        return LearnedState(self, History(), 0, self.bias.astype(np.float64), None, "")

    def _read_states(self, states: Sequence[RunningState]) -> Float64:
        """Logits [N, K]; rows of NaN are of contexts without a known piece."""
        logits = np.full((len(states), len(self.bias)), np.nan)
        for i, state in enumerate(states):
            if not isinstance(state, LearnedState):
                raise TypeError("states: they are another router's")
            if state.logits is not None:
                logits[i] = state.logits
        return logits

    def _read_texts(self, texts: Sequence[str]) -> Float64:
        logits = np.full((len(texts), len(self.bias)), np.nan)
        for i, text in enumerate(texts):
            counts = Counter(match.group() for match in _PIECE.finditer(text))
            rows: Counter[int] = Counter()
            for found, count in counts.items():
                row = self.row_of(piece_of(found))
                if row is not None:
                    rows[row] += count
            if rows:
                times = np.log1p(np.fromiter(rows.values(), np.float64, len(rows)))
                logits[i] = self.bias + times @ self.coefficients[list(rows)].astype(np.float64)
        return logits

    def _read_prefixes(self, text: str, ends: Sequence[int]) -> Float64:
        end_of = np.asarray(ends, dtype=np.int64)
        found = list(pieces(text[: int(end_of[-1])] if len(end_of) else ""))
        rows = [self.row_of(piece) for _, _, piece in found]
        # At which pieces each row occurs: how often it did before any of them is a search.
        places: dict[int, list[int]] = {}
        steps = np.zeros((len(found) + 1, len(self.bias)))
        for i, row in enumerate(rows):
            if row is not None:
                steps[i + 1] = _step(len(places.setdefault(row, []))) * self.coefficients[row]
                places[row].append(i)
        sums = np.cumsum(steps, axis=0) + self.bias
        known = np.cumsum([False, *(row is not None for row in rows)])
        whole = np.searchsorted(np.array([end for _, end, _ in found], dtype=np.int64), end_of, side="right")
        logits = np.where(known[whole, None] > 0, sums[whole], np.nan)
        for t, (done, end) in enumerate(zip(whole.tolist(), end_of.tolist(), strict=True)):
            if done < len(found) and found[done][0] < end:
                cut = self.row_of(piece_of(text[found[done][0] : end]))
                if cut is not None:
                    before = bisect_left(places.get(cut, []), done)
                    logits[t] = sums[done] + _step(before) * self.coefficients[cut]
        return logits

    def restrict(self, cluster_ids: Sequence[str]) -> Self:
        """Raises InvalidArgument for a cluster that this router does not know."""
        clustering = self.clustering.restrict(cluster_ids)
        columns = [self.cluster_ids.index(cluster_id) for cluster_id in cluster_ids]
        return type(self)(
            clustering=clustering,
            vocabulary=self.vocabulary,
            coefficients=np.ascontiguousarray(self.coefficients[:, columns]),
            bias=self.bias[columns],
            temperature=self._temperature,
        )

    def _weigh(self, read: Float64, top_k: int | None, temperature: float | None, distance: Distance) -> Float64:
        if distance is not Distance.SQUARED:
            raise InvalidArgument(f"distance: a learned router has none, so not {distance} either", field="distance")
        unknown = np.isnan(read[:, 0])
        result = mixture_weights(
            -np.where(unknown[:, None], 0.0, read), temperature=temperature or self._temperature, top_k=top_k
        )
        if unknown.any():
            result[unknown] = keep_top(self.clustering.prior.astype(np.float64)[None], top_k)
        return result

    def save(self, directory: Path) -> None:
        from safetensors.numpy import save_file

        self.write_about(directory, {"temperature": self._temperature, "vocabulary": list(self.vocabulary)})
        save_file({"coefficients": self.coefficients, "bias": self.bias}, str(directory / TENSORS_NAME))
        self.clustering.save(directory / _CENTROID_FOLDER)

    @classmethod
    def load(cls, directory: Path, about: dict[str, Any]) -> Self:
        from safetensors.numpy import load_file

        clustering = load_router(directory / _CENTROID_FOLDER)
        if not isinstance(clustering, CentroidRouter) or list(clustering.cluster_ids) != about["cluster_ids"]:
            raise IntegrityError(f"{directory}: the clustering in it is not the one that {JSON_NAME} tells of")
        tensors = load_file(str(directory / TENSORS_NAME))
        vocabulary, temperature = about["vocabulary"], float(about["temperature"])
        if not (isinstance(vocabulary, list) and all(isinstance(piece, str) for piece in vocabulary)):
            raise IntegrityError(f"{directory}: vocabulary is not a list of strings")
        if len(set(vocabulary)) != len(vocabulary):
            raise IntegrityError(f"{directory}: a piece appears twice in vocabulary")
        if not 0 < temperature < float("inf"):
            raise IntegrityError(f"{directory}: temperature {temperature} is not above 0")
        for name in ("coefficients", "bias"):
            if tensors[name].dtype != np.float32 or not np.isfinite(tensors[name]).all():
                raise IntegrityError(f"{directory}: {name} is not float32 of finite numbers")
        return cls(
            clustering=clustering,
            vocabulary=vocabulary,
            coefficients=tensors["coefficients"],
            bias=tensors["bias"],
            temperature=temperature,
        )
