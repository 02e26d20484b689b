"""c-BTM's router: weights from the distance of a context's tf-idf embedding to each cluster's centroid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cbtm_common.errors import IntegrityError, InvalidArgument
from cbtm_common.routing.embedding import Float32, Float64, RunningText, TermEmbedding
from cbtm_common.routing.mixture import Distance, keep_top, mixture_weights
from cbtm_common.routing.router import TENSORS_NAME, Router, RunningState, register_router


@dataclass(frozen=True)
class CentroidState:
    """A context as its sum over terms. Extending it costs what the new text costs."""

    embedding: TermEmbedding
    running: RunningText

    def extend(self, text: str) -> Self:
        return type(self)(self.embedding, self.embedding.advance(self.running, text))


@register_router
class CentroidRouter(Router):
    """c-BTM's router: weights from the distance of the context's embedding to each centroid.

    `centroids` [K, d]; `prior` [K] is each cluster's share of the training tokens, and answers for a context with no
    known term (the empty one above all), where distances would only compare the centroids' norms.
    """

    kind = "centroid"

    def __init__(
        self,
        *,
        cluster_ids: Sequence[str],
        embedding: TermEmbedding,
        centroids: Float32,
        prior: Float32,
        temperature: float = 0.1,
    ) -> None:
        if centroids.shape != (len(cluster_ids), embedding.dimensions) or prior.shape != (len(cluster_ids),):
            raise IntegrityError(
                f"router: {len(cluster_ids)} clusters, centroids {centroids.shape}, prior {prior.shape}, "
                f"{embedding.dimensions} dimensions do not fit together"
            )
        self._cluster_ids = tuple(cluster_ids)
        self.embedding = embedding
        self.centroids = centroids
        self.prior = prior
        self._temperature = temperature

    @property
    def cluster_ids(self) -> tuple[str, ...]:
        return self._cluster_ids

    @property
    def temperature(self) -> float:
        return self._temperature

    def _read_texts(self, texts: Sequence[str]) -> Float64:
        return self.embedding.embed(texts)

    def _read_prefixes(self, text: str, ends: Sequence[int]) -> Float64:
        return self.embedding.embed_prefixes(text, ends)

    def begin(self) -> CentroidState:
        return CentroidState(self.embedding, self.embedding.start())

    def _read_states(self, states: Sequence[RunningState]) -> Float64:
        running = [state.running for state in states if isinstance(state, CentroidState)]
        if len(running) != len(states):
            raise TypeError("states: they are another router's")
        return self.embedding.embed_running(running)

    def restrict(self, cluster_ids: Sequence[str]) -> Self:
        """Raises InvalidArgument for a cluster that this router does not know."""
        unknown = sorted(set(cluster_ids) - set(self._cluster_ids))
        if unknown or not cluster_ids:
            raise InvalidArgument(f"cluster_ids: the router knows no cluster {', '.join(unknown) or '(none given)'}")
        rows = [self._cluster_ids.index(cluster_id) for cluster_id in cluster_ids]
        prior = self.prior[rows].astype(np.float64)
        total = prior.sum()
        return type(self)(
            cluster_ids=cluster_ids,
            embedding=self.embedding,
            centroids=self.centroids[rows],
            prior=(prior / total if total > 0 else np.full(len(rows), 1 / len(rows))).astype(np.float32),
            temperature=self._temperature,
        )

    def squared_distances(self, embedded: Float64) -> Float64:
        """‖h - c_j‖² for unit rows h: [N, d] to [N, K]."""
        centroids = self.centroids.astype(np.float64)
        cross = embedded @ centroids.T
        lengths = (embedded**2).sum(axis=1, keepdims=True)
        squared: Float64 = np.maximum(lengths - 2 * cross + (centroids**2).sum(axis=1), 0.0)
        return squared

    def _weigh(self, read: Float64, top_k: int | None, temperature: float | None, distance: Distance) -> Float64:
        result = mixture_weights(
            self.squared_distances(read),
            temperature=temperature or self._temperature,
            top_k=top_k,
            distance=distance,
        )
        unknown = ~read.any(axis=1)
        if unknown.any():
            result[unknown] = keep_top(self.prior.astype(np.float64)[None], top_k)
        return result

    def save(self, directory: Path) -> None:
        from safetensors.numpy import save_file

        self.write_about(
            directory,
            {
                "dimensions": self.embedding.dimensions,
                "temperature": self._temperature,
                "sublinear": self.embedding.sublinear,
                "terms": list(self.embedding.terms),
            },
        )
        save_file(
            {"projection": self.embedding.projection, "centroids": self.centroids, "prior": self.prior},
            str(directory / TENSORS_NAME),
        )

    @classmethod
    def load(cls, directory: Path, about: dict[str, Any]) -> Self:
        from safetensors.numpy import load_file

        tensors = load_file(str(directory / TENSORS_NAME))
        _check_saved(directory, about, tensors)
        return cls(
            cluster_ids=about["cluster_ids"],
            embedding=TermEmbedding(about["terms"], tensors["projection"], sublinear=about.get("sublinear", False)),
            centroids=tensors["centroids"],
            prior=tensors["prior"],
            temperature=float(about["temperature"]),
        )


def _check_saved(directory: Path, about: dict[str, Any], tensors: dict[str, npt.NDArray[Any]]) -> None:
    """What the constructor takes for granted, of files that came from elsewhere. Raises IntegrityError."""
    for name in ("terms", "cluster_ids"):
        listed = about[name]
        if not (isinstance(listed, list) and all(isinstance(item, str) for item in listed)):
            raise IntegrityError(f"{directory}: {name} is not a list of names")
        if len(set(listed)) != len(listed):
            raise IntegrityError(f"{directory}: a name appears twice in {name}")
    if not isinstance(about.get("sublinear", False), bool):
        raise IntegrityError(f"{directory}: sublinear is neither true nor false")
    if not 0 < float(about["temperature"]) < float("inf"):
        raise IntegrityError(f"{directory}: temperature {about['temperature']} is not above 0")
    for name, rank in (("projection", 2), ("centroids", 2), ("prior", 1)):
        tensor = tensors[name]
        if tensor.ndim != rank or tensor.dtype != np.float32 or not np.isfinite(tensor).all():
            raise IntegrityError(f"{directory}: {name} is not {rank}-dimensional float32 of finite numbers")
    if (tensors["prior"] < 0).any() or not tensors["prior"].sum() > 0:
        raise IntegrityError(f"{directory}: prior is not a distribution")
