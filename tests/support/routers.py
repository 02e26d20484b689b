"""A second kind of router, to show that the seam holds one that has no embedding and no centroids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors.numpy import load_file, save_file

from cbtm_common.errors import InvalidArgument
from cbtm_common.routing import Distance, Router, keep_top, register_router
from cbtm_common.routing.mixture import Float64
from cbtm_common.routing.router import TENSORS_NAME


@dataclass(frozen=True)
class CharacterCounts:
    """How often each character of the router's alphabet came."""

    alphabet: str
    counts: Float64 = field(repr=False)

    def extend(self, text: str) -> Self:
        counts = self.counts.copy()
        for character in text:
            place = self.alphabet.find(character)
            if place >= 0:
                counts[place] += 1
        return type(self)(self.alphabet, counts)


@register_router
class LinearRouter(Router):
    """softmax(log(1 + counts of characters) · W / T), with W [characters, K]."""

    kind = "test-linear"

    def __init__(self, cluster_ids: Sequence[str], alphabet: str, matrix: np.ndarray[Any, Any]) -> None:
        self._cluster_ids = tuple(cluster_ids)
        self.alphabet = alphabet
        self.matrix = matrix

    @classmethod
    def random(cls, cluster_ids: Sequence[str], *, seed: int = 0) -> LinearRouter:
        alphabet = "abcdefghijklmnopqrstuvwxyz"
        matrix = np.random.default_rng(seed).normal(size=(len(alphabet), len(cluster_ids)))
        return cls(cluster_ids, alphabet, matrix.astype(np.float32))

    @property
    def cluster_ids(self) -> tuple[str, ...]:
        return self._cluster_ids

    @property
    def temperature(self) -> float:
        return 1.0

    def begin(self) -> CharacterCounts:
        return CharacterCounts(self.alphabet, np.zeros(len(self.alphabet)))

    def _read_states(self, states: Sequence[Any]) -> Float64:
        return np.log1p(np.array([state.counts for state in states]).reshape(-1, len(self.alphabet)))

    def _weigh(self, read: Float64, top_k: int | None, temperature: float | None, distance: Distance) -> Float64:
        if distance is not Distance.SQUARED:
            raise InvalidArgument("distance: a linear router has none", field="distance")
        logits = read @ self.matrix.astype(np.float64) / (temperature or self.temperature)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return keep_top(weights / weights.sum(axis=1, keepdims=True), top_k)

    def restrict(self, cluster_ids: Sequence[str]) -> LinearRouter:
        columns = [self._cluster_ids.index(cluster_id) for cluster_id in cluster_ids]
        return LinearRouter(cluster_ids, self.alphabet, self.matrix[:, columns])

    def save(self, directory: Path) -> None:
        self.write_about(directory, {"alphabet": self.alphabet})
        save_file({"matrix": np.ascontiguousarray(self.matrix)}, str(directory / TENSORS_NAME))

    @classmethod
    def load(cls, directory: Path, about: dict[str, Any]) -> Self:
        return cls(about["cluster_ids"], about["alphabet"], load_file(str(directory / TENSORS_NAME))["matrix"])
